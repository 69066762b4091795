"""What a checkpoint contains, read without loading it, and what `from_pretrained` makes of it.

Files and their indexes, tensor headers, the configuration that they add up to, task adapters to leave out,
and the checks before and after loading.
"""

import math
import os
import re
import shlex
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GenerationConfig
from transformers import initialization as init
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from .configuration_internlm_xcomposer import MODEL_TYPE, InternLMXComposerConfig, is_first_generation
from .configuration_internlm_xcomposer2 import (
    ADAPTERS_OF_MODE,
    AttentionHeadsError,
    CheckpointConfig,
    InternLMXcomposer2Config,
    published_name,
)
from .files_internlm_xcomposer2 import (
    SMALL_FILES,
    check_saved,
    check_small_file,
    is_file,
    plain_name,
    read_fields,
    shown,
)

# The indexes of sharded weights, in the order in which transformers prefers them.
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
QUANTIZE_CONFIG = "quantize_config.json"
MAX_SHARDS = 10_000
_NAMES_IN_MESSAGE = 100
NEVER = r"(?!)"  # a pattern that nothing matches
_NUMBERED = re.compile(r"model-\d+-of-\d+\.safetensors|pytorch_model-\d+-of-\d+\.bin")

# What safetensors calls the types of its tensors.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

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


def hub_arguments_in(arguments: dict) -> dict:
    """Those of `HUB_ARGUMENTS` among the arguments of `from_pretrained`."""
    return {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}


@dataclass(frozen=True)
class TensorHeader:
    """What a weight file says about one of its tensors."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path | None = None  # where it is stored, unless in memory

    @property
    def num_elements(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's values."""
        return self.num_elements * self.dtype.itemsize


def checkpoint_config(source: str | os.PathLike, **hub_arguments) -> CheckpointConfig:
    """The configuration of a checkpoint, with the sizes and version of its weights if it has any.

    Raises:
        OSError: there is no `config.json`.
        ValueError: it describes another model.
    """
    fields, _ = CheckpointConfig.get_config_dict(source, **hub_arguments)
    config = config_class_of(fields).from_pretrained(source, **hub_arguments)
    try:
        headers = checkpoint_headers(source, **hub_arguments)
    except FileNotFoundError:
        return config
    return config.complete_from_shapes(shapes_of(headers))


def config_class_of(fields: Mapping[str, object], names: Collection[str] = ()) -> type[CheckpointConfig]:
    """The class of a checkpoint's configuration, by its `config.json` or the names of its tensors."""
    is_first = fields.get("model_type") == MODEL_TYPE or is_first_generation(names)
    return InternLMXComposerConfig if is_first else InternLMXcomposer2Config


def has_file(source: str | os.PathLike, name: str, **hub_arguments) -> bool:
    """Whether a checkpoint has a file of this name."""
    return _find(source, name, hub_arguments) is not None


def checkpoint_headers(
    source: str | os.PathLike | None, state_dict: dict | None = None, **hub_arguments
) -> dict[str, TensorHeader]:
    """Shape and type of every tensor of a checkpoint, by name.

    Args:
        source: a directory, or a hub id, whose files go through the hub's own cache.
        state_dict: the tensors themselves, instead of a source.
        hub_arguments: those of `HUB_ARGUMENTS`.

    Raises:
        FileNotFoundError: there are no weights, or not all of them.
        ValueError: a weight file is truncated or damaged.
    """
    if state_dict is None:
        return read_headers(weight_paths(source, **hub_arguments))
    if empty := [name for name, tensor in state_dict.items() if tensor.is_meta]:
        raise ValueError(f"{len(empty)} tensors of the state_dict have no values, such as {empty[0]}")
    return {name: TensorHeader(tuple(tensor.shape), tensor.dtype) for name, tensor in state_dict.items()}


