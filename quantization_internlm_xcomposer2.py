"""Weights of few bits in a model: what transformers' quantisers need from us, and linears that stay packed.

Only the plain linears of the decoder are ever quantised. Image tokens pass through everything else, which is
a small part of the weights.
"""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint_internlm_xcomposer2 import TensorHeader
from .kernels_internlm_xcomposer2 import (
    INT8_ZERO,
    Int4Weight,
    Int8Weight,
    KeepsTypes,
    Linear,
    LowRank,
    PackedWeight,
    multiply,
    pack_int4,
    release_freed_memory,
)
from .packing_internlm_xcomposer2 import (
    FILE_TENSORS,
    VALUES_AT_ONCE,
    WORD,
    Packing,
    inputs_per_group,
    pack_awq_words,
    pack_words,
    unpack_awq,
    unpack_awq_words,
    unpack_gptq,
    unpack_words,
)

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

_DECODER_LINEAR = re.compile(r"(?:internlm_model\.)?model\.layers\.\d+\..*(?:\.linear|_proj)")


def quantizer_argument(
    config: QuantizationConfigMixin | dict | None,
    device_map: object = None,
    skipped: Sequence[str] = FULL_PRECISION_MODULES,
) -> QuantizationConfigMixin | None:
    """What `from_pretrained` passes on for a caller's `quantization_config`, which is left unchanged.

    Args:
        skipped: the modules that stay as they are, in the patterns that transformers' quantisers understand.

    Raises:
        ValueError: the quantiser is unknown, or can't work on the device.
    """
    if config is None:
        return None
    config = with_default_skips(config, skipped)
    check_quantizer_fits_device(config, device_map)
    return config


def with_default_skips(
    config: QuantizationConfigMixin | dict, skipped: Sequence[str] = FULL_PRECISION_MODULES
) -> QuantizationConfigMixin:
    """A copy of a quantiser's configuration that leaves these modules alone too.

    Raises:
        ValueError: transformers knows no such quantiser, or a dictionary doesn't say which it is.
    """
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
    for field in _SKIP_FIELDS:
        if hasattr(config, field):
            named = getattr(config, field) or []
            added = [pattern for pattern in skipped if pattern not in named]
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
    return isinstance(module, nn.Linear) and weight.is_floating_point() and type(weight) is nn.Parameter


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


# ---- packed linears ----

_OUTPUTS_OF_PART = 64  # of which a part of a weight has a multiple, as the kernels' tiles require


