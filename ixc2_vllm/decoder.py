"""The decoder of vLLM's own layers: InternLM2 with the image-only halves of Partial LoRA beside its linears.

Which tokens are image tokens is an input of the decoder, a column of ones and zeros. All of it is plain
arithmetic on the device, so that compilers and CUDA graphs may keep it, and a batch may mix anything.
"""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import make_layers
from vllm.model_executor.utils import set_weight_attrs
from vllm.sequence import IntermediateTensors

# ---- Partial LoRA ----


class ImageLowRank(nn.Module):
    """The image-only half of one or more linears that vLLM computes as one.

    Of `scale * B(A(x))` it keeps the columns of A for the inputs and the rows of B for the outputs that this
    process has. Behind a linear whose inputs are split, it is added before the processes sum up.

    Args:
        inputs: which input features this process has.
        outputs: for each of the linears, the ranges of its output features that this process has.
        rank, alpha: of each linear; the scale is `alpha / rank`.
    """

    def __init__(self, inputs: range, outputs: Sequence[Sequence[range]], rank: int, alpha: float) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.widths = [sum(map(len, ranges)) for ranges in outputs]
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(len(outputs) * rank, len(inputs)), requires_grad=False)
        self.B = nn.Parameter(torch.empty(sum(self.widths), rank), requires_grad=False)
        set_weight_attrs(self.A, {"weight_loader": self._load_down})
        set_weight_attrs(self.B, {"weight_loader": self._load_up})

    def forward(self, output: Tensor, x: Tensor, image_mask: Tensor | None) -> Tensor:
        """(tokens, out) plus the low-rank product of (tokens, in) on the rows where (tokens, 1) is one."""
        if image_mask is None:
            return output
        low = F.linear(x, self.A) * image_mask
        if self.scale != 1.0:
            low = low * self.scale
        pairs = zip(low.chunk(len(self.widths), dim=-1), self.B.split(self.widths), strict=True)
        parts = [F.linear(part, up) for part, up in pairs]
        return output + (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))

    def _load_down(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """(rank, all inputs) of the linear that `shard_id` numbers."""
        shard = parameter.data.chunk(len(self.widths))[getattr(weight, "shard_id", 0)]
        shard.copy_(weight[:, self.inputs.start : self.inputs.stop])

    def _load_up(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """(all outputs, rank) of the linear that `shard_id` numbers."""
        number = getattr(weight, "shard_id", 0)
        rows = [weight[rows.start : rows.stop] for rows in self.outputs[number]]
        parameter.data.split(self.widths)[number].copy_(torch.cat(rows))


def own_share(total: int, num_shares: int | None = None, index: int | None = None) -> range:
    """This process's part of features that are split evenly."""
    size = total // (num_shares or get_tensor_model_parallel_world_size())
    start = size * (get_tensor_model_parallel_rank() if index is None else index)
    return range(start, start + size)


def own_heads(heads: int, kv_heads: int, head_dim: int) -> list[range]:
    """This process's query, key and value features among all queries, all keys, all values.

    If there are fewer key-value heads than processes, several processes have the same one.
    """
    num_processes, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    num_shares = min(num_processes, kv_heads)
    own = own_share(kv_heads * head_dim, num_shares, rank // (num_processes // num_shares))
    keys = heads * head_dim
    values = keys + kv_heads * head_dim
    shifted = [range(start + own.start, start + own.stop) for start in (keys, values)]
    return [own_share(heads * head_dim), *shifted]


# ---- layers ----


def rotation_of(text, max_model_len: int) -> dict:
    """`rope_parameters` as vLLM reads them.

    vLLM's own "dynamic" rotates short prompts differently. Up to the trained positions the plain rotation is
    that of `chat`; beyond, it is that of a prompt as long as the engine allows.
    """
    parameters = dict(text.rope_parameters)
    if parameters.get("rope_type") != "dynamic":
        return parameters
    factor, trained = parameters.pop("factor"), text.max_position_embeddings
    if max_model_len > trained:
        growth = factor * max_model_len / trained - (factor - 1)
        parameters["rope_theta"] *= growth ** (text.head_dim / (text.head_dim - 2))
    return {**parameters, "rope_type": "default"}


class FamilyAttention(nn.Module):
    """Grouped-query attention with Partial LoRA in both linears."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        text, quantization = vllm_config.model_config.hf_text_config, vllm_config.quant_config
        cache: CacheConfig | None = vllm_config.cache_config
        max_model_len = vllm_config.model_config.max_model_len
        hidden, dim = text.hidden_size, text.head_dim
        heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.wqkv = QKVParallelLinear(
            hidden, dim, heads, kv_heads, bias=False, quant_config=quantization, prefix=f"{prefix}.wqkv"
        )
        num_heads, num_kv_heads = self.wqkv.num_heads, self.wqkv.num_kv_heads
        self.sizes = [num_heads * dim, num_kv_heads * dim, num_kv_heads * dim]
        self.wqkv_plora = ImageLowRank(
            range(hidden), [own_heads(heads, kv_heads, dim)], text.plora_wqkv_rank, text.plora_wqkv_alpha
        )
        self.wo = row_parallel(heads * dim, hidden, quantization, f"{prefix}.wo")
        self.wo_plora = ImageLowRank(
            own_share(heads * dim), [[range(hidden)]], text.plora_rank, text.plora_alpha
        )
        self.rotary_emb = get_rope(
            dim,
            max_position=max(text.max_position_embeddings, max_model_len),
            rope_parameters=rotation_of(text, max_model_len),
        )
        self.attn = Attention(
            num_heads,
            dim,
            dim**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=cache,
            quant_config=quantization,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x: Tensor, image_mask: Tensor | None) -> Tensor:
        """(tokens, hidden) -> (tokens, hidden)."""
        packed = self.wqkv_plora(self.wqkv(x)[0], x, image_mask)
        query, key, value = packed.split(self.sizes, dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        attended = self.attn(query, key, value)
        return summed(self.wo_plora(self.wo(attended)[0], attended, image_mask))


class FamilyMLP(nn.Module):
    """SwiGLU with Partial LoRA in its three linears."""

    def __init__(self, text, quantization: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        hidden, inner, rank, alpha = (
            text.hidden_size,
            text.intermediate_size,
            text.plora_rank,
            text.plora_alpha,
        )
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner] * 2, bias=False, quant_config=quantization, prefix=f"{prefix}.gate_up_proj"
        )
        self.gate_up_plora = ImageLowRank(range(hidden), [[own_share(inner)]] * 2, rank, alpha)
        self.w2 = row_parallel(inner, hidden, quantization, f"{prefix}.w2")
        self.w2_plora = ImageLowRank(own_share(inner), [[range(hidden)]], rank, alpha)
        self.act_fn = SiluAndMul()

    def forward(self, x: Tensor, image_mask: Tensor | None) -> Tensor:
        """(tokens, hidden) -> (tokens, hidden)."""
        inner = self.act_fn(self.gate_up_plora(self.gate_up_proj(x)[0], x, image_mask))
        return summed(self.w2_plora(self.w2(inner)[0], inner, image_mask))


def row_parallel(
    inputs: int, outputs: int, quantization: QuantizationConfig | None, prefix: str
) -> RowParallelLinear:
    """A linear whose inputs are split among processes, and whose outputs are not summed up yet."""
    return RowParallelLinear(
        inputs, outputs, bias=False, reduce_results=False, quant_config=quantization, prefix=prefix
    )


def summed(x: Tensor) -> Tensor:
    """The sum over the processes."""
    return tensor_model_parallel_all_reduce(x) if get_tensor_model_parallel_world_size() > 1 else x


class FamilyDecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm that also adds the residual."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        text = vllm_config.model_config.hf_text_config
        self.attention = FamilyAttention(vllm_config, f"{prefix}.attention")
        self.feed_forward = FamilyMLP(text, vllm_config.quant_config, f"{prefix}.feed_forward")
        self.attention_norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.ffn_norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def forward(
        self, positions: Tensor, x: Tensor, residual: Tensor | None, image_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(tokens, hidden) and the residual -> the same, not added yet."""
        if residual is None:
            residual, x = x, self.attention_norm(x)
        else:
            x, residual = self.attention_norm(x, residual)
        x, residual = self.ffn_norm(self.attention(positions, x, image_mask), residual)
        return self.feed_forward(x, image_mask), residual


@support_torch_compile
class FamilyDecoder(nn.Module):
    """Embeddings, the layers of this process, and on the last one the final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        text = vllm_config.model_config.hf_text_config
        self.tok_embeddings = VocabParallelEmbedding(text.vocab_size, text.hidden_size)
        self.start_layer, self.end_layer, self.layers = make_layers(
            text.num_hidden_layers,
            lambda prefix: FamilyDecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """(tokens,) -> (tokens, hidden)."""
        return self.tok_embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """(tokens,) ids or (tokens, hidden) embeddings, or what the process before has -> (tokens, hidden).

        Args:
            image_mask: (tokens, 1), one on image tokens and zero elsewhere; `None` if there are none.
        """
        if get_pp_group().is_first_rank:
            x, residual = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds, None
        else:
            x, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x, residual = layer(positions, x, residual, image_mask)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x, "residual": residual})
        return self.norm(x, residual)[0]
