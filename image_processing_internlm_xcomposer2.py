"""From a picture to what the tower reads: tiles or a square, their grid, and how many tokens they become.

Planned first, in integers, so that counts are cheap and can't disagree with the pixels. At the end of this
file is the image processor, the same with the interface of transformers.
"""

import hashlib
import math
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from .access_internlm_xcomposer2 import MediaAccess
from .bounds_internlm_xcomposer2 import Allowance
from .checkpoint_internlm_xcomposer2 import (
    check_small_files,
    checkpoint_config,
    has_file,
    hub_arguments_in,
)
from .configuration_internlm_xcomposer2 import IMAGE_PROCESSOR_AUTO_MAP, VERSIONS
from .files_internlm_xcomposer2 import PROCESSOR_KINDS, blaming, check_fields
from .inputs_internlm_xcomposer2 import check_floats, check_integers
from .ixc_utils import (
    Font,
    check_hd_num,
    composite_frames,
    frame_size,
    get_font,
    num_image_tokens,
    plan_composite,
    plan_tiles,
    plan_video,
    resize_picture,
    shrink_frame,
    square_picture,
    tile_picture,
)
from .media_internlm_xcomposer2 import (
    MAX_FRAMES,
    Medium,
    Size,
    flatten_images,
    flatten_videos,
    is_video,
    load_image,
    load_video,
    plan_frames,
    to_rgb,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

SQUARE = "square"

# Pillow and torch release the GIL while they work, so pictures can be read and cut at the same time.
MAX_PICTURES_AT_ONCE = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


# ---- pixels ----


@dataclass(frozen=True)
class PreparedImage:
    """One picture as the model reads it."""

    pixel_values: (
        Tensor  # (tiles, 3, side, side) float32: global view, then local tiles row by row; or a square
    )
    grid: tuple[int, int]  # (rows, cols) of the local tiles; (1, 1) for a square


class VisProcessor:
    """PIL picture -> (3, height, width) float32, resized to a square first if the layout is square."""

    def __init__(self, square_side: int | None = None):
        self.square_side = square_side

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, height, width), or (3, square_side, square_side)."""
        return normalize_image(square_picture(image, self.square_side) if self.square_side else image)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(square_side={self.square_side})"


def normalize_image(image: Image.Image) -> Tensor:
    """PIL picture -> (3, height, width) float32, normalised by the mean and deviation of CLIP."""
    pixels = torch.from_numpy(np.array(to_rgb(image)))
    pixels = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return pixels.sub_(mean).div_(std)


def global_view(pixels: Tensor, tile_size: int) -> Tensor:
    """(colours, height, width) -> (1, colours, tile_size, tile_size) float32: all of it, squashed."""
    return F.interpolate(pixels[None].float(), size=(tile_size, tile_size), mode="bicubic", antialias=False)


def local_tiles(pixels: Tensor, tile_size: int) -> Tensor:
    """(3, rows * tile_size, cols * tile_size) -> (rows * cols, 3, tile_size, tile_size), row by row."""
    height, width = pixels.shape[-2:]
    if height % tile_size or width % tile_size:
        raise ValueError(f"{height}x{width} px is not whole tiles of {tile_size} px; pad the picture first")
    return rearrange(pixels, "c (rows h) (cols w) -> (rows cols) c h w", h=tile_size, w=tile_size)


def split_tiles(pixels: Tensor, tile_size: int) -> Tensor:
    """(3, rows * tile_size, cols * tile_size) -> (1 + rows * cols, 3, tile_size, tile_size), global first."""
    tiles = local_tiles(pixels, tile_size)
    return torch.cat([global_view(pixels, tile_size).to(pixels.dtype), tiles])


def tile_pixels(image: Image.Image, tile_size: int) -> Tensor:
    """PIL picture of whole tiles -> (1 + rows * cols, 3, tile_size, tile_size) float32, normalised.

    Bit for bit the same as `split_tiles(normalize_image(image))`, but one colour at a time and each straight
    into its place, so that only one plane is ever held besides the result.
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
    image: Image.Image, *, layout: str, tile_size: int, hd_num: int | None = None, size: Size | None = None
) -> PreparedImage:
    """Prepare a picture as a square (layout "square") or as tiles (a name in `TILE_RULES`, and `hd_num`).

    `size` is that of a picture before it was resized, by which it is planned.
    """
    if layout == SQUARE:
        return PreparedImage(VisProcessor(tile_size)(image)[None], grid=(1, 1))
    image = to_rgb(image)
    height, width = size or image.size[::-1]
    plan = plan_tiles(height, width, tile_size=tile_size, hd_num=hd_num, layout=layout)
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


