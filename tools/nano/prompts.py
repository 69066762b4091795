"""Samples as the model gets them: tiles, grids and ids."""

import dataclasses
import itertools

import numpy as np
import torch
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import CLIP_MEAN, CLIP_STD, global_view
from internlm_xcomposer2.ixc_utils import (
    BAND,
    TilePlan,
    composite_frames,
    get_font,
    num_image_tokens,
    plan_composite,
    plan_tiles,
    plan_video,
    tile_picture,
)
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from .dense import UNKNOWN, grid_labels, mark_table
from .pictures import TILE, Picture
from .questions import COLOURS, SHAPES
from .samples import IMAGE_MARK, Sample, num_pictures, segments
from .scenes import moved

LAYOUT = "bottom"
TOKENS_ALONG_TILE = 4
MEAN = torch.tensor(CLIP_MEAN).view(3, 1, 1) * 255
DEVIATION = torch.tensor(CLIP_STD).view(3, 1, 1) * 255


@dataclasses.dataclass
class Tiles:
    """A picture as the tower sees it."""

    pixels: Tensor  # (tiles, 3, 112, 112) normalised; the global view first if there are several tiles
    labels: np.ndarray  # (tiles, 3, 16, 16) of the local tiles
    grid: tuple[int, int]
    strings: list[tuple[str, np.ndarray]]  # what is printed, and (characters, 4) boxes in pixels of the tiles

    @property
    def num_tokens(self) -> int:
        return num_image_tokens(*self.grid, TOKENS_ALONG_TILE)


@dataclasses.dataclass
class Prompt:
    """A sample as ids: `answers` holds, for each turn, the positions whose next id must be guessed."""

    ids: list[int]
    answers: list[range]
    num_pictures: int
    grids: list[tuple[int, int]]  # of tiles; by picture
    things: list[tuple[int, int]]  # colour, shape; by picture
    counts: list[int]  # of objects; by picture
    reads: list[tuple[int, list[int]]]  # where a character is to be said, and the positions that show it
    choice: tuple[int, int] | None = None  # where the number of a picture is to be said; which, from 0
    asked: int = UNKNOWN  # which of several pictures is the right one, from 0, if the question comes first


def normalise(tiles: np.ndarray | Tensor) -> Tensor:
    """uint8 (tiles, 112, 112, 3) array -> normalised (tiles, 3, 112, 112)"""
    return (torch.as_tensor(tiles).permute(0, 3, 1, 2).float() - MEAN) / DEVIATION


def cut(picture: Picture, hd_num: int = 1) -> Tiles:
    """A picture cut as in `chat`."""
    width, height = picture.image.size
    return _cut_by(picture, plan_tiles(height, width, tile_size=TILE, hd_num=hd_num, layout=LAYOUT))


def cut_video(frames: list[Picture]) -> Tiles:
    """Frames arranged on one picture and cut as in `chat`."""
    image = composite_frames([frame.image for frame in frames], get_font(), tile_size=TILE)
    sizes = [frame.image.size[::-1] for frame in frames]
    plan, marks = plan_composite(sizes, tile_size=TILE), []
    for frame, size, (top, left) in zip(frames, plan.frame_sizes, plan.positions, strict=True):
        scale = size[1] / frame.image.width
        marks += [moved(mark, scale, top + BAND, left) for mark in frame.marks]
    return _cut_by(Picture(image, marks), plan_video(image.height, image.width, tile_size=TILE))


