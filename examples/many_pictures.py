"""A long dialogue over many pictures, in the manner of MMDU, and what the history saves.

python examples/many_pictures.py                             # nano and the pictures in this folder
python examples/many_pictures.py dialogue.json --model CHECKPOINT

The file is a list of {"question": ..., "pictures": [...]}. Each turn passes all pictures so far and the
model's own answers. The table compares how many positions the decoder computes with what naive turns would
cost.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from internlm_xcomposer2.prompt_internlm_xcomposer2 import mark_pictures
from torch import nn
from transformers import AutoModel, AutoTokenizer

HERE = Path(__file__).resolve().parent
DIALOGUE = (
    ("What shape is the object?", ("star.png",)),
    ("What colour is it?", ()),
    ("Which picture shows the ring?", ("ring.jpg",)),
    ("Which picture shows the star?", ()),
    ("Which picture has the most objects?", ("circles.png",)),
    ("What number is printed in the picture?", ("number.png",)),
)


@dataclass(frozen=True)
class Turn:
    """An answer, the positions that the decoder computed for it, and the seconds that it took."""

    question: str
    answer: str
    num_pictures: int
    positions: int
    seconds: float


@contextmanager
def counted(decoder: nn.Module) -> Iterator[list[int]]:
    """A list whose only number grows by the positions that a decoder computes."""
    total = [0]

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states = kwargs.get("inputs_embeds")
        total[0] += (kwargs["input_ids"] if states is None else states).shape[1]

    hook = decoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield total
    finally:
        hook.remove()


def converse(
    model, tokenizer, dialogue: Sequence[tuple[str, Sequence]], reuse: bool = True, **settings
) -> list[Turn]:
    """Hold a dialogue of (question, new pictures).

    Args:
        reuse: whether turns start from what the history has computed.
        settings: as in `chat`; greedy by default.
    """
    settings = {"do_sample": False, **settings}
    counts = [len(new) for _, new in dialogue]
    queries = mark_pictures([question for question, _ in dialogue], counts, version=model.config.version)
    history, pictures, turns = (), [], []
    for query, (question, new) in zip(queries, dialogue, strict=True):
        pictures += new
        started = time.perf_counter()
        with counted(model.model) as total:
            answer, history = model.chat(
                tokenizer, query, list(pictures), history=history, reuse=reuse, **settings
            )
        turns.append(Turn(question, answer, len(pictures), total[0], time.perf_counter() - started))
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dialogue", nargs="?", type=Path)
    parser.add_argument("--model", default=str(HERE.parent), help="folder or hub id")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args()
    dialogue, folder = DIALOGUE, HERE
    if arguments.dialogue is not None:
        rows = json.loads(arguments.dialogue.read_text(encoding="utf-8"))
        dialogue, folder = [(row["question"], row["pictures"]) for row in rows], arguments.dialogue.parent
    dialogue = [(question, [str(folder / name) for name in names]) for question, names in dialogue]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, dtype="auto").eval()
    length = {"max_new_tokens": arguments.max_new_tokens}
    naive = converse(model, tokenizer, dialogue, reuse=False, **length)
    turns = converse(model, tokenizer, dialogue, **length)
    print("turn  pictures  positions      naive  seconds    naive  answer")
    for number, (turn, other) in enumerate(zip(turns, naive, strict=True), 1):
        print(
            f"{number:4}  {turn.num_pictures:8}  {turn.positions:9}  {other.positions:9}  {turn.seconds:7.2f}"
            f"  {other.seconds:7.2f}  {turn.answer}"
        )
    saved = sum(turn.positions for turn in naive) / sum(turn.positions for turn in turns)
    print(f"the naive way computes {saved:.1f} times as many positions")


if __name__ == "__main__":
    main()
