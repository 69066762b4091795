"""What callers of a processor pass: messages, texts, lists of media and options, read and checked."""

import binascii
import re
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from .ixc_utils import MAX_FRAMES, check_hd_num
from .media_internlm_xcomposer2 import MediaSource, describe, is_video
from .prompt_internlm_xcomposer2 import IMAGE_MARK

# In a text with pictures and videos, this marks the videos; wherever there are only videos, either mark does.
VIDEO_MARK = "<VideoHere>"

# Kinds of content that carry media: what they are, and under which keys they may say where it is.
MEDIA_PARTS = {
    "image": ("image", ("image", "url", "path", "base64")),
    "image_url": ("image", ("image_url",)),
    "video": ("video", ("video", "url", "path", "base64")),
    "video_url": ("video", ("video_url",)),
}

_OPTION_GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{32,}={0,2}\s*")


@dataclass(frozen=True)
class Medium:
    """One picture or video, not read yet."""

    is_video: bool
    source: MediaSource | Sequence[MediaSource]


@dataclass(frozen=True)
class ProcessingOptions:
    """How a processor cuts pictures, samples videos, and pads and returns what it makes of them.

    Args:
        hd_num: local tiles that a picture may be cut into, the checkpoint's own number by default.
        padding: True or "longest", "max_length", or False for rows as they come.
        padding_side: "left", as generation needs it, or "right".
        max_length: what rows are padded to with `padding="max_length"`; a longer row is an error.
        pad_to_multiple_of: a number that the length of padded rows is a multiple of.
        truncation: accepted for callers that name it; nothing is ever cut.
        add_special_tokens: whether BOS is added where the version has it and the text doesn't.
        fps, num_frames: frames per second of a video, and at most how many.
        return_mm_token_type_ids: add `mm_token_type_ids`, 1 on image tokens.
        return_text_replacement_offsets: add `text_replacement_offsets`, what became of each mark.
        return_tensors: "pt", "np", or None for lists of ids.

    Raises:
        TypeError, ValueError: an option that is unknown or impossible.
    """

    hd_num: int | None = None
    padding: bool | str = True
    padding_side: str = "left"
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    truncation: bool | str | None = False
    add_special_tokens: bool = True
    fps: float = 1.0
    num_frames: int = MAX_FRAMES
    return_mm_token_type_ids: bool = False
    return_text_replacement_offsets: bool = False
    return_tensors: str | None = None

    def __post_init__(self) -> None:
        if self.hd_num is not None:
            check_hd_num(self.hd_num)
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {self.padding_side!r}")

    @classmethod
    def names(cls) -> set[str]:
        """The names of all options, and of the groups that transformers sorts them into."""
        return {field.name for field in fields(cls)} | set(_OPTION_GROUPS)

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, object]) -> "ProcessingOptions":
        """Options by name, or inside `text_kwargs`, `images_kwargs`, `videos_kwargs`, `common_kwargs`."""
        flat = {name: value for name, value in kwargs.items() if name not in _OPTION_GROUPS}
        for group in _OPTION_GROUPS:
            flat.update(kwargs.get(group) or {})
        if unknown := set(flat) - cls.names():
            raise TypeError(
                f"unknown option {', '.join(sorted(unknown))}; the processor takes "
                f"{', '.join(sorted(cls.names() - set(_OPTION_GROUPS)))}"
            )
        return cls(**flat)


# --- messages ---


def split_conversations(conversation: Sequence) -> tuple[list[list[dict]], bool]:
    """One conversation or several -> a list of conversations, and whether there were several.

    Raises:
        TypeError, ValueError: something that is no list of messages, or an empty one.
    """
    if hasattr(conversation, "messages"):
        conversation = conversation.messages
    if not isinstance(conversation, list | tuple):
        raise TypeError(f"a conversation is a list of messages, not {type(conversation).__name__}")
    if not conversation:
        raise ValueError("the conversation is empty: it needs at least one message")
    is_batch = isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")
    if not is_batch:
        return [list(conversation)], False
    return [split_conversations(item)[0][0] for item in conversation], True


