"""Plans are functions of integers: tables of the published transforms, and what holds for every picture."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import golden_directory
from internlm_xcomposer2 import ixc_utils
from internlm_xcomposer2.ixc_utils import (
    MAX_PLANNED_PIXELS,
    TILE_RULES,
    num_image_tokens,
    plan_composite,
    plan_tiles,
    plan_video,
)
from internlm_xcomposer2.media_internlm_xcomposer2 import plan_frames
from PIL import Image

# Which of our layouts each published transform of the table is.
PUBLISHED_LAYOUTS = {
    "ixc25_image": (560, "bottom"),
    "ixc4khd_hd": (336, "always"),
    "vlmevalkit4khd_hd": (336, "always"),
    "vlmevalkit25_hd_id1.5": (560, "centred"),
    "finetune25_R560_Identity": (560, "centred"),
}
PUBLISHED_VIDEO_TRANSFORMS = ("ixc25_video_transform", "vlmevalkit25_identity")


def golden(name: str) -> dict:
    return json.loads((golden_directory() / name).read_text(encoding="utf-8"))


def summary(plan) -> dict:
    """A plan in the terms of the table."""
    tokens = num_image_tokens(*plan.grid, plan.tile_size // 28)
    return {
        "out": list(plan.padded[::-1]),
        "grid_hw": list(plan.grid),
        "exact": True,
        "tokens": tokens,
        "tiles": plan.num_tiles,
    }


@pytest.mark.parametrize("transform", [*PUBLISHED_LAYOUTS, *PUBLISHED_VIDEO_TRANSFORMS])
def test_sizes_of_the_published_transforms(transform):
    rows = [row for row in golden("preprocess_sizes.json")["rows"] if transform in row]
    assert rows
    for row in rows:
        if transform in PUBLISHED_VIDEO_TRANSFORMS:
            plan = plan_video(row["h"], row["w"], tile_size=560)
        else:
            tile_size, layout = PUBLISHED_LAYOUTS[transform]
            plan = plan_tiles(row["h"], row["w"], tile_size=tile_size, hd_num=row["hd_num"], layout=layout)
        assert summary(plan) == row[transform], (row["w"], row["h"], row["hd_num"])


def random_sizes(count: int = 300):
    """(height, width, hd_num) from thin to square, small to large."""
    random = np.random.default_rng(0)
    for height, width, hd_num in np.exp(random.uniform(0, np.log([9000, 9000, 64]), (count, 3))).astype(int):
        yield int(height), int(width), int(hd_num)


@pytest.mark.parametrize("layout", TILE_RULES)
@pytest.mark.parametrize("tile_size", [112, 336, 560])
def test_plans_keep_their_promises(layout, tile_size):
    for height, width, hd_num in random_sizes():
        plan = plan_tiles(height, width, tile_size=tile_size, hd_num=hd_num, layout=layout)
        rows, cols = plan.grid
        assert 1 <= rows * cols <= hd_num
        assert plan.padded == (rows * tile_size, cols * tile_size)
        for resized, padded, offset in zip(plan.resized, plan.padded, plan.offset, strict=True):
            assert 1 <= resized <= padded and 0 <= offset <= padded - resized < tile_size
        assert max(plan.resized) == max(plan.padded) or height == width


@pytest.mark.parametrize("layout", TILE_RULES)
def test_a_portrait_is_planned_as_the_landscape_on_its_side(layout):
    for height, width, hd_num in random_sizes():
        if height == width:
            continue
        plan = plan_tiles(height, width, tile_size=112, hd_num=hd_num, layout=layout)
        turned = plan_tiles(width, height, tile_size=112, hd_num=hd_num, layout=layout)
        assert (plan.resized, plan.padded, plan.offset) == (
            turned.resized[::-1],
            turned.padded[::-1],
            turned.offset[::-1],
        )
        assert plan.transposed != turned.transposed


@pytest.mark.parametrize("layout", TILE_RULES)
@pytest.mark.parametrize("size", [(1, 30000), (30000, 1)])
def test_a_hair_thin_picture_gets_one_row(layout, size):
    plan = plan_tiles(*size, tile_size=560, hd_num=24, layout=layout)
    assert min(plan.resized) == 1 and sorted(plan.grid) == [1, 24]


def test_padding_is_at_the_end_or_on_both_sides():
    bottom = plan_tiles(400, 1000, tile_size=560, hd_num=6, layout="bottom")
    assert (bottom.resized, bottom.padded, bottom.offset) == ((448, 1120), (560, 1120), (0, 0))
    centred = plan_tiles(400, 1000, tile_size=336, hd_num=6, layout="always")
    assert (centred.resized, centred.padded, centred.offset) == ((403, 1008), (672, 1008), (134, 0))


@pytest.mark.parametrize("hd_num", [0, -3])
def test_a_budget_below_one_tile_is_rejected(hd_num):
    with pytest.raises(ValueError, match=f"hd_num.*{hd_num}"):
        plan_tiles(100, 100, tile_size=560, hd_num=hd_num, layout="bottom")


@pytest.mark.parametrize("hd_num", [None, 2.5, "6", True])
def test_a_budget_that_is_not_an_integer_is_rejected(hd_num):
    with pytest.raises(TypeError, match="hd_num"):
        plan_tiles(100, 100, tile_size=560, hd_num=hd_num, layout="bottom")


def test_numpy_integers_are_integers():
    plan = plan_tiles(100, 200, tile_size=560, hd_num=np.int64(4), layout="always")
    assert plan == plan_tiles(100, 200, tile_size=560, hd_num=4, layout="always")


def test_an_unknown_layout_is_rejected():
    with pytest.raises(ValueError, match="bottom, always, centred"):
        plan_tiles(100, 100, tile_size=560, hd_num=6, layout="left")


def test_a_picture_without_pixels_is_rejected():
    with pytest.raises(ValueError, match="0x100 px"):
        plan_tiles(100, 0, tile_size=560, hd_num=6, layout="bottom")


@pytest.mark.parametrize("hd_num", [10**6, 10**30])
def test_a_budget_beyond_memory_is_rejected_when_it_would_be_used(hd_num):
    small = plan_tiles(100, 100, tile_size=560, hd_num=hd_num, layout="bottom")
    assert small.grid == (1, 1)
    with pytest.raises(ValueError, match=f"limit of {MAX_PLANNED_PIXELS // 560**2}"):
        plan_tiles(100, 100, tile_size=560, hd_num=hd_num, layout="always")
    with pytest.raises(ValueError, match="crop the picture"):
        plan_video(1, 30000, tile_size=560)


def test_token_counts():
    assert num_image_tokens(1, 1, 20) == 841
    assert num_image_tokens(2, 3, 12) == 7 * 144 + 1 + 3 * 12
    squares = [num_image_tokens(1, 1, side, is_tiled=False) for side in (16, 35)]
    assert squares == [256, 1225]


def test_frames_of_the_published_videos():
    for row in golden("preprocess_content.json")["videos"]:
        assert plan_frames(row["n_frames_total"], row["avg_fps"]) == row["indices"]


def test_frames_are_ascending_within_the_video_and_within_the_budget():
    for num_frames in (1, 2, 31, 32, 33, 34, 1000, 108_000):
        for average_fps in (0.2, 1, 23.976, 60):
            for max_frames in (1, 8, 32):
                indices = plan_frames(num_frames, average_fps, max_frames=max_frames)
                assert indices[0] == 0 and indices == sorted(set(indices)) and indices[-1] < num_frames
                assert len(indices) <= max_frames
    assert plan_frames(10, 4.0, fps=2.0) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("wrong", [{"num_frames": 0}, {"fps": 0.0}, {"fps": float("nan")}, {"max_frames": 0}])
def test_sampling_nothing_is_rejected(wrong):
    with pytest.raises(ValueError, match="frames"):
        plan_frames(**{"num_frames": 10, "average_fps": 1.0} | wrong)


def test_composites_of_many_shapes():
    for row in golden("preprocess_content.json")["composite_table"]:
        composite = plan_composite([tuple(row["frame"][::-1])] * row["n"], tile_size=560)
        plan = plan_video(*composite.size, tile_size=560)
        assert list(composite.size[::-1]) == row["composite"]
        assert list(plan.padded[::-1]) == row["out"]
        assert num_image_tokens(*plan.grid, 20) == row["tokens"]


def test_the_last_frame_decides_how_frames_are_stacked():
    wide, tall = (30, 40), (40, 30)
    assert plan_composite([tall, wide], tile_size=112).stacked
    side_by_side = plan_composite([wide, tall], tile_size=112)
    assert not side_by_side.stacked and side_by_side.positions == ((0, 0), (0, 224 + 10))
    assert side_by_side.size == (224 + 40, 224 + 10 + 168 + 10)
    with pytest.raises(ValueError, match="at least one frame"):
        plan_composite([], tile_size=112)


def test_hair_thin_frames_stay_within_reason():
    for frame in ((1, 30000), (30000, 1)):
        plan = plan_video(*plan_composite([frame] * 32, tile_size=560).size, tile_size=560)
        assert plan.num_tiles < 130


def test_the_module_works_as_a_top_level_import(monkeypatch):
    """Old clients put the model directory on sys.path."""
    names = ("ixc_utils", "media_internlm_xcomposer2", "video_internlm_xcomposer2")
    monkeypatch.syspath_prepend(str(Path(ixc_utils.__file__).parent))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        module = importlib.import_module("ixc_utils")
        assert module.HD_transform.__module__ == "ixc_utils"
        with pytest.raises(FileNotFoundError):
            module.load_video("no such file.mp4")
    finally:
        for name in names:
            sys.modules.pop(name, None)


# ---- boxes ----


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        ("[100, 200, 300, 400]", [(20, 20, 60, 40)]),
        ("[[100,200,300,400],[0,0,1000,1000]]", [(20, 20, 60, 40), (0, 0, 200, 100)]),
        ("The star is at 100 200 300 400.", [(20, 20, 60, 40)]),
        (
            "<box>(100,200), (300,400)</box> and (500, 500, 750, 1000)",
            [(20, 20, 60, 40), (100, 50, 150, 100)],
        ),
        ("[300, 400, 100, 200]", [(20, 20, 60, 40)]),
        ("[-50, 0, 2000, 500]", [(0, 0, 200, 50)]),
        ("[99.5, 200.0, 300.25, 400]", [(20, 20, 60, 40)]),
        ("[1, 2, 3]", []),
        ("1, 2, 3, 4, 5", []),
        ("[500, 500, 500, 900]", []),
        ("no box, but 3 stars in 2024", []),
        ("", []),
        ("9" * 5000, []),
    ],
)
def test_boxes_in_an_answer(answer, boxes):
    assert ixc_utils.parse_boxes(answer, (100, 200)) == boxes


def test_boxes_as_parts_of_the_picture():
    assert ixc_utils.parse_boxes("[0.1, 0.2, 0.3, .4]", (100, 200), scale=1) == [(20, 20, 60, 40)]
    with pytest.raises(ValueError, match="scale must be above 0, not 0"):
        ixc_utils.parse_boxes("", (100, 200), scale=0)
    with pytest.raises(ValueError, match="0x5"):
        ixc_utils.parse_boxes("", (5, 0))


def test_drawn_boxes():
    image = Image.new("RGB", (200, 100), "white")
    drawn = ixc_utils.draw_boxes(image, [(20, 20, 60, 40), (100, 0, 200, 100)], ["star", "ring"])
    assert image.getcolors() == [(20_000, (255, 255, 255))]
    assert drawn.getpixel((20, 20)) == drawn.getpixel((59, 39)) == (255, 0, 0)
    assert drawn.getpixel((199, 99)) == (0, 0, 255)
    assert drawn.getpixel((60, 40)) == drawn.getpixel((10, 10)) == (255, 255, 255)
    assert ixc_utils.draw_boxes(image, []).getcolors() == image.getcolors()
    with pytest.raises(ValueError, match="2 boxes but 1 labels"):
        ixc_utils.draw_boxes(image, [(0, 0, 1, 1)] * 2, ["star"])
