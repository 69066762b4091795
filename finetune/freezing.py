"""Which weights train."""

from collections.abc import Sequence

from internlm_xcomposer2.configuration_internlm_xcomposer2 import ADAPTERS_OF_MODE
from torch import nn

from .arguments import ModelArguments

# The parts that are frozen or trained as a whole, and what their names begin with or contain. No forward pass
# uses the first two of those that never train; flags of the first generation stay as they are, as published.
_NEVER = ("vit.vision_tower.vision_model.post_layernorm.", "video_mem_proj.", "flag_image_")
_TOWER = ("vit.", "visual_encoder.", "ln_vision.")
_PROJECTOR = ("vision_proj.", "plora_glb_GN", "plora_sub_GN", "Qformer.", "query_tokens", "internlm_proj.")
_LOW_RANK = (".Plora_", ".low_rank_")


def part_of(name: str) -> str:
    """The part that a weight belongs to, by its name in the model.

    `unused`, `tower`, `projector`, `plora`, `task:` plus an adapter's name, or `decoder`.
    """
    if name.startswith(_NEVER):
        return "unused"
    if name.startswith(_TOWER):
        return "tower"
    if name.startswith(_PROJECTOR):
        return "projector"
    if any(part in name for part in _LOW_RANK):
        return "plora"
    if ".lora_" in name:  # lora_sft_A.weight of a published task adapter
        return "task:" + name.split(".lora_")[1].split("_")[0]
    return "decoder"


def trained_parts(arguments: ModelArguments, adapters: Sequence[str] | None = None) -> set[str]:
    """The parts that train; LoRA's own weights are not among them.

    Args:
        adapters: the task adapters of `--train adapter`, by default all of the mode.
    """
    adapters = ADAPTERS_OF_MODE[arguments.infer_mode] if adapters is None else adapters
    parts = {
        "full": {"decoder", "plora"},
        "plora": {"plora"},
        "adapter": {f"task:{name}" for name in adapters},
        "lora": set(),
    }[arguments.train]
    if not arguments.fix_vit:
        parts.add("tower")
    if not arguments.fix_sampler and arguments.train != "lora":
        parts.add("projector")
    return parts


def freeze(model: nn.Module, arguments: ModelArguments, adapters: Sequence[str] | None = None) -> None:
    """Let exactly the requested parts of a model train. The model has no LoRA on it yet.

    Args:
        adapters: as in `trained_parts`.

    Raises:
        ValueError: nothing would train.
    """
    parts = trained_parts(arguments, adapters)
    for name, weight in model.named_parameters():
        weight.requires_grad_(part_of(name) in parts)
    if arguments.train != "lora" and not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            f"--train {arguments.train} finds no weights to train in this checkpoint; list its parts with "
            f"'ixc2 inspect {arguments.model_name_or_path}'"
        )


def hold_trained_in_float32(model: nn.Module) -> None:
    """Hold the weights that train in float32; a shorter type would round their small steps away."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def count_trained(model: nn.Module) -> tuple[int, int]:
    """How many numbers train, and how many there are."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