def read_messages(messages: Sequence[Mapping], *, need_sources: bool) -> tuple[list[dict], list[Medium]]:
    """A conversation as a chat template reads it, media left out, and its media in their order.

    Args:
        need_sources: False allows `{"type": "image"}` alone, a mark for a picture that comes later.

    Raises:
        TypeError, ValueError: a message without a role, content of an unknown type, a source that is none.
    """
    rendered, media = [], []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"a message is a dict with a role and content, not {_shorten(message)}")
        content = message.get("content")
        if isinstance(content, list | tuple):
            parts = [_read_part(part, need_sources) for part in content]
            media += [medium for _, medium in parts if medium is not None]
            content = [part for part, _ in parts]
        elif content is not None and not isinstance(content, str):
            raise TypeError(f"the content of a message is a text or a list, not {type(content).__name__}")
        rendered.append({**message, "content": "" if content is None else content})
    return rendered, media


def _read_part(part: Mapping, need_source: bool) -> tuple[dict, Medium | None]:
    """One item of a message's content, without its medium, and that medium."""
    if not isinstance(part, Mapping) or "type" not in part:
        raise TypeError(f"content is made of dicts with a type, not {_shorten(part)}")
    kind = part["type"]
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise TypeError(f"content of type 'text' needs a text, not {_shorten(part.get('text'))}")
        return dict(part), None
    if kind not in MEDIA_PARTS:
        raise ValueError(
            f"unknown content type {kind!r}; these models read text, {', '.join(sorted(MEDIA_PARTS))}"
        )
    name, keys = MEDIA_PARTS[kind]
    sources = [(key, part[key]) for key in keys if part.get(key) is not None]
    if len(sources) > 1:
        raise ValueError(f"content of type {kind!r} has {len(sources)} sources, {_names(sources)}; keep one")
    if not sources and need_source:
        raise ValueError(f"content of type {kind!r} has no source; put it under {' or '.join(keys)}")
    medium = Medium(name == "video", _source_of(*sources[0])) if sources else None
    return {"type": name}, medium


def _source_of(key: str, value: object) -> MediaSource | Sequence[MediaSource]:
    """What stands under a key of a part, ready to be loaded."""
    if isinstance(value, Mapping):  # OpenAI: {"image_url": {"url": ...}}
        if not isinstance(value.get("url"), str):
            raise TypeError(f"{key} needs a url, got {_shorten(value)}")
        value = value["url"]
    if key == "base64" and isinstance(value, str) and not value.startswith("data:"):
        return f"data:;base64,{value}"
    return as_source(value)


def as_source(value: MediaSource) -> MediaSource:
    """A source, or base64 without its `data:` head, as a source.

    A text is base64 if it has no other characters, is 32 or more long, decodes, and names no file.
    """
    if not isinstance(value, str) or not _BASE64.fullmatch(value) or _is_file(value):
        return value
    try:
        return b64decode(re.sub(r"\s", "", value), validate=True)
    except binascii.Error as error:
        raise ValueError(
            f"{describe(value)} is neither a file nor valid base64 ({error}); it may have been cut"
        ) from error


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # longer than a path can be
        return False


def _names(sources: Sequence[tuple[str, object]]) -> str:
    return " and ".join(key for key, _ in sources)


def _shorten(value: object) -> str:
    return f"{value!r:.80}"


# --- texts with lists of media ---


def pair_media(
    texts: Sequence[str], images: object, videos: object, *, allow_unmarked: bool
) -> tuple[list[str], list[list[Medium]]]:
    """Texts in which every medium has an `IMAGE_MARK`, and the media of each in the order of their marks.

    Args:
        images: nothing, one picture, a list that the marks take in order, or a list for each text.
        videos: nothing, one video, or a list of them; a list of frames is a video.
        allow_unmarked: a text without any mark may have one picture.

    Raises:
        ValueError: marks and media differ in number, or a text doesn't say which mark is a video's.
    """
    pictures = None if images is None else [Medium(False, item) for item in flatten_images(images)]
    films = None if videos is None else [Medium(True, item) for item in flatten_videos(videos)]
    if films is not None and not any(VIDEO_MARK in text for text in texts):
        if pictures:
            raise ValueError(f"with pictures and videos, the text marks each video by {VIDEO_MARK}")
        return list(texts), _share_out(films, texts, IMAGE_MARK, None, allow_unmarked)
    rows = _share_out(pictures or [], texts, IMAGE_MARK, _row_lengths(images), allow_unmarked and not films)
    if not films:
        return list(texts), rows
    film_rows = _share_out(films, texts, VIDEO_MARK, None, False)
    merged = [_merge(*row) for row in zip(texts, rows, film_rows, strict=True)]
    return [text.replace(VIDEO_MARK, IMAGE_MARK) for text in texts], merged


