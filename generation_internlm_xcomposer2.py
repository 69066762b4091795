"""`generate` with pictures: encoded and prefilled once, whatever the number of beams; old clients' forms."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache

from .cache_internlm_xcomposer2 import GrowingCache, GrowingCacheMixin
from .modeling_internlm2 import check_image_mask, check_infer_mode
from .parallel_internlm_xcomposer2 import same_draws
from .prefix_internlm_xcomposer2 import (
    ends_in_text,
    is_assisted,
    num_copies,
    prefills_once,
    setting,
    start_generation,
)


class GenerateMixin(GrowingCacheMixin):
    """`generate` and what it asks at each step. Goes before transformers' own mixin."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        im_mask: Tensor | None = None,
        infer_mode: str = "base",
        **kwargs,
    ) -> dict:
        """What one step of `generate` passes to `forward`: the mask and pictures in the first step only."""
        is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        if inputs_embeds is not None and is_prefill and input_ids.shape[1] > inputs_embeds.shape[1]:
            # In assisted generation the candidates stand after the prompt already.
            num_candidates = input_ids.shape[1] - inputs_embeds.shape[1]
            candidates = self.model.tok_embeddings(input_ids[:, -num_candidates:])
            inputs_embeds = torch.cat([inputs_embeds, candidates.to(inputs_embeds.device)], dim=1)
            im_mask = None if im_mask is None else nn.functional.pad(im_mask, (0, num_candidates))
        if inputs_embeds is not None and not is_prefill and inputs_embeds.shape[1] == 1:
            kwargs["next_sequence_length"] = 1  # the last token of a prompt that is computed already
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        inputs["infer_mode"] = infer_mode
        current = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
        if is_prefill or inputs.get("inputs_embeds") is not None:
            inputs["im_mask"] = None if im_mask is None else im_mask[:, -current.shape[1] :]
        if not is_prefill:
            inputs.pop("pixel_values", None)
            inputs.pop("image_grid_hw", None)
        return inputs

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        im_mask: Tensor | None = None,
        **kwargs,
    ):
        """As in transformers, with pictures, which are encoded once whatever the number of beams.

        With `inputs_embeds` alone the result begins with BOS and `max_length` counts BOS and new tokens, as
        clients of the published code expect; with ids it holds prompt and answer.

        Raises:
            ValueError: pictures and prompt don't match, or the checkpoint lacks what `infer_mode` needs.
        """
        check_infer_mode(kwargs.get("infer_mode", "base"), self.config.text_config)
        ids = inputs if input_ids is None else input_ids
        if pixel_values is not None:
            if ids is None:
                raise ValueError("pixel_values need input_ids, in which each picture has its image tokens")
            ids = ids.to(self.input_device)
            inputs_embeds, im_mask = self.embed_inputs(ids, pixel_values, image_grid_hw, im_mask)
            kwargs.setdefault("attention_mask", torch.ones_like(ids))
        elif inputs_embeds is not None and ids is None:
            if is_assisted(kwargs):
                raise ValueError("assisted generation guesses from ids; pass input_ids beside inputs_embeds")
            ids, kwargs = self._published_generate_arguments(inputs_embeds, kwargs)
        if im_mask is not None and inputs_embeds is not None:
            check_image_mask(im_mask, inputs_embeds)
        if im_mask is not None:
            kwargs["im_mask"] = im_mask.to(self.input_device).bool()
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        if not args and num_copies(self, kwargs) > 1:
            kwargs = self._prefill_before_copies(ids, kwargs)
        with same_draws(self):
            return super().generate(ids, *args, **kwargs)

    def _prefill_before_copies(self, ids: Tensor | None, kwargs: dict) -> dict:
        """`generate`'s arguments with the prompt computed once, not for each beam or sample."""
        embeds, mask, im_mask = (kwargs.get(name) for name in ("inputs_embeds", "attention_mask", "im_mask"))
        with_ids = embeds is None or (ids is not None and ids.shape[1] == embeds.shape[1])
        if embeds is None:
            embeds = None if ids is None else self.model.tok_embeddings(ids.to(self.input_device))
        if embeds is None or not prefills_once(self, kwargs) or not ends_in_text(embeds, mask, im_mask):
            return kwargs
        mask = torch.ones_like(embeds[..., 0], dtype=torch.long) if mask is None else mask
        padding = None if mask.bool().all() else mask
        started = start_generation(
            self,
            GrowingCache(self.config),
            inputs_embeds=embeds,
            attention_mask=padding,
            im_mask=im_mask,
            infer_mode=kwargs.get("infer_mode", "base"),
            kwargs=kwargs,
        )
        if with_ids:
            started["inputs_embeds"] = None
        return {**kwargs, **started, "attention_mask": mask, "im_mask": None}

    def _published_generate_arguments(self, inputs_embeds: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """The BOS column that old sequences begin with, and today's arguments for old ones."""
        kwargs = dict(kwargs)
        batch, length = inputs_embeds.shape[:2]
        bos = kwargs.get("bos_token_id") or self.config.text_config.bos_token_id
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones(
                batch, length, dtype=torch.long, device=inputs_embeds.device
            )
        max_length = kwargs.pop("max_length", None)
        if max_length is not None and kwargs.get("max_new_tokens") is None:
            kwargs["max_new_tokens"] = max(1, max_length - 1)
        penalty = setting(self, kwargs, "repetition_penalty") or 1.0
        if penalty != 1.0 and not torch.as_tensor(kwargs["attention_mask"]).all():
            # The library's own skips as many new tokens as a row has padding.
            kwargs["logits_processor"] = LogitsProcessorList(
                [RowPenalty(penalty, [[]] * batch), *(kwargs.get("logits_processor") or [])]
            )
            kwargs["repetition_penalty"] = 1.0
        return torch.full((batch, 1), bos, device=inputs_embeds.device), kwargs


class RowPenalty(LogitsProcessor):
    """The repetition penalty (arXiv:1909.05858) over generated tokens, and over the prompts of some rows.

    Padding counts nowhere, and beams share the prompt of their row.

    Args:
        prompts: per row the ids that count from the start.
    """

    def __init__(self, penalty: float, prompts: Sequence[Sequence[int]]) -> None:
        self.penalty, self.prompts = penalty, prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, new tokens) ids and (rows, vocabulary) scores -> scores."""
        copies = len(scores) // len(self.prompts)
        seen = torch.zeros_like(scores, dtype=torch.bool)
        for row, prompt in enumerate(self.prompts):
            seen[row * copies : (row + 1) * copies, list(prompt)] = True
        seen.scatter_(1, input_ids, True)
        penalised = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen, penalised, scores)


def as_list(ids: int | Sequence[int] | Tensor | None) -> list[int]:
    """One id, several or none, as `generate` takes them, as a list."""
    return [] if ids is None else torch.as_tensor(ids).flatten().tolist()
