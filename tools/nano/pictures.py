"""Procedural pictures: a background, text or objects on it, and marks that say what is where.

A picture is drawn at its own size in pixels, like a user's file. "Tile pixels" are those of the 112-pixel
square that the model sees once the longer side has been scaled to it: sizes are chosen there.
Training draws sizes and positions on even pixels, the other splits on odd ones.
"""

import dataclasses
import functools
import math
import random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from .fonts import load_font
from .questions import COLOURS, SHAPES
from .words import random_string

TILE = 112  # px
MARGIN = 2  # tile px between anything drawn and the edge
TEXT_SIZES = (22, 48)  # em, tile px
OBJECT_SIZES = (24, 84)  # diameter of a single object, tile px
COUNTED_SIZES = (14, 38)  # diameter of one of several, tile px
PAINTS = {
    "red": ((255, 0, 0), (220, 20, 40), (230, 50, 50)),
    "orange": ((255, 165, 0), (255, 140, 0), (240, 130, 30)),
    "yellow": ((255, 255, 0), (250, 220, 0), (240, 220, 60)),
    "green": ((0, 128, 0), (0, 180, 40), (60, 170, 80), (0, 230, 0)),
    "blue": ((0, 0, 255), (30, 60, 200), (60, 120, 230)),
    "purple": ((128, 0, 128), (140, 40, 170), (120, 60, 190)),
    "brown": ((139, 69, 19), (120, 72, 40), (150, 82, 45)),
    "black": ((0, 0, 0), (25, 25, 25)),
}
PAINT_JITTER = 10


@dataclasses.dataclass(frozen=True)
class Mark:
    """What is in a box (left, top, right, bottom; px): a character of a string, or a shape."""

    name: str
    box: tuple[float, float, float, float]
    index: int = 0  # place of a character in its string
    colour: str | None = None


@dataclasses.dataclass
class Picture:
    image: Image.Image
    marks: list[Mark]


@dataclasses.dataclass(frozen=True)
class Thing:
    shape: str
    colour: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


class Sketch:
    """An empty picture of random size and background, and the parity of pixels that its split may use."""

    def __init__(
        self,
        rng: random.Random,
        split: str,
        least: tuple[float, float] = (0, 0),
        sides: tuple[int, int] = (TILE, 4 * TILE),
    ):
        """`least`: (height, width) in tile px that it must offer; `sides`: bounds of the longer one, px."""
        self.rng, self.parity = rng, 0 if split == "train" else 1
        long_side = self.snap(math.exp(rng.uniform(*map(math.log, sides))))
        height, width = random_proportions(rng, least)
        self.scale = long_side / TILE
        self.height, self.width = (self.snap(max(8, part * self.scale)) for part in (height, width))
        self.image = draw_background(rng, self.height, self.width)
        self.pen = ImageDraw.Draw(self.image)

    def snap(self, value: float) -> int:
        """The nearest pixel below `value` that has this split's parity."""
        value = int(value + 1e-6)
        return value - (value - self.parity) % 2

    def place(self, height: float, width: float) -> tuple[int, int]:
        """A random (top, left) for a box inside the picture, with a margin if there is room for one."""
        edge = MARGIN * self.scale
        top = self.rng.uniform(min(edge, max(0, self.height - height)), max(0, self.height - height - edge))
        left = self.rng.uniform(min(edge, max(0, self.width - width)), max(0, self.width - width - edge))
        return self.snap(top), self.snap(left)


def random_proportions(rng: random.Random, least: tuple[float, float]) -> tuple[float, float]:
    """(height, width) in tile pixels, the longer one a whole tile: square, wide or tall."""
    if rng.random() < 0.5:
        return TILE, TILE
    short = rng.uniform(0.5, 1.0) * TILE
    wide = rng.random() < 0.7 or least[1] > short
    height, width = (short, TILE) if wide else (TILE, short)
    return max(height, min(TILE, least[0])), max(width, min(TILE, least[1]))


def draw_background(rng: random.Random, height: int, width: int) -> Image.Image:
    """White, one light colour, a gradient between four, or any of them with noise."""
    style = rng.random()
    if style < 0.3:
        image = Image.new("RGB", (width, height), "white")
    elif style < 0.65:
        image = Image.new("RGB", (width, height), light_colour(rng))
    else:
        corners = Image.new("RGB", (2, 2))
        corners.putdata([light_colour(rng) for _ in range(4)])
        image = corners.resize((width, height), Image.Resampling.BILINEAR)
    if rng.random() < 0.3:
        image = add_noise(rng, image)
    return image