class PackedLinear(KeepsTypes):
    """A linear whose weight is packed.

    It is built for the tensors of a GPTQ or AWQ file, under their names. `settle` puts the weight in the
    order of the device's 4-bit kernel instead, if there is one that takes its widths; without one, the weight
    is unpacked for each product. A state dict holds the tensors of the file in either case.

    Args:
        packing: the format.
        num_groups: how many groups of inputs share a scale.
        has_index: whether the file gives the group of each input (`g_idx`), else they are consecutive.
        has_bias: whether the file has a bias.

    Attributes:
        settled: the weight in the order of a kernel; `None` if it is as in the file.
        keeps_bias: whether the bias is the model's; else it must be zero, and is dropped.
    """

    keeps_bias = False

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
        self.group_size = inputs_per_group(in_features, num_groups, packing)
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
        self.has_index = has_index
        self.settled: PackedWeight | None = None
        self.register_state_dict_post_hook(_add_file_tensors)
        self.register_load_state_dict_pre_hook(_expect_file_tensors)
        self.register_load_state_dict_post_hook(_settle_again)

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
    def settle(self, qweight: Tensor | None = None) -> None:
        """Put the weight in the order of the device's kernel, if there is one; call it once it is loaded.

        From then on the tensors are buffers: they neither train nor count as parameters.

        Args:
            qweight: the weight as in the file, read anew; by default the parameter of that name.

        Raises:
            ValueError: the file names a group that doesn't exist.
        """
        groups, device = self.groups(), self.scales.device
        sizes = torch.bincount(groups, minlength=len(self.scales))
        scales, zeros = _smallest(self.scales.T.contiguous()), self._zeros().T.to(torch.uint8).contiguous()
        is_int8 = self.bits == Int8Weight.bits and Int8Weight.fits(device.type, zeros)
        widths = self.out_features, self.in_features, len(self.scales)
        is_int4 = self.bits <= Int4Weight.bits and Int4Weight.fits(device.type, *widths)
        if not (is_int4 or is_int8) or not bool((sizes == sizes[0]).all()):
            self._hold(self.file_tensors())
            return
        order = groups.argsort(stable=True)
        order = None if torch.equal(order, torch.arange(self.in_features, device=device)) else order.int()
        parts = self._integers((self.qweight if qweight is None else qweight).to(device))
        parts = (part if order is None else part.index_select(1, order) for part in parts)
        pack = pack_int4 if is_int4 else lambda integers: (integers - INT8_ZERO).to(torch.int8)
        codes = torch.cat([pack(part) for part in parts])
        self._hold({})
        self.settled = (Int4Weight if is_int4 else Int8Weight)(codes, scales, zeros, order)

    def _hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors of the file as buffers, and no others."""
        for name in FILE_TENSORS:
            self._parameters.pop(name, None)
            self.register_buffer(name, tensors.get(name))

    def _integers(self, qweight: Tensor) -> Iterator[Tensor]:
        """The weight as in the file -> parts (outputs, in) of its integers."""
        step = max(1, VALUES_AT_ONCE // self.in_features // _OUTPUTS_OF_PART) * _OUTPUTS_OF_PART
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            if self.method == "gptq":
                yield unpack_words(qweight[:, start:stop].T, self.bits)
            else:
                columns = slice(start * self.bits // WORD, stop * self.bits // WORD)
                yield unpack_awq_words(qweight[:, columns], self.bits).T

    @property
    def in_order(self) -> bool:
        """Whether each group consists of consecutive inputs, in the order of the groups."""
        if self.settled is not None:
            return self.settled.order is None
        return self.g_idx is None or self.g_idx.device.type == "meta" or bool((self.g_idx.diff() >= 0).all())

    def _zeros(self) -> Tensor:
        """(groups, out) zero points."""
        unpack = unpack_words if self.method == "gptq" else unpack_awq_words
        return (unpack(self.qzeros, self.bits) + self.zero_offset) & (2**self.bits - 1)

    @torch.no_grad()
    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors of the format by name, with the bias if there is one."""
        if self.settled is None:
            found = {name: getattr(self, name) for name in (*FILE_TENSORS, "bias")}
            return {name: tensor.data for name, tensor in found.items() if tensor is not None}
        integers, order = self.settled.integers(), self.settled.order
        zeros = (self.settled.zeros.T.int() - self.zero_offset) & (2**self.bits - 1)
        if self.method == "gptq":
            tensors = {"qweight": pack_words(integers, self.bits).T.contiguous()}
            tensors["qzeros"] = pack_words(zeros, self.bits)
        else:
            tensors = {"qweight": pack_awq_words(integers.T), "qzeros": pack_awq_words(zeros)}
        tensors["scales"] = self.settled.scales.T.contiguous()
        if self.has_index:
            groups = torch.arange(self.in_features, device=zeros.device) // (self.in_features // len(zeros))
            groups = groups if order is None else groups[order.long().argsort()]
            tensors["g_idx"] = groups.int()
        return tensors if self.bias is None else {**tensors, "bias": self.bias.data}

    @torch.no_grad()
    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weight, (out, in)."""
        if self.settled is not None:
            return self.settled.unpack(dtype)
        unpack = unpack_gptq if self.method == "gptq" else unpack_awq
        packed = self.qweight, self.qzeros, self.scales, self.groups()
        return unpack(*packed, bits=self.bits, zero_offset=self.zero_offset, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The weight, (out, in) in float32, unpacked at each call; not a parameter."""
        return self.unpack(torch.float32)

    def folds(self, x: Tensor, low_rank: LowRank) -> bool:
        """Whether these low-rank weights are better folded into the weight for x (..., in)."""
        return self.settled is not None and low_rank.folds(x)

    def forward(self, x: Tensor, low_rank: LowRank | None = None) -> Tensor:
        """(..., in) -> (..., out).

        Args:
            low_rank: to be folded in for some of the rows of all batches, where `folds` says that it can be.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            output = _FrozenProduct.apply(x, self)
        elif self.settled is not None:
            output = self.settled(x, low_rank)
        else:
            output = multiply(x, self.unpack(x.dtype))
        return output if self.bias is None else output + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.method}, {self.bits} bits"


class _FrozenProduct(torch.autograd.Function):
    """A product with a packed weight, which is unpacked again for the gradient instead of being kept."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: PackedLinear) -> Tensor:
        """(..., in) -> (..., out)."""
        ctx.linear = linear
        return multiply(x, linear.unpack(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        """(..., out) -> (..., in)."""
        return gradient @ ctx.linear.unpack(gradient.dtype), None


def _add_file_tensors(module: PackedLinear, state_dict: dict, prefix: str, _) -> None:
    """Put the tensors of the format into a state dict, also for a settled weight."""
    if module.settled is not None:
        state_dict.update({f"{prefix}{name}": value for name, value in module.file_tensors().items()})


def _expect_file_tensors(module: PackedLinear, *_) -> None:
    """Make room in a settled linear for the tensors of a state dict."""
    if module.settled is not None:
        tensors = module.file_tensors()
        module._hold({**tensors, "scales": tensors["scales"].float()})
        module.settled = None


def _settle_again(module: PackedLinear, _) -> None:
    if module.qweight.device.type != "meta":
        module.settle()


def _smallest(scales: Tensor) -> Tensor:
    """Scales in the half type that holds them exactly, if one does."""
    halves = (scales.to(dtype) for dtype in (torch.float16, torch.bfloat16))
    return next((half for half in halves if torch.equal(half.to(scales.dtype), scales)), scales)


def _constant(tensor: Tensor | None) -> nn.Parameter | None:
    """A parameter that doesn't train; being one, it is offloaded like the others."""
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


def pack_linears(model: nn.Module, packing: Packing, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Put a `PackedLinear` in place of each plain linear that is packed in a file.

    Args:
        shapes: of the tensors in the file, by name.
    """
    for linear in packing.linears:
        name = our_linear(model, linear)
        plain = model.get_submodule(name)
        packed = PackedLinear(
            plain.in_features,
            plain.out_features,
            packing,
            num_groups=shapes[f"{linear}.scales"][0],
            has_index=f"{linear}.g_idx" in shapes,
            has_bias=f"{linear}.bias" in shapes,
        )
        packed.keeps_bias = plain.bias is not None
        model.set_submodule(name, packed)


def our_linear(model: nn.Module, name: str) -> str:
    """The name of a plain linear in the model, from that in a file: `wqkv`, `wqkv.linear` or `q_proj`."""
    owner = name.removesuffix(".linear")
    return f"{owner}.linear" if hasattr(model.get_submodule(owner), "linear") else owner


def settle_linears(model: nn.Module, headers: Mapping[str, TensorHeader]) -> None:
    """Put each `PackedLinear` in the order of its device's kernel, one at a time; offloaded ones stay.

    Args:
        headers: of the tensors in the file. Packed words are read anew from a safetensors file that names
            them, so that the pages of the file, which is mapped as long as the model is loaded, stay on disk.

    Raises:
        ValueError: a bias isn't zero, or a group index is wrong; says whose.
    """
    packed = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    files = {our_linear(model, name): f"{name}.qweight" for name in packed}
    for name, module in packed_linears(model):
        if module.qweight.device.type == "meta":
            continue
        stored = files[name]
        path = headers[stored].file
        with naming(name):
            if path is None or path.suffix != ".safetensors":
                module.settle()
            else:
                with safe_open(path, framework="pt") as file:
                    module.settle(file.get_tensor(stored))
        release_freed_memory()  # what unpacking took, else a multiple of the weights would stay


def packed_linears(model: nn.Module) -> list[tuple[str, PackedLinear]]:
    """The packed linears of a model by name, without a bias of zeros where the model has none.

    Raises:
        ValueError: a bias isn't zero; says whose.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    for name, module in found:
        if not module.keeps_bias and module.bias is not None and module.bias.device.type != "meta":
            if module.bias.any():
                raise ValueError(f"the weights don't fit this model; tensors: 1 unexpected: {name}.bias")
            module.bias = None
    return found


def packing_fields(model: nn.Module) -> dict | None:
    """The `quantization_config` of a model with packed weights; `None` without any."""
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    if not linears:
        return None
    first = linears[0]
    sizes = {-1 if each.group_size == each.in_features else each.group_size for each in linears}
    fields = {"quant_method": first.method, "bits": first.bits}
    if len(sizes) == 1:  # else the shapes say it
        fields["group_size"] = sizes.pop()
    if first.method == "awq":
        return {**fields, "zero_point": True, "version": "gemm"}
    format_name = "gptq" if first.zero_offset else "gptq_v2"
    in_order = all(each.in_order for each in linears)
    return {**fields, "desc_act": not in_order, "sym": False, "checkpoint_format": format_name}


def add_to_config(directory: str | os.PathLike, fields: dict) -> None:
    """Add fields to the `config.json` of a directory."""
    path = Path(directory, "config.json")
    config = {**json.loads(path.read_text(encoding="utf-8")), **fields}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Begin the message of a `ValueError` with the name of what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def unpack_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Put a plain linear in place of each `PackedLinear`, one at a time, except those that are offloaded.

    The model is then saved under the names that it would have had from plain files.

    Raises:
        ValueError: a bias isn't zero, or a group index is wrong; says whose.
    """
    for name, module in packed_linears(model):
        module.requires_grad_(False)
        if module.settled is None and module.qweight.device.type == "meta":
            continue
        with naming(name):
            weight = module.unpack(dtype)
        plain = Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight)
        plain.bias = None if module.bias is None else nn.Parameter(module.bias.to(dtype))
        model.set_submodule(name, plain.train(module.training))
    vars(model).pop("_weight_conversions", None)  # the renamings that the packed file needed
