"""How are files read that anyone may have written, and written so that a kill leaves the old or the new?

Reading: JSON of bounded size, names that lead nowhere else, fields of the right kind; whatever is wrong is a
`ValueError` that names the file and the field. Writing: into a folder aside, then moved into place.
"""

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import GenerationConfig

# Of JSON files, vocabularies and texts: the published ones have at most 1.5 MB.
MAX_SMALL_BYTES = 64 << 20
_SHOWN = 80  # characters of a wrong value in a message


# ---- reading ----


def read_fields(path: str | os.PathLike) -> dict:
    """The content of a JSON file that holds fields by name.

    Raises:
        ValueError: it holds something else, is too large or too deep, or isn't JSON.
        OSError: it can't be read, or is a link that can't be followed.
    """
    content = read_small(path)
    try:
        fields = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply; fix or remove it") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; fix or remove it") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, not fields by name; fix or remove it")
    return fields


def read_small(path: str | os.PathLike) -> bytes:
    """The content of a file that is not weights.

    Raises:
        ValueError: it has more than `MAX_SMALL_BYTES`.
        OSError: it can't be read, or is a link that can't be followed.
    """
    check_link(path)
    if (num_bytes := os.stat(path).st_size) > MAX_SMALL_BYTES:
        raise ValueError(f"{path} has {num_bytes} bytes, more than the limit of {MAX_SMALL_BYTES}")
    return Path(path).read_bytes()


def is_file(path: str | os.PathLike) -> bool:
    """Whether there is such a file; a link that can't be followed is an `OSError`, not a missing file."""
    check_link(path)
    return os.path.isfile(path)


def check_link(path: str | os.PathLike) -> None:
    """Raise `OSError` for a path through links that lead in a circle, or a link to nothing."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            text = f"{path} is a link to {os.readlink(path)}, which doesn't exist"
            raise FileNotFoundError(text) from None
    except OSError as error:
        text = f"{error.strerror}: this path can't be followed; replace its links"
        raise OSError(error.errno, text, os.fspath(path)) from None


def is_plain_name(name: object) -> bool:
    """Whether this names a file of the directory at hand, and nothing elsewhere on any system."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not re.search(r'[\x00-\x1f\x7f/\\:*?"<>|]', name)
        and name.isprintable()
        and len(os.fsencode(name)) <= 255
    )


def plain_name(name: object, where: str) -> str:
    """A name that was read from a file, if it is a plain one.

    Args:
        where: the file and the field.

    Raises:
        ValueError: it could lead out of the directory.
    """
    if not is_plain_name(name):
        raise ValueError(f"{where} must be the plain name of a file beside it, not {shown(name)}")
    return name


def shown(value: object) -> str:
    """A wrong value, short enough for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@contextmanager
def blaming(file: str | os.PathLike) -> Iterator[None]:
    """Whatever goes wrong while a file's content is used becomes a `ValueError` that names the file.

    Errors of the system, and those that already name the file, pass unchanged.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # each library raises its own kinds for content that it didn't expect
        if isinstance(error, ValueError) and os.fspath(file) in str(error):
            raise
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{os.fspath(file)}: {' '.join(text.split())}") from error


# ---- kinds of fields ----


@dataclass(frozen=True)
class Kind:
    """What a field may hold.

    Attributes:
        words: the end of "must be ...".
        accepts: whether a value is of this kind.
    """

    words: str
    accepts: Callable[[object], bool]

    def or_none(self) -> "Kind":
        """The same, or null."""
        return Kind(f"{self.words} or null", lambda value: value is None or self.accepts(value))


