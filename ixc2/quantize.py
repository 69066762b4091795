"""A checkpoint whose decoder has weights of 4 or 8 bits, in GPTQ's layout, written a part at a time."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import logging

from ..checkpoint_internlm_xcomposer2 import TensorHeader, load_torch_file, read_tensor
from ..configuration_internlm_xcomposer2 import our_name
from ..modeling_internlm_xcomposer import fold
from ..packing_internlm_xcomposer2 import FILE_TENSORS, WORD, pack_words
from .adopt import check_loadable, staging_beside
from .convert import INDEX, Piece, plan_pieces
from .examine import LINEAR, Findings, examine
from .small_files import describe_checkpoint, json_bytes

BITS = (4, 8)
GROUP_SIZE = 128  # inputs that share a scale, in 4 bits; in 8 bits an output has one scale
METHODS = ("hqq", "round")
MAX_SHARD_SIZE = "2GB"
_GROUP_SIZES = (128, 64, 32, 16, 8)
_SCALE_TYPE = torch.float16
_SMALLEST_SCALE = 1e-6  # that is not zero in half precision


@dataclass(frozen=True)
class Settings:
    """How weights are quantised.

    Attributes:
        bits: 4 or 8.
        group_size: inputs that share a scale, -1 for all.
        method: `"round"` divides by the largest value of a group; `"hqq"` improves the scales so that the
            weights change less (Half-Quadratic Quantization, by torchao).
    """

    bits: int
    group_size: int
    method: str

    @property
    def fields(self) -> dict:
        """The `quantization_config` of `config.json`."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
        }


def quantize(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    bits: int = 4,
    group_size: int | None = None,
    method: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    num_attention_heads: int | None = None,
) -> tuple[str, ...]:
    """Write a checkpoint with the plain linears of the decoder in a few bits, and everything else as it was.

    Low-rank weights of the first generation act on all tokens, so they are folded in before. The new
    directory is complete: it loads with and without this package. At most one of its files is held in
    memory. It appears when it is finished, or not at all.

    Args:
        source: the directory of a checkpoint, published, adopted or fine-tuned.
        target: a directory that doesn't exist or is empty.
        bits: one of `BITS`.
        group_size: inputs that share a scale, -1 for all; by default 128 in 4 bits, or the most that divides
            the widths, and all in 8.
        method: one of `METHODS`; by default hqq in 4 bits if torchao is installed, else rounding.
        tokenizer: a `tokenizer.model` if `source` has none.
        max_shard_size: the most bytes of one file, or text such as `"2GB"`.
        num_attention_heads: if `config.json` doesn't say.

    Returns:
        What is missing or assumed, and how the weights were quantised, in plain words.

    Raises:
        FileNotFoundError: no directory, no weights, or not all shards.
        FileExistsError: `target` holds files, or another run is working on it.
        ValueError: `source` isn't a checkpoint of the family, or is quantised; or a setting doesn't fit.
        ImportError: hqq is requested, but torchao isn't installed.
        OSError: the disk is too small or can't be written to.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} already exists; choose another target directory")
    findings = examine(source, num_attention_heads)
    check_loadable(findings)
    settings = choose_settings(findings, bits, group_size, method)
    texts, notes = describe_checkpoint(findings, Path(tokenizer) if tokenizer else None)
    config = {**json.loads(texts["config.json"]), "quantization_config": settings.fields}
    if low_rank_of(findings):
        config["internlm_lora"] = None
    texts |= {"config.json": json_bytes(config), "quantize_config.json": json_bytes(settings.fields)}
    units = _planned(findings, settings)
    pieces = plan_pieces(units, max_shard_size)
    _check_space(units, target)
    with staging_beside(target) as staging:
        weight_map = _write(pieces, findings, settings, staging)
        if len(pieces) > 1:
            total = sum((staging / piece.name).stat().st_size for piece in pieces)
            texts[INDEX] = json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})
        for name, content in texts.items():
            (staging / name).write_bytes(content)
        if target.exists():
            target.rmdir()  # it is empty
        staging.rename(target)
    size = "whole inputs" if settings.group_size == -1 else f"groups of {settings.group_size}"
    how = f"{len(linears_of(findings))} linears in {bits} bits, {size}, by {settings.method}"
    return (*findings.notes, *notes, how)


# ---- what is to be done ----


def linears_of(findings: Findings) -> dict[str, tuple[int, int]]:
    """The (out, in) widths of the decoder's plain linears by the names of their weights in the files."""
    return {name: header.shape for name, header in findings.headers.items() if LINEAR.search(name)}


