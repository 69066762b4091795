"""Turn a published checkpoint into a directory that any user of transformers can load."""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint_internlm_xcomposer2 import INDEX_FILES, read_headers
from ..files_internlm_xcomposer2 import (
    PROCESSOR_FILES,
    check_link,
    is_plain_name,
    read_fields,
    read_small,
    shown,
    staging,
)
from .convert import INDEX, Piece, convert, index_of, plan_pieces
from .examine import Findings, examine
from .small_files import describe_checkpoint, json_bytes

MARKER = "ixc2_adopted.json"  # in an adopted directory: where it came from, and what was written
MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Adoption:
    """What `adopt` did."""

    target: Path
    findings: Findings
    written: tuple[str, ...]
    kept: tuple[str, ...]  # files that were changed after being written, and were left alone
    removed: tuple[str, ...]
    notes: tuple[str, ...]  # what is missing or assumed, in plain words


@dataclass
class _Plan:
    """Every file of the adopted directory by name."""

    texts: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, Path] = field(default_factory=dict)  # weights that are used as is
    pieces: list[Piece] = field(default_factory=list)  # weights that are converted

    @property
    def names(self) -> list[str]:
        return [*self.links, *(piece.name for piece in self.pieces), *self.texts]


def adopt(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    convert_bin: bool = False,
    copy: bool = False,
    tokenizer: str | os.PathLike | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    num_attention_heads: int | None = None,
) -> Adoption:
    """Write a directory that holds everything a published checkpoint needs to be loaded.

    It holds a complete `config.json`, the generation, tokenizer, processor and template files, the modules of
    this package that remote code needs, and the weights: hard links if the file system has them, else
    symbolic links, else copies. `source` is never changed. A second call checks what the first one wrote,
    and rewrites what is missing or out of date.

    Args:
        source: the directory of a published checkpoint.
        target: the new directory, or one that an earlier call wrote.
        convert_bin: write `.bin` weights as safetensors.
        copy: copy the weights, so that the two directories share nothing.
        tokenizer: a `tokenizer.model` if `source` has none.
        max_shard_size: the most bytes of one converted file, or text such as `"5GB"`.
        num_attention_heads: if `config.json` doesn't say; the weights don't determine it.

    Raises:
        FileNotFoundError: no directory, no weights, or not all shards.
        FileExistsError: `target` holds other files, or another run is working on it.
        ValueError: `source` isn't a checkpoint of the family, is damaged, or the package can't load it.
        OSError: the disk is too small or can't be written to.
    """
    source, target = Path(source).absolute(), Path(target).absolute()
    for path in (source, target):
        check_link(path)
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    previous = check_target(source, target)
    findings = examine(source, num_attention_heads)
    check_loadable(findings)
    texts, notes = describe_checkpoint(findings, Path(tokenizer) if tokenizer else None)
    convert_bin = findings.is_bin and (convert_bin or previous.get("converted", False))
    plan = _plan_weights(findings, convert_bin, max_shard_size)
    plan.texts |= texts
    needed, kept = _what_is_needed(plan, target, previous, copy)
    dropped = [name for name in previous.get("files", {}) if name not in plan.names and _is_weights(name)]
    removed = [name for name in dropped if os.path.lexists(target / name) and not (target / name).is_dir()]
    if needed or removed:
        check_space(plan, needed, findings, target, copy)
        with staging_beside(target) as staging:
            _fill(plan, needed, staging, copy)
            record = _record(plan, target, staging, previous, kept)
            record = {"source": os.path.realpath(source), "converted": convert_bin, "files": record}
            (staging / MARKER).write_bytes(json_bytes(record))
            put_in_place(staging, target, removed)
    notes = (*findings.notes, *notes)
    return Adoption(target, findings, tuple(needed), tuple(kept), tuple(removed), notes)


