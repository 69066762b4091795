"""transformers' `Trainer`, adapted to this model's checkpoints, batches and parts."""

import re

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from .arguments import TrainArguments
from .freezing import count_trained, part_of

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


class FinetuneTrainer(Trainer):
    """A `Trainer` that trains in one inference mode, with lengths counted beforehand.

    Args:
        infer_mode: `"base"`, `"write"` or `"web"`, for every batch.
        kwargs: those of `Trainer`.

    Attributes:
        num_trained, num_weights: how many numbers train, and how many there are.
    """

    args: TrainArguments

    def __init__(self, *, infer_mode: str = "base", **kwargs) -> None:
        use_cache = kwargs["model"].config.use_cache
        self.num_trained, self.num_weights = count_trained(kwargs["model"])
        super().__init__(**kwargs)
        self.model.config.use_cache = use_cache  # `Trainer` turns it off, in checkpoints too
        self.infer_mode = infer_mode

    def compute_loss(self, model: nn.Module, inputs: dict, *args, **kwargs):
        """Like the base class, in `infer_mode`."""
        return super().compute_loss(model, {**inputs, "infer_mode": self.infer_mode}, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> Tensor:
        """Like the base class.

        Raises:
            RuntimeError: the device is out of memory; says what needs less.
        """
        shape = tuple(inputs["input_ids"].shape)
        num_tiles = len(inputs["pixel_values"]) if inputs.get("pixel_values") is not None else 0
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if self.args.auto_find_batch_size or not _OUT_OF_MEMORY.search(str(error)):
                raise
            raise RuntimeError(memory_advice(shape, num_tiles, self.args)) from error

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Like the base class, with a separate learning rate for the tower."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self.args.vit_learning_rate is not None:
            model = args[0] if args else kwargs.get("model") or self.model
            tower = {id(w) for name, w in model.named_parameters() if part_of(name) == "tower"}
            split_groups(optimizer, tower, self.args.vit_learning_rate)
        return optimizer

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and hasattr(dataset, "lengths"):
            size = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGroupedSampler(size, dataset=dataset, lengths=dataset.lengths)
        return super()._get_train_sampler(train_dataset)


def split_groups(optimizer: torch.optim.Optimizer, chosen: set[int], learning_rate: float) -> None:
    """Move the weights with these ids to separate groups with this learning rate."""
    for group in list(optimizer.param_groups):
        picked = [weight for weight in group["params"] if id(weight) in chosen]
        if not picked:
            continue
        group["params"] = [weight for weight in group["params"] if id(weight) not in chosen]
        optimizer.add_param_group({**group, "params": picked, "lr": learning_rate})


def memory_advice(shape: tuple[int, ...], num_tiles: int, args: TrainArguments) -> str:
    """What to change when a batch doesn't fit in the memory of a device, the cheapest first."""
    size = args.per_device_train_batch_size
    steps = []
    if size > 1:
        steps.append(
            f"--per_device_train_batch_size 1 with --gradient_accumulation_steps "
            f"{size * args.gradient_accumulation_steps} (now {size} and {args.gradient_accumulation_steps})"
        )
    if not args.gradient_checkpointing:
        steps.append("--gradient_checkpointing True")
    if not (args.bf16 or args.fp16):
        steps.append("--bf16 True")
    steps.append(f"a smaller --max_length (this batch is {shape[0]} x {shape[1]} tokens)")
    if num_tiles:
        steps.append(f"a smaller --hd_num (this batch has {num_tiles} tiles)")
    steps.append("--train lora, with --quantize nf4 for the least memory")
    steps.append("several devices with finetune/configs/fsdp2.yaml")
    return "out of memory in a training step; in this order, try " + "; ".join(steps)
