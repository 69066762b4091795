"""From turns and pictures to the ids of an answer: plan the prompt, reuse what is there, generate."""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    BatchEncoding,
    GenerationMixin,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.cache_utils import Cache

from .cache_internlm_xcomposer2 import GrowingCache
from .generation_internlm_xcomposer2 import RowPenalty, as_list
from .ixc_utils import check_hd_num
from .parallel_internlm_xcomposer2 import same_draws
from .prefix_internlm_xcomposer2 import (
    PromptCache,
    capture,
    is_assisted,
    origin_of,
    prefills_once,
    reusable_length,
    start_generation,
)
from .prompt_internlm_xcomposer2 import (
    END_OF_TURN,
    History,
    PromptIds,
    check_length,
    encode_prompt,
    format_prompt,
    place_images,
)
from .streaming_internlm_xcomposer2 import AnswerStreamer, EndMarkFilter
from .visual_internlm_xcomposer2 import Visual, as_visuals, default_hd_num, prepare_visuals


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt that is checked and counted, whose pictures are not cut yet.

    Attributes:
        penalise_prompt: whether the repetition penalty sees the prompt, as in the published text-only form.
    """

    ids: list[int]
    is_image: list[bool]
    visuals: tuple[Visual, ...] = ()
    lengths: tuple[int, ...] = ()
    hd_num: int = 1
    penalise_prompt: bool = False

    def spans(self) -> list[tuple[int, int]]:
        """(first, behind the last) position of each picture's tokens."""
        spans, position = [], 0
        for length in self.lengths:
            start = self.is_image.index(True, position)
            position = start + length
            spans.append((start, position))
        return spans

    def tokens(self, identities: Sequence[Hashable]) -> list[Hashable]:
        """What stands at each position: ids, and for image tokens the identity of their picture."""
        tokens: list[Hashable] = list(self.ids)
        for (start, stop), identity in zip(self.spans(), identities, strict=True):
            tokens[start:stop] = [identity] * (stop - start)
        return tokens


@dataclass(frozen=True)
class Capture:
    """What is needed to keep a cache once the answer is there."""

    cache: Cache
    tokens: Sequence[Hashable]
    origin: Hashable


