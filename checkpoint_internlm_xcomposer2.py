"""What lies in a checkpoint directory: the names and shapes of its tensors, read without loading them."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import cached_file

# In the order in which transformers prefers them.
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# Arguments of `from_pretrained` that say where a hub checkpoint is found.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "proxies",
)


def checkpoint_shapes(source: str | os.PathLike, **hub_arguments) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, by name.

    Args:
        source: a directory, or a hub id, whose files then go through the hub's own cache.
        hub_arguments: those of `HUB_ARGUMENTS`.

    Raises:
        FileNotFoundError: no weights lie there.
        ValueError: a file of weights is truncated or damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_paths(source, hub_arguments):
        try:
            shapes.update(_safetensors_shapes(path) if path.suffix == ".safetensors" else _torch_shapes(path))
        except Exception as error:  # each format raises its own kinds
            raise ValueError(f"{path} can't be read as a file of weights: {error}") from error
    return shapes


def _weight_paths(source: str | os.PathLike, hub_arguments: dict) -> list[Path]:
    for index, single in zip(_INDEX_FILES, _WEIGHT_FILES, strict=True):
        if path := _find(source, single, hub_arguments):
            return [path]
        if path := _find(source, index, hub_arguments):
            names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            found = {name: _find(source, name, hub_arguments) for name in names}
            if missing := [name for name, shard in found.items() if shard is None]:
                raise FileNotFoundError(
                    f"{source} lacks {len(missing)} of its {len(names)} shards: {', '.join(missing)}"
                )
            return list(found.values())
    raise FileNotFoundError(f"no weights in {source}; looked for {', '.join(_WEIGHT_FILES + _INDEX_FILES)}")


def _find(source: str | os.PathLike, name: str, hub_arguments: dict) -> Path | None:
    path = cached_file(
        os.fspath(source),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=True,
        **hub_arguments,
    )
    return Path(path) if path else None


def _safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _torch_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    tensors = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_not_packed(shapes: dict, config, source) -> None:
    """Raise `ValueError` for 4-bit weights that no quantiser has been named for."""
    num_packed = sum(name.endswith(".qweight") for name in shapes)
    if num_packed and getattr(config, "quantization_config", None) is None:
        raise ValueError(
            f"{source} holds {num_packed} packed weights (GPTQ or AWQ), which this package does not unpack, "
            "and its config.json names no quantization_config; load the unquantised checkpoint"
        )


def check_loading(info: dict, source) -> None:
    """Raise `ValueError` that lists every tensor that is missing, unknown or of another shape."""
    faults = [
        f"{len(info[kind])} {what}: {', '.join(sorted(map(str, info[kind])))}"
        for kind, what in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unexpected"),
            ("mismatched_keys", "of another shape"),
            ("error_msgs", "errors"),
        )
        if info.get(kind)
    ]
    if faults:
        raise ValueError(f"the weights in {source} don't fit this model; tensors {'; '.join(faults)}")
