"""Keys and values: what a decoder has computed, within a turn and across turns.

`GrowingCache` is what `generate` fills. `PromptCache` is what remains of it, owned by the `ChatHistory` that
`chat` returns, so that the next turn computes only what is new.
"""

import functools
import hashlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# ---- the name of the cache ----

# transformers 5.24 renamed `past_key_values` to `cache` in `forward`, in outputs and in `generate`. Our code
# says `cache`; this is what the installed release says.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
CACHE_NAMES = ("cache", "past_key_values")


def pop_cache(kwargs: dict) -> Cache | None:
    """Take the cache out of keyword arguments, under whichever name the caller used.

    Raises:
        ValueError: two caches, one under each name.
    """
    cache, older = kwargs.pop("cache", None), kwargs.pop("past_key_values", None)
    if cache is not None and older is not None:
        raise ValueError("cache and past_key_values are two names for one argument; pass one of them")
    return older if cache is None else cache


def accepts_both_names(method: Callable) -> Callable:
    """Let a method with a `cache` argument be called with `past_key_values` too."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        if "past_key_values" in kwargs:
            kwargs["cache"] = pop_cache(kwargs)
        return method(*args, **kwargs)

    return call


# ---- a cache that grows in place ----

# Spare room when a layer is full: 1 / SPARE_PART of its tokens, but at least LEAST_SPARE tokens.
SPARE_PART = 8
LEAST_SPARE = 128


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, at the start of larger buffers.

    `keys` and `values` are (batch, heads, tokens, head_dim) as in every cache of transformers, and may be
    replaced from outside: whatever is there at the next update counts.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._views: tuple[Tensor, Tensor] | None = None
        self._num_alike = 0  # how many leading tokens are the same in all rows that came from one

    @property
    def is_own(self) -> bool:
        """Whether `keys` and `values` are still the start of the buffers, and can be written to here."""
        if self._views is None or self.keys is not self._views[0] or self.values is not self._views[1]:
            return False
        return torch.is_inference_mode_enabled() or not self.keys.is_inference()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """(batch, heads, new tokens, head_dim) each -> all keys and all values.

        Raises:
            ValueError: the number of rows has changed.
        """
        needs_old = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if needs_old or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys.shape[0] != key_states.shape[0]:
            raise ValueError(f"the cache holds {self.keys.shape[0]} rows, but got {key_states.shape[0]}")
        past, length = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if not self.is_own or length > self._buffers[0].shape[2]:
            self._move(length)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, past:length] = new
        self._show(length)
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Start without tokens, with the rows and heads of (batch, heads, new tokens, head_dim)."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def _move(self, length: int, repeats: int = 1) -> None:
        """Move `keys` and `values` to the start of larger buffers, each row `repeats` times."""
        if not self.is_own:
            self._num_alike = 0  # replaced from outside: nothing is known about them
        past, buffers = self.keys.shape[2], []
        for old in (self.keys, self.values):
            rows, heads, _, head_dim = old.shape
            size = length + max(LEAST_SPARE, length // SPARE_PART)
            buffer = old.new_empty(rows, repeats, heads, size, head_dim)
            buffer[:, :, :, :past] = old[:, None]
            buffers.append(buffer.flatten(0, 1))
        self._buffers = tuple(buffers)
        self._show(past)

    def _show(self, length: int) -> None:
        """Make `keys` and `values` the first `length` tokens of the buffers."""
        self.keys, self.values = self._views = tuple(buffer[:, :, :length] for buffer in self._buffers)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, but keep the room they took."""
        is_own = self.is_own
        super().crop(tokens_to_remove)
        if is_own:
            self._show(self.keys.shape[2])
            self._num_alike = min(self._num_alike, self.keys.shape[2])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, in one copy that includes room for new tokens."""
        if self.get_seq_length():
            self._move(self.keys.shape[2], repeats)
            self._num_alike = self.keys.shape[2]

    def reorder_cache(self, beam_idx: Tensor, among_alike: bool = False) -> None:
        """Give each row the tokens of row `beam_idx` (batch,).

        Args:
            among_alike: each row gets the tokens of one that came from the same row when rows were last
                repeated, so the tokens from before then need not move.
        """
        if not self.is_own:
            super().reorder_cache(beam_idx)
            return
        beam_idx = beam_idx.to(self.keys.device)
        if among_alike:
            for states in (self.keys, self.values):
                tail = states[:, :, self._num_alike :]
                tail.copy_(tail.index_select(0, beam_idx))
            return
        self._num_alike, length = 0, self.keys.shape[2]
        self._buffers = tuple(buffer.index_select(0, beam_idx) for buffer in self._buffers)
        self._show(length)


class GrowingCache(Cache):
    """The cache of one prompt, or of a batch, in a `GrowingLayer` per layer of the decoder.

    A decoding step writes its own token and moves nothing else.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[GrowingLayer() for _ in range(num_layers)])
        self._repeats = 1

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, for beams or several answers to one prompt."""
        super().batch_repeat_interleave(repeats)
        self._repeats = repeats

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each row the tokens of row `beam_idx` (batch,); prompts that beams share stay in place."""
        order = torch.arange(len(beam_idx), device=beam_idx.device)
        if torch.equal(beam_idx, order):
            return
        among_alike = self._repeats > 1 and torch.equal(beam_idx // self._repeats, order // self._repeats)
        for layer in self.layers:
            layer.reorder_cache(beam_idx, among_alike)


# ---- what is kept across turns ----

# A token's id, and its place in a list.
TOKEN_BYTES = 40
# What changes the output of peft's wrappers without changing a weight's version.
ADAPTER_STATE = ("merged_adapters", "active_adapters", "disable_adapters")


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of the tokens of one conversation, and what those tokens are. Never modified.

    Attributes:
        tokens: what is at each position: a token's id, or the picture's identity for image tokens.
        layers: keys and values of each layer, each (1, kv heads, tokens, head_dim).
        origin: what else the values depend on, as `origin_of` returns it.
    """

    tokens: Sequence[Hashable]
    layers: Sequence[tuple[Tensor, Tensor]]
    origin: Hashable

    @property
    def nbytes(self) -> int:
        """What is kept, in bytes: the storage of keys and values, and the tokens."""
        storages = [tensor.untyped_storage() for layer in self.layers for tensor in layer]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(held.values()) + TOKEN_BYTES * len(self.tokens)

    def shared_length(self, tokens: Sequence[Hashable], origin: Hashable) -> int:
        """How many leading tokens of another prompt are the same as these."""
        if origin != self.origin:
            return 0
        pairs = zip(self.tokens, tokens, strict=False)
        overlap = min(len(self.tokens), len(tokens))
        return next((i for i, (mine, other) in enumerate(pairs) if mine != other), overlap)

    def restore(self, length: int, config) -> Cache:
        """A separate cache of the first `length` tokens; writing to it leaves this one unchanged."""
        cache = GrowingCache(config)
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys[:, :, :length], values[:, :, :length], index)
        return cache


class ChatHistory(list):
    """The turns of a conversation, (question, answer), with what the decoder computed for them.

    Otherwise an ordinary list. When it is passed to `chat` again, everything up to the first difference is
    reused. Slices, sums and copies share what was computed, which is never modified, so they can be continued
    independently. Pickling leaves it out.
    """

    def __init__(
        self, turns: Iterable[tuple[str, str]] = (), prompt_cache: PromptCache | Future | None = None
    ) -> None:
        super().__init__(turns)
        self._prompt_cache = prompt_cache

    @property
    def prompt_cache(self) -> PromptCache | None:
        """Keys and values of the last prompt and its answer, if they were kept.

        Those of an answer that is still being written arrive as a `Future`; until then this is `None`.
        """
        cache = self._prompt_cache
        if isinstance(cache, Future):
            return cache.result() if cache.done() and cache.exception() is None else None
        return cache

    def release(self) -> None:
        """Free the keys and values now; the turns stay."""
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


def origin_of(model: nn.Module, infer_mode: str) -> Hashable:
    """Everything besides the tokens that keys and values depend on: mode, weights and their state.

    A weight counts as changed if it was written to in place, replaced, moved or cast.
    """
    state = hashlib.blake2b(f"{infer_mode} {model.config.text_config.rope_parameters}".encode())
    for weight in model.parameters():
        version = 0 if weight.is_inference() else weight._version
        state.update(f"{id(weight)} {version} {weight.dtype} {weight.device} ".encode())
    for module in model.modules():
        if hasattr(module, "merged_adapters"):
            state.update(repr([str(getattr(module, name)) for name in ADAPTER_STATE]).encode())
    # The model too: the ids of a deleted one may be reused by the next.
    return weakref.ref(model), state.digest()


def rotates_by_length(config) -> bool:
    """Whether the keys of a prompt beyond `max_position_embeddings` depend on its length (dynamic NTK)."""
    return config.rope_parameters["rope_type"] == "dynamic"


def reusable_length(config, num_tokens: int, prompt_length: int) -> int:
    """How many of `num_tokens` cached tokens another prompt may reuse, given the one they were computed for.

    Dynamic NTK rotates the keys of a prompt beyond `max_position_embeddings` according to its length, so
    prompts of another length can't reuse them.
    """
    if not rotates_by_length(config):
        return num_tokens
    limit = config.max_position_embeddings
    return min(num_tokens, limit) if prompt_length <= limit else 0


def capture(
    cache: Cache, tokens: Sequence[Hashable], origin: Hashable, length: int, limit: int
) -> PromptCache | None:
    """The first `length` tokens of a cache's first row, or as many as fit in `limit` bytes."""
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    per_token = sum(t.shape[1] * t.shape[3] * t.element_size() for layer in layers for t in layer)
    per_token += TOKEN_BYTES
    length = min(length, cache.get_seq_length(), len(tokens), limit // per_token)
    if length < 1:
        return None
    slack = 1.25 if 1.25 * per_token * length <= limit else 1.0
    kept = [tuple(_first_row(tensor, length, slack) for tensor in layer) for layer in layers]
    return PromptCache(tokens[:length], kept, origin)


def _first_row(tensor: Tensor, length: int, slack: float) -> Tensor:
    """(rows, heads, tokens, d) -> (1, heads, length, d), copied if a view keeps `slack` times as much."""
    row = tensor[:1, :, :length]
    held = tensor.untyped_storage().nbytes()
    return row if held <= slack * row.numel() * row.element_size() else row.clone()
