"""What a decoder has computed for a prompt (its keys and values), kept so that nothing is computed twice."""

import weakref
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .cache_internlm_xcomposer2 import GrowingCache

# What makes peft's wrappers compute something else without touching a weight's version.
ADAPTER_STATE = ("merged_adapters", "active_adapters", "disable_adapters")


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of the tokens of one conversation, and what those tokens are. Never changed once made.

    Attributes:
        tokens: what stands at each position: a token's id, or for image tokens the picture's identity.
        layers: per layer keys and values, each (1, kv heads, tokens, head_dim).
        origin: what else the values depend on, as `origin_of` gives it.
    """

    tokens: Sequence[Hashable]
    layers: Sequence[tuple[Tensor, Tensor]]
    origin: Hashable

    @property
    def nbytes(self) -> int:
        """Size of keys and values in bytes."""
        return sum(tensor.numel() * tensor.element_size() for layer in self.layers for tensor in layer)

    def shared_length(self, tokens: Sequence[Hashable], origin: Hashable) -> int:
        """How many tokens at the start of another prompt are these."""
        if origin != self.origin:
            return 0
        pairs = zip(self.tokens, tokens, strict=False)
        overlap = min(len(self.tokens), len(tokens))
        return next((i for i, (mine, other) in enumerate(pairs) if mine != other), overlap)

    def restore(self, length: int, config) -> Cache:
        """A cache of its own that holds the first `length` tokens; writing to it leaves this one alone."""
        cache = GrowingCache(config)
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys[:, :, :length], values[:, :, :length], index)
        return cache


class ChatHistory(list):
    """The turns of a conversation, (question, answer), that own what the decoder computed for them.

    A list like any other. Passed to `chat` again, everything up to the first difference is reused; slices,
    sums and copies share what is there, which is never changed, so that they can be continued apart.
    Pickling leaves it out.
    """

    def __init__(
        self, turns: Iterable[tuple[str, str]] = (), prompt_cache: "PromptCache | PendingCache | None" = None
    ) -> None:
        super().__init__(turns)
        self._prompt_cache = prompt_cache

    @property
    def prompt_cache(self) -> PromptCache | None:
        """Keys and values of the last prompt and its answer, if they were kept."""
        cache = self._prompt_cache
        return cache.result if isinstance(cache, PendingCache) else cache

    def release(self) -> None:
        """Let go of keys and values now; the turns stay."""
        self._prompt_cache = None

    def copy(self) -> "ChatHistory":
        return ChatHistory(self, self._prompt_cache)

    __copy__ = copy

    def __deepcopy__(self, memo: dict) -> "ChatHistory":
        return self.copy()  # turns are tuples of text, and keys and values are never changed

    def __reduce__(self):
        return ChatHistory, (list(self),)

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return ChatHistory(item, self._prompt_cache) if isinstance(index, slice) else item

    def __add__(self, turns: list) -> "ChatHistory":
        return ChatHistory(super().__add__(turns), self._prompt_cache)


class PendingCache:
    """A place for the cache of an answer that is still being written."""

    def __init__(self) -> None:
        self.result: PromptCache | None = None


def origin_of(model: nn.Module, infer_mode: str) -> Hashable:
    """Everything beside the tokens that keys and values depend on: mode, weights and their state.

    A weight counts as changed when it was written to in place, replaced, moved or cast.
    """
    weights = tuple(
        (id(weight), 0 if weight.is_inference() else weight._version, weight.dtype, str(weight.device))
        for weight in model.parameters()
    )  # ids alone would not do: those of a model that is gone may be given to the next
    adapters = tuple(
        (name, str(getattr(module, name)))
        for module in model.modules()
        if hasattr(module, "merged_adapters")
        for name in ADAPTER_STATE
    )
    return weakref.ref(model), infer_mode, weights, adapters, str(model.config.text_config.rope_parameters)


def reusable_length(config, num_tokens: int, prompt_length: int) -> int:
    """How many of `num_tokens` cached ones may serve another prompt, given the one they were computed for.

    Dynamic NTK rotates the keys of a prompt beyond `max_position_embeddings` by its length, so that those of
    another length can't use them.
    """
    if config.rope_parameters["rope_type"] != "dynamic":
        return num_tokens
    limit = config.max_position_embeddings
    return min(num_tokens, limit) if prompt_length <= limit else 0


def capture(
    cache: Cache, tokens: Sequence[Hashable], origin: Hashable, length: int, limit: int
) -> PromptCache | None:
    """The first `length` tokens of a cache's first row, or as many of them as `limit` bytes hold."""
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    per_token = sum(t.shape[1] * t.shape[3] * t.element_size() for layer in layers for t in layer)
    length = min(length, cache.get_seq_length(), len(tokens), limit // per_token)
    if length < 1:
        return None
    kept = [tuple(_first_row(tensor, length) for tensor in layer) for layer in layers]
    return PromptCache(tokens[:length], kept, origin)


def _first_row(tensor: Tensor, length: int) -> Tensor:
    """(rows, heads, tokens, d) -> (1, heads, length, d), copied where a view would hold much more alive."""
    row = tensor[:1, :, :length]
    held = tensor.untyped_storage().nbytes()
    return row if held <= 1.25 * row.numel() * row.element_size() else row.clone()


# Arguments with which `generate` needs a cache of its own kind, or more of the prompt than its last token.
LIBRARY_CACHE = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "past_key_values",
    "cache_implementation",
    "custom_generate",
    "prefill_chunk_size",
    "output_attentions",
    "output_hidden_states",
    "guidance_scale",
    "penalty_alpha",
    "dola_layers",
    "position_ids",
)


