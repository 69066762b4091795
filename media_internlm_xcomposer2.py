"""Pictures and videos from wherever callers keep them, as RGB PIL pictures.

A file's content decides what it is; its name is used only if the content says nothing or is out of reach.
Anything wrong with a source is a `FileNotFoundError`, `ValueError` or `TypeError` here, before any
computation. Nothing accesses the network except an http(s) URL that the caller passed.
"""

import base64
import binascii
import io
import math
import os
import re
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

try:
    from .access_internlm_xcomposer2 import MediaAccess, fetch
    from .bounds_internlm_xcomposer2 import bound_icon, bound_pixels
    from .video_internlm_xcomposer2 import DecordReader, PyAVReader, open_video
except ImportError:
    if __package__:
        raise
    # A model directory on sys.path, this file imported as a top-level module.
    from access_internlm_xcomposer2 import MediaAccess, fetch
    from bounds_internlm_xcomposer2 import bound_icon, bound_pixels
    from video_internlm_xcomposer2 import DecordReader, PyAVReader, open_video

Size = tuple[int, int]  # (height, width) in pixels
MediaSource = (
    str | os.PathLike | bytes | bytearray | io.BytesIO | BinaryIO | Image.Image | np.ndarray | torch.Tensor
)

TIMEOUT = 20.0  # seconds that a URL may take in total
MAX_IMAGE_BYTES = 128 << 20
MAX_VIDEO_BYTES = 1 << 30
MAX_FRAME_PIXELS = 8192 * 4320
MAX_FRAMES = 32  # of a video, unless the caller gives another number
MOST_FRAMES = 512  # whatever the caller gives
LONG_VIDEO = 600.0  # seconds from which reading is worth a progress bar

# Formats that Pillow decodes itself: none that start a program or draw vectors.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF")
IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".ico", ".jp2", ".avif")
)
VIDEO_EXTENSIONS = frozenset(
    (".mp4", ".m4v", ".avi", ".mkv", ".mov", ".wmv", ".webm", ".flv", ".mpg", ".mpeg", ".ts", ".3gp", ".ogv")
)

EXIF_ORIENTATION = 0x0112
ICON = b"\0\0\1\0"
STRIP_PIXELS = 1 << 20  # that are converted at once

_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{32,}={0,2}\s*")

HEAD_BYTES = 512
MOST_NESTED = 2  # lists of pictures: one for each text in one for all
PICTURE_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1", b"jxl "})
VIDEO_SIGNATURES = (
    (0, b"\x1a\x45\xdf\xa3"),  # Matroska, WebM
    (8, b"AVI "),
    (0, b"FLV\x01"),
    (0, b"OggS"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),  # ASF: wmv
    (0, b"\x00\x00\x01\xba"),  # MPEG program stream
    (0, b"\x00\x00\x01\xb3"),  # MPEG video
    (4, b"moov"),
    (4, b"mdat"),
    (4, b"wide"),
    (4, b"free"),
    (4, b"skip"),
)
# Where the packets of an MPEG transport stream begin: bare, or with the time stamps of a camcorder.
TRANSPORT_STREAM_STARTS = ((0, 188, 376), (4, 196, 388))


# --- pictures ---


def load_image(
    source: MediaSource,
    *,
    timeout: float = TIMEOUT,
    max_bytes: int = MAX_IMAGE_BYTES,
    max_pixels: int | None = None,
    access: MediaAccess | None = None,
) -> Image.Image:
    """Read one picture as upright RGB.

    `source` is a path, PIL picture, bytes, binary file, `data:` URI, http(s) URL, array of (height, width[,
    channels]) or tensor of (channels, height, width) or of an array's shape. Values are uint8, or floats in
    0..1.
    """
    if isinstance(source, Image.Image):
        return _finish_image(source, None, "the PIL picture", max_pixels)
    if isinstance(source, torch.Tensor):
        source = _tensor_to_array(source)
    if isinstance(source, np.ndarray):
        return _finish_image(_array_to_image(source), None, "the array", max_pixels)
    name = describe(source)
    with _open_source(source, timeout=timeout, max_bytes=max_bytes, access=access) as file:
        return _finish_image(_open_image(file, name, max_pixels), file, name, max_pixels)


