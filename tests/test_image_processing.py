"""Pictures become the pixels that the published checkpoints saw, bit for bit."""

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from helpers import golden_directory, tiny_config
from internlm_xcomposer2 import image_processing_internlm_xcomposer2 as image_processing
from internlm_xcomposer2 import ixc_utils
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import (
    CLIP_MEAN,
    CLIP_STD,
    VisProcessor,
    as_visuals,
    batch_images,
    global_view,
    normalize_image,
    prepare_visuals,
    preprocess_image,
    preprocess_video,
    split_tiles,
    tile_pixels,
)
from internlm_xcomposer2.ixc_utils import plan_tiles, square_picture, tile_picture
from internlm_xcomposer2.media_internlm_xcomposer2 import to_rgb
from PIL import Image, ImageFont

CONTENT = json.loads((golden_directory() / "preprocess_content.json").read_text(encoding="utf-8"))
TILE_SIZES = {"ixc25_image": 560, "ixc4khd": 336}
PILLOW_RESIZE = Image.Image.resize
OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13  # always resamples rows first; the goldens are from 13


def picture(name: str) -> Image.Image:
    return Image.open(golden_directory() / "inputs" / name)


def sha256(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def padded_to_square(image: Image.Image) -> Image.Image:
    """What one evaluation kit does before the square resize: centred on black."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side))
    canvas.paste(to_rgb(image), ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def transformed(image: Image.Image, transform: str) -> Image.Image:
    """Run a published transform by its name in the table, for instance `ixc4khd@25`."""
    name, _, hd_num = transform.partition("@")
    if name in ("vl490", "vl224"):
        return square_picture(image, int(name.removeprefix("vl")))
    if name == "vlmevalkit_vl_padding490":
        return square_picture(padded_to_square(image), 490)
    if name == "ixc25_video":
        return ixc_utils.Video_transform(image)
    functions = {
        "ixc25_image": ixc_utils.Image_transform,
        "ixc4khd": ixc_utils.HD_transform,
        "vlmevalkit25": ixc_utils.R560_HD18_Identity_transform,
    }
    return functions[name](image, hd_num=int(hd_num))


def resized_columns_first(image, size, resample):
    """`resize`, as Pillow 13 does it when the height shrinks more; it rounds between the two passes."""
    columns = PILLOW_RESIZE(image, (image.width, size[1]), resample)
    return PILLOW_RESIZE(columns, size, resample)


def as_recorded(row: dict) -> Image.Image:
    """The picture of a golden row; on an older Pillow, in the order of passes that gives the golden bits."""
    image = transformed(picture(row["image"]), row["transform"])
    if OLD_PILLOW and sha256(image) != row["u8_sha256"]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image.Image, "resize", resized_columns_first)
            image = transformed(picture(row["image"]), row["transform"])
    return image


@pytest.mark.parametrize("name", sorted({row["image"] for row in CONTENT["content"]}))
def test_pixels_of_the_published_transforms(name):
    for row in (row for row in CONTENT["content"] if row["image"] == name):
        image = as_recorded(row)
        assert (list(image.size), sha256(image)) == (row["size"], row["u8_sha256"]), row["transform"]
        pixels = normalize_image(image)
        assert sha256(pixels) == row["f32_sha256"], row["transform"]
        if "global_view_sha256" in row:
            check_global_view(pixels, row)


@pytest.mark.parametrize(("rows", "cols", "side"), [(1, 1, 16), (2, 3, 16), (3, 1, 24)])
def test_tiles_cut_one_colour_at_a_time_are_the_same_bits(rows, cols, side):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (rows * side, cols * side, 3), dtype=np.uint8)
    pixels.reshape(-1, 3)[:256] = np.arange(256)[:, None]  # every value of every colour
    image = Image.fromarray(pixels)
    assert torch.equal(tile_pixels(image, side), split_tiles(normalize_image(image), side))


def check_global_view(pixels: torch.Tensor, row: dict) -> None:
    """Interpolation is torch's own and may round differently elsewhere, so sums are compared, not bits."""
    view = global_view(pixels, TILE_SIZES[row["transform"].partition("@")[0]])
    assert view.mean().item() == pytest.approx(row["global_view_mean"], abs=1e-5)
    assert view.double().abs().sum().item() == pytest.approx(row["global_view_sum_abs"], rel=1e-6)
    np.testing.assert_allclose([view.min(), view.max()], row["global_view_min_max"], rtol=0, atol=1e-5)


def test_composites_of_the_published_videos():
    for row in CONTENT["videos"]:
        frames = ixc_utils.load_video(golden_directory() / "inputs" / f"{row['video']}.mp4")
        assert len(frames) == len(row["indices"]) and list(frames[0].size) == row["frame_size"]
        composite = ixc_utils.frame2img(frames, ixc_utils.get_font())
        assert list(composite.size) == row["composite_size"]
        assert sha256(composite) == row["composite_sha256"]
        tiled = ixc_utils.Video_transform(composite, hd_num=1)
        assert list(tiled.size) == row["video_transform_size"]
        assert sha256(tiled) == row["video_transform_sha256"]


def test_published_names_accept_another_tile_size():
    image = picture("wide.png")
    assert ixc_utils.Image_transform(image, 6, tile_size=112).size == (336, 224)
    assert ixc_utils.frame2img([image] * 2, tile_size=112).size == (224, 2 * (89 + 50))


# --- any mode ---


TRANSPARENT_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
BLACK_MODES = ("1", "L", "P", "RGB", "RGBX", "HSV", "I", "F", "I;16", "I;16B")
OTHER_MODES = ("CMYK", "YCbCr", "LAB")


@pytest.mark.parametrize("mode", TRANSPARENT_MODES + BLACK_MODES + OTHER_MODES)
def test_every_mode_becomes_rgb(mode):
    converted = to_rgb(Image.new(mode, (3, 2)))
    assert (converted.mode, converted.size) == ("RGB", (3, 2))
    if mode not in OTHER_MODES:
        assert converted.getpixel((0, 0)) == (0 if mode in BLACK_MODES else 255,) * 3


def test_transparency_is_put_on_white():
    image = Image.new("RGBA", (1, 1), (200, 0, 0, 51))
    assert to_rgb(image).getpixel((0, 0)) == (244, 204, 204)
    palette = Image.new("P", (1, 1))
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "dtype, value, grey",
    [
        ("uint16", 65535, 255),
        ("uint16", 257, 1),
        ("int32", 65535, 255),
        ("int32", 200, 200),
        ("float32", 0.2, 51),
        ("float32", 200, 200),
    ],
)
def test_numbers_of_more_than_eight_bits_become_grey(dtype, value, grey):
    assert to_rgb(Image.fromarray(np.full((2, 2), value, dtype))).getpixel((1, 1)) == (grey,) * 3


