"""LoRA and QLoRA on the decoder, by peft."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from .arguments import LORA_TARGETS, ModelArguments

# A published adapter sits on the linear itself, ours on the plain linear in it: the same product.
_PUBLISHED_KEY = re.compile(r"\.(wqkv|wo|w1|w2|w3)\.(lora_[AB]\.)")


def import_peft():
    """The package peft.

    Raises:
        ImportError: it isn't installed; says how to.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs the package peft; install it with pip install '.[finetune]'") from error
    return peft


def target_modules(names: Iterable[str]) -> list[str]:
    """The names that peft needs for these linears of the decoder.

    Args:
        names: as published (`attention.wqkv`), or of the plain linear in it (`attention.wqkv.linear`).

    Raises:
        ValueError: a name is none of the decoder's linears, or there is none.
    """
    names = list(names)
    found = our_targets(names)
    unknown = [name for name, ours in zip(names, found, strict=True) if not ours.endswith(".linear")]
    if unknown or not names:
        wrong = ", ".join(unknown) or "none"
        raise ValueError(f"--lora_target_modules takes some of {', '.join(LORA_TARGETS)}, not {wrong}")
    return list(dict.fromkeys(found))


def our_targets(names: Iterable[str]) -> list[str]:
    """Names of the decoder's linears as the plain linears in them; all other names as they are."""
    known = {short: name for name in LORA_TARGETS for short in (name, name.split(".")[1])}
    plain = [name.removesuffix(".linear") for name in names]
    return [f"{known[name]}.linear" if name in known else name for name in plain]


def quantization(arguments: ModelArguments, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How `from_pretrained` is to quantise the decoder's plain linears."""
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


def add_lora(model: PreTrainedModel, arguments: ModelArguments) -> nn.Module:
    """The model with new low-rank weights on the decoder's linears, which alone train.

    With `fix_sampler` off the projector trains too and is saved with them.

    Raises:
        ImportError: peft isn't installed.
        ValueError: a target is unknown.
    """
    peft = import_peft()
    config = peft.LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=target_modules(arguments.lora_target_modules),
        modules_to_save=None if arguments.fix_sampler else ["vision_proj"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, config)
    # peft finds its weights by "lora_" in their names, which Plora_A and lora_sft_A hold as well.
    for name, weight in wrapped.named_parameters():
        weight.requires_grad_(_is_peft_weight(name))
    return wrapped


def _is_peft_weight(name: str) -> bool:
    return name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) or (
        ".modules_to_save.default." in name
    )


def our_adapter_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of an adapter under our names: those of the published training sit one level higher."""
    return {_PUBLISHED_KEY.sub(r".\1.linear.\2", name): value for name, value in weights.items()}


def load_adapter(model: PreTrainedModel, directory: Path) -> nn.Module:
    """The model with a trained adapter on it, ours or one of the published training.

    Raises:
        FileNotFoundError: the directory holds no adapter of peft.
        ValueError: the adapter is none of LoRA, or its weights don't fit the model.
    """
    peft = import_peft()
    if not (directory / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{directory} holds no adapter: adapter_config.json is missing")
    config = peft.PeftConfig.from_pretrained(str(directory))
    if config.peft_type != peft.PeftType.LORA:
        raise ValueError(
            f"{directory} holds an adapter of the kind {config.peft_type.value}; only LoRA is known"
        )
    if not isinstance(config.target_modules, str):  # a regular expression stays
        config.target_modules = our_targets(config.target_modules)
    weights = our_adapter_keys(peft.utils.load_peft_weights(str(directory), device="cpu"))
    try:
        wrapped = peft.get_peft_model(model, config)
        unknown = peft.set_peft_model_state_dict(wrapped, weights).unexpected_keys
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the adapter in {directory} doesn't fit this model: {error}") from error
    lacking = set(peft.get_peft_model_state_dict(wrapped)).difference(weights)
    if unknown or lacking:
        raise ValueError(
            f"the adapter in {directory} doesn't fit this model: {len(unknown)} of its tensors are unknown "
            f"{unknown[:3]}, {len(lacking)} are missing {sorted(lacking)[:3]}"
        )
    return wrapped.train(model.training)