def whole(low: int, high: int = 2**31 - 1) -> Kind:
    """Integers from `low` to `high`; true and false are none."""
    return Kind(
        f"an integer from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def number(low: float, high: float, *, above: bool = False) -> Kind:
    """Finite numbers from `low` to `high`; with `above`, greater than `low`."""
    start = f"greater than {low:g}, at most" if above else f"from {low:g} to"

    def accepts(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return (low < value if above else low <= value) and value <= high

    return Kind(f"a number {start} {high:g}", accepts)


def one_of(*names: object) -> Kind:
    """One of these values."""
    listed = ", ".join(map(str, names))
    return Kind(f"one of {listed}", lambda value: isinstance(value, str) and value in names)


def list_of(kind: Kind) -> Kind:
    """Lists of one kind."""
    return Kind(
        f"a list, each entry {kind.words}",
        lambda value: isinstance(value, list | tuple) and all(map(kind.accepts, value)),
    )


def either(*kinds: Kind) -> Kind:
    """Any of several kinds."""
    words = " or ".join(kind.words for kind in kinds)
    return Kind(words, lambda value: any(kind.accepts(value) for kind in kinds))


def mapping_of(values: Kind, keys: str = r"[\s\S]*") -> Kind:
    """Objects whose values are of one kind and whose keys match a pattern."""
    return Kind(
        f"an object, each value {values.words}" + ("" if keys.startswith("[") else f", each key like {keys}"),
        lambda value: (
            isinstance(value, Mapping)
            and all(
                re.fullmatch(keys, str(key)) is not None and values.accepts(entry)
                for key, entry in value.items()
            )
        ),
    )


def check_fields(
    fields: Mapping[str, object], kinds: Mapping[str, Kind], prefix: str = "", owner: type | None = None
) -> None:
    """Raise `ValueError` for the first field that isn't of its kind; fields without a kind may hold anything.

    Args:
        prefix: of the fields' names in the message, for instance `"vision_config."`.
        owner: the class whose attributes the fields become: none may replace what belongs to the class.
    """
    for name, value in fields.items():
        kind = kinds.get(name)
        if kind is not None and not kind.accepts(value):
            raise ValueError(f"{prefix}{name} must be {kind.words}, not {shown(value)}")
        if kind is None and owner is not None and _belongs_to(owner, name):
            raise ValueError(f"{prefix}{name} can't be a field: it is part of {owner.__name__}")


def _belongs_to(owner: type, name: str) -> bool:
    """Whether a name is a method, a read-only property or a setting of the class itself."""
    if name.startswith("__") or any(
        "ClassVar" in str(vars(base).get("__annotations__", {}).get(name)) for base in owner.__mro__
    ):
        return name != "model_type"
    found = inspect.getattr_static(owner, name, None)
    if isinstance(found, property):
        return found.fset is None
    return callable(found) or isinstance(found, classmethod | staticmethod)


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
PATH = Kind("a text", lambda value: isinstance(value, str | os.PathLike))
MAPPING = Kind("an object with fields", lambda value: isinstance(value, Mapping))
NOTHING = Kind("left out", lambda value: False)
SIZE = whole(1)
TOKEN = whole(0)
SHARE = number(0, 1)
ACTIVATION = Kind("the name of an activation in transformers", lambda value: is_activation(value))
DTYPE = Kind(
    "one of bfloat16, float16, float32, float64",
    lambda value: str(value).removeprefix("torch.") in ("bfloat16", "float16", "float32", "float64"),
)
# A configuration itself, or its fields.
CONFIG = Kind("an object with fields", lambda value: isinstance(value, Mapping) or hasattr(value, "to_dict"))
# Special tokens are texts, or objects that say how a text is matched.
PIECE = either(TEXT, Kind("an object with a content", lambda value: is_piece(value)))

MAX_LAYERS = 256
MAX_SIDE = 4096  # px of a tile
MAX_LABELS = 10_000


def is_activation(name: object) -> bool:
    """Whether transformers has an activation of this name."""
    from transformers.activations import (
        ACT2FN,
    )  # it imports torch, which reading a configuration doesn't need

    return isinstance(name, str) and name in ACT2FN


def is_piece(value: object) -> bool:
    """Whether this is a token as tokenizers write it: a content, and flags."""
    if not isinstance(value, Mapping):
        return hasattr(value, "content")  # a token itself
    rest = {name: entry for name, entry in value.items() if name not in ("content", "__type", "id")}
    return isinstance(value.get("content"), str) and all(isinstance(flag, bool) for flag in rest.values())


# ---- what each field may hold ----


def _or_none(kinds: dict[str, Kind]) -> dict[str, Kind]:
    return {name: kind.or_none() for name, kind in kinds.items()}


# Of every configuration.
COMMON_KINDS = {
    # They would change which files are read, or how the class itself works.
    **dict.fromkeys(("transformers_weights", "configuration_files", "per_layer_config"), NOTHING),
    **dict.fromkeys(("attribute_map", "sub_configs", "keys_to_ignore_at_inference"), NOTHING),
    **_or_none(
        {
            **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
            **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict"), FLAG),
            **dict.fromkeys(("name_or_path", "_name_or_path"), PATH),
            **dict.fromkeys(("model_type", "transformers_version", "problem_type", "tokenizer_class"), TEXT),
            "is_encoder_decoder": FLAG,
            "chunk_size_feed_forward": TOKEN,
            "architectures": list_of(TEXT),
            "auto_map": MAPPING,
            "num_labels": whole(1, MAX_LABELS),
            "id2label": mapping_of(TEXT, r"\d{1,9}"),
            "label2id": mapping_of(TOKEN),
            "quantization_config": CONFIG,
        }
    ),
}

_ROPE_KINDS = {
    **dict.fromkeys(("type", "rope_type"), TEXT),
    **dict.fromkeys(("rope_theta", "attention_factor", "beta_fast", "beta_slow"), number(0, 1e15)),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim"), number(0, 1e6)),
    "factor": number(1, 1e6),
    "original_max_position_embeddings": SIZE,
    "partial_rotary_factor": SHARE,
    "truncate": FLAG,
}
ROPE_KINDS = _or_none(_ROPE_KINDS)

TEXT_KINDS = {
    **COMMON_KINDS,
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "plora_rank"), SIZE
    ),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "plora_wqkv_rank"), SIZE.or_none()),
    **dict.fromkeys(("plora_alpha", "plora_wqkv_alpha"), number(0, 1e6).or_none()),
    **dict.fromkeys(("attention_dropout", "plora_dropout"), SHARE),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), TOKEN.or_none()),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), MAPPING.or_none()),
    **dict.fromkeys(("use_cache", "bias", "tie_word_embeddings"), FLAG),
    "num_hidden_layers": whole(1, MAX_LAYERS),
    "hidden_act": ACTIVATION,
    "initializer_range": number(0, 1e3),
    "rms_norm_eps": SHARE,
    "eos_token_id": either(TOKEN, list_of(TOKEN)).or_none(),
    "rope_theta": number(0, 1e15, above=True),
    "task_adapters": mapping_of(SIZE, r"\w+").or_none(),
}

