"""More pictures: receipts, small print on large pictures, an object at a position, and frames of videos."""

import io
import math
import random

from PIL import Image, ImageDraw

from .fonts import load_font
from .pictures import (
    MARGIN,
    TILE,
    Mark,
    Picture,
    Sketch,
    Thing,
    draw_background,
    ink,
    stamp,
    write,
)
from .questions import PLACES

RECEIPT_SIZES = (18, 24)  # em, tile px
LINE_SPACING = 1.3  # em
SMALL_SIZES = (22, 34)  # em, pixels of the cut tiles
LARGE_SIDES = (3 * TILE, 8 * TILE)  # px, of pictures with small print
PLACED_SIZES = (18, 34)  # diameter, tile px
PLACE_JITTER = 0.08  # of the picture's side
FRAME_SIDES = (112, 320)  # px, longer side of a video
FRAME_PROPORTIONS = ((4, 3), (4, 3), (16, 9), (3, 4), (1, 1))  # width, height
LEAST_WAY = 0.4  # of the way across that a moving object covers
MOVING_SIZES = (0.22, 0.4)  # diameter, of the shorter side
FRAME_TEXT_SIZES = (0.2, 0.4)  # em, of the longer side
COMPRESSED_SHARE = 0.5  # of the videos in training, whose frames get compression artefacts


def draw_receipt(
    rng: random.Random, split: str, lines: list[tuple[str, str]], families: list[list[str]]
) -> Picture:
    """Names on the left and numbers on the right, line by line, perhaps with a rule above the last line."""
    path = rng.choice(rng.choice(families))
    probe = load_font(path, 64)
    widest = max(probe.getlength(f"{name}  {number}") for name, number in lines) / 64
    room = TILE - 2 * MARGIN
    size = min(rng.uniform(*RECEIPT_SIZES), room / widest, room / (len(lines) * LINE_SPACING))
    sketch = Sketch(rng, split, least=(room, room))
    font = load_font(path, max(8, sketch.snap(size * sketch.scale)))
    spacing = font.size * min(
        rng.uniform(LINE_SPACING, 1.6), (sketch.height - 2 * MARGIN * sketch.scale) / (len(lines) * font.size)
    )
    width = max(font.getlength(f"{name}  {number}") for name, number in lines)
    width = min(sketch.width - 2 * MARGIN * sketch.scale, width * rng.uniform(1, 1.4))
    y, x = sketch.place(spacing * len(lines), width)
    fill = ink(rng)
    marks = []
    for index, (name, number) in enumerate(lines):
        if index + 1 == len(lines) and rng.random() < 0.4:
            sketch.pen.line((x, y - 1, x + width, y - 1), fill=fill[0], width=max(1, round(sketch.scale)))
        marks += write(sketch.pen, rng, name, font, x, y, fill)
        marks += write(sketch.pen, rng, number, font, x + width - font.getlength(number), y, fill)
        y += spacing
    return Picture(sketch.image, marks)


def draw_small_print(
    rng: random.Random, split: str, text: str, families: list[list[str]], tiles_along: int
) -> Picture:
    """`text` on a large picture, so small that it is legible only if that is cut into `tiles_along`."""
    path = rng.choice(rng.choice(families))
    width = load_font(path, 64).getlength(text) / 64
    size = min(rng.uniform(*SMALL_SIZES) / tiles_along, (TILE - 2 * MARGIN - 2) / width)
    sketch = Sketch(rng, split, least=(0.6 * TILE, 0.6 * TILE), sides=LARGE_SIDES)
    font = load_font(path, sketch.snap(size * sketch.scale))
    left, top, right, bottom = font.getbbox(text)
    y, x = sketch.place(bottom - top, right - left)
    return Picture(sketch.image, write(sketch.pen, rng, text, font, x - left, y - top))


def draw_at(rng: random.Random, split: str, thing: Thing) -> tuple[Picture, str]:
    """One object on a square picture, and the name of the ninth that its centre is in."""
    sketch = Sketch(rng, split, least=(TILE, TILE))
    side = sketch.snap(rng.uniform(*PLACED_SIZES) * sketch.scale)
    row, column = rng.randrange(3), rng.randrange(3)
    y, x = (_near(rng, sketch, (index + 0.5) / 3, side) for index in (row, column))
    return Picture(sketch.image, [stamp(sketch.pen, rng, thing, x, y, side)]), PLACES[row][column]


