"""The small files of an adopted checkpoint: configurations, tokenizer, processor, template, modules."""

import ast
import copy
import json
import os
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from ..configuration_internlm_xcomposer import CONFIG_AUTO_MAP as FIRST_AUTO_MAP
from ..configuration_internlm_xcomposer import TOKENIZER_AUTO_MAP as FIRST_TOKENIZER_AUTO_MAP
from ..configuration_internlm_xcomposer2 import (
    CONFIG_AUTO_MAP,
    FIRST_GENERATION,
    IMAGE_PROCESSOR_AUTO_MAP,
    REWARD_AUTO_MAP,
    TOKENIZER_AUTO_MAP,
    CheckpointConfig,
    is_reward,
)
from ..files_internlm_xcomposer2 import is_file, read_fields, read_small
from ..image_processing_internlm_xcomposer2 import InternLMXComposer2ImageProcessor
from ..processing_internlm_xcomposer2 import InternLMXComposer2Processor, default_template
from ..tokenization_internlm_xcomposer2 import tokenizer_class
from .examine import Findings

# The modules of the package, and nano's files beside them.
PACKAGE = Path(__file__).resolve().parents[1]
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
)
# LMDeploy distinguishes the versions by which of the published transforms it finds in this module.
_TRANSFORMS = "ixc_utils.py"
FOREIGN_TRANSFORMS = {"2": ("Image_transform", "HD_transform"), "2-4khd": ("Image_transform",)}
# Files of a checkpoint that are copied along with its weights unchanged.
_TRAVELLING = ("LICENSE*", "NOTICE*", "README.md", "quantize_config.json", "quant_config.json")
# What a published generation_config.json says about other things: its `max_length` limits a prompt.
_NOT_GENERATION = ("max_length", "transformers_version", "_from_model_config")


