"""The dense task: what is under each of 16 x 16 points of a tile, read from the tower's patch features.

One word per picture is far too little signal to learn glyphs at any place and size; tiles full of text,
with an answer at every point, teach the tower to see. The head is thrown away afterwards.
"""

import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from .pictures import TILE, Picture, draw_page
from .questions import COLOURS, SHAPES

POINTS = 16  # along each side of a tile; patches are 2 x 2 points
PATCH_POINTS = 2
NAMES = ("", *"0123456789", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *SHAPES)
NUM_PLACES = 8
FIELDS = (len(NAMES), NUM_PLACES, len(COLOURS))  # what, which character of its string, in which colour
BACKGROUND_WEIGHT = 0.2
UNKNOWN = -100


def grid_labels(marks: np.ndarray, left: float, top: float) -> np.ndarray:
    """(marks, 7) -> (3, 16, 16) labels of the tile whose corner is at (left, top)."""
    grid = np.full((3, POINTS, POINTS), UNKNOWN, np.int64)
    grid[0] = 0
    spacing = TILE / POINTS
    starts = np.ceil((marks[:, :2] - (left, top)) / spacing - 0.5).clip(0, POINTS).astype(int)
    ends = np.ceil((marks[:, 2:4] - (left, top)) / spacing - 0.5).clip(0, POINTS).astype(int)
    seen = (starts < ends).all(axis=1)
    fields = marks[seen, 4:].astype(np.int64)
    for (x0, y0), (x1, y1), values in zip(starts[seen], ends[seen], fields, strict=True):
        grid[:, y0:y1, x0:x1] = values[:, None, None]
    return grid


def mark_table(picture: Picture, scale: float) -> np.ndarray:
    """(marks, 7): box in scaled pixels, name, place, colour."""
    rows = [
        (
            *(edge * scale for edge in mark.box),
            NAMES.index(mark.name),
            UNKNOWN if mark.name in SHAPES or mark.index >= NUM_PLACES else mark.index,
            COLOURS.index(mark.colour) if mark.colour else UNKNOWN,
        )
        for mark in picture.marks
    ]
    return np.array(rows, np.float64).reshape(-1, 7)


class Pages:
    """A pool of pages, each cut many times before a fresh one takes its place."""

    def __init__(self, rng: random.Random, families: list[list[str]], size: int = 40, first: int = 10):
        """A pool of at most `size` pages, `first` of them drawn right away."""
        self.rng, self.families, self.size, self.pool = rng, families, size, []
        for _ in range(first):
            self.renew()

    def renew(self) -> None:
        """Draws one more page, at a random scale, and drops the oldest once the pool is full."""
        page = draw_page(self.rng, self.families)
        scale = self.rng.choice((1.0, self.rng.uniform(0.75, 1.5)))
        side = round(page.image.width * scale)
        image = page.image.resize((side, side), Image.Resampling.BILINEAR)
        self.pool = [*self.pool, (np.asarray(image), mark_table(page, scale))][-self.size :]

    def draw(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(count, 112, 112, 3) tiles and (count, 3, 16, 16) labels."""
        tiles, labels = zip(*(self.cut() for _ in range(count)), strict=True)
        return np.stack(tiles), np.stack(labels)

    def cut(self) -> tuple[np.ndarray, np.ndarray]:
        """One (112, 112, 3) tile and its (3, 16, 16) labels."""
        image, marks = self.rng.choice(self.pool)
        top, left = (self.rng.randrange(0, image.shape[0] - TILE + 1, 2) for _ in range(2))
        return image[top : top + TILE, left : left + TILE], grid_labels(marks, left, top)


class DenseHead(nn.Module):
    """Linear classifiers for the four points of each patch."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, PATCH_POINTS**2 * sum(FIELDS))

    def forward(self, features: Tensor) -> Tensor:
        """(tiles, 64, width) -> (tiles, 16, 16, classes)"""
        side = POINTS // PATCH_POINTS
        logits = self.linear(features).float()
        logits = logits.view(-1, side, side, PATCH_POINTS, PATCH_POINTS, sum(FIELDS))
        return logits.transpose(2, 3).reshape(-1, POINTS, POINTS, sum(FIELDS))


def dense_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """(tiles, 16, 16, classes), (tiles, 3, 16, 16) -> a scalar."""
    what, place, colour = logits.split(FIELDS, dim=-1)
    weights = torch.ones(FIELDS[0], device=logits.device)
    weights[0] = BACKGROUND_WEIGHT
    loss = functional.cross_entropy(what.flatten(0, 2), labels[:, 0].flatten(), weights)
    for field, target in ((place, labels[:, 1]), (colour, labels[:, 2])):
        loss = loss + 0.3 * functional.cross_entropy(field.flatten(0, 2), target.flatten())
    return loss


def glyph_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the points on characters and shapes that are named right."""
    guesses, names = logits[..., : FIELDS[0]].argmax(-1), labels[:, 0]
    return (guesses == names)[names > 0].float().mean().item()
