"""The small files of an adopted checkpoint: configurations, tokenizer, processor, template, modules."""

import copy
import json
import tempfile
from importlib import import_module
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .auto_internlm_xcomposer2 import REWARD_AUTO_MAP
from .configuration_internlm_xcomposer2 import InternLMXcomposer2Config
from .image_processor_internlm_xcomposer2 import InternLMXComposer2ImageProcessor
from .inspect_internlm_xcomposer2 import Findings
from .tokenization_internlm_xcomposer2 import InternLMXComposer2Tokenizer
from .weight_shapes_internlm_xcomposer2 import is_reward

# What lies beside this module: the files of nano, which say where each class is found.
PACKAGE = Path(__file__).resolve().parent
_CONFIGURATIONS = ("config.json", "tokenizer_config.json")
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
)
# Files of a checkpoint that travel with its weights unchanged.
_TRAVELLING = ("LICENSE*", "NOTICE*", "README.md", "quantize_config.json", "quant_config.json")
# What a published generation_config.json says of other things: `max_length` limits a prompt there.
_NOT_GENERATION = ("max_length", "transformers_version", "_from_model_config")


def describe_checkpoint(
    findings: Findings, tokenizer: Path | None = None
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Every small file of an adopted directory by name, and what is missing in plain words.

    Args:
        tokenizer: a `tokenizer.model` to use where the checkpoint has none.

    Raises:
        FileNotFoundError: `tokenizer` doesn't exist.
        ValueError: the vocabulary is none of this family, or doesn't fit the weights.
    """
    notes: list[str] = []
    files = {path.name: path.read_bytes() for path in _modules()}
    for pattern in _TRAVELLING:
        files |= {path.name: path.read_bytes() for path in findings.source.glob(pattern) if path.is_file()}
    files |= _tokenizer_files(findings, tokenizer, notes)
    files |= _processor_files(findings.config)
    files["generation_config.json"] = json_bytes(_generation_fields(findings, notes))
    files["config.json"] = _config_bytes(findings)
    if "tokenizer.model" in files:
        _check_by_loading(files, findings)
    return files, tuple(notes)


def auto_maps() -> dict[str, dict]:
    """File of the package -> the `auto_map` in it."""
    paths = [PACKAGE / name for name in (*_CONFIGURATIONS, *_PROCESSOR_FILES) if name.endswith(".json")]
    found = {path.name: _read_json(path).get("auto_map") for path in paths if path.is_file()}
    return {name: auto_map for name, auto_map in found.items() if auto_map}


def class_for(auto_class: str) -> str | None:
    """`module.Class` that the package names for an auto class, if any."""
    for auto_map in auto_maps().values():
        if auto_class in auto_map:
            return next(iter(_references(auto_map[auto_class])))
    return None


def _references(entry: str | list[str | None]) -> list[str]:
    return [entry] if isinstance(entry, str) else [reference for reference in entry if reference]


def _modules() -> list[Path]:
    """The modules that remote code reaches from the classes named in the auto maps."""
    entries = [entry for auto_map in auto_maps().values() for entry in auto_map.values()]
    names = {reference.split(".")[0] for entry in entries for reference in _references(entry)}
    found = {PACKAGE / f"{name}.py" for name in names}
    for path in list(found):
        found |= {Path(imported) for imported in get_relative_import_files(path)}
    return sorted(found)


def _read_json(path: Path) -> dict:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; mend or remove it") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__} and not fields by name; mend or remove it")
    return fields


def json_bytes(content: dict) -> bytes:
    """The content of a JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _fields_beside(findings: Findings, name: str, notes: list[str]) -> dict:
    """A JSON file of the checkpoint, empty where it has none."""
    if (findings.source / name).is_file():
        return _read_json(findings.source / name)
    notes.append(f"no {name}: written with this package's own fields")
    return {}


# ---- configurations ----


def _config_bytes(findings: Findings) -> bytes:
    config = copy.deepcopy(findings.config)
    config.auto_map = REWARD_AUTO_MAP if is_reward(findings.headers) else auto_maps()["config.json"]
    config.architectures = [config.auto_map["AutoModel"].rsplit(".", 1)[1]]
    if findings.dtype.is_floating_point:
        config.dtype = findings.dtype
    return config.to_json_string(use_diff=False).encode()


def _generation_fields(findings: Findings, notes: list[str]) -> dict:
    """The checkpoint's own settings, and ends at which an answer stops."""
    text = findings.config.text_config
    own = _fields_beside(findings, "generation_config.json", notes)
    fields = {name: value for name, value in own.items() if name not in _NOT_GENERATION}
    stops = fields.get("eos_token_id", text.eos_token_id)
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    if findings.config.end_token_id not in stops and findings.config.end_token_id < text.vocab_size:
        stops.append(findings.config.end_token_id)
    defaults = {"bos_token_id": text.bos_token_id, "pad_token_id": text.pad_token_id}
    return {**defaults, **fields, "eos_token_id": stops}


# ---- tokenizer, processor and template ----


def _tokenizer_files(findings: Findings, given: Path | None, notes: list[str]) -> dict[str, bytes]:
    """The vocabulary, and a `tokenizer_config.json` with our class and the checkpoint's own fields."""
    ours = _read_json(PACKAGE / "tokenizer_config.json")
    own = _fields_beside(findings, "tokenizer_config.json", notes)
    side = {"padding_side": ours["padding_side"]}  # what pipelines pad batches by
    fields = {**side, **own, "tokenizer_class": ours["tokenizer_class"], "auto_map": ours["auto_map"]}
    files = {"tokenizer_config.json": json_bytes(fields)}
    for name in ("added_tokens.json", "special_tokens_map.json"):
        if (findings.source / name).is_file():
            files[name] = (findings.source / name).read_bytes()
    if given is not None and not given.is_file():
        raise FileNotFoundError(f"{given} is no file; --tokenizer takes a tokenizer.model")
    path = given or findings.source / "tokenizer.model"
    if path.is_file():
        files["tokenizer.model"] = path.read_bytes()
    else:
        notes.append(
            "no tokenizer.model: the model loads, its tokenizer doesn't; "
            "take the file from a checkpoint of the family and run again with --tokenizer"
        )
    return files


def _processor_files(config: InternLMXcomposer2Config) -> dict[str, bytes]:
    """The package's processor files, with the numbers of this checkpoint."""
    files = {}
    for name in _PROCESSOR_FILES:
        path = PACKAGE / name
        if path.is_file() and name.endswith(".json"):
            files[name] = json_bytes(_with_numbers_of(config, _read_json(path)))
        elif path.is_file():
            files[name] = path.read_bytes()
    return files


def _with_numbers_of(config: InternLMXcomposer2Config, fields: dict) -> dict:
    """These fields, nested ones too, with the numbers that the processor has for this configuration."""
    image_processor = InternLMXComposer2ImageProcessor.for_config(config)
    known = {"image_token_id": config.image_token_id, **vars(image_processor)}
    numbers = {name: known[name] for name in fields if name in known and name != "auto_map"}
    nested = {name: _with_numbers_of(config, part) for name, part in fields.items() if isinstance(part, dict)}
    return {**fields, **nested, **numbers}


def _check_by_loading(files: dict[str, bytes], findings: Findings) -> None:
    """Load tokenizer and processor from the files, so that a fault shows before anything is in place."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        tokenizer = InternLMXComposer2Tokenizer.from_pretrained(folder)
        num_rows = findings.config.text_config.vocab_size
        if tokenizer.vocab_size > num_rows:
            raise ValueError(
                f"tokenizer.model has {tokenizer.vocab_size} pieces, but the weights have {num_rows} "
                "embeddings: it belongs to another checkpoint; name the right one with --tokenizer"
            )
        if reference := class_for("AutoProcessor"):
            module, name = reference.rsplit(".", 1)
            getattr(import_module(f".{module}", __package__), name).from_pretrained(folder)