@pytest.mark.parametrize("value", [-1.0, 256.0, np.nan, np.inf])
def test_numbers_of_no_known_scale_are_rejected(value):
    with pytest.raises(ValueError, match="mode F holds"):
        to_rgb(Image.fromarray(np.full((2, 2), value, "float32")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, orientation):
    """A mark in a known corner must end up in the corner where the camera saw it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.new("RGB", (80, 48), "white")
    stored.paste("red", (0, 0, 16, 16))
    stored.save(tmp_path / "turned.png", exif=exif)
    upright = to_rgb(Image.open(tmp_path / "turned.png"))
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    assert upright.size == ((80, 48) if orientation < 5 else (48, 80))
    x, y = 0 if corner[1] == "l" else upright.width - 1, 0 if corner[0] == "t" else upright.height - 1
    assert upright.getpixel((x, y)) == (255, 0, 0)
    assert to_rgb(upright) is upright
    half_read = Image.open(tmp_path / "turned.png").convert("RGB")  # as many clients do
    assert ixc_utils.Image_transform(half_read).tobytes() == ixc_utils.Image_transform(upright).tobytes()


# --- tensors ---


def test_tiles_come_row_by_row_after_the_global_view():
    pixels = torch.arange(3 * 4 * 6, dtype=torch.float32).view(3, 4, 6)
    tiles = split_tiles(pixels, 2)
    assert tiles.shape == (1 + 6, 3, 2, 2)
    torch.testing.assert_close(tiles[:1], global_view(pixels, 2))
    for index, tile in enumerate(tiles[1:]):
        top, left = 2 * (index // 3), 2 * (index % 3)
        assert torch.equal(tile, pixels[:, top : top + 2, left : left + 2])
    with pytest.raises(ValueError, match="4x6 px.*4 px"):
        split_tiles(pixels, 4)


def test_normalised_white_and_black():
    for colour, value in (("white", 1.0), ("black", 0.0)):
        pixels = normalize_image(Image.new("RGB", (2, 1), colour))
        expected = (value - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
        torch.testing.assert_close(pixels, expected.view(3, 1, 1).expand(3, 1, 2))


def test_vis_processor_squares_only_the_square_layout():
    image = picture("gray.png")
    assert VisProcessor()(image).shape == (3, 220, 300)
    assert torch.equal(VisProcessor(224)(image), normalize_image(square_picture(image, 224)))


@pytest.mark.parametrize("layout", ["bottom", "always", "centred"])
def test_preprocess_image_follows_the_plan(layout):
    image = picture("tall.png")
    plan = plan_tiles(1300, 500, tile_size=112, hd_num=9, layout=layout)
    prepared = preprocess_image(image, layout=layout, tile_size=112, hd_num=9)
    assert torch.equal(prepared.pixel_values, split_tiles(normalize_image(tile_picture(image, plan)), 112))
    assert prepared.grid == plan.grid and len(prepared.pixel_values) == plan.num_tiles


def test_preprocess_square():
    prepared = preprocess_image(picture("wide.png"), layout="square", tile_size=224)
    assert prepared.pixel_values.shape == (1, 3, 224, 224) and prepared.grid == (1, 1)


def test_preprocess_needs_a_budget_for_tiles():
    with pytest.raises(TypeError, match="hd_num"):
        preprocess_image(picture("tiny.png"), layout="bottom", tile_size=112)


def test_preprocess_video_and_batch():
    video = preprocess_video([picture("small.png")] * 3, tile_size=112)
    image = preprocess_image(picture("tiny.png"), layout="bottom", tile_size=112, hd_num=4)
    pixel_values, grids = batch_images([video, image])
    assert grids.dtype == torch.int64 and grids.tolist() == [list(video.grid), [1, 1]]
    assert pixel_values.shape == (len(video.pixel_values) + 2, 3, 112, 112)
    assert pixel_values.dtype == torch.float32 and pixel_values.is_contiguous()


def test_batches_of_mixed_tile_sizes_are_rejected():
    square = preprocess_image(picture("tiny.png"), layout="square", tile_size=224)
    tiled = preprocess_image(picture("tiny.png"), layout="bottom", tile_size=112, hd_num=4)
    with pytest.raises(ValueError, match="112, 224"):
        batch_images([square, tiled])
    with pytest.raises(ValueError, match="at least one"):
        batch_images([])


def test_a_hair_thin_picture_goes_through():
    prepared = preprocess_image(Image.new("RGB", (30000, 1)), layout="bottom", tile_size=112, hd_num=12)
    assert prepared.grid == (1, 12)


def test_fonts():
    assert ixc_utils.get_font().size == 40
    assert isinstance(ixc_utils.get_font(), ImageFont.FreeTypeFont)
    with pytest.raises(OSError):
        ixc_utils.get_font(Path("no such font.ttf"))


# --- several at once ---


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_pictures_prepared_at_once_keep_their_order(two_threads, tmp_path):
    config = tiny_config()
    paths = []
    for number, size in enumerate([(300, 90), (20, 20), (64, 200), (500, 400), (57, 56)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    alone = [prepare_visuals(as_visuals(path, config), config, 6) for path in paths]
    pixel_values, grids = prepare_visuals(as_visuals(paths, config), config, 6)
    assert torch.equal(pixel_values, torch.cat([pixels for pixels, _ in alone]))
    assert torch.equal(grids, torch.cat([grid for _, grid in alone]))


def test_they_do_run_at_once_but_no_more_than_torch_may(two_threads):
    meeting = threading.Barrier(2, timeout=20)
    assert image_processing._in_threads(lambda item: meeting.wait() is not None, range(4)) == [True] * 4
    torch.set_num_threads(1)
    main = threading.get_ident()
    assert image_processing._in_threads(lambda item: threading.get_ident(), range(3)) == [main] * 3


def test_the_first_of_several_errors_is_raised(two_threads, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    paths = [tmp_path / name for name in ("good.png", "first.png", "second.png", "good.png")]
    with pytest.raises(FileNotFoundError, match="first.png"):
        as_visuals(paths, tiny_config())


def test_a_picture_that_is_not_read_yet_may_be_passed_twice(two_threads, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    image = Image.open(tmp_path / "one.png")
    found = as_visuals([image] * 4, tiny_config())
    assert all(np.array_equal(np.asarray(visual.image), pixels) for visual in found)


@pytest.mark.parametrize(
    "pixels, message",
    [
        (torch.full((1, 3, 112, 112), float("nan")), "finite"),
        (torch.zeros(1, 3, 112, 112).index_fill_(3, torch.tensor([7]), float("inf")), "finite"),
        (torch.zeros(1, 3, 112, 112).sub_(torch.inf).half(), "finite"),
        (torch.zeros(1, 3, 112, 112, device="meta"), "finite"),
        (torch.zeros(0, 3, 112, 112), "at least one picture"),
        (torch.zeros(1, 3, 0, 112), "multiples of 56"),
        (torch.zeros(1, 3, 112, 0), "multiples of 56"),
        (torch.zeros(1, 3, 0, 0), "multiples of 56"),
        (torch.zeros(1, 0, 112, 112), "3, height, width"),
        (torch.zeros(1, 3, 112, 112, dtype=torch.uint8), "floats"),
        (torch.zeros(1, 3, 112, 112, dtype=torch.complex64), "floats"),
    ],
)
def test_stacks_of_pixels_that_no_tower_reads(pixels, message):
    for media in (pixels, [pixels], [torch.zeros(1, 3, 112, 112), pixels]):
        with pytest.raises(ValueError, match=message):
            as_visuals(media, tiny_config())
