"""How GPTQ and AWQ lay out a linear's weight in a file, and what of it fits together.

GPTQ (arXiv:2210.17323) and AWQ (arXiv:2306.00978) keep a weight as integers of a few bits, several to a
32-bit word, with a scale and a zero point for each group of inputs: `weight = (integer - zero) * scale`. GPTQ
packs along the inputs, AWQ along the outputs and in its own order.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.quantizers import AutoQuantizationConfig

from .checkpoint_internlm_xcomposer2 import TensorHeader, quantize_fields, shapes_of
from .configuration_internlm_xcomposer2 import published_name
from .files_internlm_xcomposer2 import blaming

WORD = 32  # bits of a packed word
FILE_TENSORS = ("qweight", "qzeros", "scales", "g_idx")  # of one packed weight
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output that each nibble of a word holds, lowest nibble first
VALUES_AT_ONCE = 1 << 21  # weights that are unpacked at once: bounds the memory besides the result
_NAMES_IN_MESSAGE = 8


@dataclass(frozen=True)
class Packing:
    """How the packed weights of a checkpoint are laid out.

    Attributes:
        method: `"gptq"` or `"awq"`.
        bits: of one weight.
        group_size: inputs that share a scale; -1 for all of them, `None` if only the shapes say it.
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
        config: what else is known: a configuration with a `quantization_config`, or that itself, or a
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
    packed = {f"{linear}.{part}" for linear in packing.linears for part in FILE_TENSORS}
    plain = {name: shape for name, shape in shapes.items() if name not in packed}
    for linear in packing.linears:
        outputs = shapes[f"{linear}.scales"][1]
        plain[published_name(f"{linear}.weight")] = (outputs, _num_inputs(shapes, linear, packing))
    return plain


def packing_to_read(
    source: str | os.PathLike | None,
    headers: Mapping[str, TensorHeader],
    config: PreTrainedConfig,
    quantization: object,
    hub_arguments: dict,
) -> Packing | None:
    """How the weights to be loaded are packed; `None` if they aren't, or are not to be read here.

    Args:
        quantization: the caller's `quantization_config`; one for GPTQ or AWQ leaves them to transformers.

    Raises:
        ValueError: see `packing_of`; or the caller asks for another quantiser.
    """
    method = getattr(quantization, "quant_method", None)
    if getattr(method, "value", method) in ("gptq", "awq"):
        return None
    says = getattr(config, "quantization_config", None)
    if says is None and source is not None and any(name.endswith(".qweight") for name in headers):
        says = quantize_fields(source, **hub_arguments)
    packing = packing_of(shapes_of(headers), {"quantization_config": says})
    if packing is None:
        if isinstance(says, dict):  # transformers' quantisers read it
            with blaming(f"{source}/config.json: quantization_config"):
                AutoQuantizationConfig.from_dict(dict(says))
        return None
    words = [f"{linear}.{part}" for linear in packing.linears for part in ("qweight", "qzeros")]
    if wrong := [name for name in words if headers[name].dtype != torch.int32]:
        raise ValueError(f"{len(wrong)} packed tensors are not 32-bit integers: {_listed(wrong)}")
    if quantization is not None:
        raise ValueError(
            f"these weights already have {packing.bits} bits, by {packing.method}; leave quantization_config "
            "out, or quantise the original checkpoint"
        )
    return packing


