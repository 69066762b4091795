"""Low-bit weights: what transformers' quantisers need from us, and checkpoints packed by GPTQ and AWQ.

Only the plain linears of the decoder are ever quantised. Image tokens pass through everything else, which is
a small part of the weights.

GPTQ (arXiv:2210.17323) and AWQ (arXiv:2306.00978) keep a linear's weight as integers of a few bits, several
to a 32-bit word, with a scale and a zero point for each group of inputs: `weight = (integer - zero) * scale`.
GPTQ packs along the inputs, AWQ along the outputs and in its own order.
"""

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint_internlm_xcomposer2 import TensorHeader, quantize_fields, shapes_of
from .configuration_internlm_xcomposer2 import published_name

logger = logging.get_logger(__name__)

# Everything but the plain linears of the decoder, in the patterns that transformers' quantisers understand:
# names of modules, or expressions.
FULL_PRECISION_MODULES = (
    "vit",
    "vision_proj",
    "video_mem_proj",
    "output",
    "score",
    r".*\.Plora_[AB]",
    r".*\.lora_\w+_[AB]",
)

# Where the quantisers' configurations keep the modules that they leave alone.
_SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")

_DECODER_LINEAR = re.compile(r"model\.layers\.\d+\..*\.linear")


def quantizer_argument(
    config: QuantizationConfigMixin | dict | None, device_map: object = None
) -> QuantizationConfigMixin | None:
    """What `from_pretrained` passes on for a caller's `quantization_config`, which is left unchanged.

    Raises:
        ValueError: the quantiser is unknown, or can't work on the device.
    """
    if config is None:
        return None
    config = with_default_skips(config)
    check_quantizer_fits_device(config, device_map)
    return config


def with_default_skips(config: QuantizationConfigMixin | dict) -> QuantizationConfigMixin:
    """A copy of a quantiser's configuration that leaves `FULL_PRECISION_MODULES` alone too.

    Raises:
        ValueError: transformers knows no such quantiser, or a dictionary doesn't say which it is.
    """
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
    for field in _SKIP_FIELDS:
        if hasattr(config, field):
            named = getattr(config, field) or []
            added = [pattern for pattern in FULL_PRECISION_MODULES if pattern not in named]
            setattr(config, field, [*named, *added])
    return config


def check_quantizer_fits_device(config: QuantizationConfigMixin, device_map: object) -> None:
    """Raise `ValueError` if torchao's int4 layout for GPUs is requested, but the weights go to a CPU."""
    layout = type(getattr(config, "quant_type", None)).__name__
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    on_cpu = places <= {None, "cpu", torch.device("cpu")} or not torch.accelerator.is_available()
    if layout == "Int4WeightOnlyConfig" and on_cpu:
        raise ValueError(
            "torchao's Int4WeightOnlyConfig has no layout for a CPU; use PrototypeInt4WeightOnlyConfig from "
            "torchao.prototype.quantization.int4 (4 bits in memory), or IntxWeightOnlyConfig(torch.int4, "
            "PerGroup(32)) from torchao.quantization (4-bit values, a byte each)"
        )


def settle_quantized(model: PreTrainedModel) -> None:
    """Give a quantised model kernels that fit its widths, and say which linears were left alone."""
    if getattr(model, "hf_quantizer", None) is None:
        return
    linears = {name: module for name, module in model.named_modules() if _DECODER_LINEAR.fullmatch(name)}
    for module in linears.values():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            _settle_4bit(module)
    plain = [name for name, module in linears.items() if _is_plain(module)]
    if plain:
        logger.warning(
            f"{len(plain)} of {len(linears)} linears of the decoder were not quantised, such as {plain[0]}: "
            "their widths don't fit the group size, or the quantization_config excludes them"
        )


def _is_plain(module: nn.Module) -> bool:
    weight = module.weight
    return type(module) is nn.Linear and weight.is_floating_point() and type(weight) is nn.Parameter


