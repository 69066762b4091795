"""The InternLM2 decoder (arXiv:2403.17297). Knows nothing about pictures beyond a mask of their tokens."""

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple, is_flash_attn_2_available, is_kernels_available

from .build_mlp import LowRankUp, PLoRA, image_row_indices, introduce_to_peft, outside_autocast
from .cache_internlm_xcomposer2 import CACHE, CACHE_NAMES, GrowingCache, accepts_both_names
from .configuration_internlm_xcomposer2 import InternLMXcomposer2TextConfig, check_infer_mode
from .inputs_internlm_xcomposer2 import (
    check_attention_mask,
    check_embeds,
    check_ids,
    check_image_mask,
    check_positions,
)


class InternLM2RMSNorm(nn.Module):
    """Root-mean-square norm in float32, multiplied by the weight after casting back."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)


class InternLM2RotaryEmbedding(nn.Module):
    """Cosines and sines of the positions, in float32 whatever the model's dtype.

    Holds no buffers: frequencies are computed from the configuration at each call, so that neither loading,
    nor `half()`, nor an earlier long prompt can corrupt them.
    """

    def __init__(self, config: InternLMXcomposer2TextConfig) -> None:
        super().__init__()
        self.config = config

    def frequencies(self, num_positions: Tensor) -> tuple[Tensor, float]:
        """Inverse frequencies (rows, head_dim / 2) for rows of `num_positions` (rows,); attention scale.

        In dynamic NTK, the base grows with a row's length beyond `max_position_embeddings`; up to there,
        nothing changes.
        """
        parameters = self.config.rope_parameters
        device = num_positions.device
        if parameters["rope_type"] not in ("default", "dynamic"):
            inverse, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](self.config, device)
            return inverse[None], scale
        dim = self.config.head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        theta = parameters["rope_theta"]
        plain = 1.0 / theta**exponents
        if parameters["rope_type"] == "default":
            return plain[None], 1.0
        num_positions = num_positions[:, None]
        limit, factor = self.config.max_position_embeddings, parameters["factor"]
        growth = factor * num_positions.to(torch.float32) / limit - (factor - 1)
        scaled = 1.0 / (theta * growth.clamp(min=1) ** (dim / (dim - 2))) ** exponents
        return torch.where(num_positions > limit, scaled, plain), 1.0

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, tokens) positions -> cosines and sines, each (batch, tokens, head_dim), float32."""
        inverse_frequencies, scale = self.frequencies(position_ids.amax(dim=-1) + 1)
        with torch.autocast(device_type=position_ids.device.type, enabled=False):
            angles = position_ids[..., None].float() * inverse_frequencies[:, None].float()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * scale, angles.sin() * scale


