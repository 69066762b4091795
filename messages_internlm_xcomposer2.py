"""What did a caller pass: messages, or texts and lists of media -> marked texts, and their media in order.

Nothing is read or loaded here, so mistakes in the form of a request cost nothing.
"""

import re
from collections.abc import Mapping, Sequence

from .media_internlm_xcomposer2 import MediaSource, Medium, as_source, flatten_images, flatten_videos
from .tokenization_internlm_xcomposer2 import IMAGE_MARK, VIDEO_MARK

# Kinds of content that carry media: what they are, and the keys that may hold the source.
MEDIA_PARTS = {
    "image": ("image", ("image", "url", "path", "base64")),
    "image_url": ("image", ("image_url",)),
    "video": ("video", ("video", "url", "path", "base64")),
    "video_url": ("video", ("video_url",)),
}


# ---- messages ----


def split_conversations(conversation: Sequence) -> tuple[list[list[dict]], bool]:
    """One conversation or several -> a list of conversations, and whether there were several.

    Raises:
        TypeError, ValueError: something isn't a list of messages, or an empty one.
    """
    if hasattr(conversation, "messages"):
        conversation = conversation.messages
    if not isinstance(conversation, list | tuple):
        raise TypeError(f"a conversation must be a list of messages, not {type(conversation).__name__}")
    if not conversation:
        raise ValueError("the conversation is empty: it needs at least one message")
    if not _is_conversation(conversation[0]):
        return [list(conversation)], False
    if any(isinstance(item, list | tuple) and item and _is_conversation(item[0]) for item in conversation):
        raise ValueError("conversations are nested too deep: a batch is a list of lists of messages")
    return [split_conversations(item)[0][0] for item in conversation], True


def _is_conversation(item: object) -> bool:
    return isinstance(item, list | tuple) or hasattr(item, "messages")


def read_messages(messages: Sequence[Mapping], *, need_sources: bool) -> tuple[list[dict], list[Medium]]:
    """A conversation as a chat template reads it, without its media, and its media in order.

    Args:
        need_sources: False allows `{"type": "image"}` alone, a mark for a picture that comes later.

    Raises:
        TypeError, ValueError: a message without a role, content of an unknown type, or not just one source.
    """
    rendered, media = [], []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"a message must be a dict with a role and content, not {_shorten(message)}")
        content = message.get("content")
        if isinstance(content, list | tuple):
            parts = [_read_part(part, need_sources) for part in content]
            media += [medium for _, medium in parts if medium is not None]
            content = [part for part, _ in parts]
        elif content is not None and not isinstance(content, str):
            raise TypeError(f"a message's content must be a text or a list, not {type(content).__name__}")
        rendered.append({**message, "content": "" if content is None else content})
    return rendered, media


def _read_part(part: Mapping, need_source: bool) -> tuple[dict, Medium | None]:
    """One item of a message's content, without its medium, and that medium."""
    if not isinstance(part, Mapping) or "type" not in part:
        raise TypeError(f"content must consist of dicts with a type, not {_shorten(part)}")
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
    """What is under a key of a part, ready to be loaded."""
    if isinstance(value, Mapping):  # OpenAI: {"image_url": {"url": ...}}
        if not isinstance(value.get("url"), str):
            raise TypeError(f"{key} needs a url, got {_shorten(value)}")
        value = value["url"]
    if key == "base64" and isinstance(value, str) and not value.startswith("data:"):
        return f"data:;base64,{value}"
    return as_source(value)


def _names(sources: Sequence[tuple[str, object]]) -> str:
    return " and ".join(key for key, _ in sources)


def _shorten(value: object) -> str:
    return f"{value!r:.80}"


# ---- texts with lists of media ----


def pair_media(
    texts: Sequence[str], images: object, videos: object, *, allow_unmarked: bool
) -> tuple[list[str], list[list[Medium]]]:
    """Texts in which every medium has an `IMAGE_MARK`, and the media of each in the order of their marks.

    Args:
        images: nothing, one picture, a list for the marks in order, or a list for each text.
        videos: nothing, one video, or a list of them; a list of frames is a video.
        allow_unmarked: a text without any mark may have one picture.

    Raises:
        ValueError: the numbers of marks and media differ, or a text doesn't say which mark is a video's.
    """
    row_lengths = _row_lengths(images)
    images = [] if images is None else [Medium(False, item) for item in flatten_images(images)]
    videos = None if videos is None else [Medium(True, item) for item in flatten_videos(videos)]
    if videos is not None and not any(VIDEO_MARK in text for text in texts):
        if images:
            raise ValueError(f"with pictures and videos, the text must mark each video with {VIDEO_MARK}")
        return list(texts), _distribute(videos, texts, IMAGE_MARK, None, allow_unmarked)
    rows = _distribute(images, texts, IMAGE_MARK, row_lengths, allow_unmarked and not videos)
    if not videos:
        return list(texts), rows
    video_rows = _distribute(videos, texts, VIDEO_MARK, None, False)
    merged = [_merge(*row) for row in zip(texts, rows, video_rows, strict=True)]
    return [text.replace(VIDEO_MARK, IMAGE_MARK) for text in texts], merged


def _merge(text: str, images: list[Medium], videos: list[Medium]) -> list[Medium]:
    """Pictures and videos of one text in the order of their marks."""
    kinds = re.findall(f"{re.escape(IMAGE_MARK)}|{re.escape(VIDEO_MARK)}", text)
    iterators = {IMAGE_MARK: iter(images), VIDEO_MARK: iter(videos)}
    return [next(iterators[kind]) for kind in kinds]


def _distribute(
    media: list[Medium], texts: Sequence[str], mark: str, lengths: list[int] | None, allow_unmarked: bool
) -> list[list[Medium]]:
    """Give each text its media: as many as `lengths` says, else one for each mark."""
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


def _row_lengths(images: object) -> list[int] | None:
    """How many pictures each text has, if they come as a list for each text."""
    if isinstance(images, list | tuple) and images and all(isinstance(item, list | tuple) for item in images):
        return [len(item) for item in images]
    return None