def image_size(source: str | os.PathLike) -> Size:
    """(height, width) of the upright picture in a file, from its header alone.

    Raises the errors of `load_image`, except those that only decoding reveals.
    """
    name = describe(source)
    with _open_source(source, timeout=TIMEOUT, max_bytes=MAX_IMAGE_BYTES) as file:
        image = _open_image(file, name, None)
        if bound_pixels(image, file, name):
            _decode(image, name)
        # If a PNG's header has no orientation, Pillow decodes it to see whether one follows the pixels.
        is_silent = image.format == "PNG" and "exif" not in image.info
        return image.size[::-1] if is_silent else upright_size(image)


def _open_image(file: BinaryIO, name: str, max_pixels: int | None) -> Image.Image:
    """Read a picture's header."""
    head = _peek(file)
    if _looks_like_video(head):
        raise ValueError(f"{name} is a video; pass it as a video, or one of its frames as a picture")
    if head.startswith(ICON):
        bound_icon(file, name, max_pixels)
    Image.init()
    formats = [kind for kind in IMAGE_FORMATS if kind in Image.OPEN]
    try:
        return Image.open(file, formats=formats)
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture in a known format ({', '.join(formats)})") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is larger than Pillow opens; scale it down: {error}") from None
    except Exception:  # decoders raise anything at all on hostile input, and may repeat what it says
        raise ValueError(f"{name} can't be read as a picture: its header is broken") from None


def _finish_image(
    image: Image.Image, file: BinaryIO | None, name: str, max_pixels: int | None
) -> Image.Image:
    """Check the size that the header promises, then decode."""
    bound_pixels(image, file, name, max_pixels)
    _decode(image, name)
    try:
        return to_rgb(image)
    except ValueError as error:
        raise ValueError(f"{name} can't be shown: {error}") from None
    except Exception:
        raise ValueError(f"{name} is broken: its metadata can't be read") from None