def _settle_4bit(module: nn.Module) -> None:
    """Limit bitsandbytes' fused kernel for CPUs to the widths it supports, and keep its layout out of files.

    The kernel repacks a weight at the first forward, which fails unless the widths are multiples of 32 (out)
    and of the block size (in); other widths are dequantised instead.
    """
    state = getattr(module.weight, "quant_state", None)
    block = getattr(state, "blocksize", None)
    if block and (module.out_features % 32 or module.in_features % block):
        module.support_avx512bf16_for_cpu = False
    module.register_state_dict_pre_hook(_restore_absmax)


def _restore_absmax(module: nn.Module, *_) -> None:
    """Put the scales of a repacked 4-bit weight back into the order of the file, before it is written.

    bitsandbytes 0.50 restores only the weight: the scales would stay transposed, in the file and in the
    model, and doubly quantised ones would be rounded a second time. They are written as they are in use.
    """
    state = getattr(module.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        state.original_nested = False
        state.absmax = state.absmax.T.reshape(-1).float()


def check_savable(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a quantised model whose tensors can't be saved."""
    try:
        _, metadata = model.hf_quantizer.get_state_dict_and_metadata(model)
    except ValueError as error:
        raise ValueError(
            f"this model's quantised weights can't be saved ({error}); save the unquantised model and "
            "quantise it each time it is loaded"
        ) from error
    if "tensor_names" in metadata and not _quantized_names(metadata):
        raise ValueError("none of this model's weights are quantised; save it without a quantization_config")


def settle_saved_metadata(directory: str | os.PathLike) -> None:
    """Remove plain tensors from what torchao says about a saved model's tensors.

    They need no description, and torchao can't read one for a name without a dot, as newline vectors have.
    """
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "tensor_names" not in metadata:
                continue
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = _quantized_names(metadata)
        described = set(json.loads(metadata["tensor_names"]))
        kept = {name: text for name, text in metadata.items() if name not in described or name in names}
        save_file(tensors, path, metadata={**kept, "tensor_names": json.dumps(names)})


def _quantized_names(metadata: Mapping[str, str]) -> list[str]:
    """The tensors that torchao's metadata says are quantised."""
    names = json.loads(metadata["tensor_names"])
    return [name for name in names if json.loads(metadata.get(name, "{}")).get("_type", "Tensor") != "Tensor"]


# ---- packed checkpoints ----

WORD = 32  # bits of a packed word
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output that each nibble of a word holds, lowest nibble first
_BLOCK = 1 << 21  # weights that are unpacked at once: bounds the memory besides the result
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
    packed = {f"{linear}.{part}" for linear in packing.linears for part in _PARTS}
    plain = {name: shape for name, shape in shapes.items() if name not in packed}
    for linear in packing.linears:
        outputs = shapes[f"{linear}.scales"][1]
        plain[published_name(f"{linear}.weight")] = (outputs, _num_inputs(shapes, linear, packing))
    return plain


class PackedLinear(nn.Module):
    """A linear whose weight is packed, with the tensor names that GPTQ and AWQ files use.

    Args:
        bits, method, zero_offset: as in `Packing`.
        num_groups: how many groups of inputs share a scale.
        group_size: consecutive inputs in a group, unless the file gives the group of each input.
        has_index: whether the file does so (`g_idx`).
        has_bias: whether the file has a bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packing: Packing,
        *,
        num_groups: int,
        has_index: bool = False,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.method, self.bits, self.zero_offset = packing.method, packing.bits, packing.zero_offset
        self.group_size = _inputs_per_group(in_features, num_groups, packing)
        words = in_features * self.bits // WORD, out_features * self.bits // WORD
        is_gptq = self.method == "gptq"
        shapes = {
            "qweight": (words[0], out_features) if is_gptq else (in_features, words[1]),
            "qzeros": (num_groups, words[1]),
            "g_idx": (in_features,) if has_index else None,
        }
        for name, shape in shapes.items():
            empty = None if shape is None else torch.zeros(shape, dtype=torch.int32)
            self.register_parameter(name, _constant(empty))
        # In float32, which can hold every type found in files, whatever the type of the model.
        self.scales = _constant(torch.ones(num_groups, out_features, dtype=torch.float32))
        bias = torch.zeros(out_features, dtype=torch.float32) if has_bias else None
        self.register_parameter("bias", _constant(bias))

    def groups(self) -> Tensor:
        """(in,), the group of each input.

        Raises:
            ValueError: the file names a group that doesn't exist.
        """
        num_groups = len(self.scales)
        if self.g_idx is None:
            return torch.arange(self.in_features, device=self.scales.device) // self.group_size
        low, high = int(self.g_idx.min()), int(self.g_idx.max())
        if low < 0 or high >= num_groups:
            raise ValueError(f"g_idx names groups {low} to {high}, but there are {num_groups}")
        return self.g_idx.long()

    @torch.no_grad()
    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight, (out, in)."""
        unpack = unpack_gptq if self.method == "gptq" else unpack_awq
        packed = self.qweight, self.qzeros, self.scales, self.groups()
        return unpack(*packed, bits=self.bits, zero_offset=self.zero_offset, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.unpack(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.method}, {self.bits} bits"


def _constant(tensor: Tensor | None) -> nn.Parameter | None:
    """A parameter that doesn't train; being one, it is offloaded like the others."""
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


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


def pack_linears(model: nn.Module, packing: Packing, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Put a `PackedLinear` in place of each plain linear that is packed in a file.

    Args:
        shapes: of the tensors in the file, by name.
    """
    for linear in packing.linears:
        name = our_linear(linear)
        plain = model.get_submodule(name)
        packed = PackedLinear(
            plain.in_features,
            plain.out_features,
            packing,
            num_groups=shapes[f"{linear}.scales"][0],
            has_index=f"{linear}.g_idx" in shapes,
            has_bias=f"{linear}.bias" in shapes,
        )
        model.set_submodule(name, packed)


def our_linear(name: str) -> str:
    """The name of a plain linear in the model, from that in a file, `wqkv` or `wqkv.linear`."""
    return f"{name.removesuffix('.linear')}.linear"


def unpack_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Put a plain linear in place of each `PackedLinear`, one at a time, except those that are offloaded.

    The model is then saved under the names that it would have had from plain files.

    Raises:
        ValueError: a bias isn't zero, or a group index is wrong; says whose.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, PackedLinear):
            continue
        if module.bias is not None and module.bias.device.type != "meta" and module.bias.any():
            raise ValueError(f"the weights don't fit this model; tensors: 1 unexpected: {name}.bias")
        module.requires_grad_(False)
        if module.qweight.device.type == "meta":
            continue
        try:
            weight = module.unpack(dtype)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from error
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight)
        model.set_submodule(name, plain.train(module.training))
    vars(model).pop("_weight_conversions", None)  # the renamings that the packed file needed


# ---- unpacking ----


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """(rows, words) of 32 bits -> (rows, words * 32 / bits) integers from 0, lowest bits first."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(1)


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
    step = max(1, _BLOCK // (scales.shape[1] * per_word))
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
    zeros = ((_unpack_awq_words(qzeros, bits) + zero_offset) & (2**bits - 1)).float()
    scales = scales.float()
    weight = torch.empty(scales.shape[1], len(groups), dtype=dtype, device=scales.device)
    step = max(1, _BLOCK // scales.shape[1])
    for start in range(0, qweight.shape[0], step):
        rows = slice(start, start + step)
        integers = _unpack_awq_words(qweight[rows], bits)  # (inputs of the block, out)
        group = groups[rows]
        weight[:, rows] = ((integers - zeros[group]) * scales[group]).T.to(dtype)
    return weight


def _unpack_awq_words(words: Tensor, bits: int) -> Tensor:
    """(rows, words) -> (rows, words * 8), each word's nibbles in the order of the outputs."""
    nibbles = unpack_words(words, bits).unflatten(1, (-1, len(_AWQ_ORDER)))
    return nibbles[..., torch.tensor(_AWQ_ORDER).argsort()].flatten(1)


def _inputs_per_group(num_inputs: int, num_groups: int, packing: Packing) -> int:
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
    size = _inputs_per_group(inputs, groups, packing)
    if -(-inputs // size) != groups:
        return f"{linear} has {inputs} inputs in {groups} groups, which are not groups of {size}"
    return None


def _listed(names: tuple[str, ...] | list[str], between: str = ", ") -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _NAMES_IN_MESSAGE
    return between.join(names[:_NAMES_IN_MESSAGE]) + (f"{between}and {more} more" if more > 0 else "")