VISION_KINDS = {
    **COMMON_KINDS,
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), SIZE),
    **dict.fromkeys(("image_size", "patch_size"), whole(1, MAX_SIDE)),
    **dict.fromkeys(("layer_norm_eps", "attention_dropout"), SHARE),
    **dict.fromkeys(("initializer_range", "initializer_factor"), number(0, 1e3)),
    "num_hidden_layers": whole(1, MAX_LAYERS),
    "num_channels": whole(3, 3),
    "projection_dim": TOKEN,
    "hidden_act": ACTIVATION,
}

GENERATION_KINDS = _or_none(
    {
        **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k"), TOKEN),
        **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"), SHARE),
        **dict.fromkeys(("temperature", "max_time"), number(0, 1e9)),
        **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), number(0, 1e4, above=True)),
        **dict.fromkeys(("length_penalty", "guidance_scale", "diversity_penalty"), number(-1e4, 1e4)),
        **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), TOKEN),
        **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), whole(1, 10_000)),
        **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"), FLAG),
        **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores"), FLAG),
        **dict.fromkeys(("output_logits", "return_dict_in_generate", "token_healing"), FLAG),
        **dict.fromkeys(("bos_token_id", "pad_token_id"), TOKEN),
        **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), either(TOKEN, list_of(TOKEN))),
        **dict.fromkeys(("forced_bos_token_id", "decoder_start_token_id"), TOKEN),
        **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), list_of(TOKEN)),
        **dict.fromkeys(("cache_implementation", "transformers_version"), TEXT),
        "early_stopping": either(FLAG, one_of("never")),
        "stop_strings": either(TEXT, list_of(TEXT)),
        "bad_words_ids": list_of(list_of(TOKEN)),
    }
)