def _decode(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except Exception:  # decoders raise anything at all on hostile input, and may repeat what it says
        raise ValueError(f"{name} is truncated or broken") from None


def _tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    """(channels, height, width), (height, width[, channels]) -> (height, width[, channels])."""
    tensor = tensor.detach().cpu()
    if tensor.dim() == 3 and tensor.shape[0] in (1, 3, 4):
        tensor = tensor.permute(1, 2, 0)
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _array_to_image(array: np.ndarray) -> Image.Image:
    """(height, width[, 1, 3 or 4]) of uint8, or of floats in 0..1 -> PIL picture."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or array.size == 0:
        raise ValueError(f"a picture array must be (height, width[, 1, 3 or 4]), got {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # NaN fails both
            raise ValueError(f"float pixels must be finite and in 0..1, got {low:g}..{high:g}; rescale them")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8 or float, got {array.dtype}; convert them")
    return Image.fromarray(np.ascontiguousarray(array))


def upright_size(image: Image.Image) -> Size:
    """(height, width) of a picture once its EXIF orientation is applied."""
    return image.size if _orientation(image) in (5, 6, 7, 8) else image.size[::-1]


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation of a picture, 1 for upright; broken metadata turn nothing."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # of the reader of TIFF's tags
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB: upright by its EXIF orientation, transparency on white."""
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_from_numbers(image)
    if image.has_transparency_data:
        return _in_strips(image, _on_white)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert a picture to RGB, so many rows at a time that what it takes besides the result stays small."""
    canvas = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        canvas.paste(convert(strip), (0, top))
    return canvas


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The picture from top to bottom in parts of about `STRIP_PIXELS`, each with its first row."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    """Put a picture with transparency on white."""
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def _grey_from_numbers(image: Image.Image) -> Image.Image:
    """A picture of numbers as RGB. White is 65535 for 16 bits, else the first candidate that covers them."""
    extremes = np.array([(values.min(), values.max()) for _, values in _numbers(image)])  # of each strip
    low, high = extremes[:, 0].min(), extremes[:, 1].max()
    if not np.isfinite(extremes).all():
        raise ValueError(f"a picture of mode {image.mode} holds values that are not finite")
    candidates = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,))
    white = next((value for value in candidates if high <= value), None)
    if low < 0 or white is None:
        raise ValueError(
            f"a picture of mode {image.mode} holds {low:g}..{high:g}; scale it to 0..{candidates[-1]}"
        )
    canvas = Image.new("RGB", image.size)
    for top, values in _numbers(image):
        grey = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
        canvas.paste(grey.convert("RGB"), (0, top))
    return canvas


def _numbers(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """The values of each strip, (rows, width) float64."""
    return ((top, np.asarray(strip).astype(np.float64)) for top, strip in _strips(image))


# --- videos ---


def is_video(source: object) -> bool:
    """Whether a source is a video or a list of frames: by its content, else by extension or media type."""
    if isinstance(source, (list, tuple)):
        return True
    if isinstance(source, (bytes, bytearray)):
        return _looks_like_video(bytes(source[:HEAD_BYTES]))
    if isinstance(source, io.BytesIO):
        return _looks_like_video(bytes(source.getbuffer()[:HEAD_BYTES]))
    if isinstance(source, io.BufferedReader):
        try:
            return _looks_like_video(source.peek(HEAD_BYTES)[:HEAD_BYTES])
        except (OSError, ValueError):  # closed, or open for nothing but writing; reading it says so
            return False
    if not isinstance(source, (str, os.PathLike)):
        return False
    name = os.fsdecode(source)
    if name.startswith("data:"):
        return name.startswith("data:video/")
    if _scheme(name):
        return Path(urllib.parse.urlsplit(name).path).suffix.lower() in VIDEO_EXTENSIONS
    head = _file_head(name)
    if _looks_like_video(head):
        return True
    return Path(name).suffix.lower() in VIDEO_EXTENSIONS and not _looks_like_picture(head)


def plan_frames(
    num_frames: int, average_fps: float, *, fps: float = 1.0, max_frames: int = MAX_FRAMES
) -> list[int]:
    """Choose which frames of a video to show: `fps` per second, thinned out evenly to `max_frames`.

    Raises:
        TypeError, ValueError: an argument that is no such number, or more than `MOST_FRAMES` to show.
    """
    _check_sampling(fps, max_frames)
    if num_frames < 1:
        raise ValueError("the video has no frames")
    step = average_fps / fps  # infinite for a tiny fps
    indices = range(0, num_frames, max(1, round(step) if step < num_frames else num_frames))
    if min(len(indices), max_frames) > MOST_FRAMES:
        raise ValueError(
            f"{min(len(indices), max_frames)} frames of the video would be shown, beyond the limit of "
            f"{MOST_FRAMES}; lower fps, or the number of frames"
        )
    if len(indices) <= max_frames:
        return list(indices)
    step = len(indices) / (max_frames + 1)
    return [indices[int(i * step)] for i in range(max_frames)]


def _plan_list(frames: Sequence, fps: float, max_frames: int) -> list[int]:
    """Which of a list of frames to show; its frames have no rate."""
    _check_sampling(fps, max_frames)
    return plan_frames(len(frames), 1.0, fps=1.0, max_frames=max_frames)


def _check_sampling(fps: float, max_frames: int) -> None:
    """Raise `TypeError` or `ValueError` for numbers by which no video can be sampled."""
    if isinstance(fps, bool) or not isinstance(fps, Real):
        raise TypeError(f"fps must be a number, got {fps!r:.80}")
    fps = fps if isinstance(fps, int) else float(fps)
    if isinstance(max_frames, bool) or not isinstance(max_frames, Integral):
        raise TypeError(f"the number of frames must be an integer, got {max_frames!r:.80}")
    if not (0 < fps <= sys.float_info.max or fps == math.inf) or max_frames < 1:
        raise ValueError(f"fps must be > 0 and max_frames >= 1, got fps={fps}, max_frames={max_frames}")


def load_video(
    source: MediaSource | Sequence[MediaSource],
    *,
    max_frames: int = MAX_FRAMES,
    fps: float = 1.0,
    timeout: float = TIMEOUT,
    max_bytes: int = MAX_VIDEO_BYTES,
    max_frame_pixels: int = MAX_FRAME_PIXELS,
    progress: bool | None = None,
    access: MediaAccess | None = None,
    each: Callable[[Image.Image], Image.Image] | None = None,
) -> list[Image.Image]:
    """Read sampled frames of a video: a path, bytes, binary file, `data:` URI, URL, or a list of frames.

    A file gives `fps` frames per second, thinned out evenly to `max_frames`; a list is only thinned out.
    Between the requested frames, the reader jumps from keyframe to keyframe and converts nothing, so an hour
    takes no more memory than a minute. `progress` shows a bar on stderr; by default it does so for videos
    longer than `LONG_VIDEO` seconds, on a terminal, unless the progress bars of transformers are off. `each`
    is applied to every frame as soon as it is decoded, so that scaling it down saves memory.
    """
    if isinstance(source, (list, tuple)):
        indices = _plan_list(source, fps, max_frames)
        limits = {"timeout": timeout, "max_pixels": max_frame_pixels, "access": access}
        each = each or (lambda frame: frame)
        return [each(load_image(source[index], **limits)) for index in indices]
    sampling = {"max_frames": max_frames, "fps": fps}
    limits = {"timeout": timeout, "max_bytes": max_bytes, "max_frame_pixels": max_frame_pixels}
    limits["access"] = access
    with _open_video(source, **sampling, **limits) as (video, indices):
        seconds = video.num_frames / (video.average_fps or 1.0)
        with _progress_bar(len(indices), seconds, progress) as bar:
            return video.frames(indices, lambda num_read: bar.update(num_read - bar.n), each)


def frame_sizes(
    source: MediaSource | Sequence[MediaSource], *, max_frames: int = MAX_FRAMES, fps: float = 1.0
) -> list[Size]:
    """(height, width) of each frame that `load_video` would return; those of a file are assumed to be equal.

    Raises the errors of `load_video`, except those that only decoding reveals.
    """
    if isinstance(source, (list, tuple)):
        indices = _plan_list(source, fps, max_frames)
        return [image_size(source[index]) for index in indices]
    with _open_video(source, max_frames=max_frames, fps=fps) as (video, indices):
        (first,) = video.frames(indices[:1])
        return [first.size[::-1]] * len(indices)


@contextmanager
def _open_video(
    source: MediaSource,
    *,
    max_frames: int,
    fps: float,
    timeout: float = TIMEOUT,
    max_bytes: int = MAX_VIDEO_BYTES,
    max_frame_pixels: int = MAX_FRAME_PIXELS,
    access: MediaAccess | None = None,
) -> "Iterator[tuple[PyAVReader | DecordReader, list[int]]]":
    """An open video and the indices of its sampled frames; errors raised inside get its name."""
    name = describe(source)
    with _open_source(source, timeout=timeout, max_bytes=max_bytes, access=access) as file:
        head = _peek(file)
        if _looks_like_picture(head):
            raise ValueError(f"{name} is a picture, not a video; pass it as a picture")
        if not _looks_like_video(head):
            raise ValueError(f"{name} is not a video in a known format")
        try:
            with open_video(file, max_frame_pixels=max_frame_pixels) as video:
                yield video, plan_frames(video.num_frames, video.average_fps, fps=fps, max_frames=max_frames)
        except ValueError as error:
            raise ValueError(f"{name} can't be read as a video: {error}") from error


def _progress_bar(num_frames: int, seconds: float, wanted: bool | None) -> tqdm:
    """A bar on stderr if requested; by default for a long video on a terminal."""
    if wanted is None and seconds > LONG_VIDEO and sys.stderr.isatty():
        from transformers.utils.logging import is_progress_bar_enabled

        wanted = is_progress_bar_enabled()
    return tqdm(total=num_frames, desc="Reading the video", unit="frame", disable=not wanted)


# --- where they are ---


def describe(source: object) -> str:
    """A short name of a source for error messages."""
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
        return "the data: URI" if name.startswith("data:") else f"'{name[:200]}'"
    if isinstance(source, (bytes, bytearray)):
        return f"the content given ({len(source)} bytes)"
    return f"the {type(source).__name__} object"


def _open_source(
    source: MediaSource, *, timeout: float, max_bytes: int, access: MediaAccess | None = None
) -> BinaryIO:
    """Open whatever holds encoded bytes as a seekable file that is not empty."""
    if isinstance(source, (bytes, bytearray)):
        content = bytes(source)
    elif isinstance(source, io.BytesIO):
        content = source.getvalue()  # whatever the caller's position
    elif hasattr(source, "read"):
        content = _read_file_object(source, max_bytes)
    elif not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"a picture or video can't be read from {type(source).__name__}")
    else:
        name, access = os.fsdecode(source), access or MediaAccess.of()
        if name.startswith("data:"):
            content = _decode_data_uri(name, max_bytes)
        elif scheme := _scheme(name):
            if scheme not in ("http", "https"):
                raise ValueError(f"only http and https URLs are read, got {name[:200]!r}")
            content = fetch(name, timeout=timeout, max_bytes=max_bytes, access=access)
        else:
            access.check_path(name)
            return _open_path(Path(name))
    if not content:
        raise ValueError(f"{describe(source)} is empty: 0 bytes")
    return io.BytesIO(content)


def _open_path(path: Path) -> BinaryIO:
    try:
        if not path.exists():
            raise FileNotFoundError(f"no such file: '{path}'")
        if not path.is_file():
            raise ValueError(f"'{path}' is not a file")
        if path.stat().st_size == 0:
            raise ValueError(f"'{path}' is empty: 0 bytes")
        return path.open("rb")
    except OSError as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise ValueError(f"'{str(path)[:200]}' is not a usable path: {error.strerror}") from error


def _read_file_object(file: BinaryIO, max_bytes: int) -> bytes:
    try:
        content = file.read(max_bytes + 1)
    except Exception as error:  # a file object of a caller's own raises anything at all
        raise ValueError(f"{describe(file)} can't be read: {type(error).__name__}") from error
    if not isinstance(content, bytes):
        raise TypeError(f"a media file must be open in binary mode, got {type(content).__name__}")
    if len(content) > max_bytes:
        raise ValueError(f"the file holds more than the limit of {max_bytes} bytes")
    return content


def _decode_data_uri(uri: str, max_bytes: int) -> bytes:
    """The bytes of `data:[type][;base64],...`."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise ValueError("the data: URI has no comma, so no content")
    if len(body) > 4 * (max_bytes // 3 + 1):
        raise ValueError(f"the data: URI has {len(body)} characters, beyond the limit of {max_bytes} bytes")
    body = urllib.parse.unquote_to_bytes(body)
    if not head.endswith(";base64"):
        return body
    try:
        return base64.b64decode(re.sub(rb"\s", b"", body), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data: URI is not valid base64: {error}") from error


def _scheme(name: str) -> str | None:
    """`https` of `https://...`, None for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", name)
    return match and match[1].lower()


# --- what they are ---


def _peek(file: BinaryIO) -> bytes:
    head = file.read(HEAD_BYTES)
    file.seek(0)
    return head


def _file_head(name: str) -> bytes:
    """The first bytes of a file; none if it can't be read."""
    try:
        if not os.path.isfile(name):
            return b""
        with open(name, "rb") as file:
            return file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return b""


def _looks_like_video(head: bytes) -> bool:
    if head[4:8] == b"ftyp":
        return head[8:12] not in PICTURE_BRANDS
    if any(head[start : start + len(mark)] == mark for start, mark in VIDEO_SIGNATURES):
        return True
    return any(all(head[start : start + 1] == b"G" for start in starts) for starts in TRANSPORT_STREAM_STARTS)


def _looks_like_picture(head: bytes) -> bool:
    """Whether these first bytes are a picture's; a video reader would take it for a video of one frame."""
    marks = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")
    riff = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    heif = head[4:8] == b"ftyp" and head[8:12] in PICTURE_BRANDS
    return head.startswith(marks) or riff or heif


# --- as callers of processors pass them ---


@dataclass(frozen=True)
class Medium:
    """One picture or video, not read yet."""

    is_video: bool
    source: MediaSource | Sequence[MediaSource]


def as_source(value: MediaSource) -> MediaSource:
    """A source, or base64 without its `data:` head, as a source.

    Text is base64 if it has no other characters, is at least 32 long, decodes, and names no file.
    """
    if not isinstance(value, str) or not _BASE64.fullmatch(value) or _is_file(value):
        return value
    try:
        return base64.b64decode(re.sub(r"\s", "", value), validate=True)
    except binascii.Error as error:
        raise ValueError(
            f"{describe(value)} is neither a file nor valid base64 ({error}); it may be truncated"
        ) from error


def _is_file(name: str) -> bool:
    """Whether a file may be read and exists; where it may not, nobody learns whether it does."""
    try:
        return MediaAccess.of().may_read(name) and Path(name).is_file()
    except (OSError, ValueError):  # longer than a path can be
        return False


def flatten_images(images: object, depth: int = 0) -> list[MediaSource]:
    """One picture, a list, a list of lists or a stack of pictures -> a list.

    Raises:
        ValueError: lists are nested deeper than in a list for each text.
    """
    if isinstance(images, list | tuple):
        if depth == MOST_NESTED:
            raise ValueError(
                f"lists of pictures are nested more than {MOST_NESTED} deep; one for each text is all"
            )
        return [image for item in images for image in flatten_images(item, depth + 1)]
    if getattr(images, "ndim", 0) == 4:
        return list(images)
    return [as_source(images)]


def flatten_videos(videos: object) -> list[MediaSource | Sequence[MediaSource]]:
    """One video or a list of them -> a list. Frames, in a list or as one stack, are one video.

    Raises:
        ValueError: there is none, or lists are nested deeper than in a list of frames for each video of each
            text.
    """
    if _depth(videos) > MOST_NESTED + 1:
        raise ValueError(f"lists of videos are nested more than {MOST_NESTED + 1} deep; flatten them")
    if not (found := _flatten_videos(videos)):
        raise ValueError("videos is empty: pass at least one video, or None")
    return found


def _depth(value: object) -> int:
    """How deep lists are nested, as far as it matters."""
    level, depth = [value], 0
    while depth < MOST_NESTED + 2 and (level := [item for item in level if isinstance(item, list | tuple)]):
        level, depth = [item for items in level for item in items], depth + 1
    return depth


def _flatten_videos(videos: object) -> list[MediaSource | Sequence[MediaSource]]:
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
        yield from _flatten_videos(item)
    else:
        yield item


def _is_frame(item: object) -> bool:
    """A decoded picture: PIL, or an array of two or three dimensions."""
    return hasattr(item, "getbands") or getattr(item, "ndim", 0) in (2, 3)
