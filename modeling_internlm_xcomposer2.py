"""The whole model: its parts, pictures into embeddings, and `forward`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple, logging

from .backbone_internlm_xcomposer2 import BackboneMixin
from .build_mlp import Projector, VisionMixin, leaves_autocast, must_see_pictures
from .cache_internlm_xcomposer2 import CACHE, accepts_both_names
from .chat_internlm_xcomposer2 import ChatMixin
from .compose_internlm_xcomposer2 import ComposeMixin
from .configuration_internlm_xcomposer2 import (
    PUBLISHED_KEYS,
    InternLMXcomposer2Config,
    check_infer_mode,
    is_reward,
    our_name,
)
from .embedding_methods_internlm_xcomposer2 import EmbeddingMethodsMixin

# Names that clients import from this module.
from .embedding_methods_internlm_xcomposer2 import get_stopping_criteria as get_stopping_criteria
from .embedding_methods_internlm_xcomposer2 import image_extensions as image_extensions
from .embedding_methods_internlm_xcomposer2 import set_random_seed as set_random_seed
from .embedding_methods_internlm_xcomposer2 import video_extensions as video_extensions
from .generation_internlm_xcomposer2 import GenerateMixin
from .image_processing_internlm_xcomposer2 import VisProcessor
from .inputs_internlm_xcomposer2 import check_labels
from .ixc_utils import get_font
from .kernels_internlm_xcomposer2 import Linear, with_kernels
from .modeling_internlm2 import InternLM2Model, InternLM2PreTrainedModel, check_attention
from .packing_internlm_xcomposer2 import Packing
from .quantization_internlm_xcomposer2 import pack_linears
from .reward_internlm_xcomposer2 import RewardMixin, last_positions, pairwise_loss
from .writing_internlm_xcomposer2 import WritingMixin

logger = logging.get_logger(__name__)


def _accept_published_names(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Let `load_state_dict` accept the published names too, as the checkpoints of a trainer have them."""
    for name in list(state_dict):
        if name.startswith(prefix) and (ours := our_name(name)) != name:
            state_dict[ours] = state_dict.pop(name)


class InternLMXComposer2Backbone(VisionMixin, EmbeddingMethodsMixin, BackboneMixin, InternLM2PreTrainedModel):
    """A checkpoint without its head: a vision tower, a projector and InternLM2 with Partial LoRA.

    Subclasses add a head and call `_finish_init`.
    """

    config_class = InternLMXcomposer2Config
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _keys_to_ignore_on_load_missing = [r"vit\..*\.post_layernorm\."]
    _keys_to_ignore_on_load_unexpected = [r"\.position_ids$", r"\.rotary_emb\.inv_freq$"]

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        check_attention(config)
        super().__init__(config)
        self._build_vision()
        if config.video_memory_size:
            self.video_mem_proj = Projector(config.video_memory_size, config.text_config.hidden_size)
        self.model = InternLM2Model(config.text_config)
        self.vis_processor = VisProcessor(None if config.is_tiled else config.img_size)
        self.tokenizer = None
        self.hd_num = config.hd_num
        self.max_length = config.max_length
        self.im_size = config.img_size
        self.vocab_size = config.text_config.vocab_size
        # Task adapters that the configuration doesn't name stay in the file.
        named = "|".join(config.text_config.task_adapters)
        self._keys_to_ignore_on_load_unexpected = [
            *self._keys_to_ignore_on_load_unexpected,
            rf"\.lora_(?!(?:{named})_)\w+_[AB]\.weight$",
        ]

    def _finish_init(self, packed: tuple[Packing, Mapping[str, tuple[int, ...]]] | None) -> None:
        """What comes after the head: the library's own steps, and a `PackedLinear` for each packed weight.

        Args:
            packed: how the weights of a file are packed, and the shapes of its tensors.
        """
        if packed is not None:
            pack_linears(self, *packed)
        if getattr(self.config, "quantization_config", None) is None:
            with_kernels(self.model)
        self.register_load_state_dict_pre_hook(_accept_published_names)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.is_tiled:
            for newline in (self.plora_glb_GN, self.plora_sub_GN):
                init.normal_(newline, std=self.config.text_config.initializer_range)

    # ---- parts that libraries ask for ----

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.tok_embeddings = value

    def get_decoder(self) -> InternLM2Model:
        return self.model

    def set_decoder(self, decoder: InternLM2Model) -> None:
        self.model = decoder

    @property
    def font(self):
        """The font of video labels: Pillow's own unless another was set."""
        return self.__dict__.get("_font") or get_font()

    @font.setter
    def font(self, value) -> None:
        self.__dict__["_font"] = value

    # ---- running ----

    def _decode(self, **inputs) -> BaseModelOutputWithPast:
        return self.model(**inputs)

    def _must_see_pictures(self) -> bool:
        return must_see_pictures(self)