def low_rank_of(findings: Findings) -> dict[str, tuple[str, str]]:
    """The names of low-rank weights of the first generation, A and B, by that of their linear's weight."""
    pairs = {name: _low_rank_names(name) for name in linears_of(findings)}
    return {name: pair for name, pair in pairs.items() if pair[0] in findings.headers}


def _low_rank_names(name: str) -> tuple[str, str]:
    linear = name.removesuffix(".weight")
    return f"{linear}.lora_A.weight", f"{linear}.lora_B.weight"


def choose_settings(
    findings: Findings, bits: int, group_size: int | None = None, method: str | None = None
) -> Settings:
    """Settings that fit a checkpoint, with defaults for those not given.

    Raises:
        ValueError: there is no such setting, it doesn't fit the widths, or the weights are quantised.
        ImportError: hqq is requested, but torchao isn't installed.
    """
    if bits not in BITS:
        raise ValueError(f"{bits} bits can't be written; choose {' or '.join(map(str, BITS))}")
    if method not in (None, *METHODS):
        raise ValueError(f"no method {method!r}; choose {' or '.join(METHODS)}")
    linears = linears_of(findings)
    whole = [name for name in linears if findings.headers[name].dtype.is_floating_point]
    if findings.packing is None and not linears:
        raise ValueError(
            f"{findings.source} has no weights named wqkv, wo, w1, w2 or w3, or in version 1.0 q_proj and so "
            "on, the ones to quantise"
        )
    if findings.packing is not None or len(whole) < len(linears):
        raise ValueError(f"{findings.source} is quantised already; quantise the original checkpoint")
    group_size = _fitting_group(linears, bits) if group_size is None else group_size
    _check_widths(linears, bits, group_size)
    if method is None:
        method = "hqq" if bits == BITS[0] and has_torchao() else "round"
    elif method == "hqq" and bits != BITS[0]:
        raise ValueError(f"hqq improves scales of {BITS[0]} bits, not {bits}; choose --method round")
    elif method == "hqq" and not has_torchao():
        raise ImportError("hqq needs torchao; install it with 'pip install torchao', or use --method round")
    return Settings(bits, group_size, method)


def _fitting_group(linears: dict[str, tuple[int, int]], bits: int) -> int:
    """The default group size, or the most below it that divides the inputs of every linear; -1 in 8 bits."""
    if bits == BITS[1]:
        return -1
    fits = (size for size in _GROUP_SIZES if not any(inputs % size for _, inputs in linears.values()))
    return next(fits, -1)


def _check_widths(linears: dict[str, tuple[int, int]], bits: int, group_size: int) -> None:
    per_word = WORD // bits
    for name, (outputs, inputs) in linears.items():
        if outputs % per_word or inputs % per_word:
            raise ValueError(f"{name} is {outputs} x {inputs}: {bits} bits need multiples of {per_word}")
        if group_size != -1 and (group_size < 1 or inputs % group_size):
            raise ValueError(
                f"{name} has {inputs} inputs, which are not groups of {group_size}; choose --group-size"
            )


def has_torchao() -> bool:
    """Whether torchao can be imported."""
    try:
        import torchao.quantization  # noqa: F401
    except ImportError:
        return False
    return True


