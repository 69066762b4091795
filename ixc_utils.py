"""Picture geometry of the family, in integers and PIL pictures, and the published names of its transforms.

`plan_*` decide in integers, everything else carries out a plan. Sizes are (height, width) in pixels and grids
(rows, cols) in tiles; only PIL itself uses (width, height). The number of tokens of a picture always comes
from the plan that also cuts the picture, so the two cannot disagree.
"""

import math
import operator
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

try:
    from .media_internlm_xcomposer2 import MAX_FRAMES, Size, to_rgb, upright_size
    from .media_internlm_xcomposer2 import load_video as read_video
except ImportError:
    if __package__:
        raise
    # Clients put a model directory on sys.path and import this file as a top-level module.
    from media_internlm_xcomposer2 import MAX_FRAMES, Size, to_rgb, upright_size
    from media_internlm_xcomposer2 import load_video as read_video

if TYPE_CHECKING:
    from io import BytesIO
    from os import PathLike

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# What the published checkpoints were trained with; every function accepts another size as an argument.
TILE_SIZE = 560
TILE_SIZE_4KHD = 336

# Frame composites: a band for the label above each frame, and a gap with a line in it after each frame.
BAND = 40
GAP = 10
LINE_WIDTH = 2
FONT_SIZE = 40

# Answers give places in a picture as numbers in 0..BOX_SCALE, whatever its size.
BOX_SCALE = 1000
BOX_COLOURS = ("red", "blue", "lime", "orange", "magenta", "cyan")
_NUMBER = r"[+-]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})"
_NUMBERS = re.compile(rf"{_NUMBER}(?:(?:\s*,\s*|\s+){_NUMBER})*")
_POINTS = re.compile(r"\)\s*,\s*\(")  # between the two corners in (x, y), (x, y)

# Where a frame that was scaled down on reading keeps the size it had.
FRAME_SIZE = "ixc2_frame_size"

# No checkpoint can read a picture beyond this size; planning it would only exhaust the memory.
MAX_PLANNED_PIXELS = 1 << 28


@dataclass(frozen=True)
class TileRule:
    """How far a picture may grow, and where it goes on its canvas."""

    enlargement: (
        float | None
    )  # at most this multiple of its long side, rounded up to tiles; None: the whole budget
    centred: bool  # else at the start, with all padding after it


TILE_RULES = {
    "bottom": TileRule(enlargement=1.0, centred=False),  # 2.5
    "always": TileRule(enlargement=None, centred=True),  # 4KHD
    "centred": TileRule(enlargement=1.5, centred=True),  # 2.5, as in published training and evaluation
}


