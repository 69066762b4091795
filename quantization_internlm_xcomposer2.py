"""Quantised models: what stays in full precision, and what loading and saving have to look after."""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

logger = logging.get_logger(__name__)

# Everything but the plain linears of the decoder, in the patterns that transformers' quantisers know: names
# of modules, or expressions. Image tokens pass through all of it, and it is a small part of the weights.
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
    """What `from_pretrained` passes on for a caller's `quantization_config`, which stays as it is.

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
    """Raise `ValueError` where torchao's int4 layout for GPUs was asked for, but the weights go to a CPU."""
    layout = type(getattr(config, "quant_type", None)).__name__
    places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    on_cpu = places <= {None, "cpu", torch.device("cpu")} or not torch.accelerator.is_available()
    if layout == "Int4WeightOnlyConfig" and on_cpu:
        raise ValueError(
            "torchao's Int4WeightOnlyConfig has no layout for a CPU; take PrototypeInt4WeightOnlyConfig of "
            "torchao.prototype.quantization.int4 (4 bits in memory), or IntxWeightOnlyConfig(torch.int4, "
            "PerGroup(32)) of torchao.quantization (4-bit values, a byte each)"
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
            f"{len(plain)} of {len(linears)} linears of the decoder were not quantised, {plain[0]} for one: "
            "their widths don't fit the group size, or the quantization_config names them"
        )


def _is_plain(module: nn.Module) -> bool:
    weight = module.weight
    return type(module) is nn.Linear and weight.is_floating_point() and type(weight) is nn.Parameter


def _settle_4bit(module: nn.Module) -> None:
    """Keep bitsandbytes' fused kernel for CPUs to the widths that it takes, and its layout out of files.

    The kernel repacks a weight at the first forward, which fails unless the widths are multiples of 32 (out)
    and of the block size (in); other widths are dequantised instead.
    """
    state = getattr(module.weight, "quant_state", None)
    block = getattr(state, "blocksize", None)
    if block and (module.out_features % 32 or module.in_features % block):
        module.support_avx512bf16_for_cpu = False
    module.register_state_dict_pre_hook(_restore_absmax)


def _restore_absmax(module: nn.Module, *_) -> None:
    """Give a repacked 4-bit weight its scales back in the order of the file, before it is written.

    bitsandbytes 0.50 turns back the weight alone: the scales would stay transposed, in the file and in the
    model, and doubly quantised ones would be rounded a second time. They are written as they are in use.
    """
    state = getattr(module.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        state.original_nested = False
        state.absmax = state.absmax.T.reshape(-1).float()


@contextmanager
def saving_quantized(model: PreTrainedModel) -> Iterator[None]:
    """Within it, `save_pretrained` writes a quantised model so that it can be read back.

    Raises:
        ValueError: before anything is written, where the quantiser's tensors have no form in a file.
    """
    quantizer = model.hf_quantizer
    try:
        tensors, metadata = quantizer.get_state_dict_and_metadata(model)
    except ValueError as error:
        raise ValueError(
            f"this model's quantised weights can't be saved ({error}); save the unquantised model and "
            "quantise it at each loading"
        ) from error
    if tensors is None:
        yield
        return
    # A copy for the time of the call: torchao trips over names without a dot, such as the newline vectors'.
    prepared = tensors, quantized_metadata(metadata)
    stand_in = copy.copy(quantizer)
    stand_in.get_state_dict_and_metadata = lambda _: prepared
    model.hf_quantizer = stand_in
    try:
        yield
    finally:
        model.hf_quantizer = quantizer


def quantized_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """torchao's metadata without that of plain tensors, which need none.

    Raises:
        ValueError: all tensors are plain, which torchao can't read back as a quantised model.
    """
    names = json.loads(metadata["tensor_names"])
    kept = [name for name in names if json.loads(metadata[name]).get("_type") != "Tensor"]
    if not kept:
        raise ValueError("none of this model's weights is quantised; save it without a quantization_config")
    return {"tensor_names": json.dumps(kept), **{name: metadata[name] for name in kept}}
