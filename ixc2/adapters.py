"""The task adapters of a checkpoint as LoRA directories that vLLM serves."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint_internlm_xcomposer2 import read_tensor
from ..configuration_internlm_xcomposer2 import ADAPTERS_OF_MODE, InternLMXcomposer2TextConfig
from ..modeling_internlm2 import unpack_heads
from .adopt import staging_beside
from .examine import Findings, examine
from .small_files import json_bytes

# What peft and vLLM put before the name of a module.
_PREFIX = "base_model.model."
_LINEARS = ("wqkv", "wo", "w1", "w2", "w3")


def export_adapters(
    source: str | os.PathLike, target: str | os.PathLike, num_attention_heads: int | None = None
) -> dict[str, int]:
    """Write one directory for each inference mode that has adapters, in peft's format.

    The adapters of a mode are added one after the other, so they are one adapter of the sum of their ranks.
    Outputs of `wqkv` are in vLLM's order, all queries, keys and values, so peft can't use them.

    Args:
        source: the directory of a checkpoint.
        target: the new directory.
        num_attention_heads: if `config.json` doesn't say.

    Returns:
        The rank of each mode's adapter.

    Raises:
        FileExistsError: the target exists.
        FileNotFoundError: no directory, no weights, or not all shards.
        ValueError: the checkpoint has no task adapters, or isn't one of the family.
    """
    target = Path(target).absolute()
    if target.exists():
        raise FileExistsError(f"{target} already exists; delete it or choose another target directory")
    findings = examine(source, num_attention_heads)
    ranks = findings.config.text_config.task_adapters
    modes = {mode: names for mode, names in ADAPTERS_OF_MODE.items() if names and set(names) <= ranks.keys()}
    if not modes:
        raise ValueError(f"{source} has no task adapters; InternLM-XComposer2.5-7B has")
    with staging_beside(target) as staging:
        for mode, names in modes.items():
            _write_adapter(findings, names, staging / mode)
        staging.rename(target)
    return {mode: sum(ranks[name] for name in names) for mode, names in modes.items()}


def _write_adapter(findings: Findings, names: Sequence[str], directory: Path) -> None:
    """The sum of these adapters as one."""
    text = findings.config.text_config
    directory.mkdir()
    rank = sum(text.task_adapters[name] for name in names)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,  # a scale of 1
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(_LINEARS),
        "base_model_name_or_path": os.fspath(findings.source),
    }
    (directory / "adapter_config.json").write_bytes(json_bytes(config))
    save_file(dict(_tensors_of(findings, names, text)), directory / "adapter_model.safetensors")


def _tensors_of(
    findings: Findings, names: Sequence[str], text: InternLMXcomposer2TextConfig
) -> Iterator[tuple[str, Tensor]]:
    """Both factors of each linear: those that reduce one below the other, those that expand side by side."""
    ending = f".lora_{names[0]}_A.weight"
    linears = [name.removesuffix(ending) for name in findings.headers if name.endswith(ending)]
    for linear in linears:
        down = torch.cat([read_tensor(findings.headers, f"{linear}.lora_{name}_A.weight") for name in names])
        up = torch.cat(
            [read_tensor(findings.headers, f"{linear}.lora_{name}_B.weight") for name in names], dim=1
        )
        if linear.endswith("wqkv"):
            up = unpack_heads(up, text.num_attention_heads, text.num_key_value_heads)
        yield f"{_PREFIX}{linear}.lora_A.weight", down.contiguous()
        yield f"{_PREFIX}{linear}.lora_B.weight", up.contiguous()
