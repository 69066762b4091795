"""What decoding a picture may cost, and how little of a huge one is decoded.

One limit, in pixels. A pixel of a format or a file that takes more time or memory counts several times. The
limit is checked by the header, before anything is decoded.
"""

import os
import struct
import threading
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image

PIXELS_VARIABLE = "IXC2_MAX_PIXELS"
MAX_PIXELS = 1 << 26
PROMPT_PICTURES = 16

# As many times the limit, a JPEG or JPEG 2000 is decoded at half its width and height.
REDUCIBLE = 4

# What one pixel counts, if not 1: formats whose libraries hold a picture several times, and parts of Pillow
# that are written in Python.
FORMAT_COSTS = {"WEBP": 2, "AVIF": 2, "JPEG2000": 4}
PYTHON_CODECS = ("ppm_plain", "ppm", "bmp_rle")
PYTHON_COST = 64
JPEG_FORMATS = ("JPEG", "MPO")
SCANS_PER_PIXEL = 16  # passes over a JPEG for which its pixels count once
BLOCK_AREA = 3072  # px; in smaller blocks the pixels of a JPEG 2000 count more
MAX_SEGMENTS = 1 << 16

SAMPLES, FRAGMENT, EDITS = b"stsz", b"trun", b"elst"  # tables of an MP4
SMALLEST_SAMPLE = 2  # bytes
MOST_SAMPLES = 1 << 16  # that any file may promise
MOST_EDITS = 16
MOST_ACCEPTED = (1 << 32) // 24  # where FFmpeg itself refuses

START_OF_SCAN = b"\xff\xda"
CODESTREAM = b"\xff\x4f\xff\x51"
CODING, COMPONENT_CODING, START_OF_TILE, START_OF_DATA = b"\xff\x52", b"\xff\x53", b"\xff\x90", b"\xff\x93"


def max_pixels() -> int:
    """How many pixels decoding one picture may cost.

    Raises:
        ValueError: the environment sets something else than a number from 1.
    """
    value = os.environ.get(PIXELS_VARIABLE, str(MAX_PIXELS))
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{PIXELS_VARIABLE} must be a number of pixels, at least 1, got {value!r}")
    return int(value)


class Allowance:
    """The pixels of all pictures of one prompt: at most those of `PROMPT_PICTURES` of the largest."""

    def __init__(self) -> None:
        self.limit = PROMPT_PICTURES * max_pixels()
        self.taken, self.lock = 0, threading.Lock()

    def take(self, num_pixels: int) -> None:
        """Count a picture that was read; raise `ValueError` if it is one too many."""
        with self.lock:
            self.taken += num_pixels
        if self.taken > self.limit:
            raise ValueError(
                f"the pictures have more than {self.limit} px in all; scale them down, pass fewer, or raise "
                f"{PIXELS_VARIABLE}"
            )


