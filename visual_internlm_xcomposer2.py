"""Pictures and videos as callers pass them -> what the tower reads. Planned first, so counts are cheap."""

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from .image_processing_internlm_xcomposer2 import (
    PreparedImage,
    batch_images,
    preprocess_image,
    preprocess_video,
    split_tiles,
)
from .ixc_utils import (
    Font,
    Size,
    num_image_tokens,
    num_square_tokens,
    plan_composite,
    plan_tiles,
    plan_video,
)
from .media_internlm_xcomposer2 import is_video, load_image, load_video

# How each version cuts its pictures: names of `ixc_utils.TILE_RULES`, or the one square.
LAYOUTS = {"2": "square", "2-4khd": "always", "2.5": "bottom"}

# With several pictures in one 2.5 prompt the published code allows each only so many tiles.
MAX_TILES_OF_SEVERAL = 6


# Pillow and torch let go of Python while they work, so that pictures can be read and cut at the same time.
MAX_PICTURES_AT_ONCE = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Visual:
    """One picture (`image`), the frames of one video (`frames`), or pixels already normalised (`pixels`)."""

    image: Image.Image | None = None
    frames: tuple[Image.Image, ...] = ()
    pixels: Tensor | None = None  # (3, height, width)

    def grid(self, config, hd_num: int) -> tuple[int, int]:
        """(rows, cols) of local tiles, from sizes alone."""
        if self.pixels is not None:
            height, width = self.pixels.shape[-2:]
            return height // config.img_size, width // config.img_size
        if self.frames:
            return grid_of_frames(config, [(frame.height, frame.width) for frame in self.frames])
        return grid_of_image(config, self.image.height, self.image.width, hd_num)

    def identity(self, config, hd_num: int, font: Font | None) -> Hashable:
        """Equal for pictures that `prepare` makes the same of, and practically never for others."""
        digest = hashlib.blake2b(digest_size=16)
        if self.pixels is not None:
            pixels = self.pixels.detach().float().cpu().contiguous()
            digest.update(pixels.numpy())
            return "pixels", tuple(pixels.shape), digest.digest()
        for image in self.frames or (self.image,):
            digest.update(f"{image.mode} {image.size}".encode())
            digest.update(image.tobytes())
        labels = (*font.getname(), getattr(font, "size", None)) if self.frames and font else ()
        return "frames" if self.frames else "image", self.grid(config, hd_num), labels, digest.digest()

    def prepare(self, config, hd_num: int, font: Font | None) -> PreparedImage:
        """Cut and normalise."""
        side = config.img_size
        if self.pixels is not None:
            pixels = self.pixels.float().cpu()
            tiles = split_tiles(pixels, side) if config.is_tiled else pixels[None]
            return PreparedImage(tiles, self.grid(config, hd_num))
        if self.frames:
            return preprocess_video(self.frames, tile_size=side, font=font)
        return preprocess_image(self.image, layout=LAYOUTS[config.version], tile_size=side, hd_num=hd_num)


def grid_of_image(config, height: int, width: int, hd_num: int) -> tuple[int, int]:
    """(rows, cols) of local tiles that a picture of this size in pixels is cut into."""
    if not config.is_tiled:
        return 1, 1
    layout = LAYOUTS[config.version]
    return plan_tiles(height, width, tile_size=config.img_size, hd_num=hd_num, layout=layout).grid


def grid_of_frames(config, sizes: list[Size]) -> tuple[int, int]:
    """(rows, cols) of local tiles of a video whose frames have these (height, width)."""
    composite = plan_composite(sizes, tile_size=config.img_size)
    return plan_video(*composite.size, tile_size=config.img_size).grid


def default_hd_num(config, num_visuals: int) -> int:
    """How many tiles each picture of a prompt may be cut into where the caller names no number."""
    if config.version == "2.5" and num_visuals > 1:
        return min(MAX_TILES_OF_SEVERAL, config.hd_num)
    return config.hd_num


def num_tokens_of_grid(config, rows: int, cols: int) -> int:
    """Tokens of one picture whose local tiles form `rows` x `cols` (1 x 1 for a square)."""
    side = config.tile_tokens_per_side
    return num_image_tokens(rows, cols, side) if config.is_tiled else num_square_tokens(side)


def as_visuals(media, config) -> list[Visual]:
    """What a caller passed as `image`, loaded and checked.

    Args:
        media: one picture or video or a list of them; in a list, a list of frames is a video. A 4-D float
            tensor is a stack of pictures that `vis_processor` has normalised.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `load_image` and `load_video`; or a video for a version
            that reads none; or normalised pixels of a size the tower can't read.
    """
    if not isinstance(media, list | tuple):
        media = [media]
    # Open files and pictures that Pillow has not read yet must not be read by two at a time.
    are_apart = all(isinstance(item, str | os.PathLike | bytes) for item in media)
    run = _in_threads if are_apart else map
    return list(chain.from_iterable(run(lambda item: _as_visuals(item, config), media)))