def light_colour(rng: random.Random) -> tuple[int, int, int]:
    base = rng.randint(195, 250)
    return tuple(min(255, max(175, base + rng.randint(-25, 25))) for _ in range(3))


@functools.lru_cache(maxsize=8)
def noise_texture(strength: int, side: int = 1024) -> Image.Image:
    """(side, side) RGB noise around mid-grey, the same on every call."""
    values = np.random.default_rng(strength).normal(128, strength, (side, side, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def add_noise(rng: random.Random, image: Image.Image) -> Image.Image:
    texture = noise_texture(rng.choice((4, 8, 14)))
    left, top = (
        rng.randrange(texture.width - image.width + 1),
        rng.randrange(texture.height - image.height + 1),
    )
    crop = texture.crop((left, top, left + image.width, top + image.height))
    return ImageChops.add(image, crop, scale=1, offset=-128)


def paint(rng: random.Random, colour: str) -> tuple[int, int, int]:
    """A shade of `colour`."""
    shade = rng.choice(PAINTS[colour])
    return tuple(min(255, max(0, part + rng.randint(-PAINT_JITTER, PAINT_JITTER))) for part in shade)


def ink(rng: random.Random) -> tuple[tuple[int, int, int], str | None]:
    """A dark colour to write with, and its name if it has one."""
    style = rng.random()
    if style < 0.35:
        return paint(rng, "black"), "black"
    if style < 0.75:
        name = rng.choice([colour for colour in COLOURS if colour not in ("yellow", "orange")])
        return paint(rng, name), name
    return tuple(rng.randint(0, 110) for _ in range(3)), None


def draw_text(rng: random.Random, split: str, text: str, families: list[list[str]]) -> Picture:
    """`text` once, somewhere inside, in a random font."""
    path = rng.choice(rng.choice(families))
    probe = load_font(path, 64)
    width, height = probe.getlength(text) / 64, sum(probe.getmetrics()) / 64  # per pixel of em
    size = min(rng.uniform(*TEXT_SIZES), (TILE - 2 * MARGIN - 2) / width)
    sketch = Sketch(rng, split, least=(size * height + 2 * MARGIN, size * width + 2 * MARGIN + 2))
    font = load_font(path, max(8, sketch.snap(size * sketch.scale)))
    left, top, right, bottom = font.getbbox(text)
    y, x = sketch.place(bottom - top, right - left)
    return Picture(sketch.image, write(sketch.pen, rng, text, font, x - left, y - top))


def write(
    pen: ImageDraw.ImageDraw,
    rng: random.Random,
    text: str,
    font: ImageFont.FreeTypeFont,
    x: float,
    y: float,
    inking: tuple[tuple[int, int, int], str | None] | None = None,
) -> list[Mark]:
    """Writes `text` with its layout origin at (x, y), in a random ink or `inking`; one mark per character."""
    fill, colour = inking or ink(rng)
    pen.text((x, y), text, fill=fill, font=font)
    marks = []
    for index, character in enumerate(text):
        start = x + font.getlength(text[: index + 1]) - font.getlength(character)
        left, top, right, bottom = font.getbbox(character)
        marks.append(Mark(character, (start + left, y + top, start + right, y + bottom), index, colour))
    return marks


def draw_object(rng: random.Random, split: str, thing: Thing) -> Picture:
    """One object, somewhere inside."""
    size = rng.uniform(*OBJECT_SIZES)
    sketch = Sketch(rng, split, least=(size + 2 * MARGIN, size + 2 * MARGIN))
    pixels = sketch.snap(size * sketch.scale)
    y, x = sketch.place(pixels, pixels)
    return Picture(sketch.image, [stamp(sketch.pen, rng, thing, x, y, pixels)])


def draw_objects(rng: random.Random, split: str, things: list[Thing]) -> Picture:
    """Several objects that do not touch, of about the same size."""
    sketch = Sketch(rng, split, least=(0.7 * TILE, 0.7 * TILE))
    size = rng.uniform(*COUNTED_SIZES) * sketch.scale
    while (boxes := scatter(sketch, len(things), size)) is None:
        size *= 0.9
    marks = [
        stamp(sketch.pen, rng, thing, x, y, pixels)
        for thing, (y, x, pixels) in zip(things, boxes, strict=True)
    ]
    return Picture(sketch.image, marks)


def scatter(sketch: Sketch, count: int, size: float, tries: int = 40) -> list[tuple[int, int, int]] | None:
    """(top, left, side) of `count` squares with a gap between any two, or None if they found no room."""
    gap, boxes = 4 * sketch.scale, []
    if count == 0:
        return boxes
    for _ in range(tries):
        pixels = max(5, sketch.snap(size * sketch.rng.uniform(0.8, 1.2)))
        y, x = sketch.place(pixels, pixels)
        if all(_apart(y, x, pixels, box, gap) for box in boxes):
            boxes.append((y, x, pixels))
        if len(boxes) == count:
            return boxes
    return None


def _apart(y: int, x: int, side: int, box: tuple[int, int, int], gap: float) -> bool:
    top, left, other = box
    return (
        y + side + gap <= top or top + other + gap <= y or x + side + gap <= left or left + other + gap <= x
    )


def stamp(pen: ImageDraw.ImageDraw, rng: random.Random, thing: Thing, x: int, y: int, side: int) -> Mark:
    """Draws `thing` into the square at (x, y)."""
    fill, box = paint(rng, thing.colour), (x, y, x + side - 1, y + side - 1)
    if thing.shape == "circle":
        pen.ellipse(box, fill=fill)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=fill, width=max(2, round(side * rng.uniform(0.16, 0.24))))
    else:
        turn = rng.uniform(-0.2, 0.2) if rng.random() < 0.5 else 0.0
        pen.polygon(outline(thing.shape, x, y, side, turn), fill=fill)
    return Mark(thing.shape, (x, y, x + side, y + side), 0, thing.colour)


def outline(shape: str, x: float, y: float, side: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a polygon turned by `turn` radians, scaled so as to stay in its square."""
    points = CORNERS[shape]
    cos, sin = math.cos(turn), math.sin(turn)
    turned = [(cos * a - sin * b, sin * a + cos * b) for a, b in points]
    reach = max(1.0, max(max(abs(a), abs(b)) for a, b in turned))
    half = (side - 1) / 2
    return [(x + half + half * a / reach, y + half + half * b / reach) for a, b in turned]


def _corners() -> dict[str, list[tuple[float, float]]]:
    """Corners on the square from -1 to 1, y downwards."""
    arm = 0.36
    quarter = [(arm, -1), (arm, -arm), (1, -arm)]
    cross = []
    for _ in range(4):
        cross += quarter
        quarter = [(-b, a) for a, b in quarter]
    star = [
        (math.sin(k * math.pi / 5) * (1, 0.42)[k % 2], -math.cos(k * math.pi / 5) * (1, 0.42)[k % 2])
        for k in range(10)
    ]
    return {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
        "cross": cross,
        "star": star,
    }


CORNERS = _corners()


def random_thing(rng: random.Random, but: Thing | None = None) -> Thing:
    """A shape in a colour; different from `but` in one, the other or both."""
    while True:
        thing = Thing(rng.choice(SHAPES), rng.choice(COLOURS))
        if but is None or thing != but:
            break
    if but is not None and rng.random() < 0.5:  # as similar as possible
        thing = dataclasses.replace(thing, **rng.choice([{"shape": but.shape}, {"colour": but.colour}]))
        return thing if thing != but else random_thing(rng, but)
    return thing


def draw_page(rng: random.Random, families: list[list[str]], side: int = 3 * TILE) -> Picture:
    """A square full of strings and shapes: what the dense first stage learns from, cut into tiles."""
    image = draw_background(rng, side, side)
    pen, marks, y = ImageDraw.Draw(image), [], rng.randrange(0, 10, 2)
    while y < side - 16:
        size, x = rng.randrange(16, 50, 2), rng.randrange(-8, 12, 2)
        while x < side:
            if rng.random() < 0.12:
                pixels = max(10, round(size * rng.uniform(0.6, 1.3)) // 2 * 2)
                marks.append(stamp(pen, rng, random_thing(rng), x, y, pixels))
            else:
                text = random_string(rng.choice(("number", "word", "word", "code")), "train", rng)
                marks += write(pen, rng, text, load_font(rng.choice(rng.choice(families)), size), x, y)
            x = (int(marks[-1].box[2]) + rng.randint(4, 16)) // 2 * 2
        y += round(size * rng.uniform(1.05, 1.4)) // 2 * 2
    return Picture(image, marks)
