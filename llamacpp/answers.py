"""How an answer grows: which token comes next, and where it ends, with the arguments of `generate`."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..generation_internlm_xcomposer2 import EndMarkFilter, RowPenalty
from ..prompt_internlm_xcomposer2 import ChatPrompt
from ..settings_internlm_xcomposer2 import DEFAULT_TOP_K, as_list

# In the order in which `generate` applies them, and what leaves the scores as they are.
_WARPERS = {
    "temperature": (TemperatureLogitsWarper, 1.0),
    "top_k": (TopKLogitsWarper, 0),
    "top_p": (TopPLogitsWarper, 1.0),
    "min_p": (MinPLogitsWarper, 0),
}

SETTINGS = (
    "max_new_tokens",
    "do_sample",
    *_WARPERS,
    "repetition_penalty",
    "infer_mode",
    "eos_token_id",
    "pad_token_id",
    "streamer",
    "stopping_criteria",
    "logits_processor",
)
# What has no meaning without beams, or is as it should be anyway.
_HARMLESS = ("length_penalty", "early_stopping", "num_beams", "num_return_sequences", "use_cache")


def check_answerable(settings: dict) -> None:
    """Raise `ValueError` for arguments of `generate` that llama.cpp has no part in."""
    for name in ("num_beams", "num_return_sequences"):
        if (settings.get(name) or 1) != 1:
            raise ValueError(
                f"llama.cpp decodes one answer at a time, but {name} is {settings[name]}; pass {name}=1, or "
                "load the checkpoint with torch"
            )
    known = (*SETTINGS, *_HARMLESS)
    if unknown := [name for name, value in settings.items() if name not in known and value is not None]:
        raise ValueError(
            f"llama.cpp doesn't take {', '.join(unknown)}; it takes {', '.join(SETTINGS)}. Load the "
            "checkpoint with torch for the others"
        )


class Answer:
    """An answer as it grows.

    Attributes:
        ids: the tokens so far, with the one that ended it.
        is_complete: whether there will be no more.
        is_cut: whether the context ended it.

    Args:
        room: how many tokens the context leaves for it.
        defaults: of the checkpoint.
    """

    def __init__(self, prompt: ChatPrompt, settings: dict, room: int, defaults: GenerationConfig) -> None:
        self.ids: list[int] = []
        self.is_complete = self.is_cut = False
        wanted = settings.get("max_new_tokens")
        self._limit = room if wanted is None else min(wanted, room)
        self._is_short = wanted is None or room < wanted
        self._samples = bool(settings.get("do_sample"))
        self._stop_ids = set(as_list(settings.get("eos_token_id")))
        self._criteria = list(settings.get("stopping_criteria") or ())
        self._processors = _processors(prompt, settings, defaults)
        self._streamer = None
        if (streamer := settings.get("streamer")) is not None:
            self._streamer = EndMarkFilter(streamer, list(self._stop_ids))
            self._streamer.put(torch.empty(1, 0, dtype=torch.long))  # the prompt, which went in as embeddings

    def grow(self, logits: np.ndarray) -> None:
        """Choose the next token by (vocabulary,) logits."""
        scores = torch.from_numpy(logits)[None]
        so_far = torch.tensor([self.ids], dtype=torch.long)
        scores = self._processors(so_far, scores)
        if self._samples:
            token = int(torch.multinomial(scores.softmax(dim=-1), num_samples=1))
        else:
            token = int(scores.argmax())
        self.ids.append(token)
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token]))
        self.is_complete = self._ends(token, scores)
        if self.is_complete and self._streamer is not None:
            self._streamer.end()

    def _ends(self, token: int, scores: torch.Tensor) -> bool:
        ids = torch.tensor([self.ids], dtype=torch.long)
        if token in self._stop_ids or any(bool(criterion(ids, scores)) for criterion in self._criteria):
            return True
        self.is_cut = self._is_short and len(self.ids) == self._limit
        return len(self.ids) == self._limit


def _processors(prompt: ChatPrompt, settings: dict, defaults: GenerationConfig) -> LogitsProcessorList:
    """What changes the scores: the penalty over new tokens, the caller's processors, then the sampling."""
    processors = LogitsProcessorList()
    penalty = settings.get("repetition_penalty") or defaults.repetition_penalty or 1.0
    if penalty != 1.0:
        processors.append(RowPenalty(penalty, [prompt.ids if prompt.penalise_prompt else []]))
    processors += settings.get("logits_processor") or []
    if settings.get("do_sample"):
        processors += _warpers(settings, defaults)
    return processors


def _warpers(settings: dict, defaults: GenerationConfig) -> Sequence:
    found = []
    for name, (warper, neutral) in _WARPERS.items():
        values = (
            settings.get(name),
            getattr(defaults, name, None),
            DEFAULT_TOP_K if name == "top_k" else None,
        )
        value = next((value for value in values if value is not None), None)
        if value is not None and value != neutral:
            found.append(warper(value))
    return found