# ---- pictures and videos as callers pass them ----


@dataclass
class PictureMemo:
    """What the tower made of a picture, kept for other prompts with it.

    Attributes:
        features: (tokens, hidden), once they are known.
        origin: what they depend on besides the picture.
    """

    features: Tensor | None = None
    origin: Hashable = None


@dataclass(frozen=True)
class Visual:
    """One picture (`image`), the frames of one video (`frames`), pixels already normalised (`pixels`), or
    rows already encoded (`embeds`), which have no grid and aren't prepared.

    A picture is cut by the rule of the version, or by another of `TILE_RULES` (`layout`). With a `memo`, it
    is encoded only once for several prompts. One that is resized already keeps the `size` that it had.
    """

    image: Image.Image | None = None
    frames: tuple[Image.Image, ...] = ()
    pixels: Tensor | None = None  # (3, height, width)
    layout: str | None = None
    embeds: Tensor | None = None  # (tokens, hidden)
    memo: PictureMemo | None = field(default=None, compare=False)
    size: Size | None = None

    def grid(self, config, hd_num: int) -> tuple[int, int]:
        """(rows, cols) of local tiles, from sizes alone."""
        if self.pixels is not None:
            height, width = self.pixels.shape[-2:]
            return height // config.img_size, width // config.img_size
        if self.frames:
            return grid_of_frames(config, [frame_size(frame) for frame in self.frames])
        return grid_of_image(config, *(self.size or self.image.size[::-1]), hd_num, self.layout)

    def resized(self, config, hd_num: int) -> "Visual":
        """A picture as `prepare` resizes it for this budget, and no other, if that is smaller."""
        height, width = self.size or self.image.size[::-1]
        layout = self.layout or VERSIONS[config.version].layout
        if layout == SQUARE:
            small = square_picture(self.image, config.img_size)
        else:
            plan = plan_tiles(height, width, tile_size=config.img_size, hd_num=hd_num, layout=layout)
            is_smaller = math.prod(plan.resized) < height * width
            small = resize_picture(self.image, plan) if is_smaller else self.image
        if small.width * small.height >= height * width:
            return self
        return replace(self, image=small, size=(height, width))

    def identity(self, config, hd_num: int, font: Font | None) -> Hashable:
        """Equal for pictures that `prepare` turns into the same, and practically never for others."""
        digest = hashlib.blake2b(digest_size=16)
        for kind, tensor in (("pixels", self.pixels), ("embeds", self.embeds)):
            if tensor is not None:
                values = tensor.detach().float().cpu().contiguous()
                digest.update(values.numpy())
                return kind, tuple(values.shape), digest.digest()
        for image in self.frames or (self.image,):
            digest.update(f"{image.mode} {image.size}".encode())
            digest.update(image.tobytes())
        labels = (*font.getname(), getattr(font, "size", None)) if self.frames and font else ()
        kind = "frames" if self.frames else "image"
        return kind, self.layout, self.grid(config, hd_num), labels, digest.digest()

    def prepare(self, config, hd_num: int, font: Font | None) -> PreparedImage:
        """Cut and normalise."""
        side = config.img_size
        if self.pixels is not None:
            pixels = self.pixels.float().cpu()
            tiles = split_tiles(pixels, side) if config.is_tiled else pixels[None]
            return PreparedImage(tiles, self.grid(config, hd_num))
        if self.frames:
            return preprocess_video(self.frames, tile_size=side, font=font)
        layout = self.layout or VERSIONS[config.version].layout
        return preprocess_image(self.image, layout=layout, tile_size=side, hd_num=hd_num, size=self.size)


def grid_of_image(config, height: int, width: int, hd_num: int, layout: str | None = None) -> tuple[int, int]:
    """(rows, cols) of local tiles that a picture of this size in pixels is cut into."""
    if not config.is_tiled:
        return 1, 1
    layout = layout or VERSIONS[config.version].layout
    return plan_tiles(height, width, tile_size=config.img_size, hd_num=hd_num, layout=layout).grid


