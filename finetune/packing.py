"""Several rows in one sequence without padding, exactly as if each were alone.

Positions restart with each row. From that alone, `create_causal_mask` of transformers and the kernels of
flash attention see where one row ends, as long as there is neither an attention mask nor a cache. Every row
begins with BOS, which is not a label, so no row has to predict the start of the next.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset

from .dataset import ConversationDataset, join_items

# Kinds of rotary positions whose frequencies depend on the longest row of a sequence.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def plan_packs(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Pack rows into sequences of at most `max_length` tokens: as few as best fit, longest first, finds.

    Returns:
        The indices of each sequence's rows.

    Raises:
        ValueError: a row is longer than a sequence.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        length = lengths[index]
        if length > max_length:
            raise ValueError(
                f"row {index} has {length} tokens, but a pack holds {max_length}; raise max_length"
            )
        place = bisect_left(room, (length, -1))
        free, pack = room.pop(place) if place < len(room) else (max_length, len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
        insort(room, (free - length, pack))
    return packs


def check_packing(config, max_length: int) -> None:
    """Raise `ValueError` if a long row would change the positions of the rows packed with it."""
    text = config.get_text_config()
    kind, limit = text.rope_parameters["rope_type"], text.max_position_embeddings
    if kind in LENGTH_DEPENDENT_ROPE and max_length > limit:
        raise ValueError(
            f"packs of {max_length} tokens can't be exact: rotary positions of type {kind!r} change for all "
            f"rows of a sequence once one is longer than {limit}; use max_length={limit}, or don't pack"
        )


class PackedDataset(Dataset):
    """The rows of a dataset in sequences of at most `max_length` tokens.

    Args:
        dataset: rows, whose lengths are counted now.
        config: the model's.
        max_length: tokens of a sequence, by default the limit of the dataset's rows.

    Raises:
        ValueError: there is no limit, a row is longer, or packing would not be exact for this model.
        RowFault: a row is bad.
    """

    def __init__(self, dataset: ConversationDataset, config, max_length: int | None = None) -> None:
        max_length = max_length or dataset.encoder.max_length
        if max_length is None:
            raise ValueError("packing needs max_length, the number of tokens of a sequence")
        check_packing(config, max_length)
        self.dataset = dataset
        self.packs = plan_packs(dataset.lengths, max_length)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Like an item of the dataset, with `position_ids` (tokens,) that restart with each row."""
        return join_items([self.dataset[row] for row in self.packs[index]])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [sum(self.dataset.lengths[row] for row in pack) for pack in self.packs]
