"""The decoder over several processes: which of its linears are cut how, and what has to divide for that."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Linears whose outputs are cut between the processes, and those whose inputs are.
_CUT_OUTPUTS = ("attention.wqkv", "feed_forward.w1", "feed_forward.w3")
_CUT_INPUTS = ("attention.wo", "feed_forward.w2")


def tensor_parallel_plan(adapters: dict[str, int]) -> dict[str, str]:
    """transformers' plan for the decoder, its low-rank weights and task adapters.

    `wqkv` packs whole key-value groups one after the other, so its rows are cut between groups. Of two
    low-rank factors the one that meets what is cut is cut with it, and the other is whole everywhere.

    Args:
        adapters: the task adapters of the checkpoint by name.
    """
    low_rank = ["Plora", *(f"lora_{name}" for name in adapters)]
    plan = {"tok_embeddings": "embedding_rowwise"}
    for names, style, factor in ((_CUT_OUTPUTS, "colwise", "B"), (_CUT_INPUTS, "rowwise", "A")):
        for name in names:
            plan[f"layers.*.{name}.linear"] = style
            plan |= {f"layers.*.{name}.{pair}_{factor}": style for pair in low_rank}
    return plan


def tensor_parallel_size(arguments: dict) -> int:
    """Between how many processes the arguments of `from_pretrained` cut the model."""
    settings = arguments.get("distributed_config") or {}
    settings = settings if isinstance(settings, dict) else vars(settings)
    plan, size = (arguments.get(name) or settings.get(name) for name in ("tp_plan", "tp_size"))
    mesh = arguments.get("device_mesh")
    if size is None and plan is not None and mesh is not None:
        size = (mesh["tp"] if mesh.ndim > 1 else mesh).size()
    elif size is None and plan is not None:
        others = math.prod(settings.get(f"{kind}_size") or 1 for kind in ("fsdp", "dp_replicate", "pp"))
        size = int(os.environ.get("WORLD_SIZE", 1)) // others
    return size or 1


def check_divisible(text_config, size: int) -> None:
    """Raise `ValueError` unless `size` processes can share the decoder evenly."""
    for name in ("num_key_value_heads", "intermediate_size", "vocab_size"):
        total = getattr(text_config, name)
        if total % size:
            raise ValueError(
                f"{size} processes can't share {name} {total} evenly; start a number of them that divides "
                f"it, of at most {text_config.num_key_value_heads}"
            )


def check_gatherable(model) -> None:
    """Raise `ValueError` if transformers would save parts of linears as if they were whole.

    Before it knew what it had cut (by `DTensor`), it found the cut linears by names without numbers, and so
    none of `w1`, `w2` and `w3`.
    """
    size = getattr(model, "_tp_size", None) or 1
    if size > 1 and not hasattr(model.model.layers[0].feed_forward.w1.weight, "full_tensor"):
        raise ValueError(
            f"this transformers can't put together again what {size} processes hold; save the model from one "
            "process, or upgrade transformers"
        )


@contextmanager
def same_draws(model) -> Iterator[None]:
    """Let all processes that share a model draw the same tokens, whatever their own random states.

    They draw from a seed of the first process, which takes it from its own generator. A model that is not
    shared draws as ever.
    """
    if (getattr(model, "_tp_size", None) or 1) == 1:
        yield
        return
    import torch  # here, because the configuration imports this module and needs no torch

    mesh, device = model._device_mesh, model.input_device
    group = mesh.get_group("tp") if "tp" in (mesh.mesh_dim_names or ()) else mesh.get_group()
    seed = torch.randint(2**63 - 1, (1,)).to(device)
    torch.distributed.broadcast(seed, group=group, group_src=0)
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(int(seed))
        yield
