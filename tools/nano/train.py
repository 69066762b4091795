"""Trains nano from scratch on drawn pictures, on a CPU: the tower alone, then the whole model.

    torchrun --nproc-per-node 2 -m tools.nano.train --stage dense --output_dir runs/dense --max_steps 1150 \\
        --per_device_train_batch_size 64
    torchrun --nproc-per-node 2 -m tools.nano.train --stage joint --output_dir runs/joint --max_steps 7500 \\
        --stage_before runs/dense/best --muon_lr 0.015 --tower_lr_scale 0.2
    python -m tools.nano.export --checkpoint runs/joint/best --out .

Two processes with one thread each are faster than one with two. The flags of transformers'
`TrainingArguments` are accepted, but the optimizers are always these; `--resume_from_checkpoint` names the
checkpoint of a run that was stopped.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import HfArgumentParser, Trainer, TrainingArguments

from .stages import DenseStage, JointStage, StageArguments

STAGES = {"dense": DenseStage, "joint": JointStage}
BEST = "best"  # folder, in the output directory, of the weights that did best on the validation samples

MUON = {"momentum": 0.95, "weight_decay": 0.02}
ADAMW = {"betas": (0.9, 0.98), "weight_decay": 0.05}
TOWER_PARTS = ("tower.", "model.vit.", "head.")  # beginnings of the names of everything that sees
DEFAULTS = {
    "max_steps": 1000,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,  # of AdamW
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.005},
    "warmup_steps": 50,
    "max_grad_norm": 1.0,
    "logging_steps": 50,
    "eval_strategy": "steps",
    "eval_steps": 250,
    "save_steps": 250,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "train_sampling_strategy": "sequential",  # lessons change over time
    "seed": 0,
    "use_cpu": True,
    "report_to": "none",
    "remove_unused_columns": False,
}


class Drawn(Dataset):
    """`count` samples, each drawn on request from nothing but its number, so that a run can resume."""

    def __init__(self, draw: Callable, rng: random.Random, count: int, seed: int):
        self.draw, self.rng, self.count, self.seed = draw, rng, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        self.rng.seed(f"{self.seed} {index}")
        return self.draw(index / self.count)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices between embeddings and heads, AdamW for everything else, as one optimizer."""

    def __init__(self, model: nn.Module, muon_lr: float, learning_rate: float, tower_scale: float = 1.0):
        """`tower_scale`: learning rates of the tower and its dense head, as a share of the others'."""
        groups: dict[tuple[str, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            inner = any(part in name for part in (".layers.", "vision_proj.")) and "Plora" not in name
            kind = "plain" if parameter.ndim < 2 else "matrix" if inner and parameter.ndim == 2 else "other"
            scale = tower_scale if name.startswith(TOWER_PARTS) else 1.0
            groups.setdefault((kind, scale), []).append(parameter)
        matrices = [
            {"params": each, "lr": muon_lr * scale}
            for (kind, scale), each in groups.items()
            if kind == "matrix"
        ]
        others = [
            {
                "params": each,
                "lr": learning_rate * scale,
                "weight_decay": ADAMW["weight_decay"] if kind == "other" else 0.0,
            }
            for (kind, scale), each in groups.items()
            if kind != "matrix"
        ]
        self.parts = (
            torch.optim.Muon(matrices, lr=muon_lr, **MUON),
            torch.optim.AdamW(others, lr=learning_rate, **ADAMW),
        )
        super().__init__(self._groups(), {})
        self.param_groups = self._groups()

    def _groups(self) -> list[dict]:
        """The groups of both: setting a learning rate in them sets it where it is used."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable | None = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()


class StageTrainer(Trainer):
    """transformers' `Trainer` for a stage, which accumulates its own gradients in parts that fit a cache."""

    def __init__(self, stage: DenseStage | JointStage, arguments: StageArguments, args: TrainingArguments):
        self.stage, self.arguments = stage, arguments
        count = args.max_steps * args.per_device_train_batch_size * args.world_size
        drawn = Drawn(stage.draw, stage.rng, count, args.seed)
        super().__init__(stage, args, data_collator=list, train_dataset=drawn, eval_dataset=stage.unseen)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        arguments = self.arguments
        self.optimizer = MuonAdamW(
            self.stage, arguments.muon_lr, self.args.learning_rate, arguments.tower_lr_scale
        )
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: list, *args, **kwargs) -> Tensor:
        loss = self.stage.backward(inputs)
        average_gradients(self.stage)
        return torch.tensor(loss)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """The stage's scores, computed by the first process."""
        scores = [self.stage.validate() if self.is_world_process_zero() else None]
        metrics = {f"eval_{name}": score for name, score in broadcast_object_list(scores)[0].items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the losses of each ability to the loss of all answers."""
        if "loss" in logs:
            logs = {**logs, **{name: round(loss, 4) for name, loss in self.stage.losses.items()}}
        super().log(logs, *args, **kwargs)


def average_gradients(model: nn.Module) -> None:
    """Averages gradients over all processes; a weight that a process didn't use has none there."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not dist.is_initialized():
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, gradient in zip(
        parameters, flat.split([each.numel() for each in parameters]), strict=True
    ):
        parameter.grad.copy_(gradient.view_as(parameter))


def train(arguments: StageArguments, training: TrainingArguments) -> StageTrainer:
    """Trains one stage; its best weights are then in the folder `best` of the output directory.

    Raises:
        ValueError: gradients would be accumulated over several batches.
    """
    if training.gradient_accumulation_steps > 1:
        steps = training.gradient_accumulation_steps
        raise ValueError(
            f"--gradient_accumulation_steps {steps}: a batch is split into parts anyway; use "
            f"--per_device_train_batch_size {training.per_device_train_batch_size * steps} instead"
        )
    torch.set_flush_denormal(True)  # denormals cost a sixth of the time once the model is confident
    torch.manual_seed(training.seed)  # the same weights in every process
    rng = random.Random(f"{training.seed} {arguments.stage}")
    trainer = StageTrainer(STAGES[arguments.stage](arguments, rng), arguments, training)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(str(Path(training.output_dir) / BEST))
    trainer.save_state()  # with the log
    return trainer


def main() -> None:
    parser = HfArgumentParser((StageArguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    train(*parser.parse_args_into_dataclasses())


if __name__ == "__main__":
    main()
