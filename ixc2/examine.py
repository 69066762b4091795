"""What a checkpoint is, by the headers of its weights: version, sizes, parameters, memory."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..build_mlp import MAX_TILES_PER_BATCH
from ..checkpoint_internlm_xcomposer2 import (
    INDEX_FILES,
    WEIGHT_FILES,
    TensorHeader,
    adopt_command,
    asking_for_heads,
    config_class_of,
    published_shapes,
    quantize_fields,
    read_headers,
    read_weight_map,
    shards_without_index,
    skeleton,
    weight_paths,
)
from ..configuration_internlm_xcomposer import InternLMXComposerConfig, shapes_in_model
from ..configuration_internlm_xcomposer2 import CheckpointConfig, is_reward, published_name
from ..files_internlm_xcomposer2 import (
    SMALL_FILES,
    blaming,
    check_small_file,
    is_file,
    read_fields,
)
from ..image_processing_internlm_xcomposer2 import grid_of_image, tokens_of_grid
from ..modeling_internlm_xcomposer import InternLMXComposerForCausalLM
from ..modeling_internlm_xcomposer2 import (
    InternLMXComposer2ForCausalLM,
    InternLMXComposer2ForSequenceClassification,
)
from ..packing_internlm_xcomposer2 import Packing, packing_of, unpacked_shapes
from ..tokenization_internlm_xcomposer2 import tokenizer_class

# Beginnings of tensor names, and what they belong to; the first match counts.
_PARTS = {
    "vit.": "vision tower",
    "vision_proj.": "projector",
    "plora_": "newline vectors",
    "video_mem_proj.": "video memory projector",
    "model.tok_embeddings.": "token embeddings",
    "visual_encoder.": "vision tower",
    "ln_vision.": "vision tower",
    "Qformer.": "Q-Former",
    "query_tokens": "Q-Former",
    "internlm_proj.": "projector",
    "flag_image_": "flag vectors",
    "internlm_model.model.embed_tokens.": "token embeddings",
    "internlm_model.lm_head.": "output head",
    "internlm_model.": "decoder",
    "model.": "decoder",
    "output.": "output head",
    "score.": "reward head",
}
_BUFFERS = re.compile("|".join(InternLMXComposer2ForCausalLM._keys_to_ignore_on_load_unexpected))
_OPTIONAL = re.compile("|".join(InternLMXComposer2ForCausalLM._keys_to_ignore_on_load_missing))
# Weights of the decoder's plain linears, of both generations.
LINEAR = re.compile(r"\.(wqkv|wo|w1|w2|w3)(\.linear)?\.weight$|^internlm_model\..*_proj\.weight$")
_BUDGETS = (1, 6, 12, 24, 36, 55)

NF4_BYTES = 0.5 + 4 / 64  # per weight: four bits, and a float32 scale for each block of 64

FORMULAS = {
    "key-value cache": "2 x layers x key_value_heads x head_dim x tokens x bytes",
    "activations": (
        "the larger of decoder: tokens x 4 x (hidden + intermediate) x bytes, and tower: "
        f"min(tiles, {MAX_TILES_PER_BATCH}) x patches x 4 x (width + mlp) x bytes; "
        "an estimate, with attention that keeps no score matrix"
    ),
    "int8": "1 byte for each plain weight of the decoder's linears, 2 for everything else",
    "nf4": "0.5 + 4/64 bytes for each plain weight of the decoder's linears, 2 for everything else",
}


@dataclass(frozen=True)
class Findings:
    """What `examine` found out about a checkpoint."""

    source: Path
    fields: dict  # config.json as it is
    config: CheckpointConfig
    headers: dict[str, TensorHeader]
    paths: tuple[Path, ...]  # of the weights
    has_index: bool  # of its shards; or it has no shards
    packing: Packing | None
    shapes: dict[str, tuple[int, ...]]  # of the weights, unpacked
    notes: tuple[str, ...]  # what is missing or assumed, in plain words
    missing: tuple[str, ...]  # tensors that the model needs and the files lack
    unknown: tuple[str, ...]  # tensors that the model doesn't know
    faults: dict[str, str]  # by name of a small file: why it can't be read or used

    @property
    def is_bin(self) -> bool:
        """Whether the weights are `.bin` files."""
        return self.paths[0].suffix == ".bin"

    @property
    def is_sharded(self) -> bool:
        """Whether an index says, or must say, which file holds what."""
        return self.paths[0].name not in WEIGHT_FILES

    @property
    def dtype(self) -> torch.dtype:
        """The type of the embeddings, which stands for the checkpoint's."""
        names = ("model.tok_embeddings.weight", "internlm_model.model.embed_tokens.weight")
        return next(self.headers[name].dtype for name in names if name in self.headers)