def shapes_of(headers: Mapping[str, TensorHeader]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by name."""
    return {name: header.shape for name, header in headers.items()}


def read_headers(paths: list[Path]) -> dict[str, TensorHeader]:
    """Name, shape and type of every tensor in these files; no values are read.

    Raises:
        ValueError: a file is truncated or damaged, or holds something other than tensors.
    """
    headers: dict[str, TensorHeader] = {}
    for path in paths:
        try:
            is_safetensors = path.suffix == ".safetensors"
            headers.update(_safetensors_headers(path) if is_safetensors else _torch_headers(path))
        except Exception as error:  # each format raises its own kinds
            raise ValueError(f"{path} can't be read as a weight file: {error}") from error
    return headers


def weight_paths(source: str | os.PathLike, **hub_arguments) -> list[Path]:
    """The files that hold a checkpoint's weights: one, or those that its index names.

    Raises:
        FileNotFoundError: there are no weights, or shards are missing.
        ValueError: the index can't be read.
    """
    if os.path.isdir(source):
        check_saved(Path(source, hub_arguments.get("subfolder") or ""))
    for single in chain(WEIGHT_FILES, _packed_files(source, hub_arguments)):
        index = f"{single}.index.json"
        if path := _find(source, single, hub_arguments):
            return [path]
        if path := _find(source, index, hub_arguments):
            names = sorted(set(read_weight_map(path).values()))
            found = {name: _find(source, name, hub_arguments) for name in names}
            _refuse_gaps(source, [name for name, shard in found.items() if shard is None], len(names))
            return list(found.values())
    if os.path.isdir(source) and (shards := shards_without_index(Path(source))):
        raise FileNotFoundError(
            f"{source} holds {len(shards)} shards but no index; to write one, run: {adopt_command(source)}"
        )
    raise FileNotFoundError(f"no weights in {source}; looked for {', '.join(WEIGHT_FILES + INDEX_FILES)}")


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> name of its shard, from an index file.

    Raises:
        ValueError: the file is not a shard index.
    """
    fields = read_fields(index)
    weight_map = fields.get("weight_map")
    for name, found in (("metadata", fields.get("metadata")), ("weight_map", weight_map)):
        if not isinstance(found, dict):
            raise ValueError(
                f"{index} can't be read as a shard index: {name} is {shown(found)}, not an object"
            )
    return {
        name: plain_name(shard, f"{index}: weight_map says of {shown(name)} that its shard")
        for name, shard in weight_map.items()
    }


def shards_without_index(directory: Path) -> list[Path]:
    """Shards named `...-00001-of-00003...` in a directory; the safetensors ones if there are both kinds.

    Raises:
        FileNotFoundError: there are fewer than their names say.
    """
    found = sorted(path for path in directory.iterdir() if _NUMBERED.fullmatch(path.name))
    found = [path for path in found if path.suffix == ".safetensors"] or found
    if found:
        total = found[-1].name.split("-of-")[1].split(".")[0]
        if int(total) > MAX_SHARDS:
            raise ValueError(f"{found[-1]} claims to be one of more than {MAX_SHARDS} shards")
        stem, suffix = found[-1].name.split("-")[0], found[-1].suffix
        names = [f"{stem}-{i + 1:0{len(total)}}-of-{total}{suffix}" for i in range(int(total))]
        present = {path.name for path in found}
        _refuse_gaps(directory, [name for name in names if name not in present], len(names))
    return found


def _refuse_gaps(source: str | os.PathLike, missing: list[str], num_shards: int) -> None:
    if missing:
        raise FileNotFoundError(
            f"{source} lacks {len(missing)} of its {num_shards} shards: {listed(missing)}"
        )


def listed(names: Sequence[str]) -> str:
    """Names for a message, and how many more there are than it can show."""
    more = len(names) - _NAMES_IN_MESSAGE
    return ", ".join(names[:_NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def adopt_command(source: str | os.PathLike) -> str:
    """The command that turns `source` into a directory that can be loaded."""
    return f"ixc2 adopt {shlex.quote(os.fspath(source))}"


def _packed_files(source: str | os.PathLike, hub_arguments: dict) -> Iterator[str]:
    """The names that GPTQ's packer gives to weight files."""
    if fields := quantize_fields(source, **hub_arguments):
        usual = f"gptq_model-{fields.get('bits')}bit-{fields.get('group_size')}g"
        for base in dict.fromkeys((fields.get("model_file_base_name") or usual, usual)):
            where = f"{source}/{QUANTIZE_CONFIG}: model_file_base_name"
            yield from (plain_name(f"{base}{suffix}", where) for suffix in (".safetensors", ".bin"))


def _find(source: str | os.PathLike, name: str, hub_arguments: dict) -> Path | None:
    """A file of a directory, or of a hub checkpoint, downloaded if necessary; `None` if there is none.

    Raises:
        OSError: there is no such repository, or it is gated.
    """
    if os.path.isdir(source):
        path = Path(source, hub_arguments.get("subfolder") or "", name)
        return path if is_file(path) else None
    try:
        path = cached_file(os.fspath(source), name, **hub_arguments)
    except OSError as error:
        # A missing file has no cause; one that isn't cached while there is no network has this one.
        if error.__cause__ is None or isinstance(error.__cause__, LocalEntryNotFoundError):
            return None
        raise
    return Path(path) if path else None


def _safetensors_headers(path: Path) -> dict[str, TensorHeader]:
    headers = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            dtype = SAFETENSORS_DTYPES.get(tensor.get_dtype())
            if dtype is None:
                raise ValueError(f"{name} has the unknown type {tensor.get_dtype()}")
            headers[name] = TensorHeader(tuple(tensor.get_shape()), dtype, path)
    return headers


def _torch_headers(path: Path) -> dict[str, TensorHeader]:
    tensors = load_torch_file(path)
    return {name: TensorHeader(tuple(tensor.shape), tensor.dtype, path) for name, tensor in tensors.items()}


def read_tensor(headers: Mapping[str, TensorHeader], name: str) -> torch.Tensor:
    """One tensor of a checkpoint, alone in memory."""
    path = headers[name].file
    if path.suffix != ".safetensors":
        return load_torch_file(path)[name]
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def load_torch_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, memory-mapped; only files from before torch 1.6 are read whole.

    Raises:
        ValueError: it is compressed, or something in it is not a tensor with a name and with values.
    """
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        _check_stored(path)
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    check_named(tensors)
    _check_values(tensors, os.path.getsize(path))
    return tensors


def check_named(tensors: object) -> None:
    """Raise `ValueError` unless what a `.bin` file holds are tensors by their names."""
    if not isinstance(tensors, dict):
        raise ValueError(f"it holds a {type(tensors).__name__}, not tensors by name")
    if unnamed := [name for name in tensors if not isinstance(name, str)]:
        raise ValueError(f"{len(unnamed)} of its {len(tensors)} names are not texts: {shown(unnamed[0])}")
    others = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{len(others)} of its {len(tensors)} entries are not tensors: {', '.join(others[:5])}"
        )


def _check_stored(path: Path) -> None:
    """Raise `ValueError` for an archive that could be larger than its file; torch compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(
            f"{len(packed)} of its entries are compressed, such as {packed[0].filename} with "
            f"{packed[0].file_size} bytes in {packed[0].compress_size}; torch writes none"
        )


# How many bytes tensors may claim for each byte of their file: several may share a storage.
_MAX_SHARING = 4


def _check_values(tensors: Mapping[str, torch.Tensor], num_bytes: int) -> None:
    """Raise `ValueError` for tensors without values of their own, or that claim more than a file stores."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            kind = f"{tensor.layout} on {tensor.device}"
            raise ValueError(f"{name} has no plain values: it is {kind.removeprefix('torch.')}")
        claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if claimed > stored:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, but only {stored} bytes are stored"
            )
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > _MAX_SHARING * num_bytes:
        raise ValueError(f"its {len(tensors)} tensors claim {claimed} bytes, but the file has {num_bytes}")


def read_config(config_class: type, source: str | os.PathLike, **kwargs) -> tuple:
    """A configuration and the arguments that it left unused, as `from_pretrained` returns them.

    Raises:
        OSError: there is no `config.json`, or it can't be read; says what to run if there are weights.
    """
    hub_arguments = hub_arguments_in(kwargs)
    if not os.path.isfile(source) and _find(source, "config.json", hub_arguments) is None:
        raise FileNotFoundError(f"{source} has no config.json{_hint_to_adopt(source)}")
    # "auto" means the type in the configuration, which would otherwise be set to this word.
    auto = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if kwargs.get(name) == "auto"}
    try:
        config, unused = config_class.from_pretrained(source, return_unused_kwargs=True, **kwargs)
    except OSError as error:
        raise OSError(f"{error}{_hint_to_adopt(source)}") from error
    return config, {**unused, **auto}


def _hint_to_adopt(source: str | os.PathLike) -> str:
    """The end of a message about a configuration: what to run in a directory that has weights."""
    if not os.path.isdir(source):
        return ""
    try:
        weight_paths(source)
    except (OSError, ValueError):
        return ""
    return f"; to write one from the weights, run: {adopt_command(source)}"


@contextmanager
def asking_for_heads(source: str | os.PathLike) -> Iterator[None]:
    """End an error about the heads, the one size that the weights don't determine, with what to run."""
    try:
        yield
    except AttentionHeadsError as error:
        line = f"{adopt_command(source)} --num-attention-heads N"
        raise ValueError(f"{error}; with N from its model card, run: {line}") from error


def packer_arguments(source: str | os.PathLike | None, arguments: dict, hub_arguments: dict) -> dict:
    """What `from_pretrained` gets in place of a path whose weights have a name that only GPTQ's packer gives.

    Args:
        arguments: those of `from_pretrained`.

    Returns:
        The weights and the settings of `generate`; empty if transformers finds them itself.
    """
    if arguments.get("state_dict") is not None or any(
        has_file(source, name, **hub_arguments) for name in WEIGHT_FILES + INDEX_FILES
    ):
        return {}
    tensors = {}
    for path in weight_paths(source, **hub_arguments):
        tensors |= load_file(path) if path.suffix == ".safetensors" else load_torch_file(path)
    found = {"state_dict": tensors}
    if arguments.get("generation_config") is None and has_file(
        source, GENERATION_CONFIG_NAME, **hub_arguments
    ):
        found["generation_config"] = GenerationConfig.from_pretrained(source, **hub_arguments)
    return found


def check_small_files(
    source: str | os.PathLike, names: Sequence[str] = tuple(SMALL_FILES), **hub_arguments
) -> None:
    """Raise `ValueError` for the first of a checkpoint's `SMALL_FILES` that can't be used.

    The message names the file and the field.
    """
    for name in names:
        if (path := _find(source, name, hub_arguments)) is not None:
            check_small_file(path)


def quantize_fields(source: str | os.PathLike, **hub_arguments) -> dict:
    """The content of `quantize_config.json`, which comes with GPTQ weights; empty without one.

    Raises:
        ValueError: a field is of the wrong kind; names the file.
    """
    path = _find(source, QUANTIZE_CONFIG, hub_arguments)
    return check_small_file(path) if path else {}


def skeleton(model_class: type[torch.nn.Module], config: InternLMXcomposer2Config) -> torch.nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"), init.no_init_weights():
        return model_class(config)


def published_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model by its published name."""
    return {published_name(name): tuple(value.shape) for name, value in model.state_dict().items()}


# Numbers for each byte of their files: two if four bits hold one, and some more for scales that are shared.
_MAX_WEIGHTS_PER_BYTE = 4


def check_tensors(
    model: torch.nn.Module,
    headers: Mapping[str, TensorHeader],
    shapes: Mapping[str, tuple[int, ...]],
    source: object,
    packing: object = None,
    accept_mismatch: bool = False,
) -> None:
    """Compare the weights with a model before it takes any memory.

    Args:
        model: its `skeleton`.
        headers, shapes: of the tensors in the files, and their shapes after unpacking.
        packing: with `linears` that may have biases, of zeros or refused later.

    Raises:
        ValueError: tensors are missing, unknown or of another shape (they are listed), or far too small.
    """
    expected = published_shapes(model)
    num_bytes = sum(header.num_bytes for header in headers.values())
    num_weights = sum(map(math.prod, expected.values()))
    if num_weights > _MAX_WEIGHTS_PER_BYTE * num_bytes:
        raise ValueError(f"the weights in {source} have {num_bytes} bytes, too few for {num_weights} numbers")
    if getattr(model.config, "quantization_config", None) is not None:
        return  # names and shapes are those of the quantiser
    biases = {f"{linear}.bias" for linear in packing.linears} if packing is not None else ()
    given = {
        published_name(name): shape
        for name, shape in shapes.items()
        if name not in biases or published_name(name) in expected
    }
    optional, ignored = (
        re.compile("|".join(patterns or [NEVER]))
        for patterns in (model._keys_to_ignore_on_load_missing, model._keys_to_ignore_on_load_unexpected)
    )
    wrong = [
        (name, given[name], shape) for name, shape in expected.items() if given.get(name, shape) != shape
    ]
    faults = {
        "missing_keys": [name for name in expected if name not in given and not optional.search(name)],
        "unexpected_keys": [name for name in given if name not in expected and not ignored.search(name)],
        "mismatched_keys": () if accept_mismatch else wrong,
    }
    check_loading(faults, source)


def check_loading(info: dict, source) -> None:
    """Raise a `ValueError` that lists every tensor that is missing, unknown or of another shape."""
    faults = [
        f"{len(info[kind])} {what}: {listed(sorted(map(str, info[kind])))}"
        for kind, what in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unexpected"),
            ("mismatched_keys", "of another shape"),
            ("error_msgs", "errors"),
        )
        if info.get(kind)
    ]
    if faults:
        raise ValueError(f"the weights in {source} don't fit this model; tensors: {'; '.join(faults)}")


def choose_adapters(config: InternLMXcomposer2Config, modes: Sequence[str] | None) -> list[str]:
    """Keep the task adapters of only some inference modes in the configuration.

    Args:
        modes: any of `"write"` and `"web"`; `None` keeps all that the checkpoint has.

    Returns:
        The names of those that are left out.

    Raises:
        ValueError: there is no such mode, or the checkpoint lacks its adapters.
        TypeError: the modes are not a sequence of names.
    """
    found = getattr(config.text_config, "task_adapters", {})
    if modes is None:
        return []
    if isinstance(modes, str) or not all(isinstance(mode, str) for mode in modes):
        raise TypeError(f"adapters must be a sequence of modes such as ('web',), not {modes!r}")
    known = [mode for mode, names in ADAPTERS_OF_MODE.items() if names]
    if unknown := [mode for mode in modes if mode not in known]:
        raise ValueError(f"no adapters for the mode {unknown[0]!r}; adapters accepts {' and '.join(known)}")
    wanted = [name for mode in modes for name in ADAPTERS_OF_MODE[mode]]
    if lacking := [name for name in wanted if name not in found]:
        raise ValueError(
            f"adapters={tuple(modes)!r} needs {', '.join(lacking)}, but this checkpoint has "
            f"{', '.join(found) or 'none'}; leave the argument out, or load InternLM-XComposer2.5-7B"
        )
    config.text_config.task_adapters = {name: rank for name, rank in found.items() if name in wanted}
    return [name for name in found if name not in wanted]


# ---- several processes ----


def tensor_parallel_size(arguments: dict) -> int:
    """How many processes the arguments of `from_pretrained` split the model across."""
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
    """Raise `ValueError` unless `size` processes can split the decoder evenly."""
    for name in ("num_key_value_heads", "intermediate_size", "vocab_size"):
        total = getattr(text_config, name)
        if total % size:
            raise ValueError(
                f"{size} processes can't split {name} {total} evenly; start a number that divides it, at "
                f"most {text_config.num_key_value_heads}"
            )
