"""Draws what a model sees of a picture or a video: its tiles with their numbers, and the global view."""

import io

import numpy as np
from einops import rearrange
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import (
    CLIP_MEAN,
    CLIP_STD,
    Visual,
    as_visuals,
    tokens_of_grid,
)
from internlm_xcomposer2.ixc_utils import check_hd_num, get_font
from matplotlib.figure import Figure
from PIL import Image

INCHES_PER_TILE = 1.6
DPI = 72
LABEL = {"color": "tab:red", "va": "top", "bbox": {"color": "white", "pad": 1.5}}


def show_tiles(media, config, hd_num: int | None = None) -> Figure:
    """Draw one picture or video, passed as in `chat`, the way the model cuts it.

    Args:
        config: the model's configuration; it says how large tiles are and how they are laid out.
        hd_num: how many local tiles a picture may be cut into, `config.hd_num` by default.

    Raises:
        ValueError, TypeError, FileNotFoundError: as in `chat` for a picture that it can't read.
    """
    hd_num = config.hd_num if hd_num is None else check_hd_num(hd_num)
    visuals = as_visuals(media, config)
    if len(visuals) != 1:
        raise ValueError(f"show_tiles draws one picture or video, not {len(visuals)}; call it for each")
    return draw_visual(visuals[0], config, hd_num)


def draw_visual(visual: Visual, config, hd_num: int) -> Figure:
    """Draw a picture or video that is already read."""
    prepared = visual.prepare(config, hd_num, get_font())
    tiles = rearrange(prepared.pixel_values.numpy(), "n c y x -> n y x c") * CLIP_STD + CLIP_MEAN
    num_tokens = tokens_of_grid(config, prepared.grid)
    if not config.is_tiled:
        return _draw([(tiles, prepared.grid, "square")], num_tokens)
    rows, cols = prepared.grid
    parts = [(tiles[:1], (1, 1), "global view"), (tiles[1:], prepared.grid, f"{rows} x {cols} tiles")]
    return _draw(parts, num_tokens)


def draw_tiles(visual: Visual, config, hd_num: int) -> Image.Image:
    """The drawing as a picture."""
    file = io.BytesIO()
    draw_visual(visual, config, hd_num).savefig(file, format="png")
    return Image.open(file)


def _draw(parts: list[tuple[np.ndarray, tuple[int, int], str]], num_tokens: int) -> Figure:
    """One panel for each (tiles, grid, title), tiles (n, side, side, 3) with values around 0..1."""
    highest = max(rows for _, (rows, _), _ in parts)
    widths = [cols for _, (_, cols), _ in parts]
    size = (INCHES_PER_TILE * (sum(widths) + 0.5), INCHES_PER_TILE * (highest + 0.5))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle(f"{num_tokens} tokens")
    panels = figure.subplots(1, len(parts), squeeze=False, width_ratios=widths)[0]
    for panel, (tiles, (rows, cols), title) in zip(panels, parts, strict=True):
        raster = rearrange(tiles, "(rows cols) y x c -> (rows y) (cols x) c", rows=rows)
        panel.imshow(raster.clip(0, 1), extent=(0, cols, rows, 0))
        panel.set(title=title, xticks=range(cols + 1), yticks=range(rows + 1))
        panel.grid(color="tab:red", linewidth=1.5)
        panel.tick_params(length=0, labelbottom=False, labelleft=False)
        for index in range(rows * cols if rows * cols > 1 else 0):
            panel.text(index % cols + 0.05, index // cols + 0.05, str(index + 1), **LABEL)
    return figure