def unpack_heads(packed: Tensor, num_heads: int, num_key_value_heads: int, dim: int = 0) -> Tensor:
    """Features of `wqkv` as checkpoints pack them -> those of all queries, then all keys, then all values.

    Engines with one matrix for each of the three read them in this order.

    Args:
        packed: queries, a key and a value for each key-value head, along `dim`; if they are packed into few
            bits, one element may hold several features of a head.
    """
    groups = packed.movedim(dim, 0)
    groups = groups.unflatten(0, (num_key_value_heads, num_heads // num_key_value_heads + 2, -1))
    parts = groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)
    return torch.cat(parts).movedim(0, dim).contiguous()


def rotate_half(x: Tensor) -> Tensor:
    """(..., d) -> (..., d): the second half negated, then the first."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(batch, ..., tokens, head_dim) rotated by (batch, tokens, head_dim) cosines and sines."""
    for _ in range(x.ndim - cos.ndim):
        cos, sin = cos[:, None], sin[:, None]
    return (x * cos + rotate_half(x) * sin).to(x.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention by plain products, which also returns the weights; softmax in float32.

    query (batch, heads, tokens, d), key and value (batch, kv heads, all tokens, d) ->
    (batch, tokens, heads, d) and (batch, heads, tokens, all tokens).
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sdpa_of_one_token(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one token in each row, which may see all others that its mask doesn't hide.

    The heads that share a key-value head are computed as if they were tokens of it, so that torch's kernels
    read each key and value once, in products of several rows: many times as fast in half types on a CPU.

    query (batch, heads, 1, d), key and value (batch, kv heads, all tokens, d), a mask that broadcasts to
    (batch, heads, 1, all tokens) -> (batch, 1, heads, d).
    """
    groups = key.shape[1], -1
    if attention_mask is not None and attention_mask.shape[1] > 1:
        attention_mask = attention_mask.unflatten(1, groups).squeeze(3)
    output = nn.functional.scaled_dot_product_attention(
        query.unflatten(1, groups).squeeze(3),  # (batch, kv heads, heads of each, d)
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return output.flatten(1, 2)[:, None], None


def build_linear(config: InternLMXcomposer2TextConfig, in_features: int, out_features: int) -> PLoRA:
    """A linear of the decoder with the common low-rank sizes."""
    return PLoRA(
        in_features,
        out_features,
        bias=config.bias,
        lora_r=config.plora_rank,
        lora_alpha=config.plora_alpha,
        lora_dropout=config.plora_dropout,
        adapters=config.task_adapters,
    )


class InternLM2Attention(nn.Module):
    """Grouped-query attention; `wqkv` packs, per key-value head, its query heads, its key and its value."""

    def __init__(self, config: InternLMXcomposer2TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.wqkv = PLoRA(
            config.hidden_size,
            (config.num_attention_heads + 2 * config.num_key_value_heads) * self.head_dim,
            bias=config.bias,
            lora_r=config.plora_wqkv_rank,
            lora_alpha=config.plora_wqkv_alpha,
            lora_dropout=config.plora_dropout,
            adapters=config.task_adapters,
        )
        self.wo = build_linear(config, config.num_attention_heads * self.head_dim, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None,
        plora: dict,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, tokens, hidden) -> the same, and the attention weights if they are materialised."""
        packed = rearrange(
            self.wqkv(hidden_states, **plora),
            "b n (g r d) -> b g r n d",
            d=self.head_dim,
            r=self.num_key_value_groups + 2,
        )
        rotated, value = apply_rotary(packed[:, :, :-1], *position_embeddings), packed[:, :, -1]
        query, key = rotated[:, :, :-1].flatten(1, 2), rotated[:, :, -1]
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        attention_interface = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        if self.config._attn_implementation == "sdpa" and hidden_states.shape[1] == 1:
            attention_interface = sdpa_of_one_token
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = output.reshape(*hidden_states.shape[:2], -1)
        return self.wo(output, **plora), weights


class InternLM2MLP(nn.Module):
    """SwiGLU: `w2(act(w1 x) * w3 x)`."""

    def __init__(self, config: InternLMXcomposer2TextConfig) -> None:
        super().__init__()
        self.w1 = build_linear(config, config.hidden_size, config.intermediate_size)
        self.w3 = build_linear(config, config.hidden_size, config.intermediate_size)
        self.w2 = build_linear(config, config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, plora: dict) -> Tensor:
        """(batch, tokens, hidden) -> (batch, tokens, hidden)."""
        gate = self.act_fn(self.w1(hidden_states, **plora))
        up = self.w3(hidden_states, **plora)
        gate = gate * up if torch.is_grad_enabled() else gate.mul_(up)
        return self.w2(gate, **plora)


class InternLM2DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, config: InternLMXcomposer2TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        image_rows: Tensor | slice | None = None,
        infer_mode: str = "base",
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, tokens, hidden) -> the same, and the attention weights if they are materialised."""
        plora = {"image_rows": image_rows, "infer_mode": infer_mode}
        attended, weights = self.attention(
            self.attention_norm(hidden_states),
            position_embeddings,
            attention_mask,
            cache,
            plora,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states), plora), weights


class InternLM2PreTrainedModel(PreTrainedModel):
    """What every model of this family can do."""

    config_class = InternLMXcomposer2TextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternLM2DecoderLayer", "CLIPEncoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def named_modules(self, *args, **kwargs):
        """Like the base class. peft calls this before it wraps any, so this is where it meets `PLoRA`."""
        introduce_to_peft()
        return super().named_modules(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Like the base class; new low-rank weights change nothing until trained, as in LoRA itself."""
        super()._init_weights(module)
        if isinstance(module, LowRankUp):
            init.zeros_(module.weight)


class InternLM2Model(InternLM2PreTrainedModel):
    """The decoder without its head: ids or embeddings -> hidden states after the final norm."""

    def __init__(self, config: InternLMXcomposer2TextConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [InternLM2DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.norm = InternLM2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = InternLM2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.tok_embeddings = value

    @can_return_tuple
    @accepts_both_names
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        im_mask: Tensor | None = None,
        infer_mode: str = "base",
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids, inputs_embeds: (batch, tokens) ids or (batch, tokens, hidden) embeddings, one of them.
            attention_mask: (batch, all tokens), false or 0 on padding, of any dtype.
            cache: what has already been computed; `past_key_values` is its older name.
            im_mask: (batch, tokens), true on image tokens; any dtype and device.
            infer_mode: `"base"`, `"write"` or `"web"`.

        Raises:
            ValueError: both or neither input, a mask of the wrong shape, or an adapter the weights lack.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        check_infer_mode(infer_mode, self.config)
        if inputs_embeds is None:
            check_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.tok_embeddings(input_ids)
        check_embeds(inputs_embeds, self.config.hidden_size)
        check_image_mask(im_mask, inputs_embeds)
        check_attention_mask(attention_mask, inputs_embeds, cache)
        check_positions(position_ids, inputs_embeds)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = GrowingCache(self.config)
        if position_ids is None:
            position_ids = default_positions(inputs_embeds, cache, attention_mask)
        # By position: the fourth argument has two names.
        causal_mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        with outside_autocast(inputs_embeds):
            return self._run_layers(
                inputs_embeds,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                position_embeddings=self.rotary_emb(position_ids),
                cache=cache,
                image_rows=image_row_indices(im_mask, inputs_embeds.device),
                infer_mode=infer_mode,
                use_cache=use_cache,
                **kwargs,
            )

    def _run_layers(
        self, hidden_states: Tensor, output_attentions: bool, output_hidden_states: bool, **layer_inputs
    ) -> BaseModelOutputWithPast:
        all_hidden, all_weights = [], []
        for layer in self.layers:
            all_hidden.append(hidden_states if output_hidden_states else None)
            hidden_states, weights = layer(hidden_states, **layer_inputs)
            all_weights.append(weights if output_attentions else None)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            **{CACHE: layer_inputs["cache"]},
            hidden_states=(*all_hidden, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )


def default_positions(inputs_embeds: Tensor, cache: Cache | None, attention_mask: Tensor | None) -> Tensor:
    """(1 or batch, tokens) positions that continue where the cache ends and leave padding out."""
    if attention_mask is not None and attention_mask.ndim == 2:
        positions = (attention_mask.to(inputs_embeds.device).long().cumsum(-1) - 1).clamp(min=0)
        return positions[:, -inputs_embeds.shape[1] :]
    past = cache.get_seq_length() if cache is not None else 0
    return torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past


def check_attention(config) -> None:
    """Raise `ValueError` for an attention implementation whose package is not installed."""
    if config._attn_implementation == "flash_attention_2" and not (
        is_flash_attn_2_available() or is_kernels_available()
    ):
        raise ValueError(
            "attn_implementation='flash_attention_2' needs the flash-attn package and a GPU; use 'sdpa', "
            "which has a flash kernel, or on Hopper and newer 'flash_attention_4' (pip install "
            "flash-attn-4), or compile it: pip install flash-attn --no-build-isolation"
        )