def place_in(picture: Picture) -> str:
    """The name of the ninth of a picture that the centre of its only object is in."""
    left, top, right, bottom = picture.marks[0].box
    row = int(3 * (top + bottom) / 2 / picture.image.height)
    return PLACES[min(2, row)][min(2, int(3 * (left + right) / 2 / picture.image.width))]


def _near(rng: random.Random, sketch: Sketch, centre: float, side: int) -> int:
    """Where a square of `side` pixels begins whose middle is near `centre`, as a share of the picture."""
    middle = (centre + rng.uniform(-PLACE_JITTER, PLACE_JITTER)) * sketch.height
    return sketch.snap(min(max(0, middle - side / 2), sketch.height - side - 1))


def draw_motion(rng: random.Random, split: str, thing: Thing, way: str, times: list[float]) -> list[Picture]:
    """Frames at `times`, from 0 to 1, of an object that crosses the picture."""
    height, width, background = _stage(rng, split)
    side = int(rng.uniform(*MOVING_SIZES) * min(height, width))
    begin = rng.uniform(0, 1 - LEAST_WAY)
    end = rng.uniform(begin + LEAST_WAY, 1)
    if way in ("left", "up"):
        begin, end = end, begin
    across, seed = rng.random(), rng.random()
    frames = []
    for time in times:
        along = begin + (end - begin) * time
        down, right = (along, across) if way in ("up", "down") else (across, along)
        image = background.copy()
        y, x = int(down * (height - side)), int(right * (width - side))
        frames.append(Picture(image, [stamp(ImageDraw.Draw(image), random.Random(seed), thing, x, y, side)]))
    return frames


def draw_numbers(
    rng: random.Random, split: str, numbers: list[str], families: list[list[str]]
) -> list[Picture]:
    """One frame for each number, in one font and colour, each in a different place."""
    height, width, background = _stage(rng, split)
    path, fill = rng.choice(rng.choice(families)), ink(rng)
    longest = max(load_font(path, 64).getlength(number) for number in numbers) / 64
    size = min(rng.uniform(*FRAME_TEXT_SIZES) * max(height, width), 0.94 * width / longest, 0.7 * height)
    font, frames = load_font(path, max(8, int(size))), []
    for number in numbers:
        image = background.copy()
        left, top, right, bottom = font.getbbox(number)
        y, x = rng.uniform(0, height - (bottom - top) - 1), rng.uniform(0, width - (right - left) - 1)
        frames.append(
            Picture(image, write(ImageDraw.Draw(image), rng, number, font, x - left, y - top, fill))
        )
    return frames


def _stage(rng: random.Random, split: str) -> tuple[int, int, Image.Image]:
    """(height, width, background) of a video: multiples of four in training, other even ones elsewhere."""
    across, down = rng.choice(FRAME_PROPORTIONS)
    long_side = math.exp(rng.uniform(*map(math.log, FRAME_SIDES)))
    odd = 0 if split == "train" else 2
    width, height = (int(long_side * part / max(across, down)) // 4 * 4 + odd for part in (across, down))
    return height, width, draw_background(rng, height, width)


def compress(rng: random.Random, frames: list[Picture]) -> list[Picture]:
    """The frames with compression artefacts."""
    quality, compressed = rng.randint(40, 90), []
    for frame in frames:
        file = io.BytesIO()
        frame.image.save(file, "JPEG", quality=quality)
        compressed.append(Picture(Image.open(file).convert("RGB"), frame.marks))
    return compressed


def moved(mark: Mark, scale: float, top: float, left: float) -> Mark:
    """A mark on a picture that was scaled and placed on a larger one at (top, left)."""
    x0, y0, x1, y1 = (edge * scale for edge in mark.box)
    return Mark(mark.name, (x0 + left, y0 + top, x1 + left, y1 + top), mark.index, mark.colour)