def bound_pixels(image: Image.Image, file: BinaryIO | None, name: str, limit: int | None = None) -> bool:
    """Check what decoding an opened picture costs; have a huge one decoded at half its size, if it can be.

    Returns whether its size will be known only after it is decoded.

    Args:
        file: where it was opened from; None for a picture that a caller has opened.
        limit: in pixels, `max_pixels` by default.

    Raises:
        ValueError: it is empty, or too large.
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name} is empty: {width}x{height} px")
    limit = max_pixels() if limit is None else limit
    limit = limit // _cost_of_pixel(image, file)
    if width * height <= limit:
        return False
    if width * height <= REDUCIBLE * limit and _halve(image, file):
        return image.size == (width, height)
    raise ValueError(
        f"{name} has {width}x{height} px, beyond the limit of {limit} for its kind of file; scale it down or "
        f"convert it, or raise {PIXELS_VARIABLE}"
    )


def bound_icon(file: BinaryIO, name: str, limit: int | None = None) -> None:
    """Check the pictures in an icon, which Pillow decodes at once, whatever the icon says of their sizes."""
    limit = max_pixels() if limit is None else limit
    for width, height in _icon_sizes(_content(file)):
        if width * height > limit:
            raise ValueError(
                f"{name} holds a picture of {width}x{height} px, beyond the limit of {limit}; scale it down "
                f"or raise {PIXELS_VARIABLE}"
            )


def _cost_of_pixel(image: Image.Image, file: BinaryIO | None) -> int:
    """How many pixels of a plain picture cost what one of this picture costs."""
    tiles = getattr(image, "tile", None)
    if tiles and tiles[0][0] in PYTHON_CODECS:
        return PYTHON_COST
    cost = FORMAT_COSTS.get(image.format, 1)
    if file is not None and image.format in JPEG_FORMATS:
        return max(cost, _content(file).count(START_OF_SCAN) // SCANS_PER_PIXEL)
    if file is not None and image.format == "JPEG2000":
        return max(cost, BLOCK_AREA // _jpeg2000_structure(_content(file))[1])
    return cost


def _halve(image: Image.Image, file: BinaryIO | None) -> bool:
    """Have half the width and height decoded; False if the file doesn't allow it."""
    width, height = image.size
    if image.format in JPEG_FORMATS and not image.info.get("progressive"):
        image.draft(None, (max(1, width // 2), max(1, height // 2)))
        return image.size != (width, height)
    if image.format == "JPEG2000" and file is not None:
        levels, block_area = _jpeg2000_structure(_content(file))
        if levels and block_area >= BLOCK_AREA // FORMAT_COSTS["JPEG2000"]:  # of small ones all are held
            image.reduce = 1
            return True
    return False


def _content(file: BinaryIO) -> bytes:
    """All of a file, which stays where it is."""
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    return content


def _icon_sizes(content: bytes) -> Iterator[tuple[int, int]]:
    """(width, height) of each picture in an icon, from the picture's own header."""
    number = int.from_bytes(content[4:6], "little")
    for entry in struct.iter_unpack("<8x2I", content[6 : 6 + len(content[6 : 6 + 16 * number]) // 16 * 16]):
        header = content[entry[1] : entry[1] + 24]
        if header.startswith(b"\x89PNG") and len(header) == 24:
            yield struct.unpack(">16x2I", header)
        elif len(header) >= 12:
            width, height = struct.unpack("<4x2i", header[:12])
            yield abs(width), abs(height) // 2  # with a mask of the same size below


def _jpeg2000_structure(content: bytes) -> tuple[int, int]:
    """How many times it can be halved, and the area in px of its smallest blocks, in any of its tiles."""
    levels, area = 32, 1 << 20
    for marker, body in _jpeg2000_segments(content):
        if marker in (CODING, COMPONENT_CODING):
            style = body[0 if marker == CODING else 1 :][:1]
            sizes = body[5 if marker == CODING else 2 :]
            if len(sizes) < 5:
                return 0, 1
            sides = [(sizes[1] & 15) + 2, (sizes[2] & 15) + 2]
            for precinct in sizes[5:] if style and style[0] & 1 else b"":
                sides = [
                    min(sides[0], max(0, (precinct & 15) - 1)),
                    min(sides[1], max(0, (precinct >> 4) - 1)),
                ]
            levels, area = min(levels, sizes[0]), min(area, 1 << sum(sides))
    return (0, 1) if area == 1 << 20 else (levels, area)


def _jpeg2000_segments(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Marker and body of each segment in the main header and those of the tiles."""
    position, end_of_tile = content.find(CODESTREAM) + 2, 0
    for _ in range(MAX_SEGMENTS):
        marker, length = content[position : position + 2], content[position + 2 : position + 4]
        if marker == START_OF_DATA:
            position = end_of_tile
            continue
        if len(length) < 2 or marker[0] != 0xFF or marker == b"\xff\xd9":
            return
        body = content[position + 4 : position + 2 + int.from_bytes(length, "big")]
        yield marker, body
        if marker == START_OF_TILE:
            size = int.from_bytes(body[2:6], "big")
            end_of_tile = position + size if size > 12 else len(content)
        position += 2 + max(2, int.from_bytes(length, "big"))
    yield CODING, b""  # more than can be looked through: as if its blocks were the smallest


# ---- videos ----


def samples_promised(file: BinaryIO) -> int:
    """How many entries the index of an MP4 or MOV makes FFmpeg hold, if its bytes have no room for as many.

    A sample takes two bytes at least, in plain sound. Edits repeat samples.
    """
    size = file.seek(0, os.SEEK_END)
    promised, most_samples, num_edits = 0, 0, 0
    for header in _iso_headers(file, size):
        for kind, sample_size, count in _iso_counts(header):
            if kind == EDITS:
                num_edits += count
                continue
            most_samples = max(most_samples, count)
            promised += count if sample_size or kind == FRAGMENT else 0  # else each has an entry in the file
    if num_edits > MOST_EDITS:
        promised = max(promised, num_edits * most_samples)
    return promised if promised > max(size // SMALLEST_SAMPLE, MOST_SAMPLES) else 0


def _iso_headers(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The outermost boxes of an MP4 or MOV, without the media themselves."""
    position = 0
    for _ in range(MAX_SEGMENTS):
        file.seek(position)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        length = int.from_bytes(head[8:], "big") if length == 1 else length or size - position
        if len(head) < 16 or length < 8 or not all(32 <= byte < 127 or byte == 0xA9 for byte in kind):
            break
        if kind != b"mdat":
            file.seek(position)
            yield file.read(min(length, size - position))
        position += length
    file.seek(0)


def _iso_counts(header: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, size of each sample if all have one, and number of entries of each table of samples or edits.

    Tables are found by their names wherever they are, as FFmpeg finds them. Numbers too large for it to
    accept, among them all text that contains such a name, promise nothing.
    """
    for kind in (SAMPLES, FRAGMENT, EDITS):
        position = header.find(kind)
        while position >= 0:
            is_long = header[max(0, position - 4) : position] == b"\0\0\0\1"
            fields = header[position + (16 if is_long else 8) :][:8]
            first, second = (int.from_bytes(fields[i : i + 4], "big") for i in (0, 4))
            sample_size, count = (first, second) if kind == SAMPLES else (0, first)
            if count < MOST_ACCEPTED:
                yield kind, sample_size, count
            position = header.find(kind, position + 4)
