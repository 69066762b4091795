"""Damaged and forged pictures, videos and addresses: each is read, or is a `ValueError` after little work."""

import io
import socket
import time

import numpy as np
import pytest
from helpers import ROOT, golden_directory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from internlm_xcomposer2.access_internlm_xcomposer2 import MediaAccess
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import as_visuals, prepare_visuals
from internlm_xcomposer2.media_internlm_xcomposer2 import image_size, is_video, load_image, load_video
from PIL import Image

SECONDS = 10.0  # of the processor; what is read takes milliseconds
SEEDED = {
    "derandomize": True,
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


class Config:
    """What the reading of media asks a configuration for."""

    version, img_size, hd_num, tile_tokens_per_side, is_tiled = "2.5", 28, 4, 1, True


def encoded(mode: str, kind: str, **options) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (23, 31, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(noise, "RGBA").convert("RGB").convert(mode)
    image.save(file, kind, **options)
    return file.getvalue()


PICTURES = [
    encoded("RGB", "JPEG"),
    encoded("L", "JPEG", progressive=True),
    encoded("CMYK", "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    encoded("RGBA", "PNG"),
    encoded("P", "PNG", transparency=3),
    encoded("1", "PNG"),
    encoded("I;16", "PNG"),
    encoded("P", "GIF"),
    encoded("P", "BMP"),
    encoded("RGBA", "WEBP", lossless=True),
    encoded("RGB", "WEBP"),
    encoded("RGB", "TIFF", compression="tiff_lzw"),
    encoded("RGB", "TIFF", compression="tiff_deflate"),
    encoded("F", "TIFF"),
    encoded("LAB", "TIFF") if hasattr(Image.core, "lab") else encoded("CMYK", "TIFF"),
    encoded("RGB", "PPM"),
    b"P3\n3 2\n255\n" + b"1 2 3 " * 6,
    encoded("RGBA", "ICO", sizes=[(16, 16)]),
    encoded("RGB", "JPEG2000"),
    encoded("RGB", "JPEG2000", no_jp2=True, tile_size=(8, 8)),
]
VIDEOS = [
    (golden_directory() / "inputs" / "wide_6s.mp4").read_bytes(),
    (ROOT / "examples" / "circle.mp4").read_bytes(),
]

# Numbers that fields of sizes, offsets and counts are forged to.
NUMBERS = [
    0,
    1,
    2,
    0x7F,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    100_000,
    30_000_000,
]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["byte", "flip", "number", "little", "cut", "drop", "double", "move"]),
        st.floats(0, 1, allow_subnormal=False),
        st.integers(0, 255),
        st.sampled_from(NUMBERS),
    ),
    min_size=1,
    max_size=6,
)


def damaged(content: bytes, edits: list[tuple[str, float, int, int]], near_start: bool) -> bytes:
    """The content after each of the edits; most of what decides is in a header."""
    for kind, share, byte, number in edits:
        place = int(share * min(len(content) - 1, 200 if near_start else len(content) - 1))
        piece = content[place : place + byte + 1]
        new = {
            "byte": bytes([byte]) + piece[1:],
            "flip": bytes([piece[0] ^ (1 << byte % 8)]) + piece[1:],
            "number": number.to_bytes(4, "big") + piece[4:],
            "little": number.to_bytes(4, "little") + piece[4:],
            "cut": piece,
            "drop": b"",
            "double": piece * 2,
            "move": piece[::-1],
        }[kind]
        content = content[:place] + new + (b"" if kind == "cut" else content[place + len(piece) :])
        content = content or b"\0"
    return content


def assert_read_or_refused(read, content: bytes) -> object:
    """What `read` makes of the content, or None if it says what is wrong, soon."""
    begin = time.process_time()
    try:
        return read(content)
    except ValueError as error:
        assert len(str(error)) > 20 and "\0" not in str(error)
        return None
    finally:
        assert time.process_time() - begin < SECONDS


def as_tiles(content: bytes) -> object:
    visuals = as_visuals([content], Config)
    pixel_values, grids = prepare_visuals(visuals, Config, 4)
    assert [tuple(grid) for grid in grids.tolist()] == [visual.grid(Config, 4) for visual in visuals]
    assert pixel_values.isfinite().all()
    return pixel_values


@settings(max_examples=1000, **SEEDED)
@given(st.sampled_from(PICTURES), EDITS, st.booleans())
def test_damaged_pictures(content, edits, near_start):
    content = damaged(content, edits, near_start)
    image = assert_read_or_refused(load_image, content)
    if image is not None:
        assert image.mode == "RGB" and image_size(io.BytesIO(content)) == image.size[::-1]
        if image.width * image.height < 10**6:
            assert_read_or_refused(as_tiles, content)


@settings(max_examples=150, **SEEDED)
@given(st.sampled_from(VIDEOS), EDITS, st.booleans())
def test_damaged_videos(content, edits, near_start):
    pytest.importorskip("av")
    content = damaged(content, edits, near_start)
    frames = assert_read_or_refused(load_video, content)
    assert frames is None or (0 < len(frames) <= 32 and {frame.mode for frame in frames} == {"RGB"})


@settings(max_examples=60, **SEEDED)
@given(
    st.sampled_from(VIDEOS),
    st.sampled_from(
        [b"stsz", b"stsc", b"stts", b"stco", b"stsd", b"elst", b"tkhd", b"mvhd", b"mdhd", b"ctts"]
    ),
    st.integers(0, 60),
    st.sampled_from(NUMBERS),
)
def test_forged_tables_of_videos(content, table, at, number):
    pytest.importorskip("av")
    place = content.find(table) + 4 + at
    forged = content[:place] + number.to_bytes(4, "big") + content[place + 4 :]
    assert_read_or_refused(load_video, forged)


@settings(max_examples=100, **SEEDED)
@given(
    st.binary(max_size=600), st.sampled_from([b"", *(content[:12] for content in PICTURES), VIDEOS[0][:12]])
)
def test_noise_behind_any_head(noise, head):
    content = head + noise
    read = load_video if is_video(content) else load_image
    assert_read_or_refused(read, content or b"\0")


HOSTS = st.one_of(
    st.sampled_from(
        ["localhost", "127.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:7f00:1]", "169.254.169.254"]
    ),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map("[{}]".format),
    st.text("abc.-_@:#?%/\\[]é ", max_size=12),
)


@settings(max_examples=150, **SEEDED)
@given(
    st.sampled_from(["http://", "https://", "HTTP://", "http:", "http:///", "//", "file://", "data:,"]), HOSTS
)
def test_no_spelling_of_an_address_leads_anywhere(scheme, host):
    """With nothing allowed, no name is even looked up, and no file is opened."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up a name"))
        patch.setattr("pathlib.Path.open", lambda *_, **__: pytest.fail("opened a file"))
        with pytest.raises(ValueError):
            load_image(f"{scheme}{host}", access=MediaAccess("", ()))