# Fields of the whole checkpoint. Settings of generation may be there too, and are read from there.
CONFIG_KINDS = {
    **GENERATION_KINDS,
    **TEXT_KINDS,
    **dict.fromkeys(("text_config", "vision_config"), CONFIG.or_none()),
    **dict.fromkeys(("hd_num", "video_memory_size", "max_length"), SIZE.or_none()),
    "version": TEXT.or_none(),
    "img_size": whole(1, MAX_SIDE).or_none(),
    "image_token_id": TOKEN.or_none(),
    "end_token_id": TOKEN,
}

QUANTIZATION_KINDS = _or_none(
    {
        **dict.fromkeys(("bits", "w_bit"), whole(1, 32)),
        **dict.fromkeys(("group_size", "q_group_size"), either(whole(-1, -1), SIZE)),
        **dict.fromkeys(("checkpoint_format", "version", "model_file_base_name", "model_name_or_path"), TEXT),
        **dict.fromkeys(("desc_act", "sym", "zero_point", "true_sequential", "static_groups"), FLAG),
        **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_4bit_use_double_quant"), FLAG),
        **dict.fromkeys(("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules"), list_of(TEXT)),
    }
)

_TEMPLATE = either(TEXT, mapping_of(TEXT), list_of(mapping_of(TEXT)))
_PIECE_NAMES = tuple(f"{name}_token" for name in ("unk", "bos", "eos", "pad", "sep", "cls", "mask"))
_SPECIAL_KINDS = {
    **dict.fromkeys(_PIECE_NAMES, PIECE),
    **dict.fromkeys(
        ("additional_special_tokens", "extra_special_tokens"), either(list_of(PIECE), mapping_of(PIECE))
    ),
}
TOKENIZER_KINDS = _or_none(
    {
        **_SPECIAL_KINDS,
        **dict.fromkeys(("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"), FLAG),
        **dict.fromkeys(("split_special_tokens", "use_fast", "legacy", "add_prefix_space"), FLAG),
        **dict.fromkeys(("tokenizer_class", "processor_class", "name_or_path", "backend"), TEXT),
        **dict.fromkeys(("padding_side", "truncation_side"), one_of("left", "right")),
        "model_max_length": number(1, 1e31),
        "model_input_names": list_of(TEXT),
        "chat_template": _TEMPLATE,
        "auto_map": either(MAPPING, list_of(TEXT.or_none())),
        # Of sentencepiece's options, those that name no file.
        "sp_model_kwargs": mapping_of(
            either(FLAG, number(-1, 1e6)), "enable_sampling|nbest_size|alpha|add_bos|add_eos|reverse"
        ),
        "added_tokens_decoder": mapping_of(PIECE, r"\d{1,9}"),
        "init_inputs": Kind("an empty list", lambda value: value in ([], ())),
    }
)
PROCESSOR_KINDS = _or_none(
    {
        **dict.fromkeys(("img_size", "tile_tokens_per_side"), whole(1, MAX_SIDE)),
        **dict.fromkeys(("version", "processor_class", "image_processor_type", "video_processor_type"), TEXT),
        **dict.fromkeys(("image_processor", "video_processor", "auto_map"), MAPPING),
        "hd_num": SIZE,
        "chat_template": _TEMPLATE,
    }
)
PROCESSOR_KINDS["image_token_id"] = TOKEN


