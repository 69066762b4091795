"""The quantisations that are tested and measured here, by the short names that scripts accept."""

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

# name: what it is, for tables
QUANTIZATIONS = {
    "int8": "bitsandbytes int8",
    "nf4": "bitsandbytes nf4",
    "nf4-double": "bitsandbytes nf4, scales quantised too",
    "torchao-int8": "torchao int8, weights only",
    "torchao-intx4": "torchao int4 values in a byte each, groups of 32",
    "torchao-int4": "torchao int4 for CPUs (prototype), groups of 32",
}


def quantization_config(name: str, **fields) -> QuantizationConfigMixin:
    """The `quantization_config` for a short name, with other fields of its class.

    Raises:
        ValueError: there is no such name.
        ImportError: its package is not installed (`pip install -e '.[quant]'`).
    """
    if name not in QUANTIZATIONS:
        raise ValueError(f"unknown quantization {name!r}; choose one of {', '.join(QUANTIZATIONS)}")
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **fields)
    if name.startswith("nf4"):
        double = name == "nf4-double"
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, **fields
        )
    return TorchAoConfig(_torchao_layout(name), **fields)


def _torchao_layout(name: str):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if name == "torchao-int8":
        return Int8WeightOnlyConfig()
    if name == "torchao-intx4":
        return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=32)
