"""Train on preferences without a reward model (DPO, arXiv:2305.18290): `python -m finetune.train_dpo --help`.

The flags are those of `finetune.train`, the data those of `finetune.train_reward`. The loss of a pair is
-log sigmoid(beta * (log likelihood ratio of the chosen answer - the same of the rejected one)). A ratio
compares the model with itself without the adapter that trains. `--train lora` trains new low-rank weights,
`--train adapter --infer_mode write` the published adapter `lora_dpo` on top of `lora_sft`, as its authors
did.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from internlm_xcomposer2.inputs_internlm_xcomposer2 import IGNORED
from torch import Tensor, nn

from .dataset import RowEncoder
from .preferences import PairCollator, PairDataset, read_preferences
from .rows import Row
from .train import Task, run_command
from .train_reward import RewardTrainer

# The task adapters that train in a mode; the others of the mode belong to what the model is compared with.
TRAINED = {"write": ("dpo",)}


class DpoEncoder(RowEncoder):
    """A `RowEncoder` whose labels end with the mark of the last turn: `chat` generates nothing after it."""

    def _encode(self, row: Row, lengths: Sequence[int]) -> tuple[list[int], list[int], list[bool]]:
        ids, labels, is_image = super()._encode(row, lengths)
        num_after = ids[::-1].index(self.end)
        return ids, [*labels[: len(ids) - num_after], *[IGNORED] * num_after], is_image


class DpoDataset(PairDataset):
    """Pairs whose conversations are laid out as in `finetune.train`, with labels on the answers."""

    encoder_class = DpoEncoder


class DpoCollator(PairCollator):
    """Like the base class, with `labels` (2 x pairs, tokens), -100 outside of answers."""

    keeps_labels = True


class DpoTrainer(RewardTrainer):
    """Trains an adapter on batches of `DpoCollator`; the scores of a pair are its implicit rewards."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for module in self.model.modules():  # both passes must differ in the adapter alone
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def scores(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """(2 x pairs, 1): beta times the log of how much likelier the adapter makes the answers."""
        inputs = {**inputs, "infer_mode": self.infer_mode, "use_cache": False}
        labels = inputs.pop("labels")
        with torch.no_grad(), without_adapter(model, self.infer_mode):
            before = log_likelihoods(model(**inputs).logits, labels)
        after = log_likelihoods(model(**inputs).logits, labels)
        return (self.args.dpo_beta * (after - before))[:, None]


@contextmanager
def without_adapter(model: nn.Module, infer_mode: str) -> Iterator[None]:
    """The model as it was before: without peft's adapter, or without the task adapters that train."""
    base = getattr(model, "module", model)
    if hasattr(base, "disable_adapter"):
        with base.disable_adapter():
            yield
        return
    names = tuple(f"lora_{name}_A" for name in TRAINED[infer_mode])
    downs = [module for name, module in base.named_modules() if name.endswith(names)]
    handles = [
        down.register_forward_hook(lambda module, inputs, low: torch.zeros_like(low)) for down in downs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """The log likelihood of each row's labelled tokens, in float32: (rows,).

    Args:
        logits: (rows, tokens, vocabulary).
        labels: (rows, tokens), -100 where a token doesn't count.
    """
    targets = labels[:, 1:]
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    return -losses.sum(dim=1)


DPO = Task(
    trainer=DpoTrainer,
    read_data=read_preferences,
    dataset=DpoDataset,
    collator=DpoCollator,
    ways=("lora", "adapter"),
    adapters=TRAINED,
    packs=False,
)


if __name__ == "__main__":
    run_command(DPO)
