"""Finished models and adapters: complete, in the published layout, and never half-written."""

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internlm_xcomposer2.checkpoint_internlm_xcomposer2 import read_headers
from internlm_xcomposer2.files_internlm_xcomposer2 import read_fields
from internlm_xcomposer2.ixc2.adopt import staging_beside
from internlm_xcomposer2.ixc2.examine import examine
from internlm_xcomposer2.ixc2.small_files import describe_checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .card import CARD
from .trainer import FinetuneTrainer

_ARGUMENTS = "training_args.bin"  # pickled by `Trainer`, and useless with a finished model


@contextmanager
def put_in_place(target: Path) -> Iterator[Path]:
    """A new directory that becomes `target` once everything in it is written.

    Raises:
        FileExistsError: `target` already exists, or another run is writing it.
    """
    if target.exists():
        raise FileExistsError(f"{target} already exists; choose another directory")
    with staging_beside(target) as folder:
        yield folder
        folder.rename(target)


def is_complete(folder: Path) -> bool:
    """Whether a finished model or adapter can be read: the card is written last, and every file is whole."""
    if not (folder / CARD).is_file():
        return False
    try:
        if (folder / "adapter_config.json").is_file():
            read_fields(folder / "adapter_config.json")
            read_headers([folder / "adapter_model.safetensors"])
        else:
            read_fields(folder / "config.json")
            examine(folder)
    except (OSError, ValueError):
        return False
    return True


def move_unfinished(target: Path) -> Path | None:
    """Move a model aside that isn't complete, so that it is neither taken for finished nor lost.

    Returns:
        Where it is now, or `None` if there is nothing, or a complete model, at `target`.
    """
    if not target.is_dir() or is_complete(target):
        return None
    numbers = itertools.count(1)
    names = (target.with_name(f"{target.name}.unfinished-{number}") for number in numbers)
    return target.rename(next(name for name in names if not name.exists()))


def complete(folder: Path, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
    """Add what else a user needs to saved weights: modules, tokenizer, processor, and the model card."""
    (folder / _ARGUMENTS).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    if not (folder / "adapter_config.json").exists():
        files, _ = describe_checkpoint(examine(folder))
        for name, content in files.items():
            (folder / name).write_bytes(content)
    (folder / CARD).write_text(card, encoding="utf-8")


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    target: Path,
    max_shard_size: str = "5GB",
) -> None:
    """Write a complete checkpoint in the published layout.

    Raises:
        FileExistsError: `target` already exists.
    """
    with put_in_place(target) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        complete(folder, tokenizer, card)


def save_trained(
    trainer: FinetuneTrainer, tokenizer: PreTrainedTokenizerBase, card: str, target: Path
) -> None:
    """Write what was trained, the whole model or the adapter; every process calls this.

    Raises:
        FileExistsError: `target` already exists.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    partial = target.with_name(f"{target.name}.partial")
    if trainer.is_world_process_zero() and partial.exists():  # of a run that was killed
        shutil.rmtree(partial)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        complete(partial, tokenizer, card)
        partial.rename(target)  # complete, or not there at all
    trainer.accelerator.wait_for_everyone()
