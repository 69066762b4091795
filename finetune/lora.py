"""LoRA and QLoRA on the decoder, with peft."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from internlm_xcomposer2.configuration_internlm_xcomposer2 import FIRST_GENERATION
from internlm_xcomposer2.files_internlm_xcomposer2 import (
    FLAG,
    MAPPING,
    SIZE,
    TEXT,
    blaming,
    check_fields,
    either,
    is_file,
    list_of,
    number,
    read_fields,
)
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from .arguments import FIRST_LORA_TARGETS, LORA_TARGETS, ModelArguments

# What is trained and saved as a whole beside LoRA, if the sampler isn't frozen.
_SAMPLER, _FIRST_SAMPLER = ("vision_proj",), ("internlm_proj", "Qformer")


def import_peft():
    """The peft package.

    Raises:
        ImportError: it isn't installed; says how to install it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs the peft package; install it with pip install '.[finetune]'") from error
    return peft


def target_modules(names: Iterable[str] | None, version: str = "2.5") -> list[str]:
    """The decoder's linears that these names refer to, as published (`attention.wqkv`).

    Args:
        names: as published, with or without the first part, or followed by `.linear`; `None` for all.
        version: the checkpoint's.

    Raises:
        ValueError: a name is not one of the decoder's linears, or there are no names.
    """
    targets = FIRST_LORA_TARGETS if version == FIRST_GENERATION else LORA_TARGETS
    known = {short: name for name in targets for short in (name, name.split(".")[1])}
    names = list(targets if names is None else names)
    wrong = [name for name in names if name.removesuffix(".linear") not in known]
    if wrong or not names:
        raise ValueError(
            f"--lora_target_modules accepts {', '.join(targets)}, not {', '.join(wrong) or 'none'}"
        )
    return list(dict.fromkeys(known[name.removesuffix(".linear")] for name in names))


def quantization(arguments: ModelArguments, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How `from_pretrained` should quantise the decoder's plain linears."""
    if arguments.quantize == "none":
        return None
    if arguments.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def add_lora(
    model: PreTrainedModel, arguments: ModelArguments, task: str = "CAUSAL_LM", heads: Sequence[str] = ()
) -> nn.Module:
    """The model with new low-rank weights on the decoder's linears; only these train.

    With `fix_sampler` off, the projector (and in version 1.0 the Q-Former) trains too and is saved with them.

    Args:
        task: what peft calls this kind of model.
        heads: modules that train as a whole and are saved with them.

    Raises:
        ImportError: peft isn't installed.
        ValueError: a target is unknown.
    """
    peft, version = import_peft(), model.config.version
    sampler = _FIRST_SAMPLER if version == FIRST_GENERATION else _SAMPLER
    config = peft.LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=target_modules(arguments.lora_target_modules, version),
        modules_to_save=[*heads, *(() if arguments.fix_sampler else sampler)] or None,
        bias="none",
        task_type=task,
    )
    return peft.get_peft_model(model, config)


_ADAPTER_KINDS = {
    **dict.fromkeys(("base_model_name_or_path", "peft_type", "task_type", "bias"), TEXT.or_none()),
    **dict.fromkeys(("target_modules", "modules_to_save"), either(TEXT, list_of(TEXT)).or_none()),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "auto_mapping"), MAPPING.or_none()),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"), FLAG.or_none()),
    "r": SIZE,
    "lora_alpha": number(0, 1e6),
    "lora_dropout": number(0, 1),
}


def adapter_fields(directory: Path) -> dict:
    """The content of an adapter's `adapter_config.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it can't be read, or a field is of the wrong kind; names both.
    """
    path = directory / "adapter_config.json"
    if not is_file(path):
        raise FileNotFoundError(f"{directory} holds no adapter: adapter_config.json is missing")
    fields = read_fields(path)
    with blaming(path):
        check_fields(fields, _ADAPTER_KINDS)
    return fields


def load_adapter(model: PreTrainedModel, directory: Path) -> nn.Module:
    """The model with a trained adapter on it, one of ours or of the published training.

    Raises:
        FileNotFoundError: the directory holds no peft adapter.
        ValueError: the adapter isn't LoRA, or its weights don't fit the model.
    """
    peft = import_peft()
    adapter_fields(directory)
    with blaming(directory / "adapter_config.json"):
        config = peft.PeftConfig.from_pretrained(str(directory))
    if config.peft_type != peft.PeftType.LORA:
        raise ValueError(
            f"{directory} holds an adapter of type {config.peft_type.value}; only LoRA is supported"
        )
    if not model.can_generate() and config.task_type == "CAUSAL_LM":  # as in the published reward training
        config.task_type = None
    with blaming(directory):
        weights = peft.utils.load_peft_weights(str(directory), device="cpu")
    names = set(weights)  # peft removes some
    try:
        wrapped = peft.get_peft_model(model, config)
        unknown = peft.set_peft_model_state_dict(wrapped, weights).unexpected_keys
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"the adapter in {directory} doesn't fit this model: {error}") from error
    lacking = set(peft.get_peft_model_state_dict(wrapped)).difference(names)
    if unknown or lacking:
        raise ValueError(
            f"the adapter in {directory} doesn't fit this model: {len(unknown)} of its tensors are unknown "
            f"{unknown[:3]}, {len(lacking)} are missing {sorted(lacking)[:3]}"
        )
    return wrapped.train(model.training)
