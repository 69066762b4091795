"""The sizes of nano, and what makes it faster to train."""

import torch
from internlm_xcomposer2.configuration_internlm_xcomposer2 import InternLMXcomposer2Config
from internlm_xcomposer2.modeling_internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn import functional

from .samples import END_OF_TURN

TOWER = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 112,
    "patch_size": 14,
}
QUICK_GELU = 1.702


class FusedQuickGELUMLP(nn.Module):
    """The tower's MLP with its activation as one kernel: quick_gelu(x) = silu(1.702 x) / 1.702."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.fc1.weight * QUICK_GELU, self.fc1.bias * QUICK_GELU)
        return functional.linear(functional.silu(x), self.fc2.weight / QUICK_GELU, self.fc2.bias)


class MaskedPLoRA(nn.Module):
    """The decoder's PLoRA without gathering rows: the low-rank product everywhere, zero outside pictures."""

    def __init__(self, plora: nn.Module):
        super().__init__()
        self.linear, self.Plora_A, self.Plora_B = plora.linear, plora.Plora_A, plora.Plora_B

    def forward(
        self, x: Tensor, infer_mode: str = "base", image_rows: Tensor | slice | None = None
    ) -> Tensor:
        """(batch, tokens, in) -> (batch, tokens, out)"""
        if image_rows is None:
            return self.linear(x)
        flat = x.flatten(0, 1)
        mask = flat.new_zeros(len(flat), 1)
        mask[image_rows] = 1.0
        low_rank = self.Plora_A(flat) * mask
        return torch.addmm(self.linear(flat), low_rank, self.Plora_B.weight.T).view(*x.shape[:2], -1)


def quicken(model: nn.Module) -> None:
    """Replaces MLPs of the tower and low-rank linears by ones that compute the same in less time.

    The names of all parameters stay the same.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name == "mlp":
                parent.mlp = FusedQuickGELUMLP(child)
            elif hasattr(child, "Plora_A") and not isinstance(child, MaskedPLoRA):
                setattr(parent, name, MaskedPLoRA(child))


def new_model(pieces: SentencePieceProcessor) -> InternLMXComposer2ForCausalLM:
    """Nano with random weights. It has no dropout at this size, and its low-rank weights start at zero."""
    model = InternLMXComposer2ForCausalLM(make_config(pieces)).eval()
    for name, parameter in model.named_parameters():
        if "Plora_B" in name:
            nn.init.zeros_(parameter)
    return model


def make_config(
    pieces: SentencePieceProcessor, task_adapters: dict[str, int] | None = None
) -> InternLMXcomposer2Config:
    """The sizes of nano; ids are those of the tokenizer in the same folder."""
    return InternLMXcomposer2Config(
        version="2.5",
        vocab_size=pieces.vocab_size(),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=4096,
        max_length=4096,
        rope_theta=10_000,
        plora_rank=8,
        plora_alpha=8,
        task_adapters=task_adapters or {},
        hd_num=1,
        image_token_id=pieces.piece_to_id("[UNUSED_TOKEN_1]"),
        end_token_id=pieces.piece_to_id(END_OF_TURN),
        vision_config=TOWER,
        attn_implementation="sdpa",
    )
