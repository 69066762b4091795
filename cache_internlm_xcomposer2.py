"""A key-value cache that grows in place: a step of decoding writes its own token and moves nothing else."""

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

# Room to spare whenever a layer runs full: one part in so many of its tokens, but at least so many tokens.
SPARE_PART = 8
LEAST_SPARE = 128


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, at the beginning of larger buffers.

    `keys` and `values` are (batch, heads, tokens, head_dim) as in every cache of transformers, and may be
    replaced from outside: what stands there at the next update is what counts.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._views: tuple[Tensor, Tensor] | None = None
        self._num_alike = 0  # so many first tokens are the same in all rows that came from one

    @property
    def is_own(self) -> bool:
        """Whether `keys` and `values` still are the beginning of the buffers, and can be written to here."""
        if self._views is None or self.keys is not self._views[0] or self.values is not self._views[1]:
            return False
        return torch.is_inference_mode_enabled() or not self.keys.is_inference()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """(batch, heads, new tokens, head_dim) each -> all keys and all values.

        Raises:
            ValueError: the rows are not as many as before.
        """
        needs_old = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if needs_old or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys.shape[0] != key_states.shape[0]:
            raise ValueError(f"the cache holds {self.keys.shape[0]} rows, but {key_states.shape[0]} go on")
        past, length = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if not self.is_own or length > self._buffers[0].shape[2]:
            self._move(length)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, past:length] = new
        self._show(length)
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no tokens, for rows and heads as in (batch, heads, new tokens, head_dim)."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def _move(self, length: int, repeats: int = 1) -> None:
        """Let larger buffers begin with `keys` and `values`, each row `repeats` times, with room to spare."""
        if not self.is_own:
            self._num_alike = 0  # replaced from outside: nothing is known of them
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
        """Let `keys` and `values` be the first `length` tokens of the buffers."""
        self.keys, self.values = self._views = tuple(buffer[:, :, :length] for buffer in self._buffers)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, and keep their room."""
        is_own = self.is_own
        super().crop(tokens_to_remove)
        if is_own:
            self._show(self.keys.shape[2])
            self._num_alike = min(self._num_alike, self.keys.shape[2])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times: copied once, room for what comes included."""
        if self.get_seq_length():
            self._move(self.keys.shape[2], repeats)
            self._num_alike = self.keys.shape[2]

    def reorder_cache(self, beam_idx: Tensor, among_alike: bool = False) -> None:
        """Give each row the tokens of row `beam_idx` (batch,).

        Args:
            among_alike: each row follows one that came from the same row when rows were last repeated, so
                that the tokens of that time need not move.
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


class GrowingCache(DynamicCache):
    """The cache of one prompt, or of a batch, in a `GrowingLayer` per layer of the decoder."""

    def __init__(self, config: PreTrainedConfig) -> None:
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        Cache.__init__(self, layers=[GrowingLayer() for _ in range(num_layers)])
        self._repeats = 1

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, for beams or several answers to one prompt."""
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


class GrowingCacheMixin:
    """`generate` with a `GrowingCache`, wherever neither the caller nor the settings name another."""

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs
    ) -> None:
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        is_default = given is None and generation_config.cache_implementation is None
        if is_default and isinstance(model_kwargs.get("past_key_values"), DynamicCache):
            model_kwargs["past_key_values"] = GrowingCache(self.config)
