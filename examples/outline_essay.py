"""Write an essay in two steps: an outline of the topic, then the essay that follows it.

python examples/outline_essay.py "以“桥”为题写一篇文章。" --model internlm/internlm-xcomposer2d5-7b

The prompts are those of the published demo for exam essays. Nano, the default, knows neither: it only shows
that the recipe runs.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

OUTLINE = "请列出下面的作文题目对应的写作大纲。\n**题目：**\n{question}"
ESSAY = (
    "根据下面的题目和写作大纲进行写作。\n**题目**\n{question}\n\n**大纲：**\n{outline}\n\n**正文写作：**\n"
)
SAMPLING = {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.005, "max_new_tokens": 8192}


def outline_of(model, tokenizer, question: str, **settings) -> Iterator[str]:
    """The outline, piece by piece."""
    query = OUTLINE.format(question=question)
    return model.chat_stream(tokenizer, query, **{**SAMPLING, "top_p": 0.8, **settings})


def essay_of(model, tokenizer, question: str, outline: str, **settings) -> Iterator[str]:
    """The essay for an outline, which may have been changed by hand, piece by piece."""
    query = ESSAY.format(question=question, outline=outline)
    return model.chat_stream(tokenizer, query, **{**SAMPLING, "top_p": 1.0, **settings})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("question", help="the topic of the essay")
    parser.add_argument("--model", default=str(Path(__file__).resolve().parents[1]), help="folder or hub id")
    parser.add_argument("--max-new-tokens", type=int, default=SAMPLING["max_new_tokens"])
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, dtype="auto").eval()
    length, outline = {"max_new_tokens": arguments.max_new_tokens}, ""
    for piece in outline_of(model, tokenizer, arguments.question, **length):
        outline += piece
        print(piece, end="", flush=True)
    print("\n")
    for piece in essay_of(model, tokenizer, arguments.question, outline, **length):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