class _Everything(dict):
    """One kind for every name."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def get(self, name: str, default: object = None) -> Kind:
        return self.kind


# The small files of a checkpoint besides `config.json`, and the kinds of their fields.
SMALL_FILES: dict[str, Mapping[str, Kind]] = {
    "generation_config.json": GENERATION_KINDS,
    "tokenizer_config.json": TOKENIZER_KINDS,
    "special_tokens_map.json": _or_none(_SPECIAL_KINDS),
    "added_tokens.json": _Everything(TOKEN),
    "preprocessor_config.json": PROCESSOR_KINDS,
    "processor_config.json": PROCESSOR_KINDS,
    "video_preprocessor_config.json": PROCESSOR_KINDS,
    "quantize_config.json": QUANTIZATION_KINDS,
    "quant_config.json": QUANTIZATION_KINDS,
    "chat_template.jinja": {},  # a text
}


def check_small_file(path: Path) -> dict:
    """The fields of one of `SMALL_FILES`, or none of a text.

    Raises:
        ValueError: it can't be read, or a field is of the wrong kind; names file and field.
        OSError: see `read_fields`.
    """
    if path.suffix != ".json":
        with blaming(path):
            read_small(path).decode("utf-8")
        return {}
    fields = read_fields(path)
    kinds = SMALL_FILES[path.name]
    is_generation = kinds is GENERATION_KINDS
    with blaming(path):
        check_fields(fields, kinds, owner=GenerationConfig if is_generation else None)
        if is_generation:
            GenerationConfig.from_dict(fields)  # its own checks of how the fields go together
        for name in ("image_processor", "video_processor"):
            if isinstance(fields.get(name), Mapping):
                check_fields(fields[name], kinds, f"{name}.")
    return fields


# Which of them a tokenizer and a processor read.
TOKENIZER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def check_small_files_in(folder: str | os.PathLike, names: Iterable[str] = tuple(SMALL_FILES)) -> None:
    """Raise `ValueError` for the first of these files in a directory that can't be used, if there is one."""
    for path in (Path(folder, name) for name in names):
        if is_file(path):
            check_small_file(path)


# ---- writing ----

_WRITING, _WRITTEN = (
    ".ixc2-saving",
    ".ixc2-saved",
)  # in a directory: what is being written, and what is complete
_PLAN = ".plan.json"  # in `_WRITTEN`: which files go into place, and which go away

# Files that hold weights of one form, or list those that do. One form in a directory hides the other.
_WEIGHTS = re.compile(
    r"(?P<form>model|pytorch_model|adapter_model)(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?"
    r"\.(?:safetensors|bin)(?P<index>\.index(?:\.(?P<index_variant>[\w-]+))?\.json)?"
)

_OF_A_CHECKPOINT = re.compile(r".*\.(?:safetensors|bin|json|jinja|model|py|md)|(?:LICENSE|NOTICE).*")


@contextmanager
def staging(folder: Path, *, remedy: str) -> Iterator[Path]:
    """An empty folder that only this process writes to; removed afterwards unless it was moved.

    What a run that was killed left in it is removed first.

    Args:
        remedy: the end of the message if the folder is in use.

    Raises:
        FileExistsError: another run is working in it, or it holds something else than a run leaves.
        OSError: it can't be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.lock")  # a process that is killed leaves it, but unlocked
    was_killed = path.is_file()
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(f"{folder} is in use: another run is in progress; {remedy}") from None
    try:
        if os.path.lexists(folder):
            if not (was_killed or _is_left_over(folder)):
                raise FileExistsError(f"{folder} holds other files; move it away, or {remedy}")
            shutil.rmtree(folder)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):  # where an open file can't be removed, `release` does it
            path.unlink()
        lock.release()


def _is_left_over(folder: Path) -> bool:
    """Whether a folder holds nothing but what a run writes, so that nothing of anybody's is lost with it."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(path.is_file() and _OF_A_CHECKPOINT.fullmatch(path.name) for path in folder.iterdir())