class PromptMixin:
    """Questions, turns and pictures -> checked prompts -> tensors. Needs a model with `config` and `font`."""

    def build_inputs(
        self, tokenizer, query: str, history: History = (), meta_instruction: str | None = ""
    ) -> BatchEncoding:
        """The published text-only prompt as (1, tokens) ids on the model's device; BOS stands twice."""
        prompt = f"{tokenizer.bos_token}{format_prompt(query, history, meta_instruction)}"
        return tokenizer([prompt], return_tensors="pt").to(self.input_device)

    def plan_chat(
        self, tokenizer, query: str, image, hd_num: int | None, history: History, meta: str
    ) -> ChatPrompt:
        """One prompt with all checks made; pictures are read, but not cut."""
        if hd_num is not None:
            check_hd_num(hd_num)
        if image is None or (self.config.version != "2.5" and isinstance(image, list | tuple) and not image):
            place_images(format_prompt(query, history, meta), 0, version=self.config.version)
            ids = self.build_inputs(tokenizer, query, history, meta)["input_ids"][0].tolist()
            check_length(len(ids), [], self.config)
            return ChatPrompt(ids, [False] * len(ids), penalise_prompt=True)
        visuals = as_visuals(image, self.config)
        hd_num = self.default_hd_num(len(visuals)) if hd_num is None else hd_num
        texts = place_images(format_prompt(query, history, meta), len(visuals), version=self.config.version)
        lengths = [self.num_image_tokens(*visual.grid(self.config, hd_num)) for visual in visuals]
        prompt = self._encode_texts(tokenizer, texts, visuals, lengths, hd_num)
        return ChatPrompt(prompt.ids, prompt.is_image, tuple(visuals), tuple(lengths), hd_num)

    def prepare_chat(
        self, tokenizer, query: str, image, hd_num: int | None, history: History, meta: str
    ) -> dict:
        """Everything `forward` needs for one prompt, with all checks made and nothing computed by the model.

        Returns:
            `input_ids`, and with pictures `pixel_values`, `image_grid_hw` and `im_mask`.
        """
        return self._inputs_of([self.plan_chat(tokenizer, query, image, hd_num, history, meta)])

    def default_hd_num(self, num_visuals: int) -> int:
        """The budget of tiles where the caller names none."""
        return default_hd_num(self.config, num_visuals)

    def _encode_texts(
        self, tokenizer, texts: list[str], visuals: list[Visual], lengths: list[int], hd_num: int
    ) -> PromptIds:
        """Texts with pictures between them -> ids, after checking that they fit the context."""
        version, piece = self.config.version, self.config.image_token_id
        prompt = encode_prompt(tokenizer, texts, lengths, version=version, image_token_id=piece)
        num_text = len(prompt.ids) - sum(lengths)

        def count(budget: int) -> int:
            return num_text + sum(self.num_image_tokens(*v.grid(self.config, budget)) for v in visuals)

        check_length(len(prompt.ids), lengths, self.config, hd_num, count)
        return prompt

    def _inputs_of(self, prompts: Sequence[ChatPrompt], pad_token_id: int = 0, num_cached: int = 0) -> dict:
        """Prompts -> tensors, padded on the left; only pictures behind `num_cached` tokens are cut."""
        longest, device = max(len(prompt.ids) for prompt in prompts), self.input_device
        pads = [longest - len(prompt.ids) for prompt in prompts]
        rows = zip(pads, prompts, strict=True)
        ids = torch.tensor([[pad_token_id] * pad + prompt.ids for pad, prompt in rows], device=device)
        inputs = {"input_ids": ids}
        if any(prompt.penalise_prompt for prompt in prompts):
            inputs["penalise_prompt"] = [prompt.penalise_prompt for prompt in prompts]
        if any(pads):
            inputs["attention_mask"] = torch.tensor([[0] * p + [1] * (longest - p) for p in pads]).to(device)
        wanted = [
            (visual, prompt.hd_num)
            for prompt in prompts
            for visual, (start, _) in zip(prompt.visuals, prompt.spans(), strict=True)
            if start >= num_cached
        ]
        if wanted:
            visuals, budgets = zip(*wanted, strict=True)
            pixel_values, image_grid_hw = prepare_visuals(visuals, self.config, budgets, font=self.font)
            inputs |= {"pixel_values": pixel_values, "image_grid_hw": image_grid_hw}
        if any(prompt.visuals for prompt in prompts):
            masks = [[False] * pad + prompt.is_image for pad, prompt in zip(pads, prompts, strict=True)]
            inputs["im_mask"] = torch.tensor(masks, device=device)
        return inputs

    def check_tokenizer(self, tokenizer) -> None:
        """Raise `ValueError` unless the tokenizer's vocabulary is the model's."""
        if tokenizer is None:
            raise ValueError("no tokenizer: pass one, or set model.tokenizer")
        if not hasattr(tokenizer, "convert_tokens_to_ids"):
            raise TypeError(f"the tokenizer is a {type(tokenizer).__name__}; load it with AutoTokenizer")
        rows = self.config.text_config.vocab_size
        if rows not in (tokenizer.vocab_size, len(tokenizer)) and len(tokenizer) > rows:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} pieces but the model {rows}; load the tokenizer that "
                "lies beside the checkpoint"
            )
        end, expected = tokenizer.convert_tokens_to_ids(END_OF_TURN), self.config.end_token_id
        if end in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"the tokenizer has no piece {END_OF_TURN}, which ends every turn of these models"
            )
        if expected < rows and end != expected:
            raise ValueError(
                f"the tokenizer's id of {END_OF_TURN} is {end} but the model's is {expected}; load the "
                "tokenizer that lies beside the checkpoint"
            )


