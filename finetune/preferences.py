"""Preference data -> pairs of a chosen and a rejected conversation, and the inputs of reward model training.

Two formats: that of the published training (`{id, conversations_a, conversations_b, image}`, where the first
is chosen) and the current one (`{chosen, rejected}` as messages, `images`, and optionally a `prompt` that
precedes both), in a JSON list or JSON lines. Mixtures (`.txt`) list files with thousands of pairs.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from internlm_xcomposer2.prompt_internlm_xcomposer2 import reward_mark
from torch import Tensor
from torch.utils.data import Dataset

from .dataset import Collator, RowEncoder
from .rows import Row, Turn, read_data, read_entries, read_row

SIDES = ("chosen", "rejected")
PUBLISHED_SIDES = ("conversations_a", "conversations_b")
# Keys of the published rows that say where a pair comes from.
_ORIGIN_KEYS = ("turn", "language", "model_a", "model_b")


@dataclass(frozen=True)
class Pair:
    """Two conversations with the same pictures, of which the first has the better answer."""

    chosen: Row
    rejected: Row

    @property
    def source(self) -> Path:
        """The file that the pair comes from."""
        return self.chosen.source

    @property
    def index(self) -> int:
        """Its position there, from 0."""
        return self.chosen.index


def read_pairs(
    path: str | os.PathLike, media_root: str | os.PathLike | None = None, ignore_keys: Collection[str] = ()
) -> list[Pair]:
    """The pairs of one file. Malformed pairs are included, with the faults of their rows.

    Args:
        media_root: what relative picture paths are relative to, by default the folder of the file.
        ignore_keys: keys of rows to allow and ignore.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file as a whole is not a list of rows.
    """
    path = Path(path)
    root = path.parent if media_root is None else Path(media_root)
    known = (*ignore_keys, *_ORIGIN_KEYS)
    pairs = []
    for index, (line, entry) in enumerate(read_entries(path)):
        sides = [read_row(path, index, line, side, root, known) for side in split_entry(entry)]
        pairs.append(Pair(*(replace(row, side=name) for row, name in zip(sides, SIDES, strict=True))))
    return pairs


def read_both(
    path: str | os.PathLike, media_root: str | os.PathLike | None = None, ignore_keys: Collection[str] = ()
) -> list[Row]:
    """Both conversations of each pair of one file, the chosen one first; otherwise like `read_pairs`."""
    return [getattr(pair, side) for pair in read_pairs(path, media_root, ignore_keys) for side in SIDES]


def split_entry(entry: object) -> tuple[object, object]:
    """An entry of a file -> its chosen and its rejected conversation, as entries for `read_row`.

    Anything that isn't a pair is passed on in a form that `read_row` reports as a fault.
    """
    if not isinstance(entry, Mapping):
        return entry, entry
    for sides, key in ((PUBLISHED_SIDES, "conversations"), (SIDES, "messages")):
        if any(side in entry for side in sides):
            rest = {name: value for name, value in entry.items() if name not in (*sides, "prompt")}
            lead = _messages(entry.get("prompt"), "user") if key == "messages" else []
            return tuple({**rest, key: _joined(lead, entry.get(side), key)} for side in sides)
    fault = ValueError(f"a pair must have {' and '.join(SIDES)}, or {' and '.join(PUBLISHED_SIDES)}")
    return fault, fault


def _joined(lead: list, side: object, key: str) -> object:
    """The conversation of one side, after what both have in common."""
    if key != "messages" or side is None:
        return side
    return [*lead, *_messages(side, "assistant")] if isinstance(side, list | str) else side


def _messages(value: object, role: str) -> list:
    """Messages, or a text as the only message."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return list(value) if isinstance(value, list) else []


class PairEncoder(RowEncoder):
    """A `RowEncoder` of conversations as the reward model's `get_scores` writes them.

    Args:
        processor, max_length, layout, hd_num: as in `RowEncoder`. Nothing is cut, because the score is read
            at the end.
    """

    def __init__(
        self, processor, max_length: int | None = None, layout: str = "inference", hd_num: int | None = None
    ) -> None:
        # Older versions have no second way to cut pictures, and `chat`'s system text must not be added.
        super().__init__(processor, max_length, layout if processor.version == "2.5" else "training", hd_num)
        self.mark = reward_mark(processor.tokenizer)

    def prompt(self, row: Row) -> str:
        """The whole conversation, its texts stripped, with the piece at which the score is read."""
        turns = tuple(Turn(turn.role, turn.text.strip()) for turn in row.turns)
        return super().prompt(replace(row, turns=turns)) + self.mark


class PairDataset(Dataset):
    """Pairs as items of two encoded rows, read when they are requested. Works in worker processes.

    Args:
        pairs: as `read_pairs` returns them.
        processor, max_length, layout, hd_num: as in `PairEncoder`.
        too_long: `"error"` is the only choice.

    Raises:
        ValueError: there are no pairs, or an argument is invalid.
    """

    encoder_class: type[RowEncoder] = PairEncoder

    def __init__(
        self,
        pairs: Sequence[Pair],
        processor,
        max_length: int | None = None,
        layout: str = "inference",
        hd_num: int | None = None,
        too_long: str = "error",
    ) -> None:
        if not pairs:
            raise ValueError("there are no pairs to train on")
        if too_long != "error":
            raise ValueError(f"too_long={too_long!r}: the end of a pair's conversations can't be cut off")
        self.rows = list(pairs)
        self.encoder = self.encoder_class(processor, max_length, layout, hd_num)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, dict[str, Tensor]]:
        """`chosen` and `rejected`, each as `RowEncoder.encode` returns it.

        Raises:
            RowFault: a row is bad; the message names its file, its number and everything wrong with it.
        """
        return {side: self.encoder.encode(getattr(self.rows[index], side)) for side in SIDES}

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of the longer conversation of each pair, counted without decoding pictures.

        Raises:
            RowFault: at the first bad row.
        """
        known: dict[tuple, int] = {}  # pairs of a mixture repeat
        for pair in self.rows:
            if (pair.source, pair.index) not in known:
                plans = [self.encoder.plan(getattr(pair, side), decode=False) for side in SIDES]
                known[pair.source, pair.index] = max(len(plan.ids) for plan in plans)
        return [known[pair.source, pair.index] for pair in self.rows]


class PairCollator(Collator):
    """Pairs -> a batch of twice as many rows, alternately chosen and rejected, padded right."""

    keeps_labels = False

    def __call__(self, items: Sequence[dict[str, dict[str, Tensor]]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (2 x pairs, tokens), and the pictures of any row as in `Collator`."""
        batch = super().__call__([item[side] for item in items for side in SIDES])
        if not self.keeps_labels:
            del batch["labels"]
        return batch


read_preferences = partial(read_data, read=read_pairs)
