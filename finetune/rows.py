"""Training data as people keep it -> rows: turns, and where their pictures and videos are. Opens no media."""

import json
import os
import random
import re
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import isfinite
from pathlib import Path

from internlm_xcomposer2.messages_internlm_xcomposer2 import MEDIA_PARTS, read_messages
from internlm_xcomposer2.tokenization_internlm_xcomposer2 import IMAGE_MARK, VIDEO_MARK

# A picture or video: a path, URL or `data:` URI, or the frames of a video.
Media = str | tuple[str, ...]

# Roles as named by the published format, its relatives and `messages`.
ROLES = {
    "human": "user",
    "user": "user",
    "bot": "assistant",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
PUBLISHED_KEYS = ("id", "conversations", "image")
MESSAGES_KEYS = ("id", "messages", "image", "images", "video", "videos")
LINES = (".jsonl", ".ndjson")
MIXTURE = ".txt"
SAMPLES_PER_COUNT = 1000  # the counts of a mixture are thousands of samples

_MARKS = re.compile(f"({re.escape(IMAGE_MARK)}|{re.escape(VIDEO_MARK)})")
_KIND_OF_MARK = {IMAGE_MARK: "image", VIDEO_MARK: "video"}


class RowFault(ValueError):
    """What is wrong with a row, with its file and its number; `faults` come without them."""

    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """What one side says; `<ImageHere>` marks each picture and video."""

    role: str  # "user", "assistant" or "system"
    text: str


@dataclass(frozen=True)
class Row:
    """One conversation with its pictures and videos in the order of their marks, none of them opened yet.

    Attributes:
        index: position among the rows of `source`, from 0.
        line: line of the file, from 1, if each row has its own.
        faults: what is wrong with the row as it is written.
        side: which conversation of its pair it is, if rows are pairs.
    """

    source: Path
    index: int
    turns: tuple[Turn, ...] = ()
    media: tuple[Media, ...] = ()
    line: int | None = None
    faults: tuple[str, ...] = ()
    side: str = ""

    @property
    def place(self) -> str:
        """File, number and side, for messages."""
        line = f" (line {self.line})" if self.line else ""
        return f"{self.source}, row {self.index}{line}" + (f", {self.side}" if self.side else "")

    def fault(self, faults: Sequence[str]) -> RowFault:
        """The error that says what is wrong with this row."""
        error = RowFault(f"{self.place}: {'; '.join(faults)}")
        error.faults = tuple(faults)
        return error


class _Unreadable(ValueError):
    """An entry of a file that isn't a row."""


# --- files ---


def read_rows(
    path: str | os.PathLike, media_root: str | os.PathLike | None = None, ignore_keys: Collection[str] = ()
) -> list[Row]:
    """The rows of one file: a JSON list, or JSON lines (`.jsonl`), in the published form or as `messages`.

    Malformed rows are included, with their `faults`.

    Args:
        media_root: what relative picture paths are relative to, by default the folder of the file.
        ignore_keys: keys of rows to allow and ignore.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file as a whole is not a list of rows.
    """
    path = Path(path)
    root = path.parent if media_root is None else Path(media_root)
    return [
        read_row(path, index, line, entry, root, ignore_keys)
        for index, (line, entry) in enumerate(read_entries(path))
    ]


def read_entries(path: Path) -> list[tuple[int | None, object]]:
    """The entries of a file as they are, and the line of each if it has its own.

    For a line that is not JSON, the entry is the error that says so.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file as a whole is not a list of rows.
    """
    entries = list(_read_lines(path) if path.suffix.lower() in LINES else _read_list(path))
    if not entries:
        raise ValueError(f"{path} holds no rows")
    return entries


def read_mixture(
    path: str | os.PathLike,
    media_root: str | os.PathLike | None = None,
    ignore_keys: Collection[str] = (),
    seed: int = 0,
    read: Callable[..., list] = read_rows,
) -> list[Row]:
    """The rows that a mixture (`data.txt`) asks for, drawn and shuffled by `seed`.

    Each line is a path, relative to the mixture, and how many thousands of samples to draw from it; without a
    number, the file is taken as it is. If more are requested than there are, every row is repeated equally
    often, give or take one; if fewer, none is drawn twice.

    Args:
        read: how each file is read, with the arguments of `read_rows`.

    Raises:
        FileNotFoundError: the mixture or a file that it names is missing.
        ValueError: a line without a path or with an invalid count, or a file without rows.
    """
    drawn = []
    for position, (source, num_samples) in enumerate(read_sources(path)):
        rows = read(source, media_root, ignore_keys)
        drawn += draw_rows(rows, num_samples, random.Random(f"{seed}:{position}"))
    random.Random(seed).shuffle(drawn)
    return drawn


def read_data(
    paths: Sequence[str | os.PathLike],
    media_root: str | os.PathLike | None = None,
    ignore_keys: Collection[str] = (),
    seed: int = 0,
    read: Callable[..., list] = read_rows,
) -> list[Row]:
    """The rows of several files, read by `read_mixture` for mixtures (`.txt`), by `read` for others."""
    rows = []
    for path in paths:
        if Path(path).suffix.lower() == MIXTURE:
            rows += read_mixture(path, media_root, ignore_keys, seed, read)
        else:
            rows += read(path, media_root, ignore_keys)
    return rows


def read_sources(path: str | os.PathLike) -> list[tuple[Path, int | None]]:
    """The files that a mixture lists, and how many samples to draw from each, `None` for all as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the mixture lists no files, or a number is not a count of at least one sample.
    """
    path = Path(path)
    sources = []
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, *count = line.rsplit(maxsplit=1)
        num_samples = _samples_of(count[0], f"{path}, line {number}") if count else None
        sources.append((path.parent / (name if num_samples else line), num_samples))
    if not sources:
        raise ValueError(f"{path} lists no files; each line is a path and a count in thousands of samples")
    return sources


def draw_rows(rows: Sequence[Row], num_samples: int | None, generator: random.Random) -> list[Row]:
    """`num_samples` rows: all of them as often as they fit, and the rest without repetition."""
    if num_samples is None:
        return list(rows)
    copies, remainder = divmod(num_samples, len(rows))
    return list(rows) * copies + generator.sample(list(rows), remainder)


def _samples_of(count: str, place: str) -> int | None:
    """Thousands of samples as a number of samples; `None` for the end of a path instead of a number."""
    try:
        thousands = float(count)
    except ValueError:
        return None
    num_samples = round(thousands * SAMPLES_PER_COUNT) if isfinite(thousands) else 0
    if num_samples < 1:
        raise ValueError(
            f"{place}: a count of {count} thousand is {num_samples} samples; it must be at least 0.001"
        )
    return num_samples


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no such data file: '{path}'")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _read_list(path: Path) -> list[tuple[None, object]]:
    """The entries of a JSON list."""
    text = _text_of(path)
    if text.lstrip()[:1] != "[":
        raise ValueError(
            f"{path} isn't a list of rows; start it with '[', or name it {LINES[0]} if each line is a row"
        )
    try:
        return [(None, entry) for entry in json.loads(text)]
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _read_lines(path: Path) -> Iterator[tuple[int, object]]:
    """The number and content of each non-blank line; the error for one that is not JSON."""
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, _Unreadable(f"line {number} is not JSON: {error.msg}, column {error.colno}")


# --- rows ---


def read_row(
    path: Path, index: int, line: int | None, entry: object, root: Path, ignore_keys: Collection[str]
) -> Row:
    """One entry of a file as a row, with its faults if it has any."""
    try:
        turns, sources = _read_entry(entry, ignore_keys)
        media = tuple(_resolve(source, root) for source in sources)
    except (TypeError, ValueError) as error:
        return Row(path, index, line=line, faults=(str(error),))
    return Row(path, index, turns, media, line, tuple(turn_faults(turns)))


def _read_entry(entry: object, ignore_keys: Collection[str]) -> tuple[tuple[Turn, ...], list]:
    """Turns and media sources of an entry in either form."""
    if isinstance(entry, ValueError):
        raise entry
    if not isinstance(entry, Mapping):
        raise _Unreadable(f"a row must be an object, not {_kind(entry)}")
    forms = [name for name in ("conversations", "messages") if name in entry]
    if len(forms) != 1:
        raise _Unreadable(
            f"a row has either conversations or messages, but this one has {' and '.join(forms) or 'neither'}"
        )
    keys = PUBLISHED_KEYS if forms == ["conversations"] else MESSAGES_KEYS
    _check_keys(entry, [*keys, *ignore_keys], "the row")
    turns = entry[forms[0]]
    if not isinstance(turns, list) or not turns:
        raise _Unreadable(f"{forms[0]} must be a list of turns, not {_kind(turns)}")
    return _read_published(entry) if forms == ["conversations"] else _read_modern(entry)


def _read_published(entry: Mapping) -> tuple[tuple[Turn, ...], list]:
    """`conversations` and `image`; texts are stripped, as by the published reader."""
    turns = []
    for index, turn in enumerate(entry["conversations"]):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise _Unreadable(f"turn {index} is not an object with a role (from) and a text (value)")
        _check_keys(turn, ("from", "value"), f"turn {index}")
        turns.append(Turn(_role_of(turn.get("from"), index), turn["value"].strip()))
    return tuple(turns), _listed(entry.get("image"), "image")


def _read_modern(entry: Mapping) -> tuple[tuple[Turn, ...], list]:
    """`messages`; media have their own sources, or those in `images` and `videos` in the order of use."""
    messages = [_read_message(message, index) for index, message in enumerate(entry["messages"])]
    columns = {
        kind: [*_listed(entry.get(kind), kind), *_listed(entry.get(f"{kind}s"), f"{kind}s")]
        for kind in ("image", "video")
    }
    bare = [part for message in messages for part in message["content"] if _is_bare(part)]
    for kind, sources in columns.items():
        places = [part for part in bare if MEDIA_PARTS[part["type"]][0] == kind]
        if len(places) != len(sources):
            raise _Unreadable(
                f"{len(places)} {kind}s in the messages have no source of their own, but {kind}s lists "
                f"{len(sources)}; mark each with {{'type': '{kind}'}} or "
                f"{IMAGE_MARK if kind == 'image' else VIDEO_MARK}"
            )
        for part, source in zip(places, sources, strict=True):
            part[kind] = source
    rendered, media = read_messages(messages, need_sources=True)
    turns = [
        Turn(message["role"], "".join(part.get("text", IMAGE_MARK) for part in message["content"]))
        for message in rendered
    ]
    return tuple(turns), [medium.source for medium in media]


def _read_message(message: object, index: int) -> dict:
    """A message with its content as a list of parts, in which marks have become parts too."""
    if not isinstance(message, Mapping):
        raise _Unreadable(f"turn {index} is not an object with a role and content")
    _check_keys(message, ("role", "content"), f"turn {index}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise _Unreadable(f"turn {index}: content must be a text or a list of parts, not {_kind(content)}")
    return {
        "role": _role_of(message.get("role"), index),
        "content": [piece for part in parts for piece in _split_marks(part)],
    }


def _split_marks(part: object) -> list:
    """A text part as its texts and the media that its marks stand for; any other part as it is."""
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        return [dict(part) if isinstance(part, Mapping) else part]
    pieces = [piece for piece in _MARKS.split(part["text"]) if piece]
    return [
        {"type": _KIND_OF_MARK[piece]} if piece in _KIND_OF_MARK else {"type": "text", "text": piece}
        for piece in pieces
    ]


def _is_bare(part: object) -> bool:
    """Whether a part is a picture or video that doesn't say where it is."""
    if not isinstance(part, Mapping) or part.get("type") not in MEDIA_PARTS:
        return False
    return all(part.get(key) is None for key in MEDIA_PARTS[part["type"]][1])


def turn_faults(turns: Sequence[Turn]) -> list[str]:
    """What is wrong with the order of turns, and which ones are empty."""
    faults = []
    start = int(bool(turns) and turns[0].role == "system")
    for index, (turn, wanted) in enumerate(zip(turns[start:], cycle(("user", "assistant"))), start):
        if turn.role != wanted:
            faults.append(f"turn {index} is the {turn.role}'s but should be the {wanted}'s")
            break
    if turns and not faults and turns[-1].role != "assistant":
        faults.append(f"the last turn, {len(turns) - 1}, is the {turns[-1].role}'s; an answer must follow")
    return faults + [
        f"turn {index}, the {turn.role}'s, is empty"
        for index, turn in enumerate(turns)
        if turn.role != "system" and not turn.text.strip()
    ]


def _role_of(name: object, index: int) -> str:
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise _Unreadable(f"turn {index} has the unknown role {name!r:.80}; roles are {', '.join(ROLES)}")
    return role


def _check_keys(entry: Mapping, known: Sequence[str], what: str) -> None:
    if unknown := [str(key) for key in entry if key not in known]:
        raise _Unreadable(f"{what} has unknown keys {', '.join(unknown)}; known keys are {', '.join(known)}")


def _listed(value: object, key: str) -> list:
    """One source or a list of them as a list."""
    sources = [] if value is None else value if isinstance(value, list) else [value]
    if wrong := [source for source in sources if not isinstance(source, str) or not source]:
        raise _Unreadable(f"{key} must give files by their paths, not by {wrong[0]!r:.80}")
    return sources


def _resolve(source: object, root: Path) -> Media:
    """A source in a form that can be opened from anywhere."""
    if isinstance(source, list | tuple):
        return tuple(_resolve(frame, root) for frame in source)
    if isinstance(source, bytes):
        return f"data:;base64,{b64encode(source).decode()}"
    if not isinstance(source, str):
        raise _Unreadable(f"a picture or video must be given by its path, not by {source!r:.80}")
    return source if source.startswith("data:") or "://" in source else str(root / source)


def _kind(value: object) -> str:
    return "an empty list" if value == [] else f"{type(value).__name__} ({value!r:.60})"
