"""Pictures to tensors: normalised pixels as the global view and local tiles that the tower reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .ixc_utils import (
    Font,
    composite_frames,
    get_font,
    num_image_tokens,
    num_square_tokens,
    plan_tiles,
    plan_video,
    square_picture,
    tile_picture,
    to_rgb,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

SQUARE = "square"


@dataclass(frozen=True)
class PreparedImage:
    """One picture as the model takes it."""

    pixel_values: (
        Tensor  # (tiles, 3, side, side) float32: global view, then local tiles row by row; or a square
    )
    grid: tuple[int, int]  # (rows, cols) of the local tiles; (1, 1) for a square

    def num_tokens(self, tokens_per_side: int) -> int:
        """How many image tokens the picture takes, at `tokens_per_side` tokens along each tile."""
        if len(self.pixel_values) == 1:
            return num_square_tokens(tokens_per_side)
        return num_image_tokens(*self.grid, tokens_per_side)


class VisProcessor:
    """PIL picture -> (3, height, width) float32, resized to a square first where the layout is square."""

    def __init__(self, square_side: int | None = None):
        self.square_side = square_side

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, height, width), or (3, square_side, square_side)."""
        return normalize_image(square_picture(image, self.square_side) if self.square_side else image)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(square_side={self.square_side})"


def normalize_image(image: Image.Image) -> Tensor:
    """PIL picture -> (3, height, width) float32 with the mean and deviation of CLIP taken out."""
    pixels = torch.from_numpy(np.array(to_rgb(image)))
    pixels = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return pixels.sub_(mean).div_(std)


def global_view(pixels: Tensor, tile_size: int) -> Tensor:
    """(colours, height, width) -> (1, colours, tile_size, tile_size) float32: all of it, aspect squashed."""
    return F.interpolate(pixels[None].float(), size=(tile_size, tile_size), mode="bicubic", antialias=False)


def local_tiles(pixels: Tensor, tile_size: int) -> Tensor:
    """(3, rows * tile_size, cols * tile_size) -> (rows * cols, 3, tile_size, tile_size), row by row."""
    height, width = pixels.shape[-2:]
    if height % tile_size or width % tile_size:
        raise ValueError(f"{height}x{width} px are not whole tiles of {tile_size} px; pad the picture first")
    return rearrange(pixels, "c (rows h) (cols w) -> (rows cols) c h w", h=tile_size, w=tile_size)


def split_tiles(pixels: Tensor, tile_size: int) -> Tensor:
    """(3, rows * tile_size, cols * tile_size) -> (1 + rows * cols, 3, tile_size, tile_size), global first."""
    tiles = local_tiles(pixels, tile_size)
    return torch.cat([global_view(pixels, tile_size).to(pixels.dtype), tiles])


def tile_pixels(image: Image.Image, tile_size: int) -> Tensor:
    """PIL picture of whole tiles -> (1 + rows * cols, 3, tile_size, tile_size) float32, normalised.

    The same as `split_tiles(normalize_image(image))` bit by bit, but one colour after the other and each
    right into its place, so that only one plane is ever held besides the result.
    """
    pixels = torch.from_numpy(np.array(to_rgb(image)))  # (height, width, 3) uint8
    rows, cols = (side // tile_size for side in pixels.shape[:2])
    tiles = torch.empty(1 + rows * cols, 3, tile_size, tile_size)
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    for channel in range(3):
        plane = pixels[..., channel].to(torch.float32, memory_format=torch.contiguous_format)
        plane = plane.div_(255).sub_(mean[channel]).div_(std[channel])[None]
        tiles[:1, channel] = global_view(plane, tile_size)[:, 0]
        local = tiles[1:, channel].unflatten(0, (rows, cols))  # (rows, cols, tile_size, tile_size)
        local.copy_(rearrange(plane[0], "(rows h) (cols w) -> rows cols h w", h=tile_size, w=tile_size))
    return tiles


def preprocess_image(
    image: Image.Image, *, layout: str, tile_size: int, hd_num: int | None = None
) -> PreparedImage:
    """Prepare a picture as a square (layout "square") or as tiles (a name in `TILE_RULES`, and `hd_num`)."""
    if layout == SQUARE:
        return PreparedImage(VisProcessor(tile_size)(image)[None], grid=(1, 1))
    image = to_rgb(image)
    plan = plan_tiles(image.height, image.width, tile_size=tile_size, hd_num=hd_num, layout=layout)
    return PreparedImage(tile_pixels(tile_picture(image, plan), tile_size), plan.grid)


def preprocess_video(
    frames: Sequence[Image.Image], *, tile_size: int, font: Font | None = None
) -> PreparedImage:
    """Prepare the frames of a video as one labelled picture."""
    composite = composite_frames(frames, font or get_font(), tile_size=tile_size)
    plan = plan_video(composite.height, composite.width, tile_size=tile_size)
    return PreparedImage(tile_pixels(tile_picture(composite, plan), tile_size), plan.grid)


def batch_images(images: Sequence[PreparedImage]) -> tuple[Tensor, Tensor]:
    """n pictures -> `pixel_values` (sum of tiles, 3, side, side) float32 and `image_grid_hw` (n, 2) int64."""
    if not images:
        raise ValueError("batch_images needs at least one picture")
    sides = {image.pixel_values.shape[-1] for image in images}
    if len(sides) > 1:
        raise ValueError(f"pictures of different tile sizes don't mix: {sorted(sides)} px")
    pixels = [image.pixel_values for image in images]
    pixels = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
    return pixels, torch.tensor([image.grid for image in images])
