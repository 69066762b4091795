"""Trains nano from scratch on drawn pictures, on a CPU: the tower alone, the first lessons, all lessons.

    python -m tools.nano.train dense --minutes 12 --out runs/dense
    python -m tools.nano.train joint --minutes 60 --out runs/joint --start runs/dense/last.pt
    python -m tools.nano.train full --minutes 120 --out runs/full --start runs/joint/best.pt
    python -m tools.nano.train export --checkpoint runs/full/best.pt --out .

All stages run in `--processes` processes of one thread each (faster than one process of as many threads)
that average their gradients, stop after `--minutes` of training (the learning rate follows the clock, or
`--steps`), save as they go, and resume from what they saved.
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from .model import export
from .stages import DenseStage, FullStage, JointStage

STAGES = {"dense": DenseStage, "joint": JointStage, "full": FullStage}

MUON = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.02}
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.05}
WARM_UP_STEPS = 50
LOG_EVERY = 50  # steps
SAVE_EVERY = 100
FLOOR = 0.005  # of the learning rate, at the end
CLIP_NORM = 1.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "export"))
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and log, or the model"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the package and its tokenizer")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, help="stop after so many steps instead of by the clock")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=48, help="pictures per process and step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fonts", nargs="*", help="folders of fonts; /usr/share/fonts by default")
    parser.add_argument("--start", type=Path, help="checkpoint of the stage before to start from")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint to export")
    parser.add_argument("--adapters", action="store_true", help="export with task adapters to be trained")
    parser.add_argument("--validate-every", type=int, default=500, help="steps")
    parser.add_argument("--validation", type=int, default=100, help="samples of each ability to choose by")
    parser.add_argument("--muon-lr", type=float, default=MUON["lr"])
    return parser.parse_args()


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class ShardedMuon(torch.optim.Muon):
    """Muon whose costly orthogonalisation of each matrix is done by one of the processes."""

    def __init__(self, matrices: list[nn.Parameter], **options):
        rank, world = rank_and_world()
        self.everyone = sorted(matrices, key=lambda matrix: matrix.numel())
        self.mine = [index % world == rank for index in range(len(self.everyone))]
        super().__init__(
            [matrix for matrix, own in zip(self.everyone, self.mine, strict=True) if own], **options
        )

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        if not dist.is_initialized():
            return
        pairs = list(zip(self.everyone, self.mine, strict=True))
        flat = torch.cat([matrix.flatten() if own else torch.zeros(matrix.numel()) for matrix, own in pairs])
        dist.all_reduce(flat)
        sizes = [matrix.numel() for matrix in self.everyone]
        for matrix, values in zip(self.everyone, flat.split(sizes), strict=True):
            matrix.copy_(values.view_as(matrix))


def make_optimizers(model: nn.Module, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embeddings and heads, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = any(part in name for part in (".layers.", "vision_proj.")) and "Plora" not in name
        (matrices if inner and parameter.ndim == 2 else others).append(parameter)
    decayed = [parameter for parameter in others if parameter.ndim >= 2]
    plain = [parameter for parameter in others if parameter.ndim < 2]
    adamw = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], **ADAMW)
    return [ShardedMuon(matrices, **{**MUON, "lr": muon_lr}), adamw]


def rate(step: int, progress: float) -> float:
    """Share of the full learning rate: a short warm-up, then a cosine down to `FLOOR`."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return cosine * min(1.0, (step + 1) / WARM_UP_STEPS)