def grid_of_frames(config, sizes: list[Size]) -> tuple[int, int]:
    """(rows, cols) of local tiles of a video whose frames have these (height, width)."""
    composite = plan_composite(sizes, tile_size=config.img_size)
    return plan_video(*composite.size, tile_size=config.img_size).grid


def default_hd_num(config, num_visuals: int) -> int:
    """How many tiles each picture of a prompt may be cut into if the caller gives no number."""
    of_several = VERSIONS[config.version].hd_num_of_several
    return config.hd_num if of_several is None or num_visuals < 2 else min(of_several, config.hd_num)


def count_tokens(config, visuals: Sequence[Visual], hd_num: int) -> list[int]:
    """How many image tokens each picture or video takes, from the plan that `prepare` follows."""
    return [
        tokens_of_grid(config, visual.grid(config, hd_num)) if visual.embeds is None else len(visual.embeds)
        for visual in visuals
    ]


def tokens_of_grid(config, grid: tuple[int, int]) -> int:
    """How many image tokens a picture takes if its local tiles form this grid (1 x 1 for a square)."""
    if (resampled := getattr(config, "tokens_per_square", None)) is not None:
        return resampled
    return num_image_tokens(*grid, config.tile_tokens_per_side, is_tiled=config.is_tiled)


def as_visuals(
    media, config, *, fps: float = 1.0, num_frames: int = MAX_FRAMES, hd_num: int | None = None
) -> list[Visual]:
    """What a caller passed as `image`, loaded and checked.

    Args:
        media: one picture or video or a list of them; in a list, a list of frames is a video. A 4-D float
            tensor is a stack of pictures normalised by `vis_processor`. What is loaded stays as it is.
        fps, num_frames: frames per second of a video, and the most frames to take.
        hd_num: the budget for which pictures will be cut; they are then kept as small as that needs.

    Raises:
        FileNotFoundError, TypeError, ValueError: as in `load_image` and `load_video`; or a video for a
            version that doesn't read any; or normalised pixels of a size that the tower can't read; or more
            pixels in all than one prompt may have.
    """
    sampling = {"fps": fps, "max_frames": num_frames}
    plan_frames(1, 1.0, **sampling)  # raises what is wrong with them, even if there is no video
    if not isinstance(media, list | tuple):
        media = [media]
    # Open files and pictures that Pillow has not read yet must not be read by two threads at a time.
    are_apart = all(isinstance(item, str | os.PathLike | bytes) for item in media)
    run = _in_threads if are_apart else map
    keep = partial(_keep, Allowance(), config, hd_num)
    return list(chain.from_iterable(run(lambda item: _as_visuals(item, config, sampling, keep), media)))


def num_visuals(media) -> int:
    """How many pictures and videos `as_visuals` will find."""
    items = media if isinstance(media, list | tuple) else [media]
    return sum(len(item) if isinstance(item, torch.Tensor) and item.ndim == 4 else 1 for item in items)


def _keep(allowance: Allowance, config, hd_num: int | None, image: Image.Image) -> Visual:
    """A picture that was just read, as small as its budget needs."""
    allowance.take(image.width * image.height)
    visual = Visual(image=image)
    return visual if hd_num is None else visual.resized(config, hd_num)


def _as_visuals(item, config, sampling: dict, keep: Callable[[Image.Image], Visual]) -> list[Visual]:
    if isinstance(item, Visual):
        return [item]
    if isinstance(item, torch.Tensor) and item.ndim == 4:
        return [Visual(pixels=check_pixels(pixels, config)) for pixels in check_stack(item)]
    if isinstance(item, list | tuple) or is_video(item):
        return [video_visual(item, config, **sampling)]
    return [keep(load_image(item))]


def video_visual(source, config, **sampling) -> Visual:
    """A video from any source of `load_video`, sampled by its `fps` and `max_frames`.

    Raises:
        ValueError: the version doesn't read videos, and as in `load_video`.
    """
    if not VERSIONS[config.version].reads_videos:
        raise ValueError(
            f"version {config.version} doesn't read videos; pass the frames as pictures, or use 2.5"
        )
    shrink = partial(shrink_frame, tile_size=config.img_size)
    return Visual(frames=tuple(load_video(source, each=shrink, **sampling)))