class InternLMXComposer2ForCausalLM(
    ChatMixin, WritingMixin, ComposeMixin, GenerateMixin, InternLMXComposer2Backbone, GenerationMixin
):
    """InternLM-XComposer2, -VL, -4KHD and 2.5: the models that answer.

    Two kinds of input give the same numbers: ids with pictures (`input_ids`, `pixel_values`,
    `image_grid_hw`), and embeddings with a mask (`inputs_embeds`, `im_mask`).
    """

    _tp_plan = {"output": "colwise_gather_output"}

    def __init__(
        self,
        config: InternLMXcomposer2Config,
        packed: tuple[Packing, Mapping[str, tuple[int, ...]]] | None = None,
    ) -> None:
        super().__init__(config)
        self.output = Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self._finish_init(packed)
        self._settle_generation_config()

    @classmethod
    def _class_for(cls, shapes: Mapping[str, tuple[int, ...]]) -> type[InternLMXComposer2Backbone]:
        return InternLMXComposer2ForSequenceClassification if is_reward(shapes) else cls

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output = new_embeddings

    def _settle_generation_config(self) -> None:
        """Make `generate` stop at the end of a turn, which the published configurations leave out.

        The published `max_length` limits a prompt; it is not a default for how much is generated.
        """
        if self.generation_config.max_length == self.config.max_length:
            self.generation_config.max_length = None
        if self.config.end_token_id >= self.config.text_config.vocab_size:
            return
        stops = self.generation_config.eos_token_id
        stops = self.config.eos_token_id if stops is None else stops
        stops = [stops] if isinstance(stops, int) else list(stops or [])
        if self.config.end_token_id not in stops:
            self.generation_config.eos_token_id = [*stops, self.config.end_token_id]

    @can_return_tuple
    @accepts_both_names
    @leaves_autocast
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        im_mask: Tensor | None = None,
        infer_mode: str = "base",
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        samples: dict | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Ids with pictures, or embeddings with a mask -> logits, and the loss if there are labels.

        Args:
            input_ids: (batch, tokens), each picture a run of `config.image_token_id`.
            attention_mask: (batch, all tokens), false or 0 on padding, left or right, of any dtype.
            cache: what has already been computed; `past_key_values` is its older name.
            inputs_embeds: (batch, tokens, hidden), instead of `input_ids`.
            pixel_values: (tiles, 3, side, side), all tiles of all pictures in the order of the prompt.
            image_grid_hw: (pictures, 2), rows and columns of local tiles.
            im_mask: (batch, tokens), true on image tokens; needed with `inputs_embeds` only.
            infer_mode: `"base"`, `"write"` or `"web"`: which task adapters act.
            labels: (batch, tokens), -100 where there should be no loss.
            use_cache: whether to keep keys and values; by default not if there are labels, so that
                `position_ids` that restart separate packed conversations.
            logits_to_keep: how many of the last positions get logits, 0 for all, or the positions.
            samples: a batch of the published trainer, instead of everything above; may name an `infer_mode`.
            num_items_in_batch: what the summed loss is divided by when `Trainer` accumulates gradients.

        Raises:
            ValueError: pictures and prompt don't match, or the checkpoint lacks what `infer_mode` needs.
        """
        if samples is not None:
            infer_mode = samples.get("infer_mode", infer_mode)
        check_infer_mode(infer_mode, self.config.text_config)
        if samples is not None:
            inputs_embeds, attention_mask, labels, im_mask = self.embed_samples(samples)
            input_ids = pixel_values = None
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        check_labels(labels, tokens, self.config.text_config.vocab_size)
        if use_cache is None and labels is not None:
            use_cache = False
        outputs = self.run_decoder(
            input_ids,
            inputs_embeds,
            pixel_values,
            image_grid_hw,
            im_mask,
            cache,
            for_loss=labels is not None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            infer_mode=infer_mode,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        logits = self.output(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class InternLMXComposer2ForSequenceClassification(RewardMixin, InternLMXComposer2Backbone):
    """The model with a score head in place of the output head.

    Trained on pairs of answers (`samples`, or `pairwise_loss` of the logits), it is a reward model. A chat
    checkpoint loads too, with a new head. `config.num_labels` is one, unless a configuration says otherwise.
    """

    _keys_to_ignore_on_load_missing = [
        *InternLMXComposer2Backbone._keys_to_ignore_on_load_missing,
        r"^score\.weight$",
    ]
    _keys_to_ignore_on_load_unexpected = [
        *InternLMXComposer2Backbone._keys_to_ignore_on_load_unexpected,
        r"^output\.weight$",
    ]

    def __init__(
        self,
        config: InternLMXcomposer2Config,
        packed: tuple[Packing, Mapping[str, tuple[int, ...]]] | None = None,
    ) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = Linear(config.text_config.hidden_size, config.num_labels, bias=False)
        self._finish_init(packed)

    @classmethod
    def _class_for(cls, shapes: Mapping[str, tuple[int, ...]]) -> type[InternLMXComposer2Backbone]:
        if "score.weight" not in shapes:
            logger.warning(
                "this checkpoint has no score head: score.weight is new, and its scores mean nothing until "
                "the model is trained"
            )
        return cls

    @can_return_tuple
    @accepts_both_names
    @leaves_autocast
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        im_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = False,
        samples: dict | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Conversations -> scores, read at the last token of each.

        Args:
            input_ids: (batch, tokens), each picture a run of `config.image_token_id`.
            attention_mask: (batch, tokens), false or 0 on padding, left or right. Without it, everything
                after the last token of `input_ids` that is not padding counts as padding.
            inputs_embeds: (batch, tokens, hidden), instead of `input_ids`, with `im_mask` where pictures are.
            pixel_values, image_grid_hw: as in the chat model.
            labels: (batch,), for transformers' own losses, by `config.problem_type` and `config.num_labels`.
            samples: a batch of the published trainer, instead of everything above, as in `embed_pairs`.

        Returns:
            `logits` (batch, labels). With `samples` they are (2 x pairs, 1), alternately chosen and rejected,
            and `loss` is their `pairwise_loss`.

        Raises:
            ValueError: pictures and conversations don't match.
        """
        if samples is not None:
            inputs_embeds, attention_mask, im_mask = self.embed_pairs(samples)
            input_ids = pixel_values = None
        outputs = self.run_decoder(
            input_ids,
            inputs_embeds,
            pixel_values,
            image_grid_hw,
            im_mask,
            cache,
            for_loss=True,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        mask = attention_mask
        if mask is None and input_ids is not None and self.config.pad_token_id is not None:
            mask = input_ids != self.config.pad_token_id
        last = last_positions(hidden.shape[1], None if mask is None else mask.to(hidden.device))
        hidden = hidden[torch.arange(len(hidden), device=hidden.device), last]
        logits = self.score(hidden)
        loss = pairwise_loss(logits) if samples is not None else None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# transformers renames keys by class when loading and, the other way round, when saving.
for _class in (InternLMXComposer2ForCausalLM, InternLMXComposer2ForSequenceClassification):
    _renamings = [WeightRenaming(*pair) for pair in PUBLISHED_KEYS.items()]
    register_checkpoint_conversion_mapping(_class.__name__, _renamings, overwrite=True)
