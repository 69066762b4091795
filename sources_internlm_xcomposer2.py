"""Where the candidates for an article's pictures come from: a folder, a function, or anything with `search`.

A folder is ranked by a text tower that the user names, or by words of captions that the model itself writes,
which are kept in a file as soon as they are written.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor
from transformers.utils import ModelOutput, logging

from .article_internlm_xcomposer2 import Candidate
from .media_internlm_xcomposer2 import IMAGE_EXTENSIONS, MediaSource, load_image
from .writing_internlm_xcomposer2 import save_page

logger = logging.get_logger(__name__)

CandidateId = str | int
Found = Sequence[tuple[CandidateId, MediaSource] | str | os.PathLike]
Search = Callable[[str, Collection[CandidateId], int], Found]
# Pictures and a question -> an answer about each; for instance `Composer.describe`.
Describe = Callable[[Sequence[Image.Image], str], Sequence[str]]

# How a model is asked for the captions of a folder, in the language that is searched for.
CHINESE_QUESTION = "用一句话描述这张图片。"
ENGLISH_QUESTION = "Describe the picture in one sentence."

CAPTION_FILE = "captions.jsonl"
BATCH_SIZE = 4  # pictures that are described, or read by a text tower, at once

_CHINESE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_RUN = re.compile(rf"[{_CHINESE}]+|[^\W_{_CHINESE}]+")


class PictureSource(Protocol):
    """Finds pictures for a caption."""

    def search(self, caption: str, exclude: Collection[CandidateId], k: int) -> Found:
        """At most `k` pictures that fit, the best first, without those in `exclude`.

        Returns:
            (id, picture) pairs; a path alone is its own id. A picture is anything that `load_image` reads.
        """
        ...


@dataclass(frozen=True)
class SearchFunction:
    """A function with the arguments of `PictureSource.search` as a source."""

    search: Search


class FolderSource:
    """The pictures in a folder and below, the best first for a caption.

    They are ranked by a text tower if there is an encoder, else by words of the captions that `describe`
    gives them. Those are computed when first needed, and kept in a file. If the folder holds no more than are
    wanted, they come as they are, in the order of their names.

    Args:
        folder: where the pictures are.
        describe: pictures and a question -> captions; `Composer` puts in its own model if there is none.
        encoder: a CLIP or SigLIP checkpoint of transformers, or its model and processor as a pair.
        question: how captions are asked for, by default in the language that is searched for.
        captions: the file that keeps captions, `captions.jsonl` in the folder by default.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: there is no picture in it.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        describe: Describe | None = None,
        *,
        encoder: str | os.PathLike | tuple | None = None,
        question: str | None = None,
        captions: str | os.PathLike | None = None,
    ) -> None:
        self.folder, self.describe, self.question = Path(folder), describe, question
        self.names = pictures_in(folder)
        if not self.names:
            raise ValueError(f"no pictures in {str(folder)!r}; those end in .jpg, .png and the like")
        self.captions = self.folder / CAPTION_FILE if captions is None else Path(captions)
        self._tower = None if encoder is None else TextTower(encoder)
        self._features = None

    def search(self, caption: str, exclude: Collection[CandidateId], k: int) -> Found:
        """As in `PictureSource`; an id is a path below the folder."""
        left = [name for name in self.names if name not in exclude]
        scores = self._scores(caption) if len(left) > k else dict.fromkeys(left, 0.0)
        ranked = sorted((name for name in left if name in scores), key=lambda name: -scores[name])
        found = ((name, _load_or_none(self.folder, name)) for name in ranked)
        return list(itertools.islice((pair for pair in found if pair[1] is not None), k))

    def _scores(self, caption: str) -> dict[str, float]:
        """How well each readable picture fits."""
        if self._tower is not None:
            if self._features is None:
                self._features = self._tower.of_pictures(self.folder, self.names)
            return self._tower.compare(caption, self._features)
        if self.describe is None:
            raise ValueError(
                f"{len(self.names)} pictures in {str(self.folder)!r} need a model that describes them, or an "
                "encoder; pass describe=model.composer(tokenizer).describe or encoder="
            )
        file = CaptionFile(self.captions)
        question = self.question or question_for(caption)
        for _ in describe_pictures(self.folder, self.names, self.describe, file, question):
            pass
        known = file.known(self.folder, question)
        captions = {name: known[name] for name in self.names if name in known}
        return dict(zip(captions, score_by_words(caption, list(captions.values())), strict=True))


