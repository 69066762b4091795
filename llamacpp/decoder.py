"""A decoder that llama.cpp runs: text and pictures in, logits out.

Partial LoRA acts on picture tokens only, which llama.cpp has no notion of. But adapters can be switched
between two calls that fill the same context: pictures are decoded with Partial LoRA set as an adapter, text
without it.
"""

import ctypes
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .files import (
    DECODER,
    EXPORT_KEY,
    PLORA,
    VISION,
    check_same_export,
    export_of_record,
    export_of_vision,
    is_first_generation,
    mode_file,
)
from .library import Library, file_name, load_library

BASE, PICTURES = "base", "pictures"  # besides the inference modes with adapters: what acts on nothing else

FLOAT_TYPES = ("f32", "f16", "bf16")
KV_TYPES = (*FLOAT_TYPES, "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
BATCH = 512  # tokens decoded in one call: bounds how long an interrupt waits
CPU_BATCH = 128  # computed at once on a CPU, which gains nothing from more: bounds the memory
MAX_SEQUENCES = 16  # decoded side by side


class LlamaDecoder:
    """A decoder and its context, in which several sequences can be decoded side by side.

    Attributes:
        num_positions: how many tokens the context holds, all sequences together.
        num_sequences: how many sequences it holds.
    """

    def __init__(self, library: Library, model, context, adapters: dict[str, object], num_positions: int):
        api = library.api
        self.library, self.num_positions = library, num_positions
        self.num_sequences = api.llama_n_seq_max(context)
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.hidden_size = api.llama_model_n_embd(model)
        self._context, self._adapters = context, adapters
        self._batch = api.llama_n_batch(context)
        self._memory = api.llama_get_memory(context)
        weakref.finalize(self, _free, api, model, context)

    def use(self, names: Sequence[str]) -> None:
        """Set the adapters for what is decoded next: `PICTURES` or inference modes.

        Raises:
            KeyError: an adapter wasn't loaded.
        """
        api, chosen = self.library.api, [self._adapters[name] for name in names]
        pointers = (api.llama_adapter_lora_p_ctypes * len(chosen))(*chosen) if chosen else None
        scales = (ctypes.c_float * len(chosen))(*[1.0] * len(chosen)) if chosen else None
        if api.llama_set_adapters_lora(self._context, pointers, len(chosen), scales):
            raise RuntimeError(f"llama.cpp can't set the adapters {', '.join(names)}")

    def prefill(self, content: Sequence[int] | np.ndarray, start: int, sequence: int = 0) -> np.ndarray:
        """Decode tokens at positions from `start` on, each of which sees those before it.

        Args:
            content: (tokens,) ids, or (tokens, hidden) embeddings of a picture.

        Returns:
            (vocabulary,) logits after the last token.
        """
        for first in range(0, len(content), self._batch):
            piece = content[first : first + self._batch]
            positions = np.arange(start + first, start + first + len(piece))
            is_last = np.zeros(len(piece), dtype=np.int8)
            is_last[-1] = first + len(piece) == len(content)
            self._decode(piece, positions, np.full(len(piece), sequence), is_last)
        return self._logits(-1)

    def step(
        self, ids: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> list[np.ndarray]:
        """Decode one more token of each of several sequences -> (vocabulary,) logits after each."""
        self._decode(ids, positions, sequences, np.ones(len(ids), dtype=np.int8))
        return [self._logits(index) for index in range(len(ids))]

    def forget(self, sequence: int | None = None, start: int = 0) -> None:
        """Remove a sequence's tokens from position `start` on, or everything."""
        if sequence is None:
            self.library.api.llama_memory_clear(self._memory, False)
        else:
            self.library.api.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def _decode(self, content, positions, sequences, wanted: np.ndarray) -> None:
        """Decode tokens, each at its position of its sequence.

        Args:
            content: (tokens,) ids, or (tokens, hidden) embeddings.
            wanted: (tokens,) whether the logits after a token are wanted.
        """
        api, is_text = self.library.api, not isinstance(content, np.ndarray)
        content = np.ascontiguousarray(content, dtype=np.int32 if is_text else np.float32)
        sequences = np.ascontiguousarray(sequences, dtype=np.int32)
        # The type is that of a pointer to one sequence's number for each token.
        places = sequences.ctypes.data + sequences.itemsize * np.arange(len(content), dtype=np.uint64)
        fields = {
            "token" if is_text else "embd": content,
            "pos": np.ascontiguousarray(positions, dtype=np.int32),
            "n_seq_id": np.ones(len(content), dtype=np.int32),
            "seq_id": places,
            "logits": wanted,
        }
        batch = api.llama_batch(n_tokens=len(content))
        kinds = dict(api.llama_batch._fields_)
        for name, values in fields.items():
            setattr(batch, name, ctypes.cast(values.ctypes.data, kinds[name]))
        with self.library.complaining(f"llama.cpp can't decode {len(content)} tokens") as fault:
            if code := api.llama_decode(self._context, batch):
                raise RuntimeError(f"{fault()} (code {code})")

    def _logits(self, index: int) -> np.ndarray:
        """(vocabulary,) logits after a token of the last batch, copied."""
        pointer = self.library.api.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(pointer, (self.vocab_size,)).copy()


def _free(api, model, context) -> None:
    api.llama_free(context)
    api.llama_model_free(model)


def load_decoder(
    directory: Path,
    modes: Sequence[str],
    *,
    num_positions: int,
    num_threads: int,
    num_gpu_layers: int,
    kv_type: str | None,
) -> LlamaDecoder:
    """Load a decoder with Partial LoRA and the task adapters of some inference modes.

    Args:
        kv_type: of keys and values; `None` for f32 if the weights are, else f16.

    Raises:
        ImportError: llama-cpp-python is missing.
        ValueError: a file is damaged, from another export, or of another model; or there is too little
            memory for the context.
    """
    library = load_library()
    api = library.api
    parameters = api.llama_model_default_params()
    parameters.n_gpu_layers = num_gpu_layers
    # llama.cpp rearranges some types for the CPU; the rest of a mapped file would stay in memory beside them.
    if not num_gpu_layers:
        parameters.load_mode = api.LLAMA_LOAD_MODE_NONE
    with library.complaining(f"llama.cpp can't load {directory / DECODER}") as fault:
        model = api.llama_model_load_from_file(file_name(directory / DECODER), parameters)
        if not model:
            raise fault()
    context = None
    try:
        adapters = _load_adapters(library, model, directory, modes)
        if kv_type is None:
            is_f32 = library.metadata(api.llama_model_meta_val_str, model, "general.file_type") == "0"
            kv_type = "f32" if is_f32 else "f16"
        parameters = _context_parameters(api, num_positions, num_threads, kv_type, num_gpu_layers != 0)
        about = f"llama.cpp can't make a context of n_ctx {num_positions} with kv_type {kv_type}"
        with library.complaining(about) as fault:
            context = api.llama_init_from_model(model, parameters)
            if not context:
                raise fault()
        return LlamaDecoder(library, model, context, adapters, num_positions)
    except BaseException:
        if context is not None:
            api.llama_free(context)
        api.llama_model_free(model)
        raise


def _load_adapters(library: Library, model, directory: Path, modes: Sequence[str]) -> dict[str, object]:
    """Adapters by what they act on, after checking that all files are from one export.

    All are loaded before the context, which makes room for them.
    """
    api, adapters = library.api, {}
    exports = {DECODER: library.metadata(api.llama_model_meta_val_str, model, EXPORT_KEY)}
    exports[VISION] = export_of_vision(directory)
    if (export := export_of_record(directory)) is not None:
        exports["config.json"] = export
    check_same_export(directory, exports)
    files = {} if is_first_generation(directory) else {PICTURES: PLORA}
    for name, file in {**files, **{mode: mode_file(mode) for mode in modes}}.items():
        with library.complaining(f"llama.cpp can't load {directory / file}") as fault:
            adapter = api.llama_adapter_lora_init(model, file_name(directory / file))
            if not adapter:
                raise fault()
        exports[file] = library.metadata(api.llama_adapter_meta_val_str, adapter, EXPORT_KEY)
        check_same_export(directory, exports)
        adapters[name] = adapter
    return adapters


def _context_parameters(api, num_positions: int, num_threads: int, kv_type: str, has_gpu: bool):
    """A context for causal decoding of up to `num_positions` tokens in all sequences together."""
    parameters = api.llama_context_default_params()
    parameters.n_ctx = num_positions
    parameters.n_batch = min(BATCH, num_positions)
    parameters.n_ubatch = parameters.n_batch if has_gpu else min(CPU_BATCH, num_positions)
    parameters.n_seq_max = MAX_SEQUENCES
    parameters.kv_unified = True  # so that one sequence may take the whole context
    parameters.n_threads = parameters.n_threads_batch = num_threads
    parameters.type_k = parameters.type_v = getattr(api, f"GGML_TYPE_{kv_type.upper()}")
    # On a CPU, a token takes a third longer with flash attention. Quantised values need it.
    if kv_type in FLOAT_TYPES and not has_gpu:
        parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return parameters