def check_target(source: Path, target: Path, marker: str = MARKER, done: str = "adopted") -> dict:
    """What an earlier run recorded in `target`, empty if `target` is new.

    Args:
        marker: the name of the file with that record.
        done: what that run did, in messages.

    Raises:
        FileExistsError: `target` is a file, holds something else, or was written from elsewhere.
        ValueError: `target` is inside `source`, or the other way round.
    """
    real_source, real_target = (Path(os.path.realpath(path)) for path in (source, target))
    if real_target == real_source or real_source in real_target.parents or real_target in real_source.parents:
        raise ValueError(f"one of {target} and {source} is inside the other; choose another target directory")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return {}
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; choose another target directory")
    if not (target / marker).is_file():
        raise FileExistsError(
            f"{target} holds files that were not {done}; empty it or choose another target directory"
        )
    try:
        previous = read_record(target / marker)
    except ValueError as error:
        raise FileExistsError(
            f"{target / marker} is damaged; delete {target} or choose another: {error}"
        ) from error
    if previous["source"] != os.fspath(real_source):
        raise FileExistsError(
            f"{target} was {done} from {previous['source']}, not from {source}; delete it or choose another"
        )
    return previous


def read_record(path: Path) -> dict:
    """What an earlier run wrote: `source`, whether it `converted`, and digest or size of its `files`.

    Raises:
        ValueError: a field is missing or of another kind, or a file isn't one of the directory's own.
    """
    record = read_fields(path)
    source, files = record.get("source"), record.get("files")
    if not isinstance(source, str) or not isinstance(files, dict):
        raise ValueError(f"source is {shown(source)} and files are {shown(files)}")
    for name, value in files.items():
        if not is_plain_name(name):
            raise ValueError(f"files names {shown(name)}, which isn't a file of this directory")
        if not isinstance(value, str | int):
            raise ValueError(f"files says {shown(value)} of {name}, neither a digest nor a size")
    return record


def check_loadable(findings: Findings) -> None:
    """Raise `ValueError` for what no class of the package would load, before anything is written."""
    for name, fault in findings.faults.items():
        if name not in PROCESSOR_FILES:  # adoption writes those itself
            raise ValueError(fault if name in fault else f"{findings.source / name}: {fault}")
    faults = [
        f"{len(names)} {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for what, names in (("missing", findings.missing), ("unknown", findings.unknown))
        if names
    ]
    if faults:
        raise ValueError(f"{findings.source} can't be loaded by this package; tensors: {'; '.join(faults)}")


# ---- weights ----


def _plan_weights(findings: Findings, convert_bin: bool, max_shard_size: int | str) -> _Plan:
    plan = _Plan()
    if convert_bin:
        plan.pieces = plan_pieces(findings.headers, max_shard_size)
        if len(plan.pieces) > 1:
            plan.texts[INDEX] = json_bytes(index_of(plan.pieces, findings.headers))
        return plan
    plan.links = {path.name: path for path in findings.paths}
    if findings.is_sharded:
        name = INDEX_FILES[findings.is_bin]
        plan.texts[name] = _index_bytes(findings, name)
    return plan


