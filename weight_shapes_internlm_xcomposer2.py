"""The shapes of a checkpoint's tensors by name, whichever way its linears are stored. No torch."""

import re
from collections.abc import Collection


def plain_name(name: str) -> str:
    """A tensor's name where a linear is no child of its own: `wqkv.linear.weight` -> `wqkv.weight`."""
    return re.sub(r"\.linear\.(\w+)$", r".\1", name)


def is_reward(names: Collection[str]) -> bool:
    """Whether tensors of these names are a reward model's: a score head in place of the output head."""
    return "score.weight" in names and "output.weight" not in names


class WeightShapes:
    """Shapes by name, blind to whether a linear is stored plain, wrapped (`.linear`) or quantised."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        plain = {name: s for name, s in shapes.items() if f"{name}.absmax" not in shapes}  # not bitsandbytes'
        self.shapes = {plain_name(name): tuple(shape) for name, shape in plain.items()}

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise ValueError(
                f"this is no InternLM-XComposer2 checkpoint: its {len(self.shapes)} tensors lack {name!r}"
            )
        return self.shapes[name]

    def rows(self, name: str, default: int | None = None) -> int | None:
        return self.shapes[name][0] if name in self.shapes else default

    def count(self, prefix: str) -> int:
        """How many consecutively numbered blocks start with `prefix`."""
        numbers = {name[len(prefix) :].split(".", 1)[0] for name in self.shapes if name.startswith(prefix)}
        return len(numbers)

    def adapters(self) -> dict[str, int]:
        prefix = "model.layers.0.attention.wqkv.lora_"
        found = [name for name in self.shapes if name.startswith(prefix) and name.endswith("_A.weight")]
        return {name[len(prefix) : -len("_A.weight")]: self.shapes[name][0] for name in found}
