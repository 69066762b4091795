"""The name by which the tokenizer configuration of some published checkpoints asks for the tokenizer."""

from .tokenization_internlm_xcomposer2 import InternLMXComposer2Tokenizer


class InternLM2Tokenizer(InternLMXComposer2Tokenizer):
    """`InternLMXComposer2Tokenizer` under its other published name."""