# ---- unpacking ----


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """(rows, words) of 32 bits -> (rows, words * 32 / bits) integers from 0, lowest bits first."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(1)


def pack_words(integers: Tensor, bits: int) -> Tensor:
    """(rows, values) integers from 0 -> (rows, values * bits / 32) words of 32 bits, lowest bits first."""
    words = integers.unflatten(1, (-1, WORD // bits)).to(torch.int64)
    shifts = torch.arange(0, WORD, bits, device=integers.device)
    packed = (words << shifts).sum(-1)
    return torch.where(packed < 2 ** (WORD - 1), packed, packed - 2**WORD).int()


def unpack_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    groups: Tensor,
    *,
    bits: int,
    zero_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Packed (in * bits / 32, out) with (groups, out) zeros and scales -> weight (out, in) of `dtype`.

    Args:
        groups: (in,), the group of each input.
    """
    per_word = WORD // bits
    zeros = ((unpack_words(qzeros, bits) + zero_offset) & (2**bits - 1)).float()
    scales = scales.float()
    weight = torch.empty(scales.shape[1], len(groups), dtype=dtype, device=scales.device)
    step = max(1, VALUES_AT_ONCE // (scales.shape[1] * per_word))
    for start in range(0, qweight.shape[0], step):
        integers = unpack_words(qweight[start : start + step].T, bits)  # (out, inputs of the block)
        columns = slice(start * per_word, start * per_word + integers.shape[1])
        group = groups[columns]
        weight[:, columns] = ((integers - zeros[group].T) * scales[group].T).to(dtype)
    return weight


def unpack_awq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    groups: Tensor,
    *,
    bits: int,
    zero_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Packed (in, out * bits / 32) with (groups, out) zeros and scales -> weight (out, in) of `dtype`."""
    zeros = ((unpack_awq_words(qzeros, bits) + zero_offset) & (2**bits - 1)).float()
    scales = scales.float()
    weight = torch.empty(scales.shape[1], len(groups), dtype=dtype, device=scales.device)
    step = max(1, VALUES_AT_ONCE // scales.shape[1])
    for start in range(0, qweight.shape[0], step):
        rows = slice(start, start + step)
        integers = unpack_awq_words(qweight[rows], bits)  # (inputs of the block, out)
        group = groups[rows]
        weight[:, rows] = ((integers - zeros[group]) * scales[group]).T.to(dtype)
    return weight


def unpack_awq_words(words: Tensor, bits: int) -> Tensor:
    """(rows, words) -> (rows, words * 8), each word's nibbles in the order of the outputs."""
    nibbles = unpack_words(words, bits).unflatten(1, (-1, len(_AWQ_ORDER)))
    return nibbles[..., torch.tensor(_AWQ_ORDER).argsort()].flatten(1)


def pack_awq_words(integers: Tensor) -> Tensor:
    """(rows, outputs) -> (rows, outputs / 8): the inverse of unpacking AWQ's words."""
    outputs = integers.unflatten(1, (-1, len(_AWQ_ORDER)))[..., torch.tensor(_AWQ_ORDER)]
    return pack_words(outputs.flatten(1), WORD // len(_AWQ_ORDER))


def inputs_per_group(num_inputs: int, num_groups: int, packing: Packing) -> int:
    size = packing.group_size
    if size is None:
        return -(-num_inputs // num_groups)
    return num_inputs if size == -1 else size


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
    """GPTQ's first format, that of files that don't name one, stores zero points minus one."""
    return int(method == "gptq" and fields.get("checkpoint_format", "gptq") == "gptq")


def _layout(shapes: Mapping[str, tuple[int, ...]], linear: str) -> tuple[str, int] | None:
    """Method and bits that the shapes suggest: GPTQ keeps the outputs whole, AWQ packs them."""
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
            f"{len(linears)} weights are packed, but {len(missing)} tensors are missing: {_listed(missing)}"
        )


def _check_fields(fields: dict, packing: Packing) -> None:
    """Check what the configuration says against the shapes, and against what can be unpacked."""
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
            return f"{linear}.{part} is {shapes[f'{linear}.{part}']}, but scales {scales} require {shape}"
    if packing.group_size is None and "g_idx" not in expected and inputs % groups:
        return (
            f"{linear} has {inputs} inputs in {groups} groups; name the group_size in the quantization_config"
        )
    size = inputs_per_group(inputs, groups, packing)
    if -(-inputs // size) != groups:
        return f"{linear} has {inputs} inputs in {groups} groups, which are not groups of {size}"
    return None


def _listed(names: tuple[str, ...] | list[str], between: str = ", ") -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _NAMES_IN_MESSAGE
    return between.join(names[:_NAMES_IN_MESSAGE]) + (f"{between}and {more} more" if more > 0 else "")
