"""Pictures and videos behind vLLM's interface: the package's processor counts, cuts and normalises them."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from internlm_xcomposer2 import InternLMXComposer2Processor
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import Visual
from internlm_xcomposer2.ixc_utils import check_hd_num
from internlm_xcomposer2.media_internlm_xcomposer2 import MAX_FRAMES, load_image, load_video, plan_frames
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageSize, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader

from . import NAME

IMAGE, VIDEO = "image", "video"

# (height, width) of frames whose composite has the most tokens that a video of usual shape can have.
LARGEST_FRAMES = ((720, 1280), (1280, 720))


def mark_of(processor: InternLMXComposer2Processor, kind: str) -> list[int]:
    """The ids that stand for a picture or video until it is counted; no plain text becomes them."""
    if kind == IMAGE:
        return [processor.image_token_id]
    return [processor.tokenizer.unk_token_id, processor.image_token_id]


# ---- videos ----


@VIDEO_LOADER_REGISTRY.register(NAME)
class FamilyVideoLoader(VideoLoader):
    """Samples a video as `chat` does: one frame each second, thinned out evenly to 32."""

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int = MAX_FRAMES, fps: float = 1.0, **kwargs
    ) -> tuple[np.ndarray, dict]:
        """A video file -> (frames, height, width, 3) uint8, and what vLLM calls its metadata.

        Raises:
            ValueError: it isn't a video, or can't be read.
        """
        frames = load_video(data, max_frames=num_frames if num_frames > 0 else MAX_FRAMES, fps=fps or 1.0)
        metadata = {"total_num_frames": len(frames), "fps": fps, "frames_indices": list(range(len(frames)))}
        return np.stack(frames), {**metadata, "video_backend": NAME, "do_sample_frames": False}


class FamilyDataParser(MultiModalDataParser):
    """vLLM's parser, for which frames without metadata are a video too."""

    def _get_video_with_metadata(self, video):
        frames, metadata = super()._get_video_with_metadata(video)
        return frames, metadata or {"do_sample_frames": False}


def sampled_frames(frames: Sequence, metadata: Mapping) -> list:
    """At most 32 frames: one each second if these are all frames of a file, else thinned out evenly."""
    rate = float(metadata.get("fps") or 1.0) if metadata.get("do_sample_frames") else 1.0
    return [frames[index] for index in plan_frames(len(frames), rate)]


# ---- sizes ----


class FamilyProcessingInfo(BaseProcessingInfo):
    """What vLLM asks before it processes anything."""

    @cached_property
    def processor(self) -> InternLMXComposer2Processor:
        """The processor of the checkpoint; published files name none that loads without their code."""
        return InternLMXComposer2Processor.for_config(self.get_hf_config(), self.ctx.tokenizer)

    def get_hf_processor(self, **kwargs) -> InternLMXComposer2Processor:
        """The processor. `hd_num` and the like are options of a call, not of the processor."""
        return self.processor

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """The options that a request may set, by the groups of transformers."""
        return {"text_kwargs": set(), "images_kwargs": {"hd_num"}, "videos_kwargs": set()}

    def get_data_parser(self) -> FamilyDataParser:
        """The parser of pictures and videos that come with a request."""
        return FamilyDataParser(
            video_needs_metadata=True, expected_hidden_size=self._get_expected_hidden_size()
        )

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        """Any number of pictures, and of videos in version 2.5."""
        return {IMAGE: None, VIDEO: None} if self.processor.version == "2.5" else {IMAGE: None}

    def hd_num(self, num_visuals: int, options: Mapping[str, object]) -> int:
        """The tile budget of each picture of a prompt: the request's, the server's, or the version's.

        Raises:
            VLLMValidationError: it isn't a positive integer.
        """
        merged = self.ctx.get_merged_mm_kwargs(dict(options))
        budget = {**merged, **(merged.get("images_kwargs") or {})}.get("hd_num")
        if budget is None:
            return self.processor.image_processor.default_hd_num(num_visuals)
        try:
            return check_hd_num(budget)
        except (TypeError, ValueError) as error:
            raise VLLMValidationError(str(error), parameter="mm_processor_kwargs") from error

    def largest_image(self) -> ImageSize:
        """A column of as many tiles as are allowed, since each row of tiles costs newlines."""
        side, tiles = self.processor.image_processor.img_size, self.hd_num(1, {})
        return ImageSize(width=side, height=side * (tiles if self.processor.image_processor.is_tiled else 1))

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> dict[str, int]:
        """Tokens of the largest picture and video, so that vLLM needn't process them to know."""
        width, height = self.largest_image()
        count = self.processor._get_num_multimodal_tokens
        most = {IMAGE: count(image_sizes=[(height, width)], hd_num=self.hd_num(1, {}))["num_image_tokens"][0]}
        if VIDEO in self.supported_mm_limits:
            videos = [(MAX_FRAMES, *size) for size in LARGEST_FRAMES] + [(1, *LARGEST_FRAMES[0])]
            most[VIDEO] = max(count(video_sizes=videos)["num_video_tokens"])
        return most