def load_media(
    media: Iterable, config, *, access: MediaAccess | None = None, hd_num: int | None = None, **sampling
) -> list[Visual]:
    """Media that say whether they are videos (`is_video`) and where they are (`source`), loaded.

    Args:
        access: which files and URLs may be read, `MediaAccess.of()` by default.
        hd_num: the budget for which pictures will be cut, as in `as_visuals`.
        sampling: `fps` and `max_frames` of videos.

    Raises:
        FileNotFoundError, TypeError, ValueError: as in `load_image` and `video_visual`; or more pixels in all
            than one prompt may have.
    """
    keep = partial(_keep, Allowance(), config, hd_num)
    plan_frames(1, 1.0, **sampling)  # raises what is wrong with them, even if there is no video
    return [
        video_visual(medium.source, config, access=access, **sampling)
        if medium.is_video
        else keep(load_image(medium.source, access=access))
        for medium in media
    ]


def check_stack(pixels: Tensor) -> Tensor:
    """(pictures, 3, height, width), if there are any pictures; raises `ValueError` for none."""
    if not len(pixels):
        raise ValueError(f"a stack of pixels needs at least one picture, got the shape {tuple(pixels.shape)}")
    return pixels


def check_pixels(pixels: Tensor, config) -> Tensor:
    """(3, height, width) normalised pixels, if the tower can read them.

    Raises:
        ValueError: the size is not that of the square, or not a multiple of the tile's; or a value is not
            finite, or there are none because the tensor is on the meta device.
    """
    side = config.img_size
    height, width = pixels.shape[-2:]
    whole = min(height, width) > 0 and height % side == 0 and width % side == 0
    whole = whole if config.is_tiled else (height, width) == (side, side)
    if pixels.shape[0] != 3 or not whole or not pixels.is_floating_point():
        wanted = f"multiples of {side}" if config.is_tiled else f"{side} x {side}"
        raise ValueError(
            f"normalised pixels must be floats of (3, height, width) with {wanted} px, not "
            f"{tuple(pixels.shape)} of {pixels.dtype}; pass a picture to have it resized"
        )
    if pixels.is_meta or not torch.isfinite(pixels).all():
        raise ValueError("normalised pixels must be finite numbers; these are NaN, infinite or on no device")
    return pixels


