"""The image processor: pictures and videos, in the layout of one checkpoint, to pixels and grids."""

import os

import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from .auto_internlm_xcomposer2 import IMAGE_PROCESSOR_AUTO_MAP
from .checkpoint_internlm_xcomposer2 import checkpoint_config, has_file, hub_arguments_in
from .configuration_internlm_xcomposer2 import VERSIONS
from .conversation_internlm_xcomposer2 import Medium, flatten_images, flatten_videos
from .ixc_utils import MAX_FRAMES, check_hd_num
from .visual_internlm_xcomposer2 import (
    Visual,
    default_hd_num,
    load_media,
    num_tokens_of_grid,
    prepare_visuals,
)


class InternLMXComposer2ImageProcessor(BaseImageProcessor):
    """Cuts pictures into the tiles or the square that a checkpoint reads. Needs no torchvision.

    Args:
        version: `"2"` (one square), `"2-4khd"` or `"2.5"` (tiles, and in 2.5 videos).
        img_size: side of a square or tile in pixels.
        tile_tokens_per_side: side, in tokens, of what one square or tile becomes.
        hd_num: how many local tiles a picture may be cut into where the caller names no number.

    Raises:
        ValueError, TypeError: the version is unknown, or a number impossible.
    """

    model_input_names = ["pixel_values", "image_grid_hw"]

    def __init__(
        self,
        version: str = "2.5",
        img_size: int = 560,
        tile_tokens_per_side: int = 20,
        hd_num: int = 24,
        **kwargs,
    ) -> None:
        super().__init__(**{"auto_map": dict(IMAGE_PROCESSOR_AUTO_MAP), **kwargs})
        if version not in VERSIONS:
            raise ValueError(f"unknown version {version!r}; this package knows {', '.join(VERSIONS)}")
        self.version = version
        self.img_size = img_size
        self.tile_tokens_per_side = tile_tokens_per_side
        self.hd_num = check_hd_num(hd_num)

    @classmethod
    def for_config(cls, config) -> "InternLMXComposer2ImageProcessor":
        """The image processor of a checkpoint, by its configuration."""
        return cls(config.version, config.img_size, config.tile_tokens_per_side, config.hd_num)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> "InternLMXComposer2ImageProcessor":
        """Load what `save_pretrained` wrote, or make it from `config.json` and the weights.

        Raises:
            OSError: there is neither.
        """
        source = pretrained_model_name_or_path
        hub_arguments = hub_arguments_in(kwargs)
        own_files = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)
        known = os.path.isfile(source) or any(has_file(source, name, **hub_arguments) for name in own_files)
        if known or not has_file(source, CONFIG_NAME, **hub_arguments):
            return super().from_pretrained(source, **kwargs)
        return cls.for_config(checkpoint_config(source, **hub_arguments))

    @property
    def is_tiled(self) -> bool:
        """Whether pictures are a global view plus local tiles."""
        return self.version != "2"

    def preprocess(
        self,
        images=None,
        videos=None,
        *,
        hd_num: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Pictures, or videos after them, without a prompt.

        Args:
            images, videos: one or a list, by any source of `load_image` and `load_video`.

        Returns:
            `pixel_values` (tiles, 3, side, side), each picture's global view first, and `image_grid_hw`
            (pictures, 2), rows and columns of its local tiles.

        Raises:
            FileNotFoundError, TypeError, ValueError: a source that can't be read, or no source at all.
        """
        pictures = [] if images is None else flatten_images(images)
        films = [] if videos is None else flatten_videos(videos)
        if hd_num is not None:
            check_hd_num(hd_num)
        if not pictures and not films:
            raise ValueError("no pictures and no videos were given; pass at least one")
        media = [*(Medium(False, item) for item in pictures), *(Medium(True, item) for item in films)]
        pixels, grids = self.prepare(self.load(media), self.hd_num if hd_num is None else hd_num)
        return BatchFeature({"pixel_values": pixels, "image_grid_hw": grids}, tensor_type=return_tensors)

    def load(self, media: list[Medium], *, fps: float = 1.0, num_frames: int = MAX_FRAMES) -> list[Visual]:
        """Read pictures and sample videos.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `load_image` and `load_video`.
        """
        return load_media(media, self, fps=fps, max_frames=num_frames)

    def default_hd_num(self, num_visuals: int) -> int:
        """The budget of tiles of each picture of a prompt where the caller names none."""
        return default_hd_num(self, num_visuals)

    def count_tokens(self, visuals: list[Visual], hd_num: int) -> list[int]:
        """How many image tokens each picture or video takes: by the plan that `prepare` cuts by."""
        return [self.num_tokens(*visual.grid(self, hd_num)) for visual in visuals]

    def num_tokens(self, rows: int, cols: int) -> int:
        """Tokens of one picture whose local tiles form `rows` x `cols` (1 x 1 for a square)."""
        return num_tokens_of_grid(self, rows, cols)

    def num_tiles(self, rows: int, cols: int) -> int:
        """Rows of `pixel_values` of one picture: its local tiles and the global view, or the square."""
        return 1 + rows * cols if self.is_tiled else 1

    def prepare(self, visuals: list[Visual], hd_num: int) -> tuple[Tensor, Tensor]:
        """`pixel_values` (tiles, 3, side, side) float32 and `image_grid_hw` (visuals, 2) int64."""
        pixels, grids = prepare_visuals(visuals, self, hd_num)
        return pixels, grids.to(torch.int64)
