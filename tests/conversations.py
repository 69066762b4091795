"""Rows of training data in every form, for the tests; importing this makes `finetune` importable."""

import json
import sys
from itertools import cycle
from pathlib import Path

from helpers import ROOT

sys.path.insert(0, str(ROOT))

from finetune.rows import Row, Turn  # noqa: E402

VIDEO = ROOT / "examples" / "circle.mp4"


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, entries: list) -> Path:
    path.write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries), encoding="utf-8")
    return path


def published_row(question="<ImageHere>What?", answer="A cat", image="wide.png", **more) -> dict:
    """One row in the published form."""
    turns = [{"from": "human", "value": question}, {"from": "bot", "value": answer}]
    return {"id": "0", "conversations": turns, **({} if image is None else {"image": image}), **more}


def message_row(content="What?", answer="A cat", **more) -> dict:
    """One row as messages."""
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def row_of(*texts: str, media=(), system: str | None = None) -> Row:
    """A row of alternating questions and answers."""
    turns = [Turn(role, text) for role, text in zip(cycle(("user", "assistant")), texts, strict=False)]
    head = [] if system is None else [Turn("system", system)]
    return Row(Path("data.json"), 0, (*head, *turns), tuple(map(str, media)))