def _merge(text: str, pictures: list[Medium], films: list[Medium]) -> list[Medium]:
    """Pictures and videos of one text in the order of their marks."""
    kinds = re.findall(f"{re.escape(IMAGE_MARK)}|{re.escape(VIDEO_MARK)}", text)
    iterators = {IMAGE_MARK: iter(pictures), VIDEO_MARK: iter(films)}
    return [next(iterators[kind]) for kind in kinds]


def _share_out(
    media: list[Medium], texts: Sequence[str], mark: str, lengths: list[int] | None, allow_unmarked: bool
) -> list[list[Medium]]:
    """Give each text its media: as many as `lengths` says, else as it has marks."""
    marks, kind = [text.count(mark) for text in texts], "pictures" if mark == IMAGE_MARK else "videos"
    if lengths is not None and len(lengths) != len(texts):
        raise ValueError(f"there are {len(texts)} texts but {len(lengths)} lists of pictures")
    if lengths is None and not any(marks) and allow_unmarked and len(media) == len(texts):
        lengths = [1] * len(texts)  # one each, and no text says where
    wanted = marks if lengths is None else lengths
    for number, (count, given) in enumerate(zip(marks, wanted, strict=True), 1):
        if count != given and not (allow_unmarked and count == 0 and given == 1):
            raise ValueError(f"text {number} has {count} {mark} marks but {given} {kind} were given for it")
    if sum(wanted) != len(media):
        raise ValueError(
            f"{len(texts)} texts have {sum(wanted)} {mark} marks but {len(media)} {kind} were given; put one "
            "mark where each belongs"
        )
    remaining = iter(media)
    return [[next(remaining) for _ in range(count)] for count in wanted]


def flatten_images(images: object) -> list[MediaSource]:
    """One picture, a list, a list of lists or a stack of pictures -> a list."""
    if isinstance(images, list | tuple):
        return [image for item in images for image in flatten_images(item)]
    if getattr(images, "ndim", 0) == 4:
        return list(images)
    return [as_source(images)]


def flatten_videos(videos: object) -> list[MediaSource | Sequence[MediaSource]]:
    """One video or a list of them -> a list. Frames, in a list or as one stack, are one video."""
    if getattr(videos, "ndim", 0) == 4:
        return [list(videos)]
    if not isinstance(videos, list | tuple):
        return [as_source(videos)]
    if videos and all(_is_frame(item) for item in videos):
        return [videos]
    return [video for item in videos for video in _videos_of(item)]


def _videos_of(item: object) -> Iterator[MediaSource | Sequence[MediaSource]]:
    """An item of a list of videos: a video, the frames of one, or one row's list of videos."""
    is_row = isinstance(item, list | tuple) and all(
        not _is_frame(part) and (getattr(part, "ndim", 0) == 4 or is_video(part)) for part in item
    )
    if is_row or not isinstance(item, list | tuple):
        yield from flatten_videos(item)
    else:
        yield item


def _is_frame(item: object) -> bool:
    """A decoded picture: PIL, or an array of two or three dimensions."""
    return hasattr(item, "getbands") or getattr(item, "ndim", 0) in (2, 3)


def _row_lengths(images: object) -> list[int] | None:
    """How many pictures each text has, where they come in a list for each text."""
    if isinstance(images, list | tuple) and images and all(isinstance(item, list | tuple) for item in images):
        return [len(item) for item in images]
    return None
