"""Questions about the pictures in this folder, answered by the small checkpoint in this repository.

python examples/demo.py
"""

from pathlib import Path

from transformers import AutoModel, AutoTokenizer

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAIR = " Picture 1: <ImageHere>; picture 2: <ImageHere>"
QUESTIONS = [  # pictures, a question about them, and how many tiles each may be cut into
    (["number.png"], "What number is printed in the picture?", 1),
    (["word.jpg"], "What word is printed in the picture?", 1),
    (["receipt.png"], "What is the total?", 1),
    (["small.png"], "What word is printed in the picture?", 9),
    (["star.png"], "What shape is the object?", 1),
    (["ring.jpg"], "What colour is the object?", 1),
    (["circles.png"], "How many circles are there?", 1),
    (["objects.png"], "How many objects are there?", 1),
    (["star.png", "ring.jpg"], "Which picture shows the ring?" + PAIR, 1),
    (["circles.png", "objects.png"], "Which picture has the most objects?" + PAIR, 1),
    (["circle.mp4"], "Which way does the object move?", 1),
]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModel.from_pretrained(ROOT, trust_remote_code=True).eval()
    for names, question, hd_num in QUESTIONS:
        paths = [str(HERE / name) for name in names]
        answer, _ = model.chat(tokenizer, question, paths, hd_num, do_sample=False)
        print(f"{', '.join(names)}\n  {question}\n  -> {answer}")


if __name__ == "__main__":
    main()
