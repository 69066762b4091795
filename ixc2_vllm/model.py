"""The whole model for vLLM: pictures to embeddings, the decoder around them, and a checkpoint's weights."""

import re
from collections.abc import Iterable, Iterator

import torch
from internlm_xcomposer2.build_mlp import MAX_TILES_PER_BATCH, assemble_tiles
from internlm_xcomposer2.modeling_internlm2 import unpack_heads
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.clip import CLIPVisionModel
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP, SupportsQuant
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, PPMissingLayer, WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from .decoder import FamilyDecoder
from .processing import (
    IMAGE,
    VIDEO,
    FamilyDummyInputs,
    FamilyMultiModalProcessor,
    FamilyProcessingInfo,
    media_of,
)

# Published names, or ours, of a checkpoint's tensors -> those of the modules here. What has none is left out:
# task adapters (served as LoRA), the unused last norm of CLIP, position ids, the video memory of OmniLive.
NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"\.lora_(sft|dpo|web)_[AB]\.weight$"): None,
        re.compile(r"\.position_ids$"): None,
        re.compile(r"^vit\..*\.post_layernorm\."): None,
        re.compile(r"^video_mem_proj\."): None,
        re.compile(r"\.(wqkv|wo|w1|w2|w3)\.linear(?=\.|$)"): r".\1",
        re.compile(r"\.(wqkv|wo|w2)\.Plora_([AB])\.weight$"): r".\1_plora.\2",
    },
    orig_to_new_stacked={
        **{
            f".{linear}.Plora_{factor}.weight": (f".gate_up_plora.{factor}", shard)
            for shard, linear in enumerate(("w1", "w3"))
            for factor in ("A", "B")
        },
        ".w1.": (".gate_up_proj.", 0),
        ".w3.": (".gate_up_proj.", 1),
    },
)

# Weights whose output features are packed by key-value head: their names, and which dimension it is.
PACKED_HEADS = {
    re.compile(r"\.wqkv\.(linear\.)?weight$"): 0,
    re.compile(r"\.wqkv\.Plora_B\.weight$"): 0,
    re.compile(r"\.wqkv\.(linear\.)?(qweight|qzeros|scales)$"): 1,
}


class Tower(nn.Module):
    """CLIP under the name that it has in checkpoints."""

    def __init__(self, config, prefix: str) -> None:
        super().__init__()
        self.vision_tower = CLIPVisionModel(config, require_post_norm=False, prefix=f"{prefix}.vision_tower")


