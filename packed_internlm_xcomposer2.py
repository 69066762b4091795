"""GPTQ and AWQ checkpoints: which tensors are packed, and their weights, unpacked one at a time as they load.

Both keep a linear's weight as integers of a few bits, several to a 32-bit word, with a scale and a zero point
for each group of inputs: `weight = (integer - zero) * scale`. GPTQ (arXiv:2210.17323) packs along the inputs,
AWQ (arXiv:2306.00978) along the outputs and in an order of its own.
"""

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import GenerationConfig, PreTrainedConfig

from .checkpoint_internlm_xcomposer2 import checkpoint_tensors, hub_arguments_in, quantize_fields
from .weight_shapes_internlm_xcomposer2 import plain_name

WORD = 32  # bits of a packed word
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output that each nibble of a word holds, lowest nibble first
_BLOCK = 1 << 21  # weights that are unpacked at once: bounds the memory beside the result
_NAMES_IN_MESSAGE = 8


class TensorSlice(Protocol):
    """A tensor that is read when it is indexed, as safetensors has it. A loaded tensor will do as well."""

    def __getitem__(self, index: object) -> Tensor: ...


@dataclass(frozen=True)
class Packing:
    """How the packed weights of a checkpoint are laid out.

    Attributes:
        method: `"gptq"` or `"awq"`.
        bits: of one weight.
        group_size: inputs that share a scale; -1 for all of them, `None` where only the shapes say it.
        zero_offset: what is added to a stored zero point: 1 in GPTQ's first format, else 0.
        linears: names of the packed linears, without `.qweight`.
    """

    method: str
    bits: int
    group_size: int | None
    zero_offset: int
    linears: tuple[str, ...]


