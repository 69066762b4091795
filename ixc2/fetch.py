"""Checkpoints from a hub: downloaded through its own library and cache, or only inspected remotely."""

import os
import re
from pathlib import Path

import torch
from huggingface_hub import HfApi, HfFileSystem, snapshot_download

from ..checkpoint_internlm_xcomposer2 import (
    INDEX_FILES,
    SAFETENSORS_DTYPES,
    WEIGHT_FILES,
    TensorHeader,
    check_named,
    read_weight_map,
)
from ..files_internlm_xcomposer2 import check_link

HUBS = ("huggingface", "modelscope")
_SMALL_FILES = ("*.json", "*.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BLOCK = 1 << 18  # bytes that are read remotely at a time


def is_hub_id(source: str) -> bool:
    """Whether this names a repository (`owner/name`), not a directory."""
    return not os.path.lexists(source) and bool(_HUB_ID.fullmatch(source))


def fetch(source: str, hub: str = "huggingface", revision: str | None = None, subfolder: str = "") -> Path:
    """The directory of a checkpoint, which is downloaded into the hub's own cache if it is a hub id.

    Only what a checkpoint needs is downloaded, `.bin` weights only if there are no safetensors.

    Args:
        hub: `"huggingface"`, or `"modelscope"`, which needs the package of that name.
        revision: a branch, tag or commit of the repository.
        subfolder: where the checkpoint is in the repository or directory.

    Raises:
        FileNotFoundError: it is neither a directory nor on that hub, or the hub can't be reached.
        ImportError: `modelscope` is not installed.
    """
    if not is_hub_id(source):
        return _local(source, subfolder)
    folder = download(source, _SMALL_FILES, hub, revision, subfolder)
    for suffix in (".safetensors", ".bin"):
        folder = download(source, (f"*model*{suffix}",), hub, revision, subfolder)
        if any(folder.glob(f"*model*{suffix}")):
            break
    return folder


def fetch_description(
    source: str, hub: str = "huggingface", revision: str | None = None, subfolder: str = ""
) -> tuple[Path, dict[str, TensorHeader] | None]:
    """Like `fetch`, but for a Hugging Face repository only its small files and the headers of its weights.

    Raises:
        FileNotFoundError: it is neither a directory nor on that hub, or the hub can't be reached.
        ImportError: `modelscope` is not installed.
        ValueError: a weight file can't be read.
    """
    if not is_hub_id(source) or hub != "huggingface":
        return fetch(source, hub, revision, subfolder), None
    folder = download(source, _SMALL_FILES, hub, revision, subfolder)
    prefix = f"{subfolder}/" if subfolder else ""
    return folder, remote_headers(source, folder, revision, prefix)


def _local(source: str, subfolder: str) -> Path:
    folder = Path(source, subfolder)
    check_link(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is neither a directory nor the id of a repository (owner/name)")
    return folder


def download(
    repository: str, patterns: tuple[str, ...], hub: str, revision: str | None, subfolder: str
) -> Path:
    """Files of a repository that match the patterns -> the directory in the hub's cache that holds them."""
    prefix = f"{subfolder}/" if subfolder else ""
    wanted = [prefix + pattern for pattern in patterns]
    try:
        root = _downloader(hub)(repository, revision=revision, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        remedy = "" if hub == "modelscope" else "; if it is on ModelScope, add --from modelscope"
        raise FileNotFoundError(
            f"{repository} is not a directory here, and can't be downloaded from {hub}: {error}{remedy}"
        ) from error
    return Path(root, subfolder)


def _downloader(hub: str):
    if hub not in HUBS:
        raise ValueError(f"unknown hub {hub!r}; choose one of {', '.join(HUBS)}")
    if hub == "huggingface":
        return snapshot_download
    try:
        from modelscope import snapshot_download as modelscope_download
    except ImportError as error:
        raise ImportError("downloads from ModelScope need its package: pip install modelscope") from error
    return modelscope_download


# ---- remote files ----


def remote_headers(
    repository: str, folder: Path, revision: str | None = None, prefix: str = ""
) -> dict[str, TensorHeader]:
    """The headers of a repository's weights; only the ranges of the files that hold them are read.

    Args:
        folder: the local directory with the repository's small files, including a shard index.
        prefix: of the names of the files in the repository.

    Raises:
        FileNotFoundError: the repository has no weights.
        ValueError: a weight file can't be read.
    """
    headers: dict[str, TensorHeader] = {}
    for name in _weight_names(repository, folder, revision, prefix):
        read = _remote_safetensors if name.endswith(".safetensors") else _remote_torch
        try:
            headers.update(read(repository, prefix + name, revision))
        except Exception as error:  # each format, and the network, raises its own kinds
            raise ValueError(f"{repository}: {name} can't be read as a weight file: {error}") from error
    return headers


def _weight_names(repository: str, folder: Path, revision: str | None, prefix: str) -> list[str]:
    for index, single in zip(INDEX_FILES, WEIGHT_FILES, strict=True):
        if (folder / index).is_file():
            return sorted(set(read_weight_map(folder / index).values()))
        if HfApi().file_exists(repository, prefix + single, revision=revision):
            return [single]
    raise FileNotFoundError(f"no weights in {repository}; looked for {', '.join(WEIGHT_FILES + INDEX_FILES)}")


def _remote_safetensors(repository: str, path: str, revision: str | None) -> dict[str, TensorHeader]:
    found = HfApi().parse_safetensors_file_metadata(repository, path, revision=revision).tensors
    return {
        name: TensorHeader(tuple(tensor.shape), SAFETENSORS_DTYPES[tensor.dtype], Path(path))
        for name, tensor in found.items()
    }


def _remote_torch(repository: str, path: str, revision: str | None) -> dict[str, TensorHeader]:
    name = f"{repository}@{revision}/{path}" if revision else f"{repository}/{path}"
    with HfFileSystem().open(name, "rb", block_size=_BLOCK) as file, torch.serialization.skip_data():
        tensors = torch.load(file, map_location="meta", weights_only=True)
    check_named(tensors)
    return {
        key: TensorHeader(tuple(tensor.shape), tensor.dtype, Path(path)) for key, tensor in tensors.items()
    }