def describe_checkpoint(
    findings: Findings, tokenizer: Path | None = None
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Every small file of an adopted directory by name, and what is missing, in plain words.

    Args:
        tokenizer: a `tokenizer.model` to use if the checkpoint has none.

    Raises:
        FileNotFoundError: `tokenizer` doesn't exist.
        ValueError: the vocabulary isn't one of this family, or doesn't fit the weights.
    """
    notes: list[str] = []
    files = _modules(findings.config.version)
    for pattern in _TRAVELLING:
        files |= _texts(findings.source, pattern, notes)
    files |= _tokenizer_files(findings, tokenizer, notes)
    files |= _processor_files(findings.config)
    files["generation_config.json"] = json_bytes(_generation_fields(findings, notes))
    files["config.json"] = _config_bytes(findings)
    if "tokenizer.model" in files:
        _check_by_loading(files, findings)
    return files, tuple(notes)


def _texts(source: Path, pattern: str, notes: list[str]) -> dict[str, bytes]:
    """Files that are copied unseen, so only the checkpoint's own: what lies elsewhere may be anything."""
    named = [path for path in sorted(source.iterdir()) if fnmatch(path.name, pattern)]
    found = [path for path in named if is_file(path)]
    own = [path for path in found if _is_own(path, source)]
    notes += [f"{path.name} is a link to another place: not copied" for path in found if path not in own]
    return {path.name: read_small(path) for path in own}


def _is_own(path: Path, source: Path) -> bool:
    """Whether a file is inside its directory, if links are followed, or in the hub's cache with it."""
    folder, real = Path(os.path.realpath(source)), Path(os.path.realpath(path))
    caches = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    return folder in real.parents or any(cache in real.parents for cache in caches)


def _modules(version: str) -> dict[str, bytes]:
    """The modules that remote code reaches from the classes named in an adopted directory, by name."""
    entries = [
        *(FIRST_AUTO_MAP if version == FIRST_GENERATION else CONFIG_AUTO_MAP).values(),
        *IMAGE_PROCESSOR_AUTO_MAP.values(),
        TOKENIZER_AUTO_MAP["AutoTokenizer"][0],
    ]
    paths = {PACKAGE / f"{entry.split('.')[0]}.py" for entry in entries}
    for path in list(paths):
        paths |= {Path(imported) for imported in get_relative_import_files(path)}
    files = {path.name: path.read_bytes() for path in sorted(paths)}
    files[_TRANSFORMS] = without_functions(files[_TRANSFORMS], FOREIGN_TRANSFORMS.get(version, ()))
    return files


def without_functions(source: bytes, names: tuple[str, ...]) -> bytes:
    """A module's source without the functions with these names."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            del lines[node.lineno - 1 : node.end_lineno]
    return b"".join(lines)


def json_bytes(content: dict) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _fields_beside(findings: Findings, name: str, notes: list[str]) -> dict:
    """A JSON file of the checkpoint, empty if it has none."""
    if is_file(findings.source / name):
        return read_fields(findings.source / name)
    notes.append(f"no {name}: written with this package's defaults")
    return {}


# ---- configurations ----


def _config_bytes(findings: Findings) -> bytes:
    config = copy.deepcopy(findings.config)
    config.auto_map = REWARD_AUTO_MAP if is_reward(findings.headers) else CONFIG_AUTO_MAP
    if config.version == FIRST_GENERATION:
        config.auto_map = FIRST_AUTO_MAP
    config.architectures = [config.auto_map["AutoModel"].rsplit(".", 1)[1]]
    if findings.dtype.is_floating_point:
        config.dtype = findings.dtype
    return config.to_json_string(use_diff=False).encode()


def _generation_fields(findings: Findings, notes: list[str]) -> dict:
    """The checkpoint's own settings, and the tokens at which an answer stops."""
    text = findings.config.text_config
    own = _fields_beside(findings, "generation_config.json", notes)
    fields = {name: value for name, value in own.items() if name not in _NOT_GENERATION}
    stops = fields.get("eos_token_id", text.eos_token_id)
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    if findings.config.end_token_id not in stops and findings.config.end_token_id < text.vocab_size:
        stops.append(findings.config.end_token_id)
    defaults = {"bos_token_id": text.bos_token_id, "pad_token_id": findings.config.pad_token_id}
    return {**defaults, **fields, "eos_token_id": stops}


# ---- tokenizer, processor and template ----


def _tokenizer_files(findings: Findings, given: Path | None, notes: list[str]) -> dict[str, bytes]:
    """The vocabulary, and a `tokenizer_config.json` with our class and the checkpoint's own fields."""
    ours = read_fields(PACKAGE / "tokenizer_config.json")
    own = _fields_beside(findings, "tokenizer_config.json", notes)
    side = {"padding_side": ours["padding_side"]}  # pipelines pad batches by it
    auto_map = ours["auto_map"]
    if findings.config.version == FIRST_GENERATION:
        auto_map = FIRST_TOKENIZER_AUTO_MAP
    named = tokenizer_class(findings.config.version).__name__
    fields = {**side, **own, "tokenizer_class": named, "auto_map": auto_map}
    files = {"tokenizer_config.json": json_bytes(fields)}
    for name in ("added_tokens.json", "special_tokens_map.json"):
        if is_file(findings.source / name):
            files[name] = read_small(findings.source / name)
    if given is not None and not given.is_file():
        raise FileNotFoundError(f"{given} is not a file; --tokenizer needs a tokenizer.model")
    path = given or findings.source / "tokenizer.model"
    if is_file(path):
        files["tokenizer.model"] = read_small(path)
    else:
        notes.append(
            "no tokenizer.model: the model loads, but its tokenizer doesn't; "
            "get the file from a checkpoint of the family and run again with --tokenizer"
        )
    return files


def _processor_files(config: CheckpointConfig) -> dict[str, bytes]:
    """The package's processor files, with the numbers of this checkpoint."""
    files = {}
    for name in _PROCESSOR_FILES:
        path = PACKAGE / name
        if path.is_file() and name.endswith(".json"):
            files[name] = json_bytes(_with_numbers_of(config, read_fields(path)))
        elif path.is_file():
            files[name] = path.read_bytes()
    if config.version == FIRST_GENERATION:
        files["chat_template.jinja"] = default_template(config.version).encode()
    return files


def _with_numbers_of(config: CheckpointConfig, fields: dict) -> dict:
    """These fields, nested ones included, with the processor's numbers for this configuration."""
    image_processor = InternLMXComposer2ImageProcessor.for_config(config)
    known = {"image_token_id": config.image_token_id, **vars(image_processor)}
    numbers = {name: known[name] for name in fields if name in known and name != "auto_map"}
    if "tile_tokens_per_side" in numbers and "tokens_per_square" in known:
        numbers["tokens_per_square"] = known["tokens_per_square"]
    nested = {name: _with_numbers_of(config, part) for name, part in fields.items() if isinstance(part, dict)}
    return {**fields, **nested, **numbers}


def _check_by_loading(files: dict[str, bytes], findings: Findings) -> None:
    """Load tokenizer and processor from the files, so that errors show before anything is in place."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        tokenizer = tokenizer_class(findings.config.version).from_pretrained(folder)
        num_rows = findings.config.text_config.vocab_size
        if tokenizer.vocab_size > num_rows:
            raise ValueError(
                f"tokenizer.model has {tokenizer.vocab_size} pieces, but the weights have {num_rows} "
                "embeddings: it belongs to another checkpoint; pass the right one with --tokenizer"
            )
        InternLMXComposer2Processor.from_pretrained(folder)