@MULTIMODAL_REGISTRY.register_processor(
    FamilyMultiModalProcessor, info=FamilyProcessingInfo, dummy_inputs=FamilyDummyInputs
)
class InternLMXComposer2ForCausalLM(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA, SupportsQuant):
    """Tower, projector and decoder, with the interfaces of vLLM's models."""

    packed_modules_mapping = {"wqkv": ["wqkv"], "gate_up_proj": ["w1", "w3"]}
    embedding_modules = {}
    hf_to_vllm_mapper = NAMES

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """The mark of a picture or video in a whole prompt."""
        return {IMAGE: "<ImageHere>", VIDEO: "<VideoHere>"}.get(modality)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config, self.text_config = config, vllm_config.model_config.hf_text_config
        hidden, width = self.text_config.hidden_size, config.projector_input_size
        with self._mark_tower_model(vllm_config, {IMAGE, VIDEO}):
            self.vit = Tower(config.vision_config, maybe_prefix(prefix, "vit"))
            self.vision_proj = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        if config.is_tiled:
            self.plora_glb_GN = nn.Parameter(torch.zeros(1, 1, width), requires_grad=False)
            self.plora_sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width), requires_grad=False)
        with self._mark_language_model(vllm_config):
            self.model = FamilyDecoder(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.output = PPMissingLayer()
        if get_pp_group().is_last_rank:
            name = maybe_prefix(prefix, "output")
            self.output = ParallelLMHead(self.text_config.vocab_size, hidden, prefix=name)
        self.logits_processor = LogitsProcessor(self.text_config.vocab_size)
        # What is where in the current step. Graphs read it where it was when they were recorded.
        num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("image_mask", torch.zeros(num_tokens, 1), persistent=False)
        self.is_compiled = vllm_config.compilation_config.mode != CompilationMode.NONE

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which modules belong to which part."""
        return MultiModelKeys.from_string_field(
            language_model="model", connector="vision_proj", tower_model="vit"
        )

    # ---- pictures ----

    def embed_multimodal(self, **kwargs: object) -> list[Tensor]:
        """Pixels and grids of a step -> (tokens, hidden) for each picture and video."""
        return [embeds for pixels, grids in media_of(kwargs) for embeds in self._encode(pixels, grids)]

    def _encode(self, pixels: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
        """(tiles, 3, side, side) -> (tokens, hidden) for each picture."""
        chunks = pixels.split(MAX_TILES_PER_BATCH)
        features = torch.cat([self.vit.vision_tower(chunk)[:, 1:] for chunk in chunks])  # without the class
        if not self.config.is_tiled:
            return list(self.vision_proj(features))
        tiles = features.split([1 + rows * cols for rows, cols in grids])
        pieces = [
            assemble_tiles(picture, grid, self.plora_glb_GN, self.plora_sub_GN)
            for picture, grid in zip(tiles, grids, strict=True)
        ]
        return list(self.vision_proj(torch.cat(pieces)).split([len(piece) for piece in pieces]))

    # ---- decoder ----

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: list[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """(tokens,) ids -> (tokens, hidden), those of pictures in their places.

        vLLM calls this before each step, and only here says which tokens belong to pictures: an image piece
        that the model itself generated doesn't.
        """
        self.image_mask.zero_()
        if is_multimodal is not None:
            self.image_mask[: len(is_multimodal), 0].copy_(is_multimodal, non_blocking=True)
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """What a process of a pipeline passes on: (tokens, hidden) twice, and (tokens, 1)."""
        hidden = self.text_config.hidden_size
        widths = {"hidden_states": hidden, "residual": hidden, "image_mask": 1}
        return IntermediateTensors(
            {
                name: torch.zeros(batch_size, width, dtype=dtype, device=device)
                for name, width in widths.items()
            }
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        """(tokens,) ids, or their embeddings with those of pictures -> (tokens, hidden)."""
        mask = self.image_mask[: positions.shape[-1]]
        if intermediate_tensors is not None:
            mask.copy_(intermediate_tensors["image_mask"])
            names = ("hidden_states", "residual")
            intermediate_tensors = IntermediateTensors({name: intermediate_tensors[name] for name in names})
        used = mask if self.is_compiled or mask.device.type != "cpu" or bool(mask.any()) else None
        output = self.model(input_ids, positions, intermediate_tensors, inputs_embeds, used)
        if isinstance(output, IntermediateTensors):
            output = IntermediateTensors({**output.tensors, "image_mask": mask.clone()})
        return output

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(tokens, hidden) -> (tokens, vocabulary)."""
        return self.logits_processor(self.output, hidden_states)

    # ---- weights ----

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors under their published names or ours, plain or packed by GPTQ or AWQ.

        Raises:
            ValueError: a tensor belongs to no part of the model.
        """
        return AutoWeightsLoader(self).load_weights(self._with_unpacked_heads(weights), mapper=NAMES)

    def _with_unpacked_heads(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors, with all queries, all keys and all values one after the other."""
        heads, kv_heads = self.text_config.num_attention_heads, self.text_config.num_key_value_heads
        for name, weight in weights:
            dim = next((dim for pattern, dim in PACKED_HEADS.items() if pattern.search(name)), None)
            yield name, weight if dim is None else unpack_heads(weight, heads, kv_heads, dim)
