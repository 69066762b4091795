"""Training in several processes: what each of them must run, whatever its batch holds."""

import torch
from torch import Tensor, nn

from .configuration_internlm_xcomposer2 import InternLMXcomposer2Config


def is_shared_out(module: nn.Module) -> bool:
    """Whether processes hold parts of the module's first weight (FSDP2, DeepSpeed ZeRO-3).

    They put it together for each call, so that each of them must call the module equally often.
    """
    weight = next(module.parameters(), None)
    return hasattr(weight, "placements") or hasattr(weight, "ds_id")  # marks of DTensor and of DeepSpeed


def is_frozen(module: nn.Module) -> bool:
    """Whether none of the module's weights is trained."""
    return not any(weight.requires_grad for weight in module.parameters())


def must_see_pictures(model: nn.Module) -> bool:
    """Whether a training or evaluation batch without pictures must pass through the vision parts anyway.

    In training, each weight that is trained gets a gradient from every batch, zero where the batch holds no
    picture: other processes wait for it, and the optimiser treats every step alike.
    """
    if is_shared_out(model.vit.last_layer):
        return True
    if not (model.training and torch.is_grad_enabled()):
        return False
    newlines = (getattr(model, name, None) for name in ("plora_glb_GN", "plora_sub_GN"))
    trained = any(newline is not None and newline.requires_grad for newline in newlines)
    return trained or not (is_frozen(model.vit) and is_frozen(model.vision_proj))


def blank_picture(config: InternLMXcomposer2Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """The smallest picture, of zeros: (tiles, 3, side, side) and its (1, 2) grid."""
    num_tiles = 2 if config.is_tiled else 1
    pixel_values = torch.zeros(num_tiles, 3, config.img_size, config.img_size, device=device)
    return pixel_values, torch.ones(1, 2, dtype=torch.long, device=device)
