"""The files of a checkpoint as GGUF: their names, and whether they belong together."""

import json
from pathlib import Path

from safetensors import safe_open

from ..configuration_internlm_xcomposer import MODEL_TYPE
from ..files_internlm_xcomposer2 import read_fields

DECODER = "decoder.gguf"
PLORA = "plora.gguf"
VISION = "vision.safetensors"
RECORD = "ixc2_gguf.json"  # where the files came from, and what was written

EXPORT_KEY = "ixc2.export"  # in the metadata of every file of one export: the same random name


def mode_file(mode: str) -> str:
    """The file with the task adapters of an inference mode."""
    return f"{mode}.gguf"


def check_complete(directory: Path) -> None:
    """Raise unless a directory holds what every checkpoint as GGUF has.

    Raises:
        FileNotFoundError: there is no such directory, or a file is missing; says what writes it.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; write one with: ixc2 gguf SRC {directory}")
    names = [DECODER, VISION, "config.json"]
    if not is_first_generation(directory):
        names.insert(1, PLORA)
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(
            f"{directory} has no {', '.join(missing)}; write such a directory with: ixc2 gguf SRC DST"
        )


def is_first_generation(directory: Path) -> bool:
    """Whether a directory's checkpoint is one of the first generation, which has no Partial LoRA."""
    path = directory / "config.json"
    return path.is_file() and read_fields(path).get("model_type") == MODEL_TYPE


def export_of_vision(directory: Path) -> str | None:
    """Which export the vision half is from.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / VISION
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(EXPORT_KEY)
    except Exception as error:  # safetensors raises its own kinds
        raise ValueError(f"{path} can't be read: {error}; export the checkpoint again") from error


def export_of_record(directory: Path) -> str | None:
    """Which export the small files are from, if its record is still there."""
    path = directory / RECORD
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["export"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged; export the checkpoint again") from error


def check_same_export(directory: Path, exports: dict[str, str | None]) -> None:
    """Raise `ValueError` unless all files, given by name with their export, are from one."""
    if foreign := [name for name, export in exports.items() if export is None]:
        raise ValueError(
            f"{', '.join(foreign)} in {directory} is not from this package: it belongs to another model; "
            "use what `ixc2 gguf` wrote"
        )
    expected = exports[DECODER]
    if others := [name for name, export in exports.items() if export != expected]:
        raise ValueError(
            f"{', '.join(others)} in {directory} is from another export than {DECODER}; "
            "use the files of one export together, or export the checkpoint again"
        )