def packing_of(shapes: Mapping[str, tuple[int, ...]], config: object = None) -> Packing | None:
    """How a checkpoint is packed, from names and shapes; `None` if it isn't.

    Args:
        shapes: the shape of every tensor by name.
        config: what says more: a configuration with a `quantization_config`, or that itself, or a
            `quantize_config.json` as a dictionary.

    Raises:
        ValueError: tensors are missing, don't fit each other (they are listed) or don't fit `config`; or the
            layout is not one that can be unpacked here.
    """
    linears = tuple(name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight"))
    if not linears:
        return None
    fields = _fields(config)
    _check_complete(shapes, linears)
    layouts = Counter(layout for linear in linears if (layout := _layout(shapes, linear)))
    if not layouts:
        raise ValueError(f"the shapes of {_listed(linears)} fit neither GPTQ nor AWQ in the gemm layout")
    ((method, bits), _) = layouts.most_common(1)[0]
    packing = Packing(method, bits, _group_size(fields), _zero_offset(fields, method), linears)
    _check_fields(fields, packing)
    faults = [fault for linear in linears if (fault := _fault(shapes, linear, packing))]
    if faults:
        raise ValueError(f"{len(faults)} packed weights are damaged: {_listed(faults, '; ')}")
    return packing


def unpacked_shapes(shapes: Mapping[str, tuple[int, ...]], packing: Packing) -> dict[str, tuple[int, ...]]:
    """The shapes of the same checkpoint with (out, in) weights instead of packed tensors."""
    packed = {f"{linear}.{part}" for linear in packing.linears for part in _PARTS}
    plain = {name: shape for name, shape in shapes.items() if name not in packed}
    for linear in packing.linears:
        outputs = shapes[f"{linear}.scales"][1]
        plain[plain_name(f"{linear}.weight")] = (outputs, _num_inputs(shapes, linear, packing))
    return plain


def unpacked_tensors(
    tensors: Mapping[str, TensorSlice],
    shapes: Mapping[str, tuple[int, ...]],
    packing: Packing,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of a plain checkpoint in place of a packed one's; each is read or unpacked when it is used.

    Args:
        tensors: the checkpoint's, by name.
        shapes: their shapes.
        dtype: of the unpacked weights; the others stay as they are.

    Raises:
        ValueError: packed tensors aren't of 32-bit integers, or an index of groups (`g_idx`) names a group
            that isn't there.
    """
    _check_words(tensors, shapes, packing)
    packed = {f"{linear}.{part}" for linear in packing.linears for part in _PARTS}
    packed |= _empty_biases(tensors, packing)
    plain = {
        name: LazyTensor(shapes[name], _dtype_of(tensor, shapes[name]), _reader(tensor))
        for name, tensor in tensors.items()
        if name not in packed
    }
    for linear in packing.linears:
        parts = {part: tensors.get(f"{linear}.{part}") for part in _PARTS}
        size = shapes[f"{linear}.scales"][1], _num_inputs(shapes, linear, packing)
        groups = _group_index(linear, parts["g_idx"], shapes[f"{linear}.scales"][0], size[1], packing)
        plain[plain_name(f"{linear}.weight")] = LazyTensor(
            size, dtype, _unpacker(parts, groups, packing, dtype)
        )
    return plain


class LazyTensor(Tensor):
    """A tensor whose values are read whenever an operation asks for them, and not kept."""

    read: Callable[[], Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor]) -> "LazyTensor":
        tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        tensor.read = read
        return tensor

    def __repr__(self) -> str:
        return f"LazyTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda tensor: tensor.read(), (args, kwargs or {}))
        return func(*args, **kwargs)


# ---- loading ----


def loading_arguments(
    source: str | os.PathLike | None,
    shapes: Mapping[str, tuple[int, ...]],
    config: PreTrainedConfig,
    quantization: object,
    arguments: dict,
) -> tuple[str | os.PathLike | None, Mapping[str, tuple[int, ...]], PreTrainedConfig, dict]:
    """What transformers' `from_pretrained` is called with, so that a packed checkpoint loads as a plain one.

    Args:
        shapes: those of all tensors of `source`, or of the `state_dict` among the arguments.
        quantization: the caller's `quantization_config`; one for GPTQ or AWQ leaves them to transformers.
        arguments: the other arguments of `from_pretrained`.

    Returns:
        Path, shapes, configuration and arguments: as they came if the weights aren't packed, else without a
        path and with a `state_dict` whose weights are unpacked as they are used.

    Raises:
        ValueError: see `packing_of` and `unpacked_tensors`.
    """
    hub_arguments = hub_arguments_in(arguments)
    packing = _packing_to_undo(source, shapes, config, quantization, hub_arguments)
    if packing is None:
        return source, shapes, config, arguments
    arguments, tensors = dict(arguments), arguments.get("state_dict")
    tensors = checkpoint_tensors(source, **hub_arguments) if tensors is None else tensors
    arguments["dtype"] = _chosen_dtype(arguments, config, tensors[f"{packing.linears[0]}.scales"][:0].dtype)
    arguments["state_dict"] = unpacked_tensors(tensors, shapes, packing, arguments["dtype"])
    if source is not None and arguments.get("generation_config") is None:
        with suppress(OSError):  # without the file, transformers makes one from the configuration
            arguments["generation_config"] = GenerationConfig.from_pretrained(source, **hub_arguments)
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return None, unpacked_shapes(shapes, packing), config, arguments


def _packing_to_undo(
    source: str | os.PathLike | None,
    shapes: Mapping[str, tuple[int, ...]],
    config: PreTrainedConfig,
    quantization: object,
    hub_arguments: dict,
) -> Packing | None:
    method = getattr(quantization, "quant_method", None)
    if getattr(method, "value", method) in ("gptq", "awq"):
        return None
    says = getattr(config, "quantization_config", None)
    if says is None and source is not None and any(name.endswith(".qweight") for name in shapes):
        says = quantize_fields(source, **hub_arguments)
    return packing_of(shapes, {"quantization_config": says})


def _chosen_dtype(arguments: dict, config: PreTrainedConfig, default: torch.dtype) -> torch.dtype:
    """What `from_pretrained` would choose: the caller's, the configuration's, that of the weights."""
    legacy = arguments.pop("torch_dtype", None)
    chosen = arguments.get("dtype") or legacy or "auto"
    chosen = (config.dtype or default) if chosen == "auto" else chosen
    chosen = getattr(torch, chosen, None) if isinstance(chosen, str) else chosen
    if not isinstance(chosen, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype or its name, not {arguments.get('dtype') or legacy!r}")
    return chosen


# ---- unpacking ----


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """(rows, words) of 32 bits -> (rows, words * 32 / bits) integers from 0, the lowest bits first."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(1)


def unpack_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: Tensor, packing: Packing, dtype: torch.dtype
) -> Tensor:
    """Packed (in * bits / 32, out) with (groups, out) zeros and scales -> weight (out, in) of `dtype`.

    Args:
        groups: (in,), the group of each input.
    """
    per_word = WORD // packing.bits
    zeros = ((unpack_words(qzeros, packing.bits) + packing.zero_offset) & (2**packing.bits - 1)).float()
    scales = scales.float()
    weight = torch.empty(scales.shape[1], len(groups), dtype=dtype)
    step = max(1, _BLOCK // (scales.shape[1] * per_word))
    for start in range(0, qweight.shape[0], step):
        integers = unpack_words(qweight[start : start + step].T, packing.bits)  # (out, inputs of the block)
        columns = slice(start * per_word, start * per_word + integers.shape[1])
        group = groups[columns]
        weight[:, columns] = ((integers - zeros[group].T) * scales[group].T).to(dtype)
    return weight


def unpack_awq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, groups: Tensor, packing: Packing, dtype: torch.dtype
) -> Tensor:
    """Packed (in, out * bits / 32) with (groups, out) zeros and scales -> weight (out, in) of `dtype`."""
    zeros = _unpack_awq_words(qzeros, packing.bits).float()
    scales = scales.float()
    weight = torch.empty(scales.shape[1], len(groups), dtype=dtype)
    step = max(1, _BLOCK // scales.shape[1])
    for start in range(0, qweight.shape[0], step):
        rows = slice(start, start + step)
        integers = _unpack_awq_words(qweight[rows], packing.bits)  # (inputs of the block, out)
        group = groups[rows]
        weight[:, rows] = ((integers - zeros[group]) * scales[group]).T.to(dtype)
    return weight


def _unpack_awq_words(words: Tensor, bits: int) -> Tensor:
    """(rows, words) -> (rows, words * 8), each word's nibbles put in the order of the outputs."""
    nibbles = unpack_words(words, bits).unflatten(1, (-1, len(_AWQ_ORDER)))
    return nibbles[..., torch.tensor(_AWQ_ORDER).argsort()].flatten(1)


def _unpacker(parts: dict, groups: Tensor, packing: Packing, dtype: torch.dtype) -> Callable[[], Tensor]:
    unpack = unpack_gptq if packing.method == "gptq" else unpack_awq

    def read() -> Tensor:
        qweight, qzeros, scales = (parts[part][...] for part in ("qweight", "qzeros", "scales"))
        return unpack(qweight, qzeros, scales, groups, packing, dtype)

    return read


def _reader(tensor: TensorSlice) -> Callable[[], Tensor]:
    return lambda: tensor[...]


def _dtype_of(tensor: TensorSlice, shape: tuple[int, ...]) -> torch.dtype:
    return tensor[: 0 if shape else ...].dtype


def _inputs_per_group(num_inputs: int, num_groups: int, packing: Packing) -> int:
    size = packing.group_size
    if size is None:
        return -(-num_inputs // num_groups)
    return num_inputs if size == -1 else size


def _group_index(
    linear: str, stored: TensorSlice | None, num_groups: int, num_inputs: int, packing: Packing
) -> Tensor:
    """(in,), the group of each input: as stored, or consecutive."""
    if stored is None:
        return torch.arange(num_inputs) // _inputs_per_group(num_inputs, num_groups, packing)
    groups = stored[...].long()
    if groups.min() < 0 or groups.max() >= num_groups:
        low, high = int(groups.min()), int(groups.max())
        raise ValueError(f"{linear}.g_idx names groups {low} to {high} of {num_groups}")
    return groups


def _empty_biases(tensors: Mapping[str, TensorSlice], packing: Packing) -> set[str]:
    """Biases of zeros, which early GPTQ packers gave to linears without one."""
    names = [f"{linear}.bias" for linear in packing.linears]
    return {name for name in names if name in tensors and not tensors[name][...].any()}


# ---- checking ----


def _fields(config: object) -> dict:
    """The quantiser's fields of a configuration, or of a dictionary that holds them."""
    if not isinstance(config, dict):
        config = getattr(config, "quantization_config", None) or {}
    elif "quantization_config" in config:
        config = config["quantization_config"] or {}
    return dict(config) if isinstance(config, dict) else config.to_dict()


def _group_size(fields: dict) -> int | None:
    return fields.get("group_size", fields.get("q_group_size"))


def _zero_offset(fields: dict, method: str) -> int:
    """GPTQ's first format, which files without a word on it have, stores zero points less one."""
    return int(method == "gptq" and fields.get("checkpoint_format", "gptq") == "gptq")


def _layout(shapes: Mapping[str, tuple[int, ...]], linear: str) -> tuple[str, int] | None:
    """Method and bits that the shapes speak for: GPTQ keeps the outputs whole, AWQ packs them."""
    words, zeros, scales = (shapes[f"{linear}.{part}"] for part in ("qweight", "qzeros", "scales"))
    if not len(words) == len(zeros) == len(scales) == 2 or 0 in (*words, *zeros, *scales):
        return None
    if words[1] == scales[1]:
        return "gptq", WORD * zeros[1] // scales[1]
    return ("awq", WORD * words[1] // scales[1]) if words[1] < scales[1] else None


def _num_inputs(shapes: Mapping[str, tuple[int, ...]], linear: str, packing: Packing) -> int:
    rows = shapes[f"{linear}.qweight"][0]
    return rows * WORD // packing.bits if packing.method == "gptq" else rows


def _check_complete(shapes: Mapping[str, tuple[int, ...]], linears: tuple[str, ...]) -> None:
    missing = [
        f"{linear}.{part}"
        for linear in linears
        for part in ("qzeros", "scales")
        if f"{linear}.{part}" not in shapes
    ]
    if missing:
        raise ValueError(
            f"{len(linears)} weights are packed, but {len(missing)} tensors lack: {_listed(missing)}"
        )


def _check_fields(fields: dict, packing: Packing) -> None:
    """Hold what the configuration says to what the shapes say, and to what can be unpacked."""
    bits = fields.get("bits", fields.get("w_bit", packing.bits))
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method") or packing.method))
    if (method, bits) != (packing.method, packing.bits):
        raise ValueError(
            f"the quantization_config says {method} with {bits} bits, but the shapes of "
            f"{_listed(packing.linears)} are those of {packing.method} with {packing.bits}"
        )
    able = (2, 4, 8) if packing.method == "gptq" else (4,)
    if packing.bits not in able:
        raise ValueError(
            f"{packing.method} with {packing.bits} bits can't be unpacked, only with "
            f"{' or '.join(map(str, able))}; load the unquantised checkpoint"
        )
    layout = str(fields.get("checkpoint_format" if packing.method == "gptq" else "version") or "").lower()
    if layout not in ("", "gptq", "gptq_v2", "gemm"):
        raise ValueError(
            f"{packing.method} in the {layout} layout can't be unpacked, only in those of gptq, gptq_v2 and "
            "AWQ's gemm; load the unquantised checkpoint"
        )


def _fault(shapes: Mapping[str, tuple[int, ...]], linear: str, packing: Packing) -> str | None:
    """What is wrong with one packed linear's shapes."""
    scales = shapes[f"{linear}.scales"]
    if len(scales) != 2 or len(shapes[f"{linear}.qweight"]) != 2:
        return f"{linear}.scales is {scales} and {linear}.qweight {shapes[f'{linear}.qweight']}, not matrices"
    (groups, outputs), inputs = scales, _num_inputs(shapes, linear, packing)
    packed_outputs = outputs * packing.bits // WORD
    is_gptq = packing.method == "gptq"
    expected = {
        "qweight": (inputs * packing.bits // WORD, outputs) if is_gptq else (inputs, packed_outputs),
        "qzeros": (groups, packed_outputs),
        **({"g_idx": (inputs,)} if f"{linear}.g_idx" in shapes else {}),
    }
    for part, shape in expected.items():
        if shapes[f"{linear}.{part}"] != shape:
            return f"{linear}.{part} is {shapes[f'{linear}.{part}']}, where scales {scales} ask for {shape}"
    if packing.group_size is None and "g_idx" not in expected and inputs % groups:
        return (
            f"{linear} has {inputs} inputs in {groups} groups; name the group_size in the quantization_config"
        )
    size = _inputs_per_group(inputs, groups, packing)
    if -(-inputs // size) != groups:
        return f"{linear} has {inputs} inputs in {groups} groups, which are not groups of {size}"
    return None


def _check_words(
    tensors: Mapping[str, TensorSlice], shapes: Mapping[str, tuple[int, ...]], packing: Packing
) -> None:
    names = [f"{linear}.{part}" for linear in packing.linears for part in ("qweight", "qzeros")]
    wrong = [name for name in names if _dtype_of(tensors[name], shapes[name]) != torch.int32]
    if wrong:
        raise ValueError(f"{len(wrong)} packed tensors are not of 32-bit integers: {_listed(wrong)}")


def _listed(names: tuple[str, ...] | list[str], between: str = ", ") -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _NAMES_IN_MESSAGE
    return between.join(names[:_NAMES_IN_MESSAGE]) + (f"{between}and {more} more" if more > 0 else "")
