"""Conversations without pictures as training data: `python -m tools.nano.rows web --out runs/web.jsonl`.

What `write_webpage` and `write_artical` are asked for, with the answers, in the `messages` format that
`finetune` reads.
"""

import argparse
import json
import random
from pathlib import Path

from .talk import article, web_page

KINDS = {"web": web_page, "write": article}


def write_rows(path: Path, kind: str, split: str, count: int, seed: int) -> None:
    """Writes `count` rows of `split`, drawn with `seed`."""
    rng = random.Random(f"{seed} {kind} {split}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            instruction, text = KINDS[kind](split, rng)
            turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": turns}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--split", choices=("train", "validation", "held_back"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_rows(arguments.out, arguments.kind, arguments.split, arguments.count, arguments.seed)


if __name__ == "__main__":
    main()