def as_source(source: object, describe: Describe | None) -> PictureSource | None:
    """A folder, a function or a source as a source.

    Raises:
        TypeError: it is neither.
    """
    if source is None:
        return None
    if isinstance(source, str | os.PathLike):
        return FolderSource(source, describe)
    if hasattr(source, "search"):
        if getattr(source, "describe", describe) is None:  # a folder; remote code has a class of its own
            source.describe = describe
        return source
    if callable(source):
        return SearchFunction(source)
    raise TypeError(
        f"source must be a folder, a function of (caption, exclude, k) or an object with search, not "
        f"{type(source).__name__}"
    )


def find_candidates(
    source: PictureSource, caption: str, exclude: Collection[CandidateId], k: int
) -> tuple[Candidate, ...]:
    """What a source finds, loaded, at most `k`.

    Raises:
        TypeError, ValueError, FileNotFoundError: the source returned something else, or unreadable pictures.
    """
    found = source.search(caption, exclude, k)
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        raise TypeError(f"a source returns a list of (id, picture), not {type(found).__name__}")
    candidates = []
    for item in found[:k]:
        if isinstance(item, str | os.PathLike):
            item = (os.fspath(item), item)
        if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], str | int):
            raise TypeError(f"a source returns (id, picture) pairs or paths, not {item!r:.80}")
        candidates.append(Candidate(item[0], load_image(item[1])))
    return tuple(candidates)


# ---- pictures in a folder ----


def pictures_in(folder: str | os.PathLike, *, recursive: bool = True) -> list[str]:
    """Names of the files in a folder that end like pictures, as paths below it, in order; not hidden ones.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no folder {str(folder)!r}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is not a folder")
    paths = (path.relative_to(folder) for path in folder.glob("**/*" if recursive else "*"))
    return sorted(
        path.as_posix()
        for path in paths
        if path.suffix.lower() in IMAGE_EXTENSIONS
        and not any(part.startswith(".") for part in path.parts)
        and (folder / path).is_file()
    )


def _load_or_none(folder: Path, name: str) -> Image.Image | None:
    """A picture, or `None` with a warning if it can't be read."""
    try:
        return load_image(folder / name)
    except (ValueError, OSError) as error:
        logger.warning("left out a picture: %s", error)
        return None


class CaptionFile:
    """Captions in JSON lines, appended one by one, so that nothing is lost when a run is interrupted.

    A line holds the picture's name, size in bytes and time of change, the question, and the caption. A
    caption counts as long as the picture's size and time are the same.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._cut_unfinished_line()

    def known(self, folder: Path, question: str) -> dict[str, str]:
        """The names of pictures below `folder` whose answer to this question is known, and that answer."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        found = {}
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                name, caption, stamp = row["file"], row["caption"], (row["bytes"], row["changed"])
                asked = row["question"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {str(self.path)!r} is no caption of ours ({error!r:.80}); use another "
                    "file"
                ) from None
            if asked == question and stamp == file_stamp(folder / str(name)):
                found[name] = caption
        return found

    def add(self, folder: Path, name: str, question: str, caption: str) -> None:
        """Append one answer."""
        num_bytes, changed = file_stamp(folder / name) or (0, 0)
        row = {"file": name, "caption": caption, "question": question, "bytes": num_bytes, "changed": changed}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _cut_unfinished_line(self) -> None:
        """Remove what a killed run left of its last line; `OSError` if the file can't be written."""
        with self.path.open("ab+") as file:
            file.seek(0)
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)


