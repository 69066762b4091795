"""A worked example: teach nano the article numbers of a catalogue, which it can't know.

    python -m finetune.example draw --out runs/example
    python -m finetune.example measure --model . --data runs/example/test.jsonl

`draw` writes pictures and conversations for training, evaluation and testing, or with `--pairs` preferences
for short captions over sentences; `measure` asks a checkpoint the questions of a file through `chat` and
counts the answers that are exactly right, or exactly the chosen ones. docs/finetuning.md has the commands in
between.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from tools.nano.pictures import Picture, draw_object, random_thing
from tools.nano.questions import COLOURS, SHAPES, ask
from tools.nano.samples import with_article

QUESTIONS = (
    "What is the article number?",
    "Which article is this?",
    "Name the article number of the object.",
)
# A letter for the colour and a digit for the shape: a blue star is E4.
LETTERS = dict(zip(COLOURS, "ABCDEFGH", strict=True))
DIGITS = dict(zip(SHAPES, "123456", strict=True))
# Training and measuring use different sizes and places: even pixels, and odd ones.
SPLITS = {"train": "train", "eval": "validation", "test": "held_back"}


def draw_row(rng: random.Random, split: str) -> tuple[Picture, str, str]:
    """A picture of one object, a question about it, and the answer."""
    thing = random_thing(rng)
    picture = draw_object(rng, split, thing)
    return picture, rng.choice(QUESTIONS), LETTERS[thing.colour] + DIGITS[thing.shape]


def draw_preference(rng: random.Random, split: str) -> tuple[Picture, str, str, str]:
    """A picture of one object, a request for a caption, a short one, and the sentence that nano writes."""
    thing = random_thing(rng)
    picture = draw_object(rng, split, thing)
    name = with_article(thing)
    return picture, ask("caption", rng), name, f"The picture shows {name}."


def draw(out: Path, counts: dict[str, int], seed: int = 0, pairs: bool = False) -> None:
    """Write `counts[name]` rows to `out/name.jsonl` for each name, with their pictures in `out/name/`.

    Args:
        pairs: whether the rows are preferences.

    Raises:
        FileExistsError: `out` already exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} already exists; choose another directory")
    for name, count in counts.items():
        (out / name).mkdir(parents=True)
        rng = random.Random(f"{seed} {name}")
        rows = [_write_row(out, name, number, rng, pairs) for number in range(count)]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_row(out: Path, name: str, number: int, rng: random.Random, pairs: bool) -> dict:
    """Save a picture -> the row about it, in which its path is relative to `out`."""
    picture, question, *answers = (draw_preference if pairs else draw_row)(rng, SPLITS[name])
    path = f"{name}/{number:04}.png"
    picture.image.save(out / path)
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    if pairs:
        return {"prompt": [asked], "chosen": answers[0], "rejected": answers[1], "images": [path]}
    asked["content"][0]["image"] = path
    return {"messages": [asked, {"role": "assistant", "content": answers[0]}]}


def measure(checkpoint: str, data: Path, limit: int | None = None) -> tuple[int, int, list[str]]:
    """Ask the questions of a file that `draw` wrote.

    Returns:
        How many answers are exactly right, how many rows there are, and the first few wrong answers.
    """
    from transformers import AutoModel, AutoTokenizer  # drawing needs neither transformers nor torch

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
    rows = [json.loads(line) for line in data.read_text().splitlines()][:limit]
    wrong = []
    for row in rows:
        picture, question, expected = _read_row(row)
        path = data.parent / picture
        answer, _ = model.chat(tokenizer, question, path, do_sample=False, max_new_tokens=12)
        if answer != expected:
            wrong.append(f"{path}: {answer} instead of {expected}")
    return len(rows) - len(wrong), len(rows), wrong[:3]


def _read_row(row: dict) -> tuple[str, str, str]:
    """A row that `draw` wrote -> its picture's path, the question and the answer that is wanted."""
    if "chosen" in row:
        return row["images"][0], row["prompt"][0]["content"][1]["text"], row["chosen"]
    asked, expected = row["messages"]
    return asked["content"][0]["image"], asked["content"][1]["text"], expected["content"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m finetune.example", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="pictures and conversations")
    drawing.add_argument("--out", type=Path, required=True, help="a new directory")
    drawing.add_argument("--train", type=int, default=960, help="rows to train on")
    drawing.add_argument("--eval", type=int, default=48, help="rows to evaluate on during training")
    drawing.add_argument("--test", type=int, default=200, help="rows to measure on")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--pairs", action="store_true", help="preferences instead of conversations")
    measuring = commands.add_parser("measure", help="how many answers are right")
    measuring.add_argument("--model", required=True, help="directory of a checkpoint")
    measuring.add_argument("--data", type=Path, required=True, help="a file written by draw")
    measuring.add_argument("--limit", type=int, help="the most rows to use")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    try:
        if arguments.command == "draw":
            draw(
                arguments.out,
                {name: getattr(arguments, name) for name in SPLITS},
                arguments.seed,
                arguments.pairs,
            )
            return
        right, count, wrong = measure(arguments.model, arguments.data, arguments.limit)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for line in wrong:
        print(line)
    print(f"{right} of {count} right ({100 * right / count:.1f} %)")


if __name__ == "__main__":
    main()
