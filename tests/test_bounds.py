"""What decoding may cost: every way to make a small file large, and that nothing else changes."""

import io
import struct
import zlib

import numpy as np
import pytest
from helpers import golden_directory
from hypothesis import given, settings
from hypothesis import strategies as st
from internlm_xcomposer2 import bounds_internlm_xcomposer2 as bounds
from internlm_xcomposer2 import media_internlm_xcomposer2 as media
from internlm_xcomposer2 import video_internlm_xcomposer2 as video
from internlm_xcomposer2.bounds_internlm_xcomposer2 import PIXELS_VARIABLE
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import Visual, as_visuals, load_media
from internlm_xcomposer2.ixc_utils import (
    TILE_RULES,
    composite_frames,
    get_font,
    plan_tiles,
    shrink_frame,
    tile_picture,
)
from internlm_xcomposer2.media_internlm_xcomposer2 import (
    Medium,
    image_size,
    load_image,
    load_video,
    plan_frames,
)
from PIL import Image

INPUTS = golden_directory() / "inputs"
VIDEO = INPUTS / "wide_6s.mp4"


class Config:
    """What the loading of media asks a configuration for."""

    version, img_size, hd_num, is_tiled = "2.5", 28, 4, True


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def blank_png(width: int, height: int) -> bytes:
    """A white picture of one bit per pixel, without holding it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * ((width + 7) // 8)
    pixels = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# ---- pictures that are too large ----


def icon_of(content: bytes) -> bytes:
    """An icon that says 16 x 16 px of whatever it holds."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + content