class SidecarFiles:
    """Captions in text files beside the pictures, `a.txt` for `a.png`, as captioning tools write them.

    Any text counts, whatever the question was.

    Args:
        names: the pictures, as paths below their folder.

    Raises:
        ValueError: two pictures would share a file.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.files, owners = {}, {}
        for name in names:
            file = Path(name).with_suffix(".txt").as_posix()
            other = owners.setdefault(file, name)
            if other != name:
                raise ValueError(f"{other} and {name} would share {file}; rename one, or write JSON lines")
            self.files[name] = file

    def known(self, folder: Path, question: str) -> dict[str, str]:
        """The names of pictures below `folder` that have a caption, and that caption."""
        paths = {name: folder / file for name, file in self.files.items()}
        texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}
        return {name: text for name, text in texts.items() if text.strip()}

    def add(self, folder: Path, name: str, question: str, caption: str) -> None:
        """Write one file, whole or not at all."""
        save_page(f"{caption}\n", folder / self.files[name])


def file_stamp(path: Path) -> tuple[int, int] | None:
    """A file's size in bytes and time of change in nanoseconds, `None` if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def describe_pictures(
    folder: str | os.PathLike,
    names: Sequence[str],
    describe: Describe,
    file: CaptionFile | SidecarFiles,
    question: str,
    *,
    batch_size: int = BATCH_SIZE,
) -> Iterator[str]:
    """Add the captions that a file lacks -> the names one by one, as they are done or found unreadable."""
    folder = Path(folder)
    known = file.known(folder, question)
    yield from (name for name in names if name in known)
    missing = [name for name in names if name not in known]
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        loaded = {name: image for name in batch if (image := _load_or_none(folder, name)) is not None}
        captions = describe(list(loaded.values()), question) if loaded else []
        for name, caption in zip(loaded, captions, strict=True):
            file.add(folder, name, question, caption)
        yield from batch


# ---- ranking ----


def question_for(caption: str) -> str:
    """How to ask for captions in the language of this one."""
    return CHINESE_QUESTION if re.search(f"[{_CHINESE}]", caption) else ENGLISH_QUESTION


def words_of(text: str) -> set[str]:
    """Words in lower case without the `s` of a plural; of scripts without spaces, pairs of characters."""
    words = set()
    for run in _RUN.findall(text.lower()):
        if not re.match(f"[{_CHINESE}]", run):
            words.add(run[:-1] if len(run) > 3 and run.endswith("s") else run)
        else:
            words.update(run[i : i + 2] for i in range(max(1, len(run) - 1)))
    return words


def score_by_words(query: str, captions: Sequence[str]) -> list[float]:
    """How much each caption shares with a query: words weighted by rarity, over the root of its length."""
    documents, wanted = [words_of(caption) for caption in captions], words_of(query)
    weights = {}
    for word in wanted:
        num_with = sum(word in document for document in documents)
        weights[word] = math.log(1 + len(documents) / num_with) if num_with else 0.0
    return [sum(weights[w] for w in wanted & words) / math.sqrt(len(words) or 1) for words in documents]


class TextTower:
    """A CLIP or SigLIP checkpoint of transformers, which compares pictures with texts.

    Args:
        encoder: its directory or hub id, or the loaded model and processor.
    """

    def __init__(self, encoder: str | os.PathLike | tuple) -> None:
        if isinstance(encoder, str | os.PathLike):
            encoder = (AutoModel.from_pretrained(encoder).eval(), AutoProcessor.from_pretrained(encoder))
        self.model, self.processor = encoder
        if not hasattr(self.model, "get_text_features") or not hasattr(self.model, "get_image_features"):
            raise TypeError(
                f"the encoder is a {type(self.model).__name__}, which compares no texts with pictures; use a "
                "CLIP or SigLIP checkpoint"
            )

    @torch.no_grad()
    def of_pictures(self, folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
        """Unit vectors (width,) of all readable pictures, by name."""
        features = {}
        for start in range(0, len(names), BATCH_SIZE):
            batch = names[start : start + BATCH_SIZE]
            loaded = {name: image for name in batch if (image := _load_or_none(folder, name)) is not None}
            if loaded:
                inputs = self.processor(images=list(loaded.values()), return_tensors="pt")
                vectors = self.model.get_image_features(**inputs.to(self.model.device))
                features |= zip(loaded, _unit_vectors(vectors), strict=True)
        return features

    @torch.no_grad()
    def compare(self, text: str, features: Mapping[str, Tensor]) -> dict[str, float]:
        """The cosine of a text with each picture."""
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=[text], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        vector = _unit_vectors(self.model.get_text_features(**inputs.to(self.model.device)))[0]
        return {name: float(picture @ vector) for name, picture in features.items()}


def _unit_vectors(features: Tensor | ModelOutput) -> Tensor:
    """(items, width) float32 of length one; newer releases wrap the features in an output."""
    return F.normalize(getattr(features, "pooler_output", features).float(), dim=-1)
