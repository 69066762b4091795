"""The model of the first generation: InternLM-XComposer 1.0 and ShareCaptioner.

A picture goes through an EVA-CLIP tower, a norm, a Q-Former that reduces it to a few queries, and a linear
projector; two flag embeddings surround it. The decoder is Llama with biases in its attention. Tower, Q-Former
and decoder are those of transformers.
"""

from collections.abc import Mapping

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import (
    Blip2QFormerModel,
    Blip2VisionModel,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.utils import can_return_tuple

from .backbone_internlm_xcomposer2 import BackboneMixin
from .build_mlp import is_frozen, is_sharded, leaves_autocast
from .cache_internlm_xcomposer2 import CACHE, CACHE_NAMES, accepts_both_names
from .chat_internlm_xcomposer import FirstChatMixin
from .compose_internlm_xcomposer2 import ComposeMixin
from .configuration_internlm_xcomposer import (
    JOINED_BIAS,
    KEPT_LOW_RANK,
    LORA_LINEARS,
    PUBLISHED_KEYS,
    QUERY_BIAS,
    VALUE_BIAS,
    InternLMXComposerConfig,
    our_name,
    published_name,
    shapes_in_model,
)
from .configuration_internlm_xcomposer2 import check_infer_mode
from .generation_internlm_xcomposer2 import GenerateMixin, published_arguments
from .image_processing_internlm_xcomposer2 import VisProcessor, check_grids
from .inputs_internlm_xcomposer2 import (
    check_attention_mask,
    check_embeds,
    check_finite,
    check_labels,
    check_positions,
)
from .modeling_internlm2 import check_attention, default_positions
from .packing_internlm_xcomposer2 import Packing
from .quantization_internlm_xcomposer2 import pack_linears

LAYER_NORM_EPS = 1e-5  # of `ln_vision`; that of the tower and that of the Q-Former are others

_FOLDED_LINEARS = tuple(linear for names in LORA_LINEARS.values() for linear in names)


# ---- low-rank weights ----


class LowRankLinear(nn.Linear):
    """`W x + b + scale * B(A(dropout(x)))`, on every token; the low-rank part in the type of its weights."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.low_rank_A = nn.Linear(in_features, rank, bias=False)
        self.low_rank_B = nn.Linear(rank, out_features, bias=False)
        self.scale, self.dropout = scale, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        low = self.low_rank_A(self.dropout(x).to(self.low_rank_A.weight.dtype))
        plain = super().forward(x)
        return plain + (self.low_rank_B(low) * self.scale).to(plain.dtype)


def fold(weight: Tensor, low_rank_a: Tensor, low_rank_b: Tensor, scale: float) -> Tensor:
    """(out, in) with (rank, in) and (out, rank) folded in, rounded once to the type of `weight`."""
    product = low_rank_b.to(weight.device, torch.float32) @ low_rank_a.to(weight.device, torch.float32)
    return (weight.float() + scale * product).to(weight.dtype)


def keep_low_rank(decoder: nn.Module, config: InternLMXComposerConfig) -> None:
    """Put a `LowRankLinear` in place of each linear that has low-rank weights."""
    lora = config.internlm_lora
    names = {linear for short in config.learn_param for linear in LORA_LINEARS[short]}
    for name, plain in list(decoder.named_modules()):
        if name.rsplit(".", 1)[-1] in names and isinstance(plain, nn.Linear):
            rank, scale = lora["lora_r"], lora["lora_alpha"] / lora["lora_r"]
            sizes = plain.in_features, plain.out_features, plain.bias is not None
            decoder.set_submodule(name, LowRankLinear(*sizes, rank, scale, lora.get("lora_dropout", 0.0)))


# ---- pictures ----


class FirstVisionMixin:
    """Pictures to embeddings of the decoder: tower, norm, Q-Former, projector and flags.

    A mixin, so that the parts have their published names both in the whole model and without the decoder.
    Needs `config`.
    """

    def _build_vision(self) -> None:
        config = self.config
        hidden_size, queries = config.text_config.hidden_size, config.qformer_config.hidden_size
        self.visual_encoder = Blip2VisionModel(config.vision_config)
        # `ln_vision` takes the place of the tower's own last norm, with another epsilon.
        self.visual_encoder.post_layernorm = nn.Identity()
        self.ln_vision = nn.LayerNorm(config.vision_config.hidden_size, eps=LAYER_NORM_EPS)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_token, queries))
        self.Qformer = Blip2QFormerModel(config.qformer_config)
        self.internlm_proj = nn.Linear(queries, hidden_size)
        self.flag_image_start = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.flag_image_end = nn.Parameter(torch.zeros(1, 1, hidden_size))

    @leaves_autocast
    def get_image_features(
        self, pixel_values: Tensor, image_grid_hw: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encode (pictures, 3, side, side) pixels.

        Returns:
            `last_hidden_state`: (pictures, queries, width) of the Q-Former; `pooler_output`: one
            (queries + 2, hidden) tensor per picture, flags included.

        Raises:
            TypeError, ValueError: the pixels have another size, or aren't finite floats.
        """
        check_grids(self.config, pixel_values, image_grid_hw)
        check_finite(pixel_values)
        device = self.visual_encoder.embeddings.patch_embedding.weight.device
        pixel_values = pixel_values if device.type == "meta" else pixel_values.to(device)
        patches = self.visual_encoder(pixel_values).last_hidden_state  # class token first, and kept
        patches = self.ln_vision(patches.to(self.ln_vision.weight.dtype))
        with align_module_device(self):  # queries and flags are ours, and may be offloaded
            count = len(pixel_values)
            queries = self.query_tokens.expand(count, -1, -1).to(patches.device)
            summary = self.Qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
            rows = self.internlm_proj(summary)
            start, end = (
                flag.expand(count, -1, -1).to(rows.device)
                for flag in (self.flag_image_start, self.flag_image_end)
            )
            features = torch.cat([start, rows, end], dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=summary, pooler_output=list(features))


# ---- files ----


def join_biases(query: Tensor, value: Tensor) -> Tensor:
    """Biases of queries and of values, each (width,) -> (3 * width,), zero for keys."""
    return torch.cat([query, torch.zeros_like(query), value.to(query.device, query.dtype)])


class JoinBiases(ConversionOps):
    """The tower's two biases of a file -> its one bias."""

    def convert(
        self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict:
        (query,), (value,) = (input_dict[pattern] for pattern in source_patterns)
        return {target_patterns[0]: join_biases(query, value)}

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitBias()


class SplitBias(ConversionOps):
    """The tower's one bias -> those of queries and values; that of keys changes no attention."""

    def convert(
        self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict:
        bias = input_dict[source_patterns[0]]
        query, _, value = (bias[0] if isinstance(bias, list) else bias).chunk(3)
        return dict(zip(target_patterns, (query.contiguous(), value.contiguous()), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinBiases()


class FoldLowRank(ConversionOps):
    """A weight and its low-rank weights, if the file has any -> one weight."""

    def convert(
        self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], config=None, **kwargs
    ) -> dict:
        (weight, *_), *factors = (input_dict.get(pattern, ()) for pattern in source_patterns)
        if all(factors):
            lora = config.internlm_lora
            (a,), (b,) = factors
            weight = fold(weight, a, b, lora["lora_alpha"] / lora["lora_r"])
        return {target_patterns[0]: weight}

    @property
    def reverse_op(self) -> ConversionOps:
        return KeepFolded()


class KeepFolded(ConversionOps):
    """What was folded is saved as one weight."""

    def convert(
        self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict:
        weight = input_dict[source_patterns[0]]
        return {target_patterns[0]: weight[0] if isinstance(weight, list) else weight}

    @property
    def reverse_op(self) -> ConversionOps:
        return FoldLowRank()


def _accept_published_names(module: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """Let `load_state_dict` accept the published names too, as the checkpoints of a trainer have them."""
    for name in [name for name in state_dict if name.endswith(QUERY_BIAS)]:
        stem = name.removesuffix(QUERY_BIAS)
        query, value = (state_dict.pop(f"{stem}{ending}") for ending in (QUERY_BIAS, VALUE_BIAS))
        state_dict[f"{stem}{JOINED_BIAS}"] = join_biases(query, value)
    for name in list(state_dict):
        if name.startswith(prefix) and (ours := prefix + our_name(name.removeprefix(prefix))) != name:
            state_dict[ours] = state_dict.pop(name)


# ---- the model ----


class InternLMForCausalLM(LlamaForCausalLM):
    """The decoder with its head, which clients of the published code call with embeddings."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ):
        """As in transformers, and with `inputs_embeds` alone as clients of the published code expect.

        The result then begins with BOS, and `max_length` counts BOS and new tokens.
        """
        ids = inputs if input_ids is None else input_ids
        if inputs_embeds is None:
            return super().generate(ids, *args, **kwargs)
        if ids is None:
            ids, kwargs = published_arguments(self, inputs_embeds, kwargs)
        return super().generate(ids, *args, inputs_embeds=inputs_embeds, **kwargs)


class InternLMXComposerPreTrainedModel(PreTrainedModel):
    """What every model of the first generation can do."""

    config_class = InternLMXComposerConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Blip2EncoderLayer", "Blip2QFormerLayer", "LlamaDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["low_rank_A", "low_rank_B"]
    _keys_to_ignore_on_load_unexpected = [r"\.position_ids$", r"\.rotary_emb\.inv_freq$"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _init_weights(self, module: nn.Module) -> None:
        """Like the base class; new low-rank weights change nothing until trained."""
        super()._init_weights(module)
        if isinstance(module, InternLMXComposerForCausalLM):  # the last, after those of its parts
            for embedding in (module.query_tokens, module.flag_image_start, module.flag_image_end):
                init.normal_(embedding, std=self.config.text_config.initializer_range)
            for linear in filter(lambda part: isinstance(part, LowRankLinear), module.modules()):
                init.zeros_(linear.low_rank_B.weight)


class InternLMXComposerForCausalLM(
    FirstChatMixin,
    ComposeMixin,
    GenerateMixin,
    BackboneMixin,
    FirstVisionMixin,
    InternLMXComposerPreTrainedModel,
    GenerationMixin,
):
    """InternLM-XComposer 1.0 and ShareCaptioner.

    Two kinds of input give the same numbers: ids with pictures (`input_ids`, `pixel_values`), in which a
    picture is a run of `config.image_token_id`, and embeddings (`inputs_embeds`).

    Attributes:
        tokenizer: the checkpoint's, set by the caller; the published methods need it.
    """

    full_precision_modules = ("visual_encoder", "Qformer", "internlm_proj", "internlm_model.lm_head")
    font = None  # there are no videos, whose labels would need one

    def __init__(
        self,
        config: InternLMXComposerConfig,
        packed: tuple[Packing, Mapping[str, tuple[int, ...]]] | None = None,
    ) -> None:
        check_attention(config)
        super().__init__(config)
        self._build_vision()
        self.internlm_model = InternLMForCausalLM(config.text_config)
        if config.internlm_lora is not None and not config.folds_low_rank:
            keep_low_rank(self.internlm_model, config)
        if packed is not None:
            pack_linears(self, *packed)
        self.vis_processor = VisProcessor(config.img_size)
        self.tokenizer = None
        self.max_length = config.max_length
        self.vocab_size = config.text_config.vocab_size
        self.register_load_state_dict_pre_hook(_accept_published_names)
        self.post_init()
        self._settle_generation_config()

    # ---- loading and saving ----

    @classmethod
    def _complete_config(cls, config, shapes: Mapping[str, tuple[int, ...]], kwargs: dict):
        config = config.complete_from_shapes(shapes)
        config.folds_low_rank = kwargs.pop("fold_low_rank", True)
        if not config.folds_low_rank:
            kwargs["key_mapping"] = {**KEPT_LOW_RANK, **(kwargs.get("key_mapping") or {})}
        return config

    @classmethod
    def _shapes_to_read(cls, config, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
        return shapes_in_model(shapes, folds_low_rank=config.folds_low_rank)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Write the checkpoint under the published names; what was folded is saved as plain weights."""
        if any(isinstance(module, LowRankLinear) for module in self.modules()):
            state_dict = kwargs.get("state_dict") or self.state_dict()
            names = {name: published_name(name) if ".low_rank_" in name else name for name in state_dict}
            kwargs["state_dict"] = {names[name]: value for name, value in state_dict.items()}
        super().save_pretrained(save_directory, **kwargs)

    def _settle_loaded(self) -> None:
        if self.config.folds_low_rank:
            self.config.internlm_lora = None
            del self.config.folds_low_rank
        super()._settle_loaded()

    def _settle_generation_config(self) -> None:
        """Make `generate` stop at the end of an answer, which the published configurations leave out.

        Its `max_length` limits a prompt; it is not a default for how much is generated.
        """
        config = self.config
        if self.generation_config.max_length == config.max_length:
            self.generation_config.max_length = None
        stops = [config.text_config.eos_token_id, config.end_token_id]
        self.generation_config.eos_token_id = [stop for stop in stops if stop < self.vocab_size]
        for generation_config in (self.generation_config, self.internlm_model.generation_config):
            generation_config.pad_token_id = config.pad_token_id

    # ---- parts that libraries ask for ----

    def get_input_embeddings(self) -> nn.Module:
        return self.internlm_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.internlm_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.internlm_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.internlm_model.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.internlm_model.model

    def set_decoder(self, decoder: nn.Module) -> None:
        self.internlm_model.model = decoder

    # ---- running ----

    def _decode(
        self,
        inputs_embeds: Tensor,
        im_mask: Tensor | None = None,
        infer_mode: str = "base",
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        check_embeds(inputs_embeds, self.config.text_config.hidden_size)
        check_attention_mask(attention_mask, inputs_embeds, cache)
        check_positions(position_ids, inputs_embeds)
        if position_ids is None:  # as in every later step of `generate`, padding has none
            position_ids = default_positions(inputs_embeds, cache, attention_mask)
        return self.internlm_model.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **kwargs,
        )

    def _must_see_pictures(self) -> bool:
        if is_sharded(self.visual_encoder.encoder.layers[-1]):
            return True
        if not (self.training and torch.is_grad_enabled()):
            return False
        modules = self.visual_encoder, self.ln_vision, self.Qformer, self.internlm_proj
        embeddings = self.query_tokens, self.flag_image_start, self.flag_image_end
        return any(weight.requires_grad for weight in embeddings) or not all(map(is_frozen, modules))

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
        """Ids with pictures, or embeddings -> logits, and the loss if there are labels.

        Args:
            input_ids: (batch, tokens), each picture a run of `config.image_token_id`.
            attention_mask: (batch, all tokens), 0 on padding, left or right.
            cache: what has already been computed; `past_key_values` is its older name.
            inputs_embeds: (batch, tokens, hidden), instead of `input_ids`.
            pixel_values: (pictures, 3, side, side) in the order of the prompt.
            labels: (batch, tokens), -100 where there should be no loss.
            use_cache: whether to keep keys and values; by default not if there are labels.
            logits_to_keep: how many of the last positions get logits, 0 for all, or the positions.
            samples: a batch of the published trainer, instead of everything above.
            num_items_in_batch: what the summed loss is divided by when `Trainer` accumulates gradients.

        Raises:
            ValueError: pictures and prompt don't match.
        """
        check_infer_mode(infer_mode, self.config.text_config)
        if samples is not None:
            inputs_embeds, attention_mask, labels = self.embed_samples(samples)
            input_ids = pixel_values = None
            # Padding on the right has positions too, as published.
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        check_labels(labels, tokens, self.config.text_config.vocab_size)
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
            use_cache=False if use_cache is None and labels is not None else use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.internlm_model.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def weight_conversions() -> list[WeightRenaming | WeightConverter]:
    """What transformers does to a file's tensors when loading and, the other way round, when saving."""
    folded = [
        WeightConverter(
            [f"{name}.weight", f"{name}.lora_A.weight", f"{name}.lora_B.weight"],
            f"{name}.weight",
            operations=[FoldLowRank()],
        )
        for name in _FOLDED_LINEARS
    ]
    renamed = [WeightRenaming(*pair) for pair in PUBLISHED_KEYS.items()]
    joined = WeightConverter([QUERY_BIAS, VALUE_BIAS], JOINED_BIAS, operations=[JoinBiases()])
    return [*renamed, joined, *folded]


register_checkpoint_conversion_mapping(
    InternLMXComposerForCausalLM.__name__, weight_conversions(), overwrite=True
)
