"""Questions about the pictures in this folder, answered by the small checkpoint that lies in this repository.

python examples/demo.py
"""

from pathlib import Path

from transformers import AutoModel, AutoTokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAIR = " Picture 1: <ImageHere>; picture 2: <ImageHere>"
QUESTIONS = [
    (["number.png"], "What number is printed in the picture?"),
    (["word.jpg"], "What word is printed in the picture?"),
    (["star.png"], "What shape is the object?"),
    (["ring.jpg"], "What colour is the object?"),
    (["circles.png"], "How many circles are there?"),
    (["objects.png"], "How many objects are there?"),
    (["star.png", "ring.jpg"], "Which picture shows the ring?" + PAIR),
    (["ring.jpg", "star.png"], "Which picture shows the ring?" + PAIR),
]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()
    for names, question in QUESTIONS:
        paths = [str(HERE / name) for name in names]
        answer, _ = model.chat(tokenizer, question, paths, do_sample=False)
        print(f"{', '.join(names)}\n  {question}\n  -> {answer}")


if __name__ == "__main__":
    main()