def _planned(findings: Findings, settings: Settings) -> dict[str, TensorHeader]:
    """What is to be written: plain tensors as they are, for a linear its number of bytes."""
    linears = linears_of(findings)
    absorbed = {name for pair in low_rank_of(findings).values() for name in pair}
    units = {}
    for name, header in findings.headers.items():
        if name in absorbed:
            continue
        if name not in linears:
            units[name] = header
            continue
        outputs, inputs = header.shape
        groups = 1 if settings.group_size == -1 else inputs // settings.group_size
        num_bytes = (outputs * inputs + outputs * groups) * settings.bits // 8 + 2 * outputs * groups
        units[name] = TensorHeader((num_bytes + 4 * inputs,), torch.uint8, header.file)
    return units


def _check_space(units: dict[str, TensorHeader], target: Path) -> None:
    num_bytes = sum(unit.num_bytes for unit in units.values())
    folder = next(folder for folder in target.parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(
            f"{target} needs {num_bytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; "
            "make room or choose another target directory"
        )


# ---- doing it ----


def _write(pieces: list[Piece], findings: Findings, settings: Settings, staging: Path) -> dict[str, str]:
    """Write every file; which tensor is in which."""
    weight_map = {}
    linears, low_rank = linears_of(findings), low_rank_of(findings)
    for piece in logging.tqdm(pieces, desc="quantising", unit="file"):
        tensors: dict[str, Tensor] = {}
        for name, tensor in _read(piece):
            if name in linears:
                linear = our_name(name).removesuffix(".weight")
                if name in low_rank:
                    tensor = folded(findings, tensor, low_rank[name])
                parts = quantize_weight(tensor, settings)
                tensors |= {f"{linear}.{part}": value for part, value in parts.items()}
            else:
                tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
        save_file(tensors, staging / piece.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, piece.name)
    return dict(sorted(weight_map.items()))


def folded(findings: Findings, weight: Tensor, names: tuple[str, str]) -> Tensor:
    """A weight (out, in) with its low-rank weights, in float32."""
    lora = findings.config.internlm_lora
    factors = (read_tensor(findings.headers, name) for name in names)
    return fold(weight.float(), *factors, lora["lora_alpha"] / lora["lora_r"])


def _read(piece: Piece) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a piece by name, mapped from their file."""
    with _opened(piece.source) as get:
        for name in piece.tensors:
            yield name, get(name)


@contextmanager
def _opened(path: Path):
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor
    else:
        yield load_torch_file(path).__getitem__


@torch.no_grad()
def quantize_weight(weight: Tensor, settings: Settings) -> dict[str, Tensor]:
    """A weight (out, in) -> the tensors of GPTQ's format by name, with zero points in the middle."""
    weight = weight.float()
    outputs, inputs = weight.shape
    size = inputs if settings.group_size == -1 else settings.group_size
    middle = 2 ** (settings.bits - 1)
    scales = _scales_by_hqq(weight, size) if settings.method == "hqq" else _largest(weight, size, middle)
    scales = scales.clamp(min=_SMALLEST_SCALE).to(_SCALE_TYPE)  # (out, groups)
    steps = weight.unflatten(1, (-1, size)) / scales.float()[..., None]
    integers = steps.round().clamp(-middle, middle - 1).flatten(1).int() + middle
    # The first format of GPTQ stores zero points less one.
    zeros = torch.full((scales.shape[1], outputs), middle - 1, dtype=torch.int32)
    parts = (
        pack_words(integers, settings.bits).T.contiguous(),
        pack_words(zeros, settings.bits),
        scales.T.contiguous(),
        (torch.arange(inputs) // size).int(),
    )
    return dict(zip(FILE_TENSORS, parts, strict=True))


def _largest(weight: Tensor, size: int, middle: int) -> Tensor:
    """(out, groups) scales by which the largest value of each group is just reached."""
    groups = weight.unflatten(1, (-1, size))
    return torch.maximum(groups.amax(-1) / (middle - 1), -groups.amin(-1) / middle)


def _scales_by_hqq(weight: Tensor, size: int) -> Tensor:
    """(out, groups) scales that change the weights the least, by torchao."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=PerGroup(size),
        intx_choose_qparams_algorithm="hqq_scale_only",
    )
    holder = nn.Sequential(linear)
    quantize_(holder, config)
    return holder[0].weight.scale.float()