def prepare_visuals(
    visuals: Sequence[Visual], config, hd_num: int | Sequence[int], *, font: Font | None = None
) -> tuple[Tensor, Tensor]:
    """`pixel_values` (tiles, 3, side, side), `image_grid_hw` (visuals, 2); one `hd_num`, or one each."""
    budgets = [hd_num] * len(visuals) if isinstance(hd_num, int) else hd_num
    pairs = zip(visuals, budgets, strict=True)
    return batch_images(_in_threads(lambda pair: pair[0].prepare(config, pair[1], font), pairs))


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results in order, several at a time, but no more than torch may use threads.

    Raises whatever the first failing item in order raises; later ones that have not started never do.
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
        ValueError: they don't; the message has both numbers.
        TypeError: something isn't a tensor, or of the wrong kind.
    """
    side = config.img_size
    check_floats("pixel_values", pixel_values)
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
    check_integers("image_grid_hw", table)
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


# ---- the interface of transformers ----


class InternLMXComposer2ImageProcessor(BaseImageProcessor):
    """Cuts pictures into the tiles or the square that a checkpoint reads. Needs no torchvision.

    Args:
        version: `"1.0"` or `"2"` (one square), `"2-4khd"` or `"2.5"` (tiles, and in 2.5 videos).
        img_size: side of a square or tile in pixels.
        tile_tokens_per_side: side, in tokens, of what one square or tile becomes.
        hd_num: how many local tiles a picture may be cut into if the caller gives no number.
        tokens_per_square: tokens of a square whose patches are resampled (version `"1.0"`).

    Raises:
        ValueError, TypeError: the version is unknown, or a number is invalid.
    """

    model_input_names = ["pixel_values", "image_grid_hw"]

    def __init__(
        self,
        version: str = "2.5",
        img_size: int = 560,
        tile_tokens_per_side: int = 20,
        hd_num: int = 24,
        tokens_per_square: int | None = None,
        **kwargs,
    ) -> None:
        given = {"version": version, "img_size": img_size, "tile_tokens_per_side": tile_tokens_per_side}
        check_fields({**given, **kwargs}, PROCESSOR_KINDS, owner=type(self))
        super().__init__(**{"auto_map": dict(IMAGE_PROCESSOR_AUTO_MAP), **kwargs})
        if version not in VERSIONS:
            raise ValueError(f"unknown version {version!r}; this package knows {', '.join(VERSIONS)}")
        self.version = version
        self.img_size = img_size
        self.tile_tokens_per_side = tile_tokens_per_side
        self.hd_num = check_hd_num(hd_num)
        if tokens_per_square is not None:
            self.tokens_per_square = tokens_per_square

    @classmethod
    def for_config(cls, config) -> "InternLMXComposer2ImageProcessor":
        """The image processor of a checkpoint, by its configuration."""
        sizes = config.version, config.img_size, config.tile_tokens_per_side, config.hd_num
        return cls(*sizes, getattr(config, "tokens_per_square", None))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> "InternLMXComposer2ImageProcessor":
        """Load what `save_pretrained` wrote, or build it from `config.json` and the weights.

        Raises:
            OSError: there is neither.
        """
        source = pretrained_model_name_or_path
        hub_arguments = hub_arguments_in(kwargs)
        own_files = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)
        known = os.path.isfile(source) or any(has_file(source, name, **hub_arguments) for name in own_files)
        if known or not has_file(source, CONFIG_NAME, **hub_arguments):
            if not os.path.isfile(source):
                check_small_files(source, own_files, **hub_arguments)
            with blaming(source):
                return super().from_pretrained(source, **kwargs)
        return cls.for_config(checkpoint_config(source, **hub_arguments))

    @property
    def is_tiled(self) -> bool:
        """Whether pictures are a global view plus local tiles."""
        return VERSIONS[self.version].layout != SQUARE

    def preprocess(
        self,
        images=None,
        videos=None,
        *,
        hd_num: int | None = None,
        access: MediaAccess | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Pictures, and videos after them, without a prompt.

        Args:
            images, videos: one or a list, from any source of `load_image` and `load_video`.
            access: which files and URLs may be read, `MediaAccess.of()` by default.

        Returns:
            `pixel_values` (tiles, 3, side, side), each picture's global view first, and `image_grid_hw`
            (pictures, 2), rows and columns of its local tiles.

        Raises:
            FileNotFoundError, TypeError, ValueError: a source that can't be read, or no source at all.
        """
        images = [] if images is None else flatten_images(images)
        videos = [] if videos is None else flatten_videos(videos)
        if hd_num is not None:
            check_hd_num(hd_num)
        if not images and not videos:
            raise ValueError("no pictures and no videos were given; pass at least one")
        media = [*(Medium(False, item) for item in images), *(Medium(True, item) for item in videos)]
        hd_num = self.hd_num if hd_num is None else hd_num
        pixels, grids = self.prepare(self.load(media, access=access, hd_num=hd_num), hd_num)
        return BatchFeature({"pixel_values": pixels, "image_grid_hw": grids}, tensor_type=return_tensors)

    def load(
        self,
        media: list[Medium],
        *,
        fps: float = 1.0,
        num_frames: int = MAX_FRAMES,
        access: MediaAccess | None = None,
        hd_num: int | None = None,
    ) -> list[Visual]:
        """Read pictures, for a budget of `hd_num` tiles, and sample videos, from where `access` allows.

        Raises:
            FileNotFoundError, TypeError, ValueError: as in `load_image` and `load_video`.
        """
        sampling = {"fps": fps, "max_frames": num_frames}
        return load_media(media, self, access=access, hd_num=hd_num, **sampling)

    def default_hd_num(self, num_visuals: int) -> int:
        """The tile budget of each picture of a prompt if the caller gives none."""
        return default_hd_num(self, num_visuals)

    def num_image_tokens(self, rows: int, cols: int) -> int:
        """Tokens of a picture whose local tiles form `rows` x `cols` (1 x 1 for a square)."""
        return tokens_of_grid(self, (rows, cols))

    def num_tiles(self, rows: int, cols: int) -> int:
        """Rows of `pixel_values` for one picture: its local tiles and the global view, or the square."""
        return 1 + rows * cols if self.is_tiled else 1

    def prepare(self, visuals: list[Visual], hd_num: int) -> tuple[Tensor, Tensor]:
        """`pixel_values` (tiles, 3, side, side) float32 and `image_grid_hw` (visuals, 2) int64."""
        pixels, grids = prepare_visuals(visuals, self, hd_num)
        return pixels, grids.to(torch.int64)