class FamilyDummyInputs(BaseDummyInputsBuilder[FamilyProcessingInfo]):
    """The largest inputs, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """The pieces that become `mark_of` each medium."""
        processor = self.info.processor
        marks = [mark_of(processor, kind) for kind in (IMAGE, VIDEO) for _ in range(mm_counts.get(kind, 0))]
        ids = [token for mark in marks for token in mark]
        return "".join(processor.tokenizer.convert_ids_to_tokens(ids))

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping) -> dict:
        """White pictures and videos of the largest size."""
        width, height = self.info.largest_image()
        images = self._get_dummy_images(
            width=width, height=height, num_images=mm_counts.get(IMAGE, 0), overrides=mm_options.get(IMAGE)
        )
        if not mm_counts.get(VIDEO, 0):
            return {IMAGE: images}
        height, width = LARGEST_FRAMES[0]
        videos = self._get_dummy_videos(
            width=width,
            height=height,
            num_frames=MAX_FRAMES,
            num_videos=mm_counts[VIDEO],
            overrides=mm_options.get(VIDEO),
        )
        return {IMAGE: images, VIDEO: videos}


# ---- pixels ----


class FamilyMultiModalProcessor(BaseMultiModalProcessor[FamilyProcessingInfo]):
    """Cuts what a request brings, and says how many image tokens each mark becomes."""

    def apply(self, inputs, timing_ctx):
        """As the base class does, with the tile budget among the options.

        The budget depends on how many pictures the prompt has. Among the options it is part of the key under
        which vLLM caches a picture.
        """
        options = dict(inputs.hf_processor_mm_kwargs)
        number = sum(inputs.mm_data_items.get_all_counts().values())
        inputs.hf_processor_mm_kwargs = {"hd_num": self.info.hd_num(number, options)}
        return super().apply(inputs, timing_ctx)

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        """Pictures and videos -> for each kind `..._pixels` (tiles, 3, side, side), grids and tile counts."""
        hd_num = hf_kwargs["hd_num"]
        images = [Visual(image=load_image(image)) for image in hf_data.get("images") or ()]
        videos = [
            Visual(frames=tuple(load_image(np.asarray(frame)) for frame in sampled_frames(*video)))
            for video in hf_data.get("videos") or ()
        ]
        outputs = {}
        for kind, visuals in ((IMAGE, images), (VIDEO, videos)):
            if visuals:
                outputs |= self._cut(kind, visuals, hd_num)
        return BatchFeature(outputs)

    def _cut(self, kind: str, visuals: list[Visual], hd_num: int) -> dict[str, torch.Tensor]:
        image_processor = self.info.processor.image_processor
        pixels, grids = image_processor.prepare(visuals, hd_num)
        num_tiles = [image_processor.num_tiles(*grid) for grid in grids.tolist()]
        pixels = pixels.to(self.info.ctx.model_config.dtype)
        return {f"{kind}_pixels": pixels, f"{kind}_grid": grids, f"{kind}_num_tiles": torch.tensor(num_tiles)}

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> dict[str, MultiModalFieldConfig]:
        """How each tensor is split among the media."""
        fields = {}
        for kind in (IMAGE, VIDEO):
            if f"{kind}_pixels" in hf_inputs:
                sizes = hf_inputs[f"{kind}_num_tiles"]
                fields[f"{kind}_pixels"] = MultiModalFieldConfig.flat_from_sizes(kind, sizes)
                for name in ("grid", "num_tiles"):
                    fields[f"{kind}_{name}"] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs
    ) -> list[PromptReplacement]:
        """For each kind of medium, its mark and what replaces it."""
        return [
            PromptReplacement(kind, mark_of(self.info.processor, kind), self._image_tokens(kind, items))
            for kind, items in out_mm_kwargs.items()
        ]

    def _image_tokens(self, kind: str, items):
        processor = self.info.processor

        def build(index: int) -> list[int]:
            rows, cols = items[index][f"{kind}_grid"].data.tolist()
            return [processor.image_token_id] * processor.image_processor.num_image_tokens(rows, cols)

        return build


def media_of(kwargs: Mapping[str, object]) -> Iterator[tuple[torch.Tensor, list[tuple[int, int]]]]:
    """What `_cut` made of each kind of medium in a step: pixels of all tiles, and the grids."""
    for kind in (IMAGE, VIDEO):
        pixels = kwargs.get(f"{kind}_pixels")
        if pixels is None:
            continue
        pixels = torch.cat(list(pixels)) if isinstance(pixels, list | tuple) else pixels
        grids = torch.as_tensor(kwargs[f"{kind}_grid"]).reshape(-1, 2).tolist()
        yield pixels, [(int(rows), int(cols)) for rows, cols in grids]
