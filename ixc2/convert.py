"""`.bin` weights rewritten as sharded safetensors, one shard in memory at a time."""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ..checkpoint_internlm_xcomposer2 import INDEX_FILES, TensorHeader, load_torch_file

INDEX = INDEX_FILES[0]


@dataclass(frozen=True)
class Piece:
    """One file to be written: some of the tensors of one `.bin` file."""

    source: Path
    name: str
    tensors: tuple[str, ...]


def plan_pieces(headers: dict[str, TensorHeader], max_shard_size: int | str) -> list[Piece]:
    """Which tensors go into which safetensors file; no file holds more than `max_shard_size` bytes.

    Args:
        headers: what `read_headers` found in the `.bin` files.
        max_shard_size: bytes, or text such as `"5GB"`. A larger tensor gets its own file.

    Raises:
        ValueError: the size can't be read.
    """
    parts: list[tuple[Path, list[str]]] = []
    for source, names in groupby(headers, key=lambda name: headers[name].file):
        split = split_state_dict_into_shards_factory(
            {name: headers[name] for name in names},
            get_storage_size=lambda header: header.num_bytes,
            filename_pattern="{suffix}",
            max_shard_size=max_shard_size,
        )
        parts += [(source, names) for names in split.filename_to_tensors.values() if names]
    if len(parts) == 1:
        return [Piece(parts[0][0], "model.safetensors", tuple(parts[0][1]))]
    return [
        Piece(source, f"model-{i + 1:05}-of-{len(parts):05}.safetensors", tuple(names))
        for i, (source, names) in enumerate(parts)
    ]


def index_of(pieces: list[Piece], headers: dict[str, TensorHeader]) -> dict:
    """The content of the index that lists these files."""
    weight_map = {name: piece.name for piece in pieces for name in piece.tensors}
    total_size = sum(headers[name].num_bytes for name in weight_map)
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}


def convert(pieces: list[Piece], directory: Path) -> None:
    """Write these files into `directory`.

    Memory use is that of the largest file: tensors are mapped from the `.bin` file, and released before the
    next file is started.

    Raises:
        OSError: the disk is full, or a file can't be read or written.
    """
    for piece in logging.tqdm(pieces, desc="converting", unit="file"):
        save_file(_tensors_of(piece), directory / piece.name, metadata={"format": "pt"})


def _tensors_of(piece: Piece) -> dict[str, Tensor]:
    """The tensors of a piece, contiguous and without shared memory, as safetensors requires."""
    loaded = load_torch_file(piece.source)
    chosen = {name: loaded[name] for name in piece.tensors}
    sharers = Counter(tensor.untyped_storage().data_ptr() for tensor in chosen.values())
    for name, tensor in chosen.items():
        if sharers[tensor.untyped_storage().data_ptr()] > 1:
            chosen[name] = tensor.clone(memory_format=torch.contiguous_format)
        else:
            chosen[name] = tensor.contiguous()
    return chosen