def _index_bytes(findings: Findings, name: str) -> bytes:
    """The source's own index, or one made from its shards."""
    if findings.has_index:
        return read_small(findings.source / name)
    total_size = sum(header.num_bytes for header in findings.headers.values())
    weight_map = {key: header.file.name for key, header in sorted(findings.headers.items())}
    return json_bytes({"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".index.json"))


def _place(path: Path, destination: Path, copy: bool) -> None:
    """Hard link, else symbolic link, else copy; a copy right away if requested."""
    real = Path(os.path.realpath(path))
    steps: list[Callable[[Path, Path], object]] = [os.link, os.symlink, shutil.copyfile]
    for step in steps[2:] if copy else steps:
        try:
            step(real, destination)
            return
        except OSError:
            if step is shutil.copyfile:
                raise


# ---- what is already there ----


def _what_is_needed(plan: _Plan, target: Path, previous: dict, copy: bool) -> tuple[list[str], list[str]]:
    """Names of files to write, and names of files that someone has changed since."""
    recorded = previous.get("files", {})
    needed, kept = [], []
    if folders := [name for name in (*plan.names, MARKER) if (target / name).is_dir()]:
        raise FileExistsError(f"{target / folders[0]} is a directory; move it away or choose another target")
    for name, path in plan.links.items():
        if not _is_placed(path, target / name, copy):
            needed.append(name)
    for piece in plan.pieces:
        if not _is_converted(piece, target / piece.name, recorded):
            needed.append(piece.name)
    for name, content in plan.texts.items():
        present = _digest((target / name).read_bytes()) if (target / name).is_file() else None
        if present is not None and present not in (recorded.get(name), _digest(content)):
            kept.append(name)
        elif present != _digest(content):
            needed.append(name)
    return needed, kept


def _is_placed(path: Path, placed: Path, copy: bool) -> bool:
    if not placed.is_file() or placed.stat().st_size != path.stat().st_size:
        return False
    return not (copy and placed.samefile(path))


def _is_converted(piece: Piece, path: Path, recorded: dict) -> bool:
    if not path.is_file() or path.stat().st_size != recorded.get(piece.name):
        return False
    try:
        return set(read_headers([path])) == set(piece.tensors)
    except ValueError:
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---- writing ----


def check_space(plan: _Plan, needed: list[str], findings: Findings, target: Path, copy: bool) -> None:
    """Raise `OSError` before anything is written if the disk can't hold the weights."""
    tensors = [name for piece in plan.pieces if piece.name in needed for name in piece.tensors]
    num_bytes = sum(findings.headers[name].num_bytes for name in tensors)
    if copy:
        num_bytes += sum(path.stat().st_size for name, path in plan.links.items() if name in needed)
    folder = next(folder for folder in target.parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(
            f"{target} needs {num_bytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; "
            "make room or choose another target directory"
        )


def staging_beside(target: Path) -> AbstractContextManager[Path]:
    """A new directory beside `target`, on the same disk; removed afterwards whatever happens.

    Raises:
        FileExistsError: another run is in progress.
    """
    remedy = "wait for it, or choose another target directory"
    return staging(target.with_name(f"{target.name}.partial"), remedy=remedy)


def _fill(plan: _Plan, needed: list[str], staging: Path, copy: bool) -> None:
    for name, path in plan.links.items():
        if name in needed:
            _place(path, staging / name, copy)
    if pieces := [piece for piece in plan.pieces if piece.name in needed]:
        convert(pieces, staging)
    for name, content in plan.texts.items():
        if name in needed:
            (staging / name).write_bytes(content)


def _record(plan: _Plan, target: Path, staging: Path, previous: dict, kept: list[str]) -> dict:
    """Digests of the small files, and bytes of the weights; what someone changed keeps its old entry."""
    record: dict[str, str | int] = {name: _digest(content) for name, content in plan.texts.items()}
    record |= {name: path.stat().st_size for name, path in plan.links.items()}
    for piece in plan.pieces:
        written = staging / piece.name
        record[piece.name] = (written if written.exists() else target / piece.name).stat().st_size
    return record | {name: previous["files"][name] for name in kept if name in previous["files"]}


def put_in_place(staging: Path, target: Path, removed: Sequence[str], marker: str = MARKER) -> None:
    """In one step for a new target; for an old one, file by file, the configuration and the record last."""
    if not (target / marker).exists():
        if target.is_dir():
            target.rmdir()  # it is empty
        staging.rename(target)
        return
    last = [name for name in ("config.json", marker) if (staging / name).exists()]
    names = {path.name for path in staging.iterdir()}.difference(last)
    for name in [*names, *last]:
        os.replace(staging / name, target / name)
    for name in removed:
        (target / name).unlink()