def examine(
    source: str | os.PathLike,
    num_attention_heads: int | None = None,
    headers: dict[str, TensorHeader] | None = None,
) -> Findings:
    """Read `config.json` and the headers of the weights in a directory.

    Args:
        headers: of weights that are stored elsewhere.
        num_attention_heads: of the decoder, instead of what `config.json` says; the weights don't determine
            it.

    Raises:
        FileNotFoundError: no directory, no weights, or not all shards.
        ValueError: a file is damaged, or this isn't a checkpoint of the family.
    """
    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a directory")
    notes: list[str] = []
    if headers is None:
        paths, has_index = _weights_of(source, notes)
        headers = read_headers(paths)
    else:
        paths, has_index = sorted({header.file for header in headers.values()}), True
    if has_index and paths[0].name not in WEIGHT_FILES:
        _check_index(source, headers)
    fields = _fields_of(source, notes)
    if num_attention_heads is not None:
        fields["num_attention_heads"] = num_attention_heads
    shapes = {name: header.shape for name, header in headers.items()}
    check_config_fields(fields, source)
    says = fields.get("quantization_config") or quantize_fields(source)
    packing = packing_of(shapes, {"quantization_config": says})
    shapes = unpacked_shapes(shapes, packing) if packing else shapes
    config = _completed(fields, shapes, source)
    if not {"num_attention_heads"} & {*fields, *(fields.get("text_config") or {})}:
        heads = f"{config.num_attention_heads} attention heads of width {config.text_config.head_dim}"
        notes.append(f"config.json has no num_attention_heads: assumed {heads}")
    missing, unknown = compare_with_model(config, shapes, packing)
    weights = headers, tuple(paths), has_index, packing, shapes
    faults = faults_of_small_files(source, config.version)
    return Findings(source, fields, config, *weights, tuple(notes), missing, unknown, faults)


def faults_of_small_files(source: Path, version: str) -> dict[str, str]:
    """What is wrong with the files of the tokenizer, the processor and the generation, by their names."""
    checks = {**dict.fromkeys(SMALL_FILES, check_small_file), "tokenizer.model": tokenizer_class(version)}
    faults = {}
    for name, check in checks.items():
        try:
            if is_file(source / name):
                check(source / name)
        except (OSError, ValueError) as error:
            faults[name] = str(error)
    return faults


def _weights_of(source: Path, notes: list[str]) -> tuple[list[Path], bool]:
    try:
        return weight_paths(source), True
    except FileNotFoundError:
        shards = shards_without_index(source)
        if not shards or any(source.glob("*.index.json")):
            raise
        notes.append("no shard index")
        return shards, False


def _check_index(source: Path, headers: dict[str, TensorHeader]) -> None:
    """Every tensor that the index names must be in the shards."""
    is_bin = next(iter(headers.values())).file.suffix == ".bin"
    index = source / INDEX_FILES[is_bin]
    if lost := sorted(set(read_weight_map(index)) - set(headers)):
        raise ValueError(f"{index} names {len(lost)} tensors that are in no shard: {', '.join(lost[:5])}")


def _fields_of(source: Path, notes: list[str]) -> dict:
    """`config.json` as a dictionary, empty if there is none."""
    path = source / "config.json"
    if not is_file(path):
        notes.append("no config.json: every size comes from the weights")
        return {}
    try:
        return read_fields(path)
    except ValueError as error:
        raise ValueError(f"{error}, then run: {adopt_command(source)}") from error


def check_config_fields(fields: dict, source: Path) -> None:
    """Raise `ValueError` for a field of `config.json` that is wrong by itself, before others rely on it."""
    with blaming(source / "config.json"):
        config_class_of(fields).from_dict({n: value for n, value in fields.items() if n != "model_type"})


def _completed(fields: dict, shapes: dict[str, tuple[int, ...]], source: Path) -> CheckpointConfig:
    config_class = config_class_of(fields, shapes)
    config = config_class.from_dict({name: value for name, value in fields.items() if name != "model_type"})
    with blaming(f"the weights in {source}"), asking_for_heads(source):
        return config.complete_from_shapes(shapes)