@dataclass(frozen=True)
class TilePlan:
    """What is done to a picture: resized, placed on white at `offset`, cut into `grid` squares."""

    resized: Size
    padded: Size
    offset: tuple[int, int]  # (top, left) of the picture on the white canvas
    tile_size: int  # px
    transposed: bool  # resized on its side: PIL rounds between its two passes, so the order of axes matters

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of local tiles."""
        return self.padded[0] // self.tile_size, self.padded[1] // self.tile_size

    @property
    def num_tiles(self) -> int:
        """Local tiles and the global view."""
        return self.grid[0] * self.grid[1] + 1


@dataclass(frozen=True)
class FramePlan:
    """Where the frames of a video go on one picture."""

    frame_sizes: tuple[Size, ...]
    positions: tuple[tuple[int, int], ...]  # (top, left) of each frame's band, right above the frame
    size: Size  # of the whole picture
    stacked: bool  # one below the other; else side by side


# --- plans ---


def plan_tiles(height: int, width: int, *, tile_size: int, hd_num: int, layout: str) -> TilePlan:
    """Plan a picture for a budget of `hd_num` local tiles under one of the `TILE_RULES`."""
    check_size(height, width)
    rule = tile_rule(layout)
    budget = min(check_hd_num(hd_num), MAX_PLANNED_PIXELS)
    long, short = max(height, width), min(height, width)
    ratio = long / short
    num_along = bisect_right(range(1, budget + 1), budget, key=lambda num: num * math.ceil(num / ratio))
    if rule.enlargement is not None:
        num_along = min(math.ceil(long * rule.enlargement / tile_size), num_along)
    resized_long = num_along * tile_size
    resized = max(1, int(resized_long / ratio)), resized_long
    return _lay_out(resized, tile_size, centred=rule.centred, transposed=width < height)


def plan_video(height: int, width: int, *, tile_size: int) -> TilePlan:
    """Plan a composite of video frames: its short side becomes one tile, whatever its long side becomes."""
    check_size(height, width)
    ratio = max(height, width) / min(height, width)
    resized = tile_size, int(tile_size * ratio)
    return _lay_out(resized, tile_size, centred=False, transposed=width < height)


def plan_composite(sizes: Sequence[Size], *, tile_size: int) -> FramePlan:
    """Plan one picture of frames with these sizes; the last frame decides how they are stacked."""
    if not sizes:
        raise ValueError("a video needs at least one frame")
    height, width = sizes[-1]
    stacked = width > height
    frames = [_fit_frame(*size, long_side=2 * tile_size) for size in sizes]
    positions, along = [], 0
    for frame_height, frame_width in frames:
        positions.append((along, 0) if stacked else (0, along))
        along += frame_height + BAND + GAP if stacked else frame_width + GAP
    if stacked:
        size = along, max(frame_width for _, frame_width in frames)
    else:
        size = max(frame_height for frame_height, _ in frames) + BAND, along
    return FramePlan(tuple(frames), tuple(positions), size, stacked)


def num_image_tokens(rows: int, cols: int, tile_tokens_per_side: int, *, is_tiled: bool = True) -> int:
    """How many tokens a picture has: the one place that defines it.

    A tiled picture has its tiles and a global view, a newline after each of their rows, and a separator; one
    that is read as a square has only the square.

    Args:
        rows, cols: of local tiles.
        tile_tokens_per_side: side, in tokens, of one tile or square.
    """
    if not is_tiled:
        return tile_tokens_per_side**2
    tiles = (rows * cols + 1) * tile_tokens_per_side**2
    newlines = (rows + 1) * tile_tokens_per_side
    return tiles + newlines + 1


def tile_rule(layout: str) -> TileRule:
    """The rule for a layout, by name."""
    if layout not in TILE_RULES:
        raise ValueError(f"unknown tile layout {layout!r}; choose one of {', '.join(TILE_RULES)}")
    return TILE_RULES[layout]


def check_hd_num(hd_num: int) -> int:
    """`hd_num` as a plain integer, or an error that says what is wrong with it."""
    if isinstance(hd_num, bool) or not hasattr(hd_num, "__index__"):
        raise TypeError(f"hd_num must be an integer number of tiles, got {hd_num!r}")
    if operator.index(hd_num) < 1:
        raise ValueError(f"hd_num must be at least 1 tile, got {hd_num}")
    return operator.index(hd_num)


def check_size(height: int, width: int) -> None:
    """Reject a picture without pixels."""
    if height < 1 or width < 1:
        raise ValueError(f"a picture needs at least 1x1 px, got {width}x{height} px")


def _lay_out(resized: Size, tile_size: int, *, centred: bool, transposed: bool) -> TilePlan:
    """Pad a landscape picture to whole tiles, then turn it back if it was a portrait."""
    height, width = (math.ceil(side / tile_size) * tile_size for side in resized)
    if height * width > MAX_PLANNED_PIXELS:
        raise ValueError(
            f"the picture would take {height * width // tile_size**2} tiles of {tile_size} px, more than the "
            f"limit of {MAX_PLANNED_PIXELS // tile_size**2}; lower hd_num or crop the picture"
        )
    offset = ((height - resized[0]) // 2, (width - resized[1]) // 2) if centred else (0, 0)
    if transposed:
        resized, offset, height, width = resized[::-1], offset[::-1], width, height
    return TilePlan(resized, (height, width), offset, tile_size, transposed)


def _fit_frame(height: int, width: int, *, long_side: int) -> Size:
    """Scale a frame so that its longer side is `long_side`."""
    check_size(height, width)
    ratio = width / height
    if width > height:
        return max(1, int(long_side / ratio)), long_side
    return long_side, max(1, int(long_side * ratio))


# --- pictures ---


def tile_picture(image: Image.Image, plan: TilePlan) -> Image.Image:
    """Resize a picture as planned and pad it with white to whole tiles."""
    top, left = plan.offset
    canvas = Image.new("RGB", plan.padded[::-1], "white")
    canvas.paste(resize_picture(image, plan), (left, top))
    return canvas


def resize_picture(image: Image.Image, plan: TilePlan) -> Image.Image:
    """Resize a picture as planned; one that has that size already stays as it is."""
    image = to_rgb(image)
    height, width = plan.resized
    if plan.transposed:  # PIL resizes the width first; as on its side, the height is resized before it
        image = image.resize((image.width, height), Image.Resampling.BILINEAR)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def square_picture(image: Image.Image, side: int) -> Image.Image:
    """Resize a picture to side x side pixels, whatever its aspect ratio."""
    return to_rgb(image).resize((side, side), Image.Resampling.BICUBIC)


def shrink_frame(image: Image.Image, *, tile_size: int) -> Image.Image:
    """A frame as `composite_frames` places it, if that is smaller; it remembers its own size."""
    image = to_rgb(image)
    height, width = _fit_frame(image.height, image.width, long_side=2 * tile_size)
    if FRAME_SIZE in image.info or width * height >= image.width * image.height:
        return image
    shrunk = image.resize((width, height), Image.Resampling.BILINEAR)
    shrunk.info[FRAME_SIZE] = image.size[::-1]
    return shrunk


def frame_size(image: Image.Image) -> Size:
    """(height, width) of a frame before `shrink_frame`, by which it is laid out."""
    return image.info.get(FRAME_SIZE, image.size[::-1])


def composite_frames(images: Sequence[Image.Image], font: Font, *, tile_size: int) -> Image.Image:
    """Arrange frames on one picture, each under its label."""
    images = [to_rgb(image) for image in images]
    plan = plan_composite([frame_size(image) for image in images], tile_size=tile_size)
    canvas = Image.new("RGB", plan.size[::-1], "white")
    draw = ImageDraw.Draw(canvas)
    placed = zip(images, plan.frame_sizes, plan.positions, strict=True)
    for index, (image, size, (top, left)) in enumerate(placed):
        canvas.paste(image.resize(size[::-1], Image.Resampling.BILINEAR), (left, top + BAND))
        draw.text((left, top), f"<IMAGE {index}>", font=font, fill="black")
        if index + 1 < len(images):
            draw.line(_gap_line(plan, size, (top, left)), fill="black", width=LINE_WIDTH)
    return canvas


def _gap_line(plan: FramePlan, size: Size, position: tuple[int, int]) -> list[tuple[int, int]]:
    """The (x, y) ends of the line in the middle of the gap after a frame."""
    if plan.stacked:
        y = position[0] + BAND + size[0] + GAP // 2
        return [(0, y), (plan.size[1], y)]
    x = position[1] + size[1] + GAP // 2
    return [(x, 0), (x, plan.size[0])]


def get_font(path: "str | PathLike | None" = None, *, size: int = FONT_SIZE) -> Font:
    """The font of frame labels: Pillow's own, or a font file (the checkpoints were trained with SimHei)."""
    return ImageFont.load_default(size=size) if path is None else ImageFont.truetype(path, size=size)