def _as_visuals(item, config) -> list[Visual]:
    if isinstance(item, torch.Tensor) and item.ndim == 4:
        return [Visual(pixels=check_pixels(pixels, config)) for pixels in item]
    if isinstance(item, list | tuple) or is_video(item):
        return [video_visual(item, config)]
    return [Visual(image=load_image(item))]


def video_visual(source, config, **sampling) -> Visual:
    """A video by any source of `load_video`, sampled by its `fps` and `max_frames`.

    Raises:
        ValueError: the version reads no videos, and as `load_video`.
    """
    if config.version != "2.5":
        raise ValueError(f"version {config.version} reads no videos; pass its frames as pictures, or use 2.5")
    return Visual(frames=tuple(load_video(source, **sampling)))


def load_media(media: Iterable, config, **sampling) -> list[Visual]:
    """Media that say whether they are videos (`is_video`) and where they are (`source`), loaded.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `load_image` and `video_visual`.
    """
    return [
        video_visual(medium.source, config, **sampling)
        if medium.is_video
        else Visual(image=load_image(medium.source))
        for medium in media
    ]


def check_pixels(pixels: Tensor, config) -> Tensor:
    """(3, height, width) normalised pixels, if the tower can read them.

    Raises:
        ValueError: the size is not the square's, or no multiple of the tile's.
    """
    side = config.img_size
    height, width = pixels.shape[-2:]
    whole = (height % side == 0 and width % side == 0) if config.is_tiled else (height, width) == (side, side)
    if pixels.shape[0] != 3 or not whole or not pixels.is_floating_point():
        wanted = f"multiples of {side}" if config.is_tiled else f"{side} x {side}"
        raise ValueError(
            f"normalised pixels must be floats of (3, height, width) with {wanted} px, not "
            f"{tuple(pixels.shape)} of {pixels.dtype}; pass a picture to have it resized"
        )
    return pixels


def prepare_visuals(
    visuals: Sequence[Visual], config, hd_num: int | Sequence[int], *, font: Font | None = None
) -> tuple[Tensor, Tensor]:
    """`pixel_values` (tiles, 3, side, side), `image_grid_hw` (visuals, 2); one `hd_num`, or each its own."""
    budgets = [hd_num] * len(visuals) if isinstance(hd_num, int) else hd_num
    pairs = zip(visuals, budgets, strict=True)
    return batch_images(_in_threads(lambda pair: pair[0].prepare(config, pair[1], font), pairs))


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results in order, several at a time, but no more than torch may use threads.

    Raises whatever the first item in order raises that fails; later ones that have not begun never do.
    """
    items = list(items)
    num_threads = min(len(items), torch.get_num_threads(), MAX_PICTURES_AT_ONCE)
    if num_threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def check_grids(config, pixel_values: Tensor, image_grid_hw: Tensor | None) -> list[tuple[int, int]]:
    """The grids as pairs of ints, after checking that they account for every tile.

    Raises:
        ValueError: with both numbers.
    """
    side = config.img_size
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, side, side):
        raise ValueError(
            f"pixel_values have the shape {tuple(pixel_values.shape)}; this checkpoint reads "
            f"(tiles, 3, {side}, {side})"
        )
    if not config.is_tiled:
        if image_grid_hw is not None and len(image_grid_hw) != len(pixel_values):
            raise ValueError(
                f"image_grid_hw names {len(image_grid_hw)} pictures but there are {len(pixel_values)}"
            )
        return [(1, 1)] * len(pixel_values)
    if image_grid_hw is None:
        raise ValueError("image_grid_hw is needed: rows and columns of the tiles of each picture")
    table = torch.as_tensor(image_grid_hw)
    if table.ndim != 2 or table.shape[1] != 2:
        raise ValueError(f"image_grid_hw has the shape {tuple(table.shape)}; it needs (pictures, 2)")
    grids = [(int(rows), int(cols)) for rows, cols in table.tolist()]
    num_tiles = sum(1 + rows * cols for rows, cols in grids)
    if any(rows < 1 or cols < 1 for rows, cols in grids) or num_tiles != len(pixel_values):
        raise ValueError(
            f"image_grid_hw {grids} stands for {num_tiles} tiles with the global views, but pixel_values "
            f"hold {len(pixel_values)}"
        )
    return grids