def compare_with_model(
    config: CheckpointConfig, shapes: dict[str, tuple[int, ...]], packing: Packing | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tensors that the files lack, and those that the model doesn't know; a wrong shape counts as both.

    Args:
        shapes: those of the weights, unpacked. Packed linears may have a bias: one of zeros is dropped.
    """
    model_class = (
        InternLMXComposer2ForSequenceClassification if is_reward(shapes) else InternLMXComposer2ForCausalLM
    )
    if isinstance(config, InternLMXComposerConfig):
        model_class = InternLMXComposerForCausalLM
        shapes = shapes_in_model(shapes, folds_low_rank=False)
    expected = set(published_shapes(skeleton(model_class, config)).items())
    biases = {f"{linear}.bias" for linear in packing.linears} if packing else set()
    pairs = {(published_name(name), shape): name for name, shape in shapes.items()}
    found = {pair for pair, name in pairs.items() if name not in biases or pair in expected}
    missing = {_named(pair) for pair in expected - found if not _OPTIONAL.search(pair[0])}
    unknown = {_named(pair) for pair in found - expected if not _BUFFERS.search(pair[0])}
    return tuple(sorted(missing)), tuple(sorted(unknown))


def quantisation_of(findings: Findings) -> dict | None:
    """Method, bits, group size and number of packed linears; `None` if none is packed."""
    packing = findings.packing
    if packing is None:
        return None
    linear = packing.linears[0]
    num_inputs, num_groups = (
        findings.shapes[published_name(f"{linear}.weight")][1],
        findings.headers[f"{linear}.scales"].shape[0],
    )
    return {
        "method": packing.method,
        "bits": packing.bits,
        "group_size": num_inputs // num_groups if packing.group_size in (None, -1) else packing.group_size,
        "num_linears": len(packing.linears),
    }


def _named(pair: tuple[str, tuple[int, ...]]) -> str:
    name, shape = pair
    return f"{name} ({', '.join(map(str, shape))})"


# ---- parameters and memory ----


def part_of(name: str) -> str:
    """What a tensor belongs to."""
    if re.search(r"\.lora_[AB]\.", name):
        return "low-rank weights"
    if ".Plora_" in name:
        return "PLoRA"
    if adapter := re.search(r"\.lora_(\w+)_[AB]\.", name):
        return f"task adapter {adapter[1]}"
    return next((part for prefix, part in _PARTS.items() if name.startswith(prefix)), "other")


def count_parameters(findings: Findings) -> dict[str, int]:
    """Parameters of each part, without buffers; packed weights count as what they unpack to."""
    counts: dict[str, int] = {}
    for name, shape in findings.shapes.items():
        if not _BUFFERS.search(name):
            counts[part_of(name)] = counts.get(part_of(name), 0) + math.prod(shape)
    return counts


def weight_memory(findings: Findings) -> dict[str, int]:
    """Bytes that the weights take in memory, by type; `stored` is what they take on disk."""
    total = sum(count_parameters(findings).values())
    linears = sum(math.prod(shape) for name, shape in findings.shapes.items() if LINEAR.search(name))
    return {
        "stored": sum(header.num_bytes for header in findings.headers.values()),
        "float32": 4 * total,
        "bfloat16": 2 * total,
        "float16": 2 * total,
        "int8": 2 * total - linears,
        "nf4": int(2 * total - (2 - NF4_BYTES) * linears),
    }


@dataclass(frozen=True)
class PictureCost:
    """What one picture costs."""

    hd_num: int | None  # None if pictures are one square
    grid: tuple[int, int]  # rows and columns of local tiles
    tokens: int
    cache_bytes: int
    activation_bytes: int


def picture_costs(config: CheckpointConfig, size: tuple[int, int], num_bytes: int = 2) -> list[PictureCost]:
    """Tokens and memory of one picture of (height, width) pixels at each usual `hd_num`.

    Args:
        num_bytes: of one value, 2 for bfloat16 and float16.
    """
    budgets = sorted({*_BUDGETS, config.hd_num}) if config.is_tiled else [None]
    return [_cost(config, size, hd_num, num_bytes) for hd_num in budgets]


def _cost(config: CheckpointConfig, size: tuple[int, int], hd_num: int | None, num_bytes: int) -> PictureCost:
    text, vision = config.text_config, config.vision_config
    grid = grid_of_image(config, *size, hd_num)
    tokens = tokens_of_grid(config, grid)
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens * num_bytes
    decoder = tokens * 4 * (text.hidden_size + text.intermediate_size) * num_bytes
    tiles = min(grid[0] * grid[1] + config.is_tiled, MAX_TILES_PER_BATCH)
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    tower = tiles * patches * 4 * (vision.hidden_size + vision.intermediate_size) * num_bytes
    return PictureCost(hd_num, grid, tokens, cache, max(decoder, tower))