class AnswerMixin(PromptMixin):
    """What `chat` and the writing methods share. Needs a model with `embed_inputs`, `config` and `generate`.

    Attributes:
        reuse_limit: how many bytes of keys and values the history that `chat` returns may own; 0 for none.
    """

    reuse_limit = 4 * 2**30

    # ---- reuse ----

    def _reuse(
        self, prompt: ChatPrompt, earlier: PromptCache | None, infer_mode: str
    ) -> tuple[dict, Capture]:
        """Inputs that begin behind what `earlier` holds of the prompt, and what keeps the result."""
        identities = [visual.identity(self.config, prompt.hd_num, self.font) for visual in prompt.visuals]
        tokens, origin = prompt.tokens(identities), origin_of(self, infer_mode)
        text = self.config.text_config
        shared = 0 if earlier is None else earlier.shared_length(tokens[:-1], origin)
        if shared and not reusable_length(text, shared, len(tokens)):
            shared = 0
        # A picture of which only a part is there is computed anew.
        shared = next((start for start, stop in prompt.spans() if start < shared < stop), shared)
        cache = earlier.restore(shared, self.config) if shared else GrowingCache(self.config)
        inputs = {**self._inputs_of([prompt], num_cached=shared), "past_key_values": cache}
        return inputs, Capture(cache, tokens, origin)

    def _capture(self, kept: Capture, answer: Tensor, num_rows: int) -> PromptCache | None:
        """Keys and values of a prompt and, unless there were several answers, of its answer."""
        prompt_length = len(kept.tokens)
        tokens = [*kept.tokens, *answer.tolist()] if num_rows == 1 else kept.tokens
        length = reusable_length(self.config.text_config, len(tokens), prompt_length)
        return capture(kept.cache, tokens, kept.origin, length, self.reuse_limit)

    # ---- generation ----

    @torch.no_grad()
    def _generate_answer(self, inputs: dict, **kwargs) -> Tensor:
        """Generate from `prepare_chat`'s inputs -> (sequences, new tokens), the prompts left out.

        A cache under `past_key_values` holds the first tokens of the prompt, and its answer too afterwards.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        cache, infer_mode = inputs.get("past_key_values"), kwargs.get("infer_mode", "base")
        if cache is None and prefills_once(self, kwargs):
            cache = GrowingCache(self.config)
        start = 0 if cache is None else cache.get_seq_length()
        kwargs["attention_mask"] = torch.ones_like(ids) if mask is None else mask
        if kwargs.get("streamer") is not None and not isinstance(kwargs["streamer"], AnswerStreamer):
            kwargs["streamer"] = EndMarkFilter(kwargs["streamer"], as_list(kwargs.get("eos_token_id")))
        embeds, im_mask = self._embed_behind(inputs, start)
        if cache is not None:
            prompt = {"inputs_embeds": embeds, "attention_mask": mask, "im_mask": im_mask}
            kwargs |= start_generation(self, cache, **prompt, infer_mode=infer_mode, kwargs=kwargs)
        else:
            kwargs |= {"inputs_embeds": embeds, "im_mask": im_mask}
        if len(ids) == 1 and inputs.get("penalise_prompt"):
            return self._new_tokens(ids, {**kwargs, "inputs_embeds": None})
        kwargs = penalise_rows(inputs, kwargs)
        return self._new_tokens(ids if is_assisted(kwargs) else None, kwargs)

    def _embed_behind(self, inputs: dict, start: int) -> tuple[Tensor, Tensor | None]:
        """Embeddings and image mask of the tokens behind the first `start`."""
        im_mask = inputs.get("im_mask")
        im_mask = None if im_mask is None else im_mask[:, start:]
        pictures = (inputs.get("pixel_values"), inputs.get("image_grid_hw"))
        return self.embed_inputs(inputs["input_ids"][:, start:], *pictures, im_mask)

    def _new_tokens(self, ids: Tensor | None, kwargs: dict) -> Tensor:
        """(sequences, new tokens) that `generate` of the library adds to `ids`, or to embeddings alone."""
        with warnings.catch_warnings(), same_draws(self):
            warnings.filterwarnings("ignore", message="Passing `repetition_penalty` with `inputs_embeds`")
            outputs = GenerationMixin.generate(self, ids, **kwargs)
        sequences = getattr(outputs, "sequences", outputs)
        return sequences if ids is None else sequences[:, ids.shape[1] :]


def penalise_rows(inputs: dict, kwargs: dict) -> dict:
    """`generate`'s arguments with a repetition penalty that sees what it sees in a prompt alone.

    The library's own counts from the end of the left padding, or from the start of guessed tokens.
    """
    ids, mask = inputs["input_ids"], kwargs["attention_mask"]
    flags = inputs.get("penalise_prompt", [False] * len(ids))
    penalty = kwargs.get("repetition_penalty", 1.0)
    if penalty == 1.0 or not (is_assisted(kwargs) or any(flags) or not mask.all()):
        return kwargs
    if is_assisted(kwargs):
        processor = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=ids.shape[1])
    else:
        rows = zip(ids, mask.bool(), flags, strict=True)
        processor = RowPenalty(penalty, [row[real].tolist() if flag else [] for row, real, flag in rows])
    others = kwargs.get("logits_processor") or []
    return {
        **kwargs,
        "repetition_penalty": 1.0,
        "logits_processor": LogitsProcessorList([processor, *others]),
    }