# --- boxes ---

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, as PIL crops and draws


def parse_boxes(answer: str, size: Size, *, scale: float = BOX_SCALE) -> list[Box]:
    """The boxes that an answer gives as four numbers each: left, top, right, bottom in 0..`scale`.

    They may be in brackets or not, or two points in parentheses. Runs of more or fewer numbers are no boxes.

    Args:
        size: (height, width) of the picture in pixels.
        scale: 1000 as in version 2.5, or 1 if the answer gives parts of the picture.

    Returns:
        The boxes in pixels, in the order of the answer, within the picture, without empty ones.

    Raises:
        ValueError: the picture or the scale is empty.
    """
    height, width = size
    check_size(height, width)
    if not scale > 0:
        raise ValueError(f"scale must be above 0, not {scale}; version 2.5 answers in 0..{BOX_SCALE}")
    runs = (re.split(r"[\s,]+", run) for run in _NUMBERS.findall(_POINTS.sub(",", answer)))
    boxes = []
    for x0, y0, x1, y1 in ([float(number) / scale for number in run] for run in runs if len(run) == 4):
        (left, right), (top, bottom) = sorted((x0, x1)), sorted((y0, y1))
        boxes.append(
            (_within(left, width), _within(top, height), _within(right, width), _within(bottom, height))
        )
    return [box for box in boxes if box[0] < box[2] and box[1] < box[3]]


