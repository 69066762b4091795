"""The notebooks in `examples/` run from top to bottom, and their stored outputs are what they produce."""

import ast
import importlib.util
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from helpers import ROOT, tiny_config
from internlm_xcomposer2 import InternLMXcomposer2Config
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import normalize_image
from internlm_xcomposer2.ixc_utils import plan_tiles, tile_picture
from nbclient import NotebookClient
from PIL import Image

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
QUICK_START, RECIPES = EXAMPLES / "quickstart.ipynb", EXAMPLES / "recipes.ipynb"
MAX_BYTES = 300_000
MAX_LINES = 12  # of a cell
TRUE_ANSWERS = {
    QUICK_START: (
        "'6143'",
        "What shape is it? star",
        "What colour is it? orange",
        "'picture 2'",
        "word.jpg: CLOUD",
        "ring.jpg: green",
        "circles.png: 4",
        "'ART'",
        "'right'",
    ),
    RECIPES: ("'ART')", "What shape is the object? star", "What colour is it? orange"),
}


def read_notebook(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell printed and what it evaluated to, as text; pictures left out."""
    parts = [output.text for output in cell.outputs if output.get("name") == "stdout"]
    values = [output.data for output in cell.outputs if "data" in output]
    parts += [data["text/plain"] for data in values if not any(kind.startswith("image/") for kind in data)]
    return "".join(parts)


def num_pictures(cell: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.fixture(scope="module", params=list(TRUE_ANSWERS), ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def executed(path, tmp_path_factory) -> nbformat.NotebookNode:
    """A notebook after a run in a fresh kernel, in its own folder."""
    home = str(tmp_path_factory.mktemp("home"))
    notebook = read_notebook(path)
    for cell in code_cells(notebook):
        cell.outputs = []
    where = {"metadata": {"path": str(EXAMPLES)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", home)
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        return client.execute()


def test_it_runs_and_gives_the_stored_outputs(path, executed):
    for stored, fresh in zip(code_cells(read_notebook(path)), code_cells(executed), strict=True):
        assert printed(fresh) == printed(stored), stored.source
        assert num_pictures(fresh) == num_pictures(stored), stored.source


def test_its_answers_are_true(path, executed):
    text = "\n".join(printed(cell) for cell in code_cells(executed))
    for answer in TRUE_ANSWERS[path]:
        assert answer in text, answer


def test_tiles_of_a_picture_and_a_video_and_a_stream_are_shown():
    cells = code_cells(read_notebook(QUICK_START))
    shown = [cell.source for cell in cells if num_pictures(cell) and "show_tiles(" in cell.source]
    assert any(".png" in source for source in shown) and any(".mp4" in source for source in shown)
    (cell,) = [cell for cell in cells if "stream" in cell.source]
    pieces = ast.literal_eval(printed(cell))
    assert len(pieces) > 1 and all(pieces) and "".join(pieces) == "an orange star"


def test_it_is_small_and_mentions_no_machine(path):
    notebook = read_notebook(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < MAX_BYTES
    assert all(len(cell.source.splitlines()) <= MAX_LINES for cell in notebook.cells)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert outputs and not any(output.get("name") == "stderr" for output in outputs)
    texts = [cell.source for cell in notebook.cells] + [printed(cell) for cell in code_cells(notebook)]
    assert not re.search(r"[A-Z]:\\|/(home|root|tmp|usr|Users)/", "\n".join(texts))


# ---- the helper ----


@pytest.fixture(scope="module")
def show_tiles():
    spec = importlib.util.spec_from_file_location("show_tiles", EXAMPLES / "show_tiles.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.show_tiles


def striped(width: int, height: int) -> Image.Image:
    columns = np.linspace(0, 255, width)[None, :, None].repeat(height, 0).repeat(3, 2)
    return Image.fromarray(columns.astype(np.uint8))


@pytest.mark.parametrize(("version", "layout"), [("2.5", "bottom"), ("2-4khd", "always")])
@pytest.mark.parametrize("size", [(200, 90), (90, 200), (60, 60)])
def test_the_drawn_tiles_are_those_of_the_plan(show_tiles, version, layout, size):
    config, picture = tiny_config(version), striped(*size)
    side = config.img_size
    plan = plan_tiles(picture.height, picture.width, tile_size=side, hd_num=8, layout=layout)
    overview, tiles = show_tiles(picture, config, hd_num=8).axes
    raster = tiles.images[0].get_array()
    expected = np.asarray(tile_picture(picture, plan)) / 255
    np.testing.assert_allclose(raster, expected, atol=1e-5)
    assert overview.images[0].get_array().shape == (side, side, 3)
    assert tiles.get_title() == f"{plan.grid[0]} x {plan.grid[1]} tiles"
    num_tiles = plan.num_tiles - 1
    labels = [text.get_text() for text in tiles.texts]
    assert labels == ([str(index + 1) for index in range(num_tiles)] if num_tiles > 1 else [])


def test_a_square_is_drawn_as_one_panel(show_tiles):
    config = tiny_config("2")
    figure = show_tiles(striped(80, 40), config)
    (panel,) = figure.axes
    assert panel.images[0].get_array().shape == (config.img_size, config.img_size, 3)
    assert figure.get_suptitle() == f"{config.tile_tokens_per_side**2} tokens"


def test_normalised_pixels_are_drawn_too(show_tiles):
    config = tiny_config("2.5")
    side = config.img_size
    picture = striped(2 * side, side)
    _, tiles = show_tiles(normalize_image(picture)[None], config).axes
    np.testing.assert_allclose(tiles.images[0].get_array(), np.asarray(picture) / 255, atol=1e-5)


def test_the_tokens_are_those_of_the_model(show_tiles):
    config = InternLMXcomposer2Config(version="2.5")
    assert show_tiles(striped(64, 48), config, hd_num=1).get_suptitle() == "841 tokens"


@pytest.mark.parametrize(
    ("media", "hd_num", "error"),
    [
        ([striped(9, 9), striped(9, 9)], None, ValueError),
        (striped(9, 9), 0, ValueError),
        (striped(9, 9), "many", TypeError),
        (Path("no such picture.png"), None, FileNotFoundError),
    ],
)
def test_what_chat_would_reject_is_rejected(show_tiles, media, hd_num, error):
    with pytest.raises(error):
        show_tiles(media, tiny_config("2.5"), hd_num)
