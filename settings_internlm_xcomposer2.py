"""Which arguments `generate` accepts, checked before anything is computed, and what it would do with them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.utils import TransformersKwargs

from .cache_internlm_xcomposer2 import CACHE, CACHE_NAMES
from .configuration_internlm_xcomposer2 import check_infer_mode

# Arguments with which `generate` needs its own kind of cache, or more of the prompt than its last token.
LIBRARY_CACHE = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    CACHE,
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

# Whole numbers, and the least that each may be.
COUNTS = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "max_length": 1,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "prompt_lookup_num_tokens": 1,
    "max_matching_ngram_size": 1,
    "num_assistant_tokens": 1,
    "prefill_chunk_size": 1,
    "max_cache_len": 1,
}
# Numbers, with their limits: above the first (or equal, if the third is true), and at most the second.
NUMBERS = {
    "temperature": (0, None, False),
    "top_p": (0, 1, False),
    "top_h": (0, 1, False),
    "min_p": (0, 1, True),
    "typical_p": (0, 1, False),
    "epsilon_cutoff": (0, 1, True),
    "eta_cutoff": (0, 1, True),
    "repetition_penalty": (0, None, False),
    "encoder_repetition_penalty": (0, None, False),
    "length_penalty": (None, None, False),
    "guidance_scale": (None, None, False),
    "diversity_penalty": (None, None, False),
    "penalty_alpha": (0, 1, True),
    "assistant_confidence_threshold": (0, 1, True),
    "max_time": (0, None, False),
}
FLAGS = (
    "do_sample",
    "use_cache",
    "low_memory",
    "renormalize_logits",
    "remove_invalid_values",
    "token_healing",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
    "disable_compile",
    "synced_gpus",
)
# Ids of the vocabulary: one, or for some also several. -1 as the end stands for none.
TOKEN_IDS = ("pad_token_id", "bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
LISTS_OF_IDS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")

DEFAULT_TOP_K = 50  # of transformers
# Ways to generate that transformers fetches from the Hub.
FETCHED_MODES = (
    GenerationMode.CONTRASTIVE_SEARCH,
    GenerationMode.DOLA_GENERATION,
    GenerationMode.GROUP_BEAM_SEARCH,
    GenerationMode.CONSTRAINED_BEAM_SEARCH,
)


# ---- checks ----


def check_numbers(settings: Mapping[str, object]) -> None:
    """Raise `TypeError` or `ValueError` for a number or flag that no engine can use."""
    for name, least in COUNTS.items():
        _check_count(name, settings.get(name), least)
    for name, limits in NUMBERS.items():
        if not (name == "temperature" and _says_greedy(settings)):
            _check_number(name, settings.get(name), *limits)
    for name in FLAGS:
        if not isinstance(settings.get(name), bool | None):
            raise TypeError(f"{name} must be True or False, not {settings[name]!r:.80}")


def _says_greedy(settings: Mapping[str, object]) -> bool:
    """Whether a temperature of 0 comes with `do_sample=False`, as evaluation harnesses write it."""
    value = settings.get("temperature")
    return settings.get("do_sample") is False and not isinstance(value, bool) and value == 0


def check_values(text_config, settings: Mapping[str, object]) -> None:
    """Raise `TypeError` or `ValueError` for an argument that no engine can use with this decoder."""
    check_numbers(settings)
    check_infer_mode(settings.get("infer_mode", "base"), text_config)
    for name in (*TOKEN_IDS, *LISTS_OF_IDS):
        _check_ids(name, settings.get(name), text_config.vocab_size, several=name in LISTS_OF_IDS)
    for name, check in _OBJECTS.items():
        if settings.get(name) is not None:
            check(name, settings[name])


def check_settings(model: nn.Module, settings: Mapping[str, object]) -> None:
    """Raise `TypeError` or `ValueError` for arguments that `generate` could not use, or not together.

    Args:
        settings: everything that `generate` gets, except for the prompt and its images.
    """
    check_numbers(settings)
    num_beams = setting(model, settings, "num_beams") or 1
    if settings.get("streamer") is not None and num_beams > 1:
        raise ValueError(f"a streamer shows one answer as it grows, but num_beams is {num_beams}; use 1")
    check_values(model.config.text_config, settings)
    config = _generation_config(model, settings)
    if config.stop_strings is not None and settings.get("tokenizer") is None:
        raise ValueError("stop_strings need the tokenizer; pass tokenizer= too")
    config.top_k = DEFAULT_TOP_K if config.top_k is None else config.top_k
    mode = config.get_generation_mode(settings.get("assistant_model"))
    if mode in FETCHED_MODES and not settings.get("custom_generate"):
        raise ValueError(f"{mode.value} is no longer part of transformers; pass it as custom_generate")


def _generation_config(model: nn.Module, settings: Mapping[str, object]) -> GenerationConfig:
    """What `generate` would make of its arguments, as transformers checks it.

    Raises `TypeError` for an argument that neither `generate` nor the model knows.
    """
    given = settings.get("generation_config")
    config = deepcopy(model.generation_config if given is None else given)
    fields = vars(config)
    values = {name: value for name, value in settings.items() if name in fields and value is not None}
    if not settings.get("custom_generate"):
        known = {*fields, *_arguments_of(model), *TransformersKwargs.__optional_keys__}
        unknown = [name for name, value in settings.items() if name not in known and value is not None]
        if unknown:
            raise TypeError(f"generate has no argument {', '.join(sorted(map(str, unknown)))}")
    try:
        config.update(**values)
    except (AttributeError, KeyError) as error:
        raise ValueError(f"these settings can't be used together: {error}") from error
    return config


def _arguments_of(model: nn.Module) -> set[str]:
    """Arguments of `generate` itself, and those that it hands to the model."""
    callables = (GenerationMixin.generate, model.generate, model.prepare_inputs_for_generation, model.forward)
    names = {name for each in callables for name in inspect.signature(each).parameters}
    names |= {"tokenizer", "assistant_tokenizer", "trust_remote_code", *CACHE_NAMES}
    return names - {"self", "args", "kwargs", "labels", "samples"}


def _check_count(name: str, value: object, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, not {value!r:.80}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def _check_number(name: str, value: object, low: float | None, high: float | None, with_low: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r:.80}")
    too_low = low is not None and not (value >= low if with_low else value > low)
    if too_low or (high is not None and not value <= high) or value != value or abs(value) == float("inf"):
        lower = "finite" if low is None else f"{'at least' if with_low else 'above'} {low}"
        limits = lower if high is None else f"{lower} and at most {high}"
        raise ValueError(
            f"{name} must be {limits}, not {value}; do_sample=False picks the most likely tokens"
        )


def _check_ids(name: str, value: object, vocab_size: int, *, several: bool) -> None:
    """Raise unless a value is an id of the vocabulary, or where `several` may be, a list or tensor of ids."""
    if value is None:
        return
    ids = value.tolist() if isinstance(value, Tensor) else value
    ids = list(ids) if isinstance(ids, list | tuple | set) and several else [ids]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        wanted = "an id or a list of ids" if several else "an id"
        raise TypeError(f"{name} must be {wanted}, not {value!r:.80}")
    lowest = -1 if name in ("eos_token_id", "pad_token_id") else 0
    if wrong := [token for token in ids if not lowest <= token < vocab_size]:
        raise ValueError(f"{name} has {wrong[0]}, but the vocabulary has the ids 0 to {vocab_size - 1}")


def _check_instance(kind: type, advice: str) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be {advice}, not {type(value).__name__}")

    return check


def _check_callables(name: str, value: object) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(map(callable, value)):
        raise TypeError(f"{name} must be a list of objects that can be called, not {value!r:.80}")


def _check_streamer(name: str, value: object) -> None:
    if not all(callable(getattr(value, method, None)) for method in ("put", "end")):
        raise TypeError(f"{name} must have the methods put and end, as TextStreamer, not {value!r:.80}")


def _check_stop_strings(name: str, value: object) -> None:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple | set) or not all(isinstance(text, str) and text for text in texts):
        raise TypeError(f"{name} must be a text or a list of texts, none empty, not {value!r:.80}")


def _check_lists_of_ids(name: str, value: object) -> None:
    rows = value if isinstance(value, list | tuple) else [None]
    if not rows or not all(
        isinstance(row, list | tuple) and row and all(type(i) is int for i in row) for row in rows
    ):
        raise TypeError(f"{name} must be a list of lists of ids, none empty, not {value!r:.80}")


def _check_custom_generate(name: str, value: object) -> None:
    if not callable(value) and not isinstance(value, str):
        raise TypeError(f"{name} must be a function or a repository, not {type(value).__name__}")


_OBJECTS: dict[str, Callable[[str, object], None]] = {
    "generation_config": _check_instance(GenerationConfig, "a GenerationConfig"),
    "logits_processor": _check_callables,
    "stopping_criteria": _check_callables,
    "prefix_allowed_tokens_fn": _check_instance(Callable, "a function"),
    "streamer": _check_streamer,
    "stop_strings": _check_stop_strings,
    "bad_words_ids": _check_lists_of_ids,
    "custom_generate": _check_custom_generate,
    "cache_implementation": _check_instance(str, "a name"),
    "assistant_model": _check_instance(nn.Module, "a model"),
    "negative_prompt_ids": _check_instance(Tensor, "a tensor"),
    "attention_mask": _check_instance(Tensor, "a tensor"),
    **dict.fromkeys(CACHE_NAMES, _check_instance(Cache, "a cache of transformers")),
}


# ---- what `generate` would do ----


def setting(model: nn.Module, kwargs: Mapping, name: str):
    """What `generate` would use for one of its arguments, `None` for its default."""
    sources = (kwargs.get("generation_config"), model.generation_config)
    values = (kwargs.get(name), *(getattr(source, name, None) for source in sources))
    return next((value for value in values if value is not None), None)


def num_copies(model: nn.Module, kwargs: Mapping) -> int:
    """How many sequences `generate` makes of each prompt: beams, or samples."""
    return max(setting(model, kwargs, name) or 1 for name in ("num_beams", "num_return_sequences"))


def is_assisted(settings: Mapping) -> bool:
    """Whether `generate` would guess tokens ahead, with these arguments."""
    return any(settings.get(name) for name in ("assistant_model", "prompt_lookup_num_tokens"))


def grows_in_place(model: nn.Module, kwargs: Mapping) -> bool:
    """Whether a `GrowingCache` can replace the library's default cache."""
    if setting(model, kwargs, "use_cache") is False:
        return False
    return not any(
        setting(model, kwargs, name) for name in (CACHE, "cache_implementation", "custom_generate")
    )


def takes_our_cache(model: nn.Module, kwargs: Mapping) -> bool:
    """Whether `generate`, with these arguments, can continue from a cache that holds part of the prompt."""
    if setting(model, kwargs, "use_cache") is False or setting(model, kwargs, "max_new_tokens") is None:
        return False
    return not any(setting(model, kwargs, name) for name in LIBRARY_CACHE)


def as_list(ids: int | Sequence[int] | Tensor | None) -> list[int]:
    """One id, several or none, in any form that `generate` accepts, as a list."""
    return [] if ids is None else torch.as_tensor(ids).flatten().tolist()