def _within(part: float, length: int) -> int:
    """A part of a length in pixels, at most all of it."""
    return round(min(max(part, 0.0), 1.0) * length)


def draw_boxes(image: Image.Image, boxes: Sequence[Box], labels: Sequence[str] = ()) -> Image.Image:
    """A copy of a picture with a frame around each box, and a label in it if there are labels.

    Raises:
        ValueError: there are labels, but not one for each box.
    """
    if labels and len(labels) != len(boxes):
        raise ValueError(f"there are {len(boxes)} boxes but {len(labels)} labels; give one for each, or none")
    image = to_rgb(image).copy()
    draw = ImageDraw.Draw(image)
    line = max(2, max(image.size) // 250)
    font = get_font(size=max(12, max(image.size) // 30))
    for index, (left, top, right, bottom) in enumerate(boxes):
        colour = BOX_COLOURS[index % len(BOX_COLOURS)]
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=line)
        if labels:
            place = left + 2 * line, top + 2 * line
            draw.rectangle(draw.textbbox(place, labels[index], font=font), fill="white")
            draw.text(place, labels[index], font=font, fill=colour)
    return image


# --- the names that clients of the published code import ---


def Image_transform(img: Image.Image, hd_num: int = 25, *, tile_size: int = TILE_SIZE) -> Image.Image:
    """The picture as 2.5 reads it, padded at the bottom (right, if it is a portrait) to whole tiles."""
    return _tile_by_rule(img, hd_num, tile_size, "bottom")


def HD_transform(img: Image.Image, hd_num: int = 16, *, tile_size: int = TILE_SIZE_4KHD) -> Image.Image:
    """The picture as 4KHD reads it, enlarged to the whole budget."""
    return _tile_by_rule(img, hd_num, tile_size, "always")


def R560_HD18_Identity_transform(
    img: Image.Image, hd_num: int = 18, *, tile_size: int = TILE_SIZE
) -> Image.Image:
    """The picture as the published finetuning and evaluation of 2.5 prepare it."""
    return _tile_by_rule(img, hd_num, tile_size, "centred")


def Video_transform(img: Image.Image, hd_num: int = 25, *, tile_size: int = TILE_SIZE) -> Image.Image:
    """A composite of video frames as 2.5 reads it. `hd_num` is accepted for old callers and ignored."""
    return tile_picture(img, plan_video(*upright_size(img), tile_size=tile_size))


def frame2img(
    images: Sequence[Image.Image], font: Font | None = None, *, tile_size: int = TILE_SIZE
) -> Image.Image:
    """One picture of all frames, each labelled `<IMAGE i>`."""
    return composite_frames(images, font or get_font(), tile_size=tile_size)


def load_video(
    source: "str | PathLike | bytes | BytesIO | Sequence[Image.Image]",
    *,
    max_frames: int = MAX_FRAMES,
    fps: float = 1.0,
) -> list[Image.Image]:
    """The sampled frames of a video file, its bytes, or a list of frames."""
    return read_video(source, max_frames=max_frames, fps=fps)


def _tile_by_rule(image: Image.Image, hd_num: int, tile_size: int, layout: str) -> Image.Image:
    height, width = upright_size(image)
    return tile_picture(image, plan_tiles(height, width, tile_size=tile_size, hd_num=hd_num, layout=layout))