def _cut_by(picture: Picture, plan: TilePlan) -> Tiles:
    canvas = np.array(tile_picture(picture.image, plan))
    rows, cols = plan.grid
    marks = mark_table(picture, plan.resized[1] / picture.image.width)
    local = canvas.reshape(rows, TILE, cols, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
    corners = [(col * TILE, row * TILE) for row in range(rows) for col in range(cols)]
    labels = np.stack([grid_labels(marks, *corner) for corner in corners])
    pixels = normalise(local)
    if len(local) > 1:
        pixels = torch.cat([global_view(normalise(canvas[None])[0], TILE), pixels])
    return Tiles(pixels, labels, plan.grid, strings_of(picture, marks))


def strings_of(picture: Picture, table: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The strings on a picture, in the order of writing, with the boxes of their characters."""
    starts = [at for at, mark in enumerate(picture.marks) if mark.index == 0] + [len(picture.marks)]
    return [
        ("".join(mark.name for mark in picture.marks[start:end]), table[start:end, :4])
        for start, end in itertools.pairwise(starts)
        if picture.marks[start].name not in SHAPES
    ]


def tiles_of(sample: Sample) -> list[Tiles]:
    """All pictures of a sample; a video is one."""
    return (
        [cut_video(sample.frames)]
        if sample.frames
        else [cut(each, sample.hd_num) for each in sample.pictures]
    )


def make_prompt(sample: Sample, tiles: list[Tiles], pieces: SentencePieceProcessor, image_id: int) -> Prompt:
    """The ids of a sample; without a picture it begins with BOS twice, as in `chat`."""
    ids, answers, pictures = [pieces.bos_id()] * (1 if tiles else 2), [], iter(tiles)
    for text, is_answer in segments(sample):
        if text is None:
            ids += [image_id] * next(pictures).num_tokens
            continue
        piece = pieces.encode(text)
        if is_answer:
            answers.append(range(len(ids) - 1, len(ids) - 1 + len(piece)))
        ids += piece
    things = [only_thing(picture) for picture in sample.pictures]
    counts = [sum(mark.name in SHAPES for mark in picture.marks) for picture in sample.pictures]
    choice, asked = None, UNKNOWN
    if sample.ability == "which":
        question, answer = sample.turns[0]
        choice = (answers[0].stop - 2, int(answer[-1]) - 1)  # after the digit only the turn's end is said
        asked = choice[1] if question.index("?") < question.index(IMAGE_MARK) else UNKNOWN
    grids = [each.grid for each in tiles]
    reads = []
    if not tiles:
        reads = [read for span in answers for read in copies(ids, span, pieces)]
    elif len(tiles) == 1:
        reads = reads_of(sample, tiles, ids, answers, pieces, image_id)
    return Prompt(ids, answers, num_pictures(sample), grids, things, counts, reads, choice, asked)


def reads_of(
    sample: Sample,
    tiles: list[Tiles],
    ids: list[int],
    answers: list[range],
    pieces: SentencePieceProcessor,
    image_id: int,
) -> list[tuple[int, list[int]]]:
    """Where the only picture must be read, and what must be looked at then.

    If a string is printed twice, it is the last one."""
    reads, grid = [], tiles[0].grid
    first = ids.index(image_id) + tiles[0].num_tokens - local_tokens(grid)
    printed = dict(tiles[0].strings)
    for (_, answer), span in zip(sample.turns, answers, strict=True):
        text = answer.split('"')[1] if '"' in answer else answer
        said = [pieces.id_to_piece(ids[at + 1]).removeprefix("\u2581") for at in span]
        start = next((at for at in range(len(said)) if said[at : at + len(text)] == list(text)), None)
        if text in printed and start is not None:
            for at, box in enumerate(printed[text]):
                reads.append((span[start + at], [first + token for token in tokens_under(box, grid)]))
    return reads


def copies(ids: list[int], span: range, pieces: SentencePieceProcessor) -> list[tuple[int, list[int]]]:
    """Where an answer repeats a colour, or two or more pieces, of what precedes it, and what it repeats."""
    texts = [pieces.id_to_piece(token).removeprefix("\u2581") for token in ids]
    said, before = texts[span.start + 1 : span.stop], texts[: span.start + 1]
    found: dict[int, tuple[int, int]] = {}  # position in the answer -> length of the run, position before
    runs = [0] * (len(before) + 1)
    for at, text in enumerate(said):
        runs = [0] + [runs[to] + 1 if before[to] == text else 0 for to in range(len(before))]
        for to, length in enumerate(runs[1:]):
            for back in range(length if length > 1 or text in COLOURS else 0):
                if length > found.get(at - back, (0, 0))[0]:
                    found[at - back] = (length, to - back)
    return [(span.start + at, [place]) for at, (_, place) in sorted(found.items())]


def local_tokens(grid: tuple[int, int]) -> int:
    """How many tokens, newlines included, the local tiles of a picture have."""
    rows, cols = grid
    return rows * TOKENS_ALONG_TILE * (cols * TOKENS_ALONG_TILE + 1)


def tokens_under(box: np.ndarray, grid: tuple[int, int]) -> list[int]:
    """The local tokens, from 0, under the middle half of a box (left, top, right, bottom) of tile pixels."""
    side = TILE / TOKENS_ALONG_TILE
    quarter = (box[2:] - box[:2]) / 4
    limits = np.array([grid[1], grid[0]]) * TOKENS_ALONG_TILE - 1
    (left, top), (right, bottom) = (
        np.clip(corner // side, 0, limits).astype(int) for corner in (box[:2] + quarter, box[2:] - quarter)
    )
    along = grid[1] * TOKENS_ALONG_TILE + 1
    return [row * along + column for row in range(top, bottom + 1) for column in range(left, right + 1)]


def only_thing(picture: Picture) -> tuple[int, int]:
    """Colour and shape of a picture's objects as indices, or unknown if there is no single answer."""
    marks = {(mark.colour, mark.name) for mark in picture.marks if mark.name in SHAPES}
    if len(marks) != 1:
        return UNKNOWN, UNKNOWN
    colour, shape = marks.pop()
    return COLOURS.index(colour), SHAPES.index(shape)
