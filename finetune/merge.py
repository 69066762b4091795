"""Merge a LoRA adapter into its checkpoint: `python -m finetune.merge ADAPTER OUT [--base BASE]`."""

import argparse
import sys
from pathlib import Path

import torch
from internlm_xcomposer2.checkpoint_internlm_xcomposer2 import checkpoint_config
from internlm_xcomposer2.tokenization_internlm_xcomposer2 import tokenizer_class
from transformers import PreTrainedModel

from .arguments import DTYPES
from .card import CARD
from .lora import adapter_fields, load_adapter
from .saving import save_model
from .train import CHAT, Task, model_class
from .train_reward import REWARD


def merge(
    adapter: Path, target: Path, base: str | None = None, dtype: str = "auto", max_shard_size: str = "5GB"
) -> PreTrainedModel:
    """Write a base model and its adapter as one checkpoint, complete and in the published layout.

    The adapter may be one of ours or of the published training. The base is loaded unquantised, whatever the
    adapter was trained on.

    Args:
        adapter: the directory of a LoRA adapter.
        target: a new directory.
        base: the checkpoint that the adapter belongs to; by default the one that it names itself.
        dtype: type of the merged weights, `"auto"` for that of the base.

    Raises:
        FileNotFoundError: there is no adapter, or no base.
        FileExistsError: `target` already exists.
        ValueError: the adapter isn't LoRA or doesn't fit the base.
        ImportError: peft isn't installed.
    """
    if target.exists():
        raise FileExistsError(f"{target} already exists; choose another directory")
    base = base or base_of(adapter)
    kind = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    task = task_of(adapter)
    version = checkpoint_config(base).version
    model = model_class(task, version).from_pretrained(base, dequantize=True, **kind)
    merged = load_adapter(model, adapter).merge_and_unload(safe_merge=True)
    tokenizer = tokenizer_class(version).from_pretrained(base)
    save_model(merged, tokenizer, card_of(adapter, base), target, max_shard_size)
    return merged


def base_of(adapter: Path) -> str:
    """The checkpoint that an adapter says it was trained on.

    Raises:
        FileNotFoundError: it isn't an adapter.
        ValueError: it doesn't say, or its configuration can't be read.
    """
    base = adapter_fields(adapter).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter} doesn't name the checkpoint that it belongs to; pass it with --base")
    return base


def task_of(adapter: Path) -> Task:
    """What an adapter was trained for: a chat model, or a reward model, whose head it contains.

    Raises:
        FileNotFoundError: it isn't an adapter.
    """
    return REWARD if adapter_fields(adapter).get("task_type") == "SEQ_CLS" else CHAT


def card_of(adapter: Path, base: str) -> str:
    """The adapter's card, turned into one for a whole model."""
    path = adapter / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# A LoRA adapter for {base}\n"
    text = text.replace("library_name: peft", "library_name: transformers").replace(", lora]", "]")
    return text.replace("# A LoRA adapter for", "# Merged with a LoRA adapter:", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path, help="directory of the adapter")
    parser.add_argument("out", type=Path, help="new directory for the merged checkpoint")
    parser.add_argument("--base", help="the checkpoint; by default the one that the adapter names")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the merged weights")
    parser.add_argument("--max-shard-size", default="5GB", help="the most bytes of one file")
    arguments = parser.parse_args()
    try:
        merge(
            arguments.adapter,
            arguments.out,
            arguments.base,
            arguments.dtype,
            arguments.max_shard_size,
        )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
