"""The repetition penalty of `chat`, which counts the answer alone, where vLLM's own counts the prompt too.

A request sets it as `vllm_xargs={"answer_repetition_penalty": 1.005}` over HTTP, or as `extra_args` of
`SamplingParams`; `--additional-config '{"answer_repetition_penalty": 1.005}'` is the server's default. In the
text-only form of 2 and 4KHD, which begins with BOS twice, the prompt counts, as published.

vLLM has two runners, each with its own interface.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as RunnerLogitsProcessor

PENALTY = "answer_repetition_penalty"


def check_penalty(value: object) -> float:
    """The penalty as a number.

    Raises:
        ValueError: it isn't a positive number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{PENALTY} must be a positive number, not {value!r}")
    return float(value)


def penalty_of(params: SamplingParams, default: float) -> float:
    """What a request asks for, else the server's default."""
    return check_penalty((params.extra_args or {}).get(PENALTY, default))


def default_of(vllm_config) -> float:
    """The server's default, 1 for none."""
    settings = vllm_config.additional_config
    return check_penalty(settings.get(PENALTY, 1.0)) if isinstance(settings, dict) else 1.0


def penalised(logits: Tensor, penalty: Tensor | float) -> Tensor:
    """Logits moved away from being chosen: positive ones divided, negative ones multiplied."""
    return torch.where(logits < 0, logits * penalty, logits / penalty)


def is_text_only_form(prompt: Sequence[int] | None, bos_token_id: int) -> bool:
    """Whether a prompt is the published text-only form of 2 and 4KHD."""
    return prompt is not None and list(prompt[:2]) == [bos_token_id] * 2


class BatchPenalty(LogitsProcessor):
    """For the runner that keeps a batch in place and reports what changes in it."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise `ValueError` for a penalty that is none."""
        penalty_of(sampling_params, 1.0)

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool) -> None:
        self.default = default_of(vllm_config)
        self.bos_token_id = vllm_config.model_config.hf_text_config.bos_token_id
        # By row: the penalty, the ids of the prompt that count, and the answer so far, which vLLM appends to.
        self.rows: dict[int, tuple[float, Sequence[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """It changes which token is the most likely."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that come, go and move."""
        process_dict_updates(self.rows, batch_update, self._new_row)

    def _new_row(self, params: SamplingParams, prompt: list[int] | None, answer: list[int]) -> tuple | None:
        penalty = penalty_of(params, self.default)
        counted = prompt if is_text_only_form(prompt, self.bos_token_id) else ()
        return None if penalty == 1.0 else (penalty, counted, answer)

    def apply(self, logits: Tensor) -> Tensor:
        """(requests, vocabulary) -> the same, changed in place."""
        for row, (penalty, prompt, answer) in self.rows.items():
            if seen := {*prompt, *answer}:
                columns = torch.tensor(sorted(seen), device=logits.device)
                logits[row, columns] = penalised(logits[row, columns], penalty)
        return logits


class RunnerPenalty(RunnerLogitsProcessor):
    """For the runner that keeps all tokens of all requests on the device."""

    def __init__(self, vllm_config, req_states) -> None:
        self.states = req_states
        self.default = default_of(vllm_config)
        self.bos_token_id = vllm_config.model_config.hf_text_config.bos_token_id
        self.penalties = np.ones(req_states.max_num_reqs, dtype=np.float32)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise `ValueError` for a penalty that is none."""
        penalty_of(sampling_params, 1.0)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Whether this request is penalised; its slot may have been another's."""
        self.penalties[req_idx] = penalty_of(sampling_params, self.default)
        return bool(self.penalties[req_idx] != 1.0)

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """(rows, vocabulary) -> the same, changed in place; without a wait for the device."""
        if (self.penalties[ctx.idx_mapping_np] == 1.0).all():
            return logits
        slots = ctx.expanded_idx_mapping.long()
        length = int(ctx.seq_lens_upper_bound_np.max())
        tokens = self.states.all_token_ids.gpu[slots, :length].long()  # (rows, length)
        positions = torch.arange(length, device=logits.device)
        is_text_only = (tokens[:, :2] == self.bos_token_id).all(dim=1)
        first = torch.where(is_text_only, 0, self.states.prompt_len.gpu[slots])[:, None]
        counts = (positions >= first) & (positions <= ctx.pos[:, None])
        num_columns = logits.shape[-1]
        # What doesn't count goes into a column of its own.
        columns = torch.where(counts, tokens.clamp(0, num_columns - 1), num_columns)
        seen = torch.zeros(len(logits), num_columns + 1, dtype=torch.bool, device=logits.device)
        seen = seen.scatter_(1, columns, True)[:, :num_columns]
        penalties = torch.from_numpy(self.penalties).to(logits.device, non_blocking=True)[slots][:, None]
        return logits.copy_(torch.where(seen, penalised(logits, penalties), logits))