@contextmanager
def saved_aside(directory: str | os.PathLike) -> Iterator[Path]:
    """A folder whose files come into `directory` when the block ends, all of them or none.

    Weights of another form that the directory had before (shards, a single file, `.bin`) are removed, so that
    none hides the new ones. A kill before the block ends leaves the directory as it was. After a kill while
    the files are moved, it has no weights that could be loaded until `finish_saving` has moved the rest.

    Raises:
        FileExistsError: `directory` is a file, or another process is saving into it.
        OSError: the disk is full or can't be written to; the directory is as it was.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; choose a directory to save into")
    directory.mkdir(parents=True, exist_ok=True)
    finish_saving(directory)
    with staging(directory / _WRITING, remedy="wait for it, or save into another directory") as folder:
        yield folder
        names = sorted(path.name for path in folder.iterdir())
        plan = {"move": names, "remove": _stale_weights(directory, names)}
        (folder / _PLAN).write_text(json.dumps(plan), encoding="utf-8")
        folder.rename(directory / _WRITTEN)
    finish_saving(directory)


def finish_saving(directory: Path) -> None:
    """Move the files of a complete save into place, if a kill has left some.

    The files by which weights are found go first and come last, so that at no time old and new ones are
    loaded together.

    Raises:
        OSError: the directory can't be written to.
        ValueError: the list of files is damaged.
    """
    folder = directory / _WRITTEN
    if folder.is_symlink() or not (folder / _PLAN).is_file():
        shutil.rmtree(folder, ignore_errors=True)  # left by a kill after the moves; never a link's target
        return
    plan = read_fields(folder / _PLAN)
    move, remove = (
        [plain_name(name, f"{folder / _PLAN}: {part}") for name in plan.get(part, ())]
        for part in ("move", "remove")
    )
    waiting = [name for name in move if os.path.lexists(folder / name)]
    entries = [name for name in waiting if _is_entry(name, move)]
    for name in [*entries, *remove]:
        (directory / name).unlink(missing_ok=True)
    for name in sorted(waiting, key=lambda name: name in entries):
        _move(folder / name, directory / name)
    shutil.rmtree(folder, ignore_errors=True)


def check_saved(directory: str | os.PathLike) -> None:
    """Raise `ValueError` for a directory in which a kill interrupted `finish_saving`."""
    if Path(directory, _WRITTEN, _PLAN).is_file():
        raise ValueError(
            f"saving into {directory} was interrupted while the files were put in place; load it once with "
            "from_pretrained, which moves the rest, or save again"
        )


def _move(path: Path, target: Path) -> None:
    if path.is_dir() and target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    try:
        os.replace(path, target)
    except FileNotFoundError:
        if not target.exists():  # else another process has moved it
            raise


def _is_entry(name: str, names: list[str]) -> bool:
    """Whether a loader finds weights by this file: an index, or weights that no index lists."""
    found = _WEIGHTS.fullmatch(name)
    return bool(found) and (bool(found["index"]) or "-of-" not in name)


def _form(name: str) -> tuple[bool, str | None] | None:
    """Whether these are an adapter's weights, and their variant; `None` if they are none."""
    found = _WEIGHTS.fullmatch(name)
    return found and (found["form"] == "adapter_model", found["variant"] or found["index_variant"])


def _stale_weights(directory: Path, names: list[str]) -> list[str]:
    """The files of weights that new ones with these names replace, whatever their own names are."""
    forms = {form for name in names if (form := _form(name))}
    present = sorted(path.name for path in directory.iterdir() if not path.is_dir() or path.is_symlink())
    return [name for name in present if name not in names and _form(name) in forms]