def many_scans() -> bytes:
    """A JPEG whose last pass is there 400 times."""
    content = encoded(Image.new("RGB", (2048, 2048)), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * 400 + b"\xff\xd9"


def promising(content: bytes, side: int, claimed: int) -> bytes:
    """A square JPEG 2000 whose headers claim another side."""
    return content.replace(struct.pack(">II", side, side), struct.pack(">II", claimed, claimed))


def text_ppm(magic: str, side: int) -> bytes:
    return f"{magic}\n{side} {side}\n{'' if magic == 'P1' else 255}\n".encode() + b"0 " * 9


def small_blocks(side: int) -> bytes:
    return encoded(Image.new("L", (side, side)), "JPEG2000", codeblock_size=(4, 4))


def small_blocks_in_a_tile() -> bytes:
    """The same, with the main header saying that blocks are large and a tile's that they are small."""
    content = small_blocks(1024)
    start = content.index(b"\xff\x52")
    coding = content[start : start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")]
    harmless = coding[:10] + b"\4\4" + coding[12:]
    tile = content.index(b"\xff\x90")
    length = int.from_bytes(content[tile + 6 : tile + 10], "big")
    header = (
        content[tile : tile + 6] + (length + len(coding)).to_bytes(4, "big") + content[tile + 10 : tile + 12]
    )
    return (
        content[:start]
        + harmless
        + content[start + len(coding) : tile]
        + header
        + coding
        + content[tile + 12 :]
    )


TOO_LARGE = {
    "PNG": lambda: blank_png(13000, 13000),
    "beyond Pillow": lambda: blank_png(20000, 20000),
    "thin PNG": lambda: blank_png(64, 1_100_000),
    "GIF": lambda: (
        struct.pack("<6sHHBBB", b"GIF89a", 9000, 9000, 0x80, 0, 0) + bytes(6) + b"\x2c" + bytes(40)
    ),
    "progressive JPEG": lambda: many_scans().replace(
        struct.pack(">HH", 2048, 2048), struct.pack(">HH", 9000, 9000), 1
    ),
    "JPEG of many scans": many_scans,
    "icon of a PNG": lambda: icon_of(blank_png(9000, 9000)),
    "icon of a bitmap": lambda: icon_of(struct.pack("<IiiHHI20x", 40, 9000, 18000, 1, 8, 1)),
    "plain text P1": lambda: text_ppm("P1", 1100),
    "plain text P3": lambda: text_ppm("P3", 1100),
    "odd numbers P6": lambda: b"P6\n1100 1100\n7\n" + bytes(90),
    "run-length bitmap": lambda: (
        struct.pack("<2sIII", b"BM", 0, 0, 1078)
        + struct.pack("<IiiHHI20x", 40, 1100, 1100, 1, 8, 1)
        + bytes(1100)
    ),
    "JPEG 2000": lambda: promising(encoded(Image.new("L", (64, 64)), "JPEG2000"), 64, 8300),
    "JPEG 2000 of one level": lambda: promising(
        encoded(Image.new("L", (64, 64)), "JPEG2000", num_resolutions=1), 64, 4200
    ),
    "JPEG 2000 of small blocks": lambda: small_blocks(1024),
    "JPEG 2000 of small blocks in a tile": small_blocks_in_a_tile,
    "WebP": lambda: encoded(Image.new("RGB", (6000, 6000)), "WEBP", lossless=True, method=0),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_small_files_of_large_pictures_are_refused_before_they_are_decoded(kind, monkeypatch):
    content = TOO_LARGE[kind]()
    assert len(content) < 200_000
    monkeypatch.setattr(media, "_decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"beyond the limit of \d+|larger than Pillow opens"):
        load_image(content)


def test_what_the_limit_is_and_how_it_is_set(monkeypatch):
    content = encoded(Image.new("L", (40, 30)), "PNG")
    assert load_image(content).size == (40, 30)
    monkeypatch.setenv(PIXELS_VARIABLE, "1199")
    with pytest.raises(ValueError, match=f"40x30 px, beyond the limit of 1199.*{PIXELS_VARIABLE}"):
        load_image(content)
    assert load_image(content, max_pixels=1200).size == (40, 30)
    for wrong in ("0", "-1", "many", ""):
        monkeypatch.setenv(PIXELS_VARIABLE, wrong)
        with pytest.raises(ValueError, match=PIXELS_VARIABLE):
            load_image(content)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("turned", [1, 6])
def test_a_huge_jpeg_is_decoded_at_half_its_size(mode, turned, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = turned
    content = encoded(Image.linear_gradient("L").resize((81, 61)).convert(mode), "JPEG", exif=exif)
    exact = load_image(content)
    monkeypatch.setenv(PIXELS_VARIABLE, str(81 * 61 - 1))
    half = load_image(content)
    assert half.size == ((31, 41) if turned == 6 else (41, 31))
    expected = exact.reduce(2) if exact.size != half.size else exact
    assert np.abs(np.asarray(half).astype(int) - np.asarray(expected)).mean() < 6
    assert image_size(io.BytesIO(content)) == half.size[::-1]
    monkeypatch.setenv(PIXELS_VARIABLE, str(81 * 61))
    assert load_image(content).tobytes() == exact.tobytes()
    monkeypatch.setenv(PIXELS_VARIABLE, str(81 * 61 // 4 - 1))
    with pytest.raises(ValueError, match="81x61 px, beyond"):
        load_image(content)


def test_a_huge_jpeg_2000_is_decoded_at_half_its_size(monkeypatch):
    content = encoded(Image.linear_gradient("L").resize((101, 75)), "JPEG2000")
    exact = load_image(content)
    monkeypatch.setenv(PIXELS_VARIABLE, str(4 * 101 * 75 - 1))
    half = load_image(content)
    assert half.size == (51, 38) and image_size(io.BytesIO(content)) == (38, 51)
    assert np.abs(np.asarray(half).astype(int) - np.asarray(exact.resize((51, 38)))).mean() < 6


# ---- pictures that stay as they are ----


def test_pictures_of_ordinary_sizes_are_never_reduced():
    for width, height in ((4032, 3024), (6000, 4000), (8064, 6048), (9504, 6336), (7680, 4320)):
        image = Image.open(io.BytesIO(encoded(Image.new("L", (16, 16)), "JPEG")))
        image._size = width, height
        assert not bounds.bound_pixels(image, None, "it") and image.size == (width, height)


MODES = ["1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "I;16B"]


def plain_to_rgb(image: Image.Image) -> Image.Image:
    """`to_rgb` of a picture that is converted as a whole."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        candidates = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,))
        white = next(value for value in candidates if values.max() <= value)
        return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        return canvas.convert("RGB")
    return image.convert("RGB")


@pytest.mark.parametrize("mode", MODES)
def test_strips_give_what_the_whole_gives(mode, monkeypatch):
    rng = np.random.default_rng(0)
    if mode in ("I", "F") or mode.startswith("I;16"):
        dtype = {"I": "int32", "F": "float32", "I;16": "<u2", "I;16B": ">u2"}[mode]
        image = Image.fromarray((rng.random((53, 37)) * 255).astype(dtype))
    else:
        base = Image.fromarray(rng.integers(0, 256, (53, 37, 4), dtype=np.uint8), "RGBA")
        image = base.convert("LA").convert("La") if mode == "La" else base.convert(mode)
    monkeypatch.setattr(media, "STRIP_PIXELS", 37 * 7)
    assert media.to_rgb(image).tobytes() == plain_to_rgb(image).tobytes()


def test_a_palette_with_a_transparent_colour_in_strips(monkeypatch):
    image = Image.effect_noise((37, 53), 90).convert("P")
    image.info["transparency"] = 100
    monkeypatch.setattr(media, "STRIP_PIXELS", 37 * 5)
    assert media.to_rgb(image).tobytes() == plain_to_rgb(image).tobytes()


def published_tile_picture(image: Image.Image, plan) -> Image.Image:
    """Tall pictures are resized lying on their side."""
    height, width = plan.resized
    if plan.transposed:
        image = image.transpose(Image.Transpose.TRANSPOSE).resize((height, width), Image.Resampling.BILINEAR)
        image = image.transpose(Image.Transpose.TRANSPOSE)
    else:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", plan.padded[::-1], "white")
    canvas.paste(image, plan.offset[::-1])
    return canvas


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(sorted(TILE_RULES)), st.integers(1, 30))
def test_resizing_without_turning_gives_the_same_bits(height, width, layout, hd_num):
    pixels = np.random.default_rng(height * 301 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    plan = plan_tiles(height, width, tile_size=28, hd_num=hd_num, layout=layout)
    assert tile_picture(image, plan).tobytes() == published_tile_picture(image, plan).tobytes()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=4))
def test_frames_scaled_down_on_reading_give_the_same_bits(sizes):
    frames = [Image.effect_noise((width, height), 80).convert("RGB") for height, width in sizes]
    small = [shrink_frame(frame, tile_size=28) for frame in frames]
    assert all(
        new.width * new.height <= 56 * 56 or new is old for new, old in zip(small, frames, strict=True)
    )
    expected = composite_frames(frames, get_font(size=8), tile_size=28)
    assert composite_frames(small, get_font(size=8), tile_size=28).tobytes() == expected.tobytes()
    assert [shrink_frame(frame, tile_size=28) for frame in small] == small


# ---- prompts of several pictures ----


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from(["2", "2-4khd", "2.5"]), st.integers(1, 9))
def test_pictures_kept_as_small_as_needed_are_cut_into_the_same_bits(height, width, version, hd_num):
    class Config:
        img_size, tile_tokens_per_side, is_tiled = 28, 1, version != "2"

    Config.version = version
    image = Image.effect_noise((width, height), 90).convert("RGB")
    visual = Visual(image=image)
    small = visual.resized(Config, hd_num)
    most = (hd_num if Config.is_tiled else 1) * 28 * 28
    assert small is visual or small.image.width * small.image.height <= min(most, width * height)
    for budget in range(1, 10):
        assert small.grid(Config, budget) == visual.grid(Config, budget)
    before, after = (one.prepare(Config, hd_num, None) for one in (visual, small))
    assert before.grid == after.grid and before.pixel_values.equal(after.pixel_values)


def test_a_prompt_has_a_limit_of_its_own(monkeypatch):
    pictures = [encoded(Image.new("L", (20, 20)), "PNG")] * 3
    monkeypatch.setenv(PIXELS_VARIABLE, "400")
    assert len(as_visuals(pictures, Config)) == 3
    monkeypatch.setattr(bounds, "PROMPT_PICTURES", 2)
    for read in (
        lambda: as_visuals(pictures, Config),
        lambda: load_media([Medium(False, picture) for picture in pictures], Config),
    ):
        with pytest.raises(ValueError, match="more than 800 px in all"):
            read()


# ---- videos ----

av = pytest.importorskip("av")


def test_frames_are_kept_as_large_as_they_are_shown():
    (visual,) = as_visuals([VIDEO], Config)
    assert {frame.size for frame in visual.frames} == {(56, 42)}
    full = as_visuals([load_video(VIDEO)], Config)[0]
    assert visual.grid(Config, 4) == full.grid(Config, 4)
    assert visual.prepare(Config, 4, None).pixel_values.equal(full.prepare(Config, 4, None).pixel_values)


def test_decoding_towards_the_frames_is_bounded(monkeypatch):
    """Of six frames in one group, all that come before a sampled one have to be decoded."""
    monkeypatch.setattr(video, "DECODED_PICTURES", 1)
    monkeypatch.setenv(PIXELS_VARIABLE, str(320 * 240 * 10))
    with pytest.raises(
        ValueError, match=f"more than {320 * 240 * 10} px have to be decoded.*{PIXELS_VARIABLE}"
    ):
        load_video(VIDEO)
    assert len(load_video(VIDEO, max_frames=1)) == 1


def test_a_huge_frame_is_converted_at_half_its_size(monkeypatch):
    exact = load_video(VIDEO)
    monkeypatch.setattr(video, "HUGE_FRAME", 1000)
    for half, frame in zip(load_video(VIDEO), exact, strict=True):
        assert half.size == (160, 120)
        assert np.abs(np.asarray(half).astype(int) - np.asarray(frame.reduce(2))).mean() < 6


def patched(content: bytes, kind: bytes, at: int, *numbers: int) -> bytes:
    """An MP4 with other numbers in a table."""
    start = content.index(kind) + 4 + at
    fields = struct.pack(f">{len(numbers)}I", *numbers)
    return content[:start] + fields + content[start + len(fields) :]


def repeated_edits(content: bytes, number: int) -> bytes:
    start = content.index(b"elst") - 4
    length = int.from_bytes(content[start : start + 4], "big")
    entry = content[start + 16 : start + length]
    body = b"elst" + struct.pack(">II", 0, number) + entry * number
    grown = content[:start] + struct.pack(">I", 4 + len(body)) + body + content[start + length :]
    for box in (b"edts", b"trak", b"moov"):
        place = grown.index(box) - 4
        size = int.from_bytes(grown[place : place + 4], "big") + 4 + len(body) - length
        grown = grown[:place] + struct.pack(">I", size) + grown[place + 4 :]
    return grown


def test_an_index_that_promises_more_than_the_file_holds():
    content = VIDEO.read_bytes()
    forged = patched(content, b"stsz", 4, 1, 30_000_000)
    with pytest.raises(ValueError, match="promises 30000000 frames, for which the file is too small"):
        load_video(forged)
    with pytest.raises(ValueError, match="promises"):
        load_video(repeated_edits(content, 20_000))
    assert bounds.samples_promised(io.BytesIO(repeated_edits(content, 3))) == 0


@pytest.mark.parametrize("text", [b"A tree trunk", b"stszstszstsz", b"trun" + b"\x7f" * 8])
def test_text_in_a_header_promises_nothing(text):
    content = VIDEO.read_bytes()
    box = struct.pack(">I", 8 + len(text)) + b"free" + text
    assert bounds.samples_promised(io.BytesIO(content + box)) == 0
    assert len(load_video(content + box)) == 6


def test_too_many_packets(monkeypatch):
    monkeypatch.setattr(video, "MAX_PACKETS", 20)
    with pytest.raises(ValueError, match="more than 20 packets"):
        load_video(VIDEO)


def test_a_video_of_an_unknown_codec():
    with pytest.raises(ValueError, match="no decoder for its codec"):
        load_video(VIDEO.read_bytes().replace(b"avc1", b"zzzz"))


# ---- sampling ----


@pytest.mark.parametrize("fps", [1e-320, 1e-9, np.float32(1e-30)])
def test_a_tiny_rate_shows_the_first_frame(fps):
    assert plan_frames(100, 30.0, fps=fps, max_frames=8) == [0]
    assert len(load_video(VIDEO, fps=fps)) == 1


@pytest.mark.parametrize(
    "options, error",
    [
        ({"fps": 0.0}, ValueError),
        ({"fps": -1e-320}, ValueError),
        ({"fps": float("nan")}, ValueError),
        ({"fps": 10**400}, ValueError),
        ({"fps": "1"}, TypeError),
        ({"fps": True}, TypeError),
        ({"fps": None}, TypeError),
        ({"max_frames": 0}, ValueError),
        ({"max_frames": 2.5}, TypeError),
        ({"max_frames": "8"}, TypeError),
        ({"max_frames": 10**6, "fps": 1e6}, ValueError),
    ],
)
@pytest.mark.parametrize("num_frames, rate", [(5000, 30.0), (5000, float("nan"))])
def test_numbers_by_which_no_video_can_be_sampled(options, error, num_frames, rate):
    with pytest.raises(error, match=r"fps|number of frames|max_frames"):
        plan_frames(num_frames, 30.0, **options)
    assert plan_frames(num_frames, rate)[0] == 0


def test_frames_of_a_list_have_no_rate():
    frames = [Image.new("L", (4, 4), index) for index in range(5)]
    for fps in (1e-320, 0.5, 1000.0, float("inf")):
        assert len(load_video(frames, fps=fps)) == 5