def is_assisted(settings: dict) -> bool:
    """Whether `generate` would guess tokens ahead, with these arguments."""
    return any(settings.get(name) for name in ("assistant_model", "prompt_lookup_num_tokens"))


def setting(model: nn.Module, kwargs: dict, name: str):
    """What `generate` would take for one of its arguments, `None` for its default."""
    sources = (kwargs.get("generation_config"), model.generation_config)
    values = (kwargs.get(name), *(getattr(source, name, None) for source in sources))
    return next((value for value in values if value is not None), None)


def num_copies(model: nn.Module, kwargs: dict) -> int:
    """How many sequences `generate` makes of each prompt: beams, or samples."""
    return max(setting(model, kwargs, name) or 1 for name in ("num_beams", "num_return_sequences"))


def prefills_once(model: nn.Module, kwargs: dict) -> bool:
    """Whether `generate`, with these arguments, can begin from a prompt that is computed already."""
    if setting(model, kwargs, "use_cache") is False or setting(model, kwargs, "max_new_tokens") is None:
        return False
    return not any(setting(model, kwargs, name) for name in LIBRARY_CACHE)


def ends_in_text(inputs_embeds: Tensor, attention_mask: Tensor | None, im_mask: Tensor | None) -> bool:
    """Whether there are several tokens, and the last of each row is neither padding nor part of a picture."""
    last_is_real = attention_mask is None or bool(attention_mask[:, -1].all())
    return inputs_embeds.shape[1] > 1 and last_is_real and (im_mask is None or not bool(im_mask[:, -1].any()))


@torch.no_grad()
def start_generation(
    model: nn.Module,
    cache: Cache,
    *,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    im_mask: Tensor | None,
    infer_mode: str,
    kwargs: dict,
) -> dict:
    """Compute keys and values of all but the last token, once for all beams or samples of a prompt.

    Args:
        cache: what is computed already, in batch size; it is filled and then repeated for each copy.
        inputs_embeds: (batch, tokens, hidden) behind what the cache holds, at least one token.
        attention_mask: (batch, cached and new tokens), `None` if nothing is padding.
        im_mask: (batch, tokens), true on image tokens.

    Returns:
        What `generate` needs to go on from there: the cache, and the last token's embedding.
    """
    if inputs_embeds.shape[1] > 1:
        model.model(
            inputs_embeds=inputs_embeds[:, :-1],
            attention_mask=None if attention_mask is None else attention_mask[:, :-1],
            past_key_values=cache,
            im_mask=None if im_mask is None else im_mask[:, :-1],
            infer_mode=infer_mode,
            use_cache=True,
        )
    copies = num_copies(model, kwargs)
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    return {"past_key_values": cache, "inputs_embeds": inputs_embeds[:, -1:]}