def average(model: nn.Module, progress: float) -> float:
    """Averages gradients over all processes, and `progress`, so that all of them agree when to stop."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not dist.is_initialized():
        return progress
    flat = torch.cat([*(parameter.grad.flatten() for parameter in parameters), torch.tensor([progress])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, gradient in zip(parameters, flat[:-1].split(sizes), strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))
    return flat[-1].item()


class Run:
    """One training run: steps, log, checkpoints. `stage` says what a batch is and how it is scored."""

    def __init__(self, arguments: argparse.Namespace, stage: DenseStage | JointStage, rank: int):
        self.arguments, self.stage, self.rank = arguments, stage, rank
        self.optimizers = make_optimizers(stage, arguments.muon_lr)
        self.base_rates = [[group["lr"] for group in one.param_groups] for one in self.optimizers]
        self.step, self.seconds, self.best = 0, 0.0, -1.0
        arguments.out.mkdir(parents=True, exist_ok=True)
        if (arguments.out / "last.pt").exists():
            self.resume()

    def train(self) -> None:
        progress, losses, began = 0.0, [], time.monotonic() - self.seconds
        while progress < 1:
            losses.append(self.stage.backward(self.arguments.batch))
            progress = average(self.stage, self.progress())
            nn.utils.clip_grad_norm_(self.stage.parameters(), CLIP_NORM)
            self.update(progress)
            self.step += 1
            self.seconds = time.monotonic() - began
            if self.rank == 0 and self.step % LOG_EVERY == 0:
                self.log(loss=sum(losses[-LOG_EVERY:]) / LOG_EVERY, **self.stage.losses)
            if self.step % SAVE_EVERY == 0 or progress >= 1:
                self.save("last.pt")
            if self.step % self.arguments.validate_every == 0 or progress >= 1:
                self.validate()
                began = time.monotonic() - self.seconds  # validation does not count

    def progress(self) -> float:
        if self.arguments.steps:
            return (self.step + 1) / self.arguments.steps
        return self.seconds / (60 * self.arguments.minutes)

    def update(self, progress: float) -> None:
        for optimizer, rates in zip(self.optimizers, self.base_rates, strict=True):
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * rate(self.step, progress)
            optimizer.step()
            optimizer.zero_grad()

    def validate(self) -> None:
        if self.rank == 0:
            scores = self.stage.validate()
            self.log(**scores)
            if scores["score"] >= self.best:
                self.best = scores["score"]
                self.save("best.pt")
        if dist.is_initialized():
            dist.barrier()

    def log(self, **values: float) -> None:
        line = {"step": self.step, "minutes": round(self.seconds / 60, 2)}
        line |= {name: round(value, 4) for name, value in values.items()}
        with open(self.arguments.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, name: str) -> None:
        """The model, by the first process; the optimizers of every process beside `last.pt`."""
        if name == "last.pt":
            self.write(
                f"optimizers.{self.rank}.pt", [optimizer.state_dict() for optimizer in self.optimizers]
            )
        if self.rank > 0:
            return
        self.write(name, {"model": self.stage.state_dict(), "counters": (self.step, self.seconds, self.best)})

    def write(self, name: str, state: dict | list) -> None:
        partial = self.arguments.out / (name + ".partial")
        torch.save(state, partial)
        os.replace(partial, self.arguments.out / name)

    def resume(self) -> None:
        state = torch.load(self.arguments.out / "last.pt", weights_only=True)
        self.stage.load_state_dict(state["model"])
        self.step, self.seconds, self.best = state["counters"]
        path = self.arguments.out / f"optimizers.{self.rank}.pt"
        saved = torch.load(path, weights_only=True) if path.exists() else []
        for optimizer, optimizer_state in zip(self.optimizers, saved, strict=False):
            optimizer.load_state_dict(optimizer_state)


def work(rank: int, arguments: argparse.Namespace) -> None:
    """One process of a run."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # they cost a sixth of the time once the model is sure of itself
    if arguments.processes > 1:
        store = f"file://{(arguments.out / 'store').absolute()}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=arguments.processes)
    torch.manual_seed(arguments.seed)  # the same weights in every process
    rng = random.Random(
        f"{arguments.seed} {arguments.stage} {rank} {time.time_ns() if resuming(arguments) else 0}"
    )
    stage = STAGES[arguments.stage](arguments, rng)
    Run(arguments, stage, rank).train()


def resuming(arguments: argparse.Namespace) -> bool:
    return (arguments.out / "last.pt").exists()


def main() -> None:
    arguments = parse_arguments()
    if arguments.stage == "export":
        export(arguments.checkpoint, arguments.root, arguments.out, arguments.adapters)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "store").unlink(missing_ok=True)
    if arguments.processes == 1:
        work(0, arguments)
    else:
        torch.multiprocessing.spawn(work, (arguments,), nprocs=arguments.processes)


if __name__ == "__main__":
    main()
