"""The model card that is written next to a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import transformers

CARD = "README.md"
_CURVES = ("loss", "eval_loss", "accuracy", "eval_accuracy")


@dataclass
class Facts:
    """What a card says about a run."""

    base: str
    is_adapter: bool
    data: dict[str, int]  # file -> number of rows trained on
    eval_data: dict[str, int]
    num_trained: int
    num_weights: int
    settings: dict[str, object]
    history: Sequence[dict] = field(default_factory=list)  # the trainer's log
    seconds: float = 0.0
    pipeline: str = "image-text-to-text"  # the hub's name for what the model does


def card_text(facts: Facts) -> str:
    """The card, in Markdown with a header that the hub reads."""
    kind = "A LoRA adapter for" if facts.is_adapter else "Trained from"
    rows = [f"- `{path}`: {count} rows" for path, count in facts.data.items()]
    rows += [f"- `{path}`: {count} rows, for evaluation" for path, count in facts.eval_data.items()]
    share = 100 * facts.num_trained / max(1, facts.num_weights)
    parts = [
        _header(facts),
        f"# {kind} {facts.base}",
        "## Data\n\n" + "\n".join(rows),
        f"## Training\n\n{facts.num_trained:,} of {facts.num_weights:,} weights ({share:.2f} %) were trained "
        f"in {facts.seconds:.0f} seconds, with torch {torch.__version__} and transformers "
        f"{transformers.__version__}.",
        _table(("setting", "value"), [(name, str(value)) for name, value in facts.settings.items()]),
        _losses(facts.history),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(facts: Facts) -> str:
    lines = [
        "---",
        f"library_name: {'peft' if facts.is_adapter else 'transformers'}",
        f"base_model: {facts.base}",
        f"pipeline_tag: {facts.pipeline}",
        "tags: [internlm-xcomposer2" + (", lora]" if facts.is_adapter else "]"),
        "---",
    ]
    return "\n".join(lines)


def _losses(history: Sequence[dict], most: int = 20) -> str:
    """The loss at up to `most` steps, including the first and the last."""
    by_step: dict[int, dict] = {}
    for entry in history:
        found = {name: entry[name] for name in _CURVES if name in entry}
        if found:
            by_step.setdefault(entry["step"], {}).update(found)
    steps = sorted(by_step)
    if len(steps) > most:
        steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    if not steps:
        return ""
    names = [name for name in _CURVES if any(name in by_step[step] for step in steps)]
    rows = [
        (str(step), *(f"{by_step[step][name]:.4f}" if name in by_step[step] else "" for name in names))
        for step in steps
    ]
    return "## Losses\n\n" + _table(("step", *names), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
