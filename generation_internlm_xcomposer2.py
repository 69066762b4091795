"""`generate` with pictures: encoded and prefilled once, however many answers are sampled, and starting where
a history ends.

A prompt becomes an answer in these steps: `GenerateMixin._answer` asks `begin` which part of it is already
computed, `_generate_answer` embeds the rest, and transformers' `generate` runs the decoder on it.
"""

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from .build_mlp import leaves_autocast
from .cache_internlm_xcomposer2 import (
    CACHE,
    GrowingCache,
    PromptCache,
    capture,
    origin_of,
    pop_cache,
    reusable_length,
    rotates_by_length,
)
from .image_processing_internlm_xcomposer2 import PictureMemo, Visual, prepare_visuals
from .inputs_internlm_xcomposer2 import check_embeds, check_ids, check_image_mask, check_tensor
from .kernels_internlm_xcomposer2 import own_memory
from .prompt_internlm_xcomposer2 import ChatPrompt, batch_inputs, check_length, context_length
from .settings_internlm_xcomposer2 import (
    as_list,
    check_settings,
    grows_in_place,
    is_assisted,
    num_copies,
    setting,
    takes_our_cache,
)


@dataclass(frozen=True)
class Begun:
    """A prompt whose first tokens are already computed, and what is needed to keep the rest too.

    Attributes:
        inputs: as from `batch_inputs`, with only the pictures that are not computed yet, or with what the
            tower made of them (`image_features`).
        cache: holds those first tokens, and everything once the answer is complete.
        tokens: what is at each position of the prompt: ids, and the identities of pictures.
        origin: what else keys and values depend on.
    """

    inputs: dict
    cache: Cache
    tokens: Sequence[Hashable]
    origin: Hashable


class GenerateMixin:
    """`generate`, what it calls at each step, and answers to prompts. Goes before transformers' own mixin.

    Attributes:
        reuse_limit: how many bytes the history that `chat` returns may keep, of keys, values and the tokens
            that they belong to; 0 for none.
    """

    reuse_limit = 4 * 2**30

    # ---- prompts to answers ----

    def _check_settings(self, settings: dict) -> None:
        """Raise `TypeError` or `ValueError` for settings of an answer that `generate` could not use."""
        check_settings(self, settings)

    @torch.no_grad()
    def _answer(
        self,
        prompts: Sequence[ChatPrompt],
        settings: dict,
        earlier: PromptCache | None = None,
        keep: bool = False,
    ) -> tuple[list[list[int]], PromptCache | None]:
        """Prompts -> the ids of an answer to each, and what is kept of the computation if there is only one.

        Args:
            settings: arguments of `generate`.
            earlier: what was kept of an earlier turn.
            keep: whether anything may be kept, and `earlier` be used.
        """
        keep = keep and not self.training and self.reuse_limit > 0 and takes_our_cache(self, settings)
        if not keep:
            inputs = batch_inputs(
                self.config,
                prompts,
                pad_token_id=settings["pad_token_id"],
                font=self.font,
                device=self.input_device,
            )
            sequences = self._generate_answer(inputs, **settings)
            firsts = sequences[:: len(sequences) // len(prompts)]  # if each prompt has several answers
            return [sequence.tolist() for sequence in firsts], None
        (prompt,) = prompts
        begun = begin(self, prompt, earlier, settings["infer_mode"])
        sequence = self._generate_answer({**begun.inputs, CACHE: begun.cache}, **settings)[0].tolist()
        is_only = num_copies(self, settings) == 1
        tokens = [*begun.tokens, *sequence] if is_only else begun.tokens
        length = reusable_length(self.config.text_config, len(tokens), len(prompt.ids))
        return [sequence], capture(begun.cache, tokens, begun.origin, length, self.reuse_limit)

    @torch.no_grad()
    @leaves_autocast
    def _generate_answer(self, inputs: dict, **kwargs) -> Tensor:
        """Generate from the tensors of `batch_inputs` -> (sequences, new tokens), without the prompts.

        A cache among them holds the first tokens of the prompt, and afterwards its answer too.
        """
        ids, mask, cache = inputs["input_ids"], inputs.get("attention_mask"), inputs.get(CACHE)
        if cache is None and takes_our_cache(self, kwargs):
            cache = GrowingCache(self.config)
        start = 0 if cache is None else cache.get_seq_length()
        im_mask = None if (im_mask := inputs.get("im_mask")) is None else im_mask[:, start:]
        pictures = inputs.get("pixel_values"), inputs.get("image_grid_hw")
        features = inputs.get("image_features")
        embeds, im_mask = self.embed_inputs(ids[:, start:], *pictures, im_mask, features)
        begun = {"inputs_embeds": embeds, "im_mask": im_mask}
        if cache is not None:
            begun[CACHE] = cache
            if prefills_before_copies(self, kwargs, ids.shape[1]):
                begun = prefill_before_copies(self, begun, mask, kwargs)
        mask = torch.ones_like(ids) if mask is None else mask
        kwargs = {**kwargs, **begun, "attention_mask": mask}
        if (streamer := kwargs.get("streamer")) is not None:
            kwargs["streamer"] = EndMarkFilter(streamer, as_list(kwargs.get("eos_token_id")))
        kwargs = penalise_rows(inputs, kwargs)
        ids = ids if is_assisted(kwargs) else None
        with same_draws(self):
            outputs = GenerationMixin.generate(self, ids, **kwargs)
        sequences = getattr(outputs, "sequences", outputs)
        return sequences if ids is None else sequences[:, ids.shape[1] :]

    # ---- generate ----

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        im_mask: Tensor | None = None,
        infer_mode: str = "base",
        **kwargs,
    ) -> dict:
        """What one step of `generate` passes to `forward`: the mask and pictures in the first step only."""
        cache = past_key_values if cache is None else cache
        is_empty = cache is None or cache.get_seq_length() == 0
        if inputs_embeds is not None and is_empty and input_ids.shape[1] > inputs_embeds.shape[1]:
            # In assisted generation the candidates already follow the prompt.
            num_candidates = input_ids.shape[1] - inputs_embeds.shape[1]
            candidates = self.get_input_embeddings()(input_ids[:, -num_candidates:])
            inputs_embeds = torch.cat([inputs_embeds, candidates.to(inputs_embeds.device)], dim=1)
            im_mask = None if im_mask is None else nn.functional.pad(im_mask, (0, num_candidates))
        if inputs_embeds is not None and not is_empty and kwargs.get("is_first_iteration"):
            # They are what follows the cache, but the library takes them to be the whole prompt.
            kwargs["next_sequence_length"] = inputs_embeds.shape[1]
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **{CACHE: cache},
            **kwargs,
        )
        inputs["infer_mode"] = infer_mode
        current = inputs["inputs_embeds"] if inputs.get("inputs_embeds") is not None else inputs["input_ids"]
        if is_empty or inputs.get("inputs_embeds") is not None:
            inputs["im_mask"] = None if im_mask is None else im_mask[:, -current.shape[1] :]
        if not is_empty:
            inputs.pop("pixel_values", None)
            inputs.pop("image_grid_hw", None)
        return inputs

    @torch.no_grad()
    @leaves_autocast
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
        """As in transformers, with pictures, which are encoded once regardless of the number of beams.

        With `inputs_embeds` alone, the result begins with BOS and `max_length` counts BOS and new tokens, as
        clients of the published code expect; with ids, it holds prompt and answer. A cache may be passed as
        `cache` or `past_key_values` in every release of transformers.

        Raises:
            TypeError, ValueError: anything wrong with the arguments, before any compute: pictures that don't
                match the prompt, a prompt longer than the context, settings that can't be used, or an
                `infer_mode` whose adapter the checkpoint lacks.
        """
        self._check_generate(inputs if input_ids is None else input_ids, inputs_embeds, args, kwargs)
        if (cache := pop_cache(kwargs)) is not None:
            kwargs[CACHE] = cache
        ids = inputs if input_ids is None else input_ids
        if pixel_values is not None:
            if ids is None:
                raise ValueError("pixel_values need input_ids, in which each picture has its image tokens")
            ids = ids.to(self.input_device)
            inputs_embeds, im_mask = self.embed_inputs(ids, pixel_values, image_grid_hw, im_mask)
            kwargs.setdefault("attention_mask", torch.ones_like(ids))
        elif inputs_embeds is not None and ids is None:
            if is_assisted(kwargs):
                raise ValueError("assisted generation guesses from ids; pass input_ids with inputs_embeds")
            ids, kwargs = published_arguments(self, inputs_embeds, kwargs)
        if im_mask is not None and inputs_embeds is not None:
            check_image_mask(im_mask, inputs_embeds)
        if im_mask is not None:
            kwargs["im_mask"] = im_mask.to(self.input_device).bool()
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        if not args:
            kwargs = self._with_our_cache(ids, kwargs)
        if self.may_be_mapped:
            self.may_be_mapped = False
            own_memory(self)
        with same_draws(self):
            return super().generate(ids, *args, **kwargs)

    def _check_generate(
        self, ids: Tensor | None, inputs_embeds: Tensor | None, args: Sequence, kwargs: dict
    ) -> None:
        """Raise `TypeError` or `ValueError` for a prompt or for settings that can't be used."""
        settings = {**positional_settings(args), **kwargs}
        if ids is None and isinstance(settings.get("max_length"), int):
            del settings["max_length"]  # clients of the published code pass any number
        check_settings(self, settings)
        prompt = ids if inputs_embeds is None else inputs_embeds
        if ids is not None:
            check_ids(ids, self.config.text_config.vocab_size)
        if inputs_embeds is not None:
            check_embeds(inputs_embeds, self.config.text_config.hidden_size)
        if prompt is None:
            return
        check_length(prompt.shape[1], (), context_length(self.config))
        mask, cache = kwargs.get("attention_mask"), kwargs.get(CACHE)
        if mask is not None:
            check_tensor("attention_mask", mask)
        lengths = {prompt.shape[1], prompt.shape[1] + (0 if cache is None else cache.get_seq_length())}
        # transformers 5.16 passes a guessing model a mask that is one longer.
        guesses = getattr(kwargs.get("generation_config"), "is_assistant", False)
        if mask is not None and not guesses and (len(mask) != len(prompt) or mask.shape[-1] not in lengths):
            raise ValueError(
                f"attention_mask has the shape {tuple(mask.shape)}, but the prompt "
                f"{tuple(prompt.shape[:2])}; it needs one value per token"
            )

    def _with_our_cache(self, ids: Tensor | None, kwargs: dict) -> dict:
        """`generate`'s arguments with a `GrowingCache`, unless they or the settings ask for another.

        For several beams or samples, the prompt is computed here if possible, once for all of them.
        """
        if not grows_in_place(self, kwargs):
            return kwargs
        kwargs = {**kwargs, CACHE: GrowingCache(self.config)}
        embeds, mask, im_mask = (kwargs.get(name) for name in ("inputs_embeds", "attention_mask", "im_mask"))
        with_ids = embeds is None or (ids is not None and ids.shape[1] == embeds.shape[1])
        if num_copies(self, kwargs) == 1 or not takes_our_cache(self, {**kwargs, CACHE: None}):
            return kwargs
        if embeds is None and ids is not None:
            embeds = self.get_input_embeddings()(ids.to(self.input_device))
        if embeds is None or not ends_in_text(embeds, mask, im_mask):
            return kwargs
        if not prefills_before_copies(self, kwargs, embeds.shape[1]):
            return kwargs
        mask = torch.ones_like(embeds[..., 0], dtype=torch.long) if mask is None else mask
        padding = None if mask.bool().all() else mask
        begun = {"inputs_embeds": embeds, "im_mask": im_mask, CACHE: kwargs[CACHE]}
        begun = prefill_before_copies(self, begun, padding, kwargs)
        if with_ids:
            begun["inputs_embeds"] = None
        return {**kwargs, **begun, "attention_mask": mask}


# ---- prompts of the published code ----


def published_arguments(model: nn.Module, inputs_embeds: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
    """The BOS column that sequences used to begin with, and the current form of old arguments."""
    kwargs = dict(kwargs)
    batch, length = inputs_embeds.shape[:2]
    bos = kwargs.get("bos_token_id") or model.config.get_text_config().bos_token_id
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = torch.ones(batch, length, dtype=torch.long, device=inputs_embeds.device)
    max_length = kwargs.pop("max_length", None)
    if max_length is not None and kwargs.get("max_new_tokens") is None:
        kwargs["max_new_tokens"] = max(1, max_length - 1)
    penalty = setting(model, kwargs, "repetition_penalty") or 1.0
    if penalty != 1.0 and not torch.as_tensor(kwargs["attention_mask"]).all():
        # The library's own penalty skips as many new tokens as a row has padding.
        kwargs |= _with_processor(RowPenalty(penalty, [[]] * batch), kwargs)
    return torch.full((batch, 1), bos, device=inputs_embeds.device), kwargs


# ---- prompts that are copied ----


def prefills_before_copies(model: nn.Module, kwargs: dict, prompt_length: int) -> bool:
    """Whether a prompt is computed before it is copied for beams or samples.

    Not if its length decides how far all keys are rotated: then it is computed in one pass.
    """
    text = model.config.text_config
    in_one_pass = rotates_by_length(text) and prompt_length > text.max_position_embeddings
    return num_copies(model, kwargs) > 1 and not in_one_pass


def ends_in_text(inputs_embeds: Tensor, attention_mask: Tensor | None, im_mask: Tensor | None) -> bool:
    """Whether there are several tokens, and the last of each row is neither padding nor part of a picture."""
    last_is_real = attention_mask is None or bool(attention_mask[:, -1].all())
    return inputs_embeds.shape[1] > 1 and last_is_real and (im_mask is None or not bool(im_mask[:, -1].any()))


# ---- beginning ----


def begin(model: nn.Module, prompt: ChatPrompt, earlier: PromptCache | None, infer_mode: str) -> Begun:
    """A prompt that starts with as much of it as `earlier` holds."""
    config, text, font = model.config, model.config.text_config, model.font
    identities = [visual.identity(config, prompt.hd_num, font) for visual in prompt.visuals]
    tokens, origin = prompt.tokens(identities), origin_of(model, infer_mode)
    shared = num_computed(prompt, tokens, earlier, origin)
    if shared and not reusable_length(text, shared, len(tokens)):
        shared = 0
    cache = earlier.restore(shared, config) if shared else GrowingCache(config)
    left = [
        visual for visual, (start, _) in zip(prompt.visuals, prompt.spans(), strict=True) if start >= shared
    ]
    is_known = any(visual.memo is not None for visual in left)
    num_cached = len(tokens) if is_known else shared
    inputs = batch_inputs(config, [prompt], num_cached=num_cached, font=font, device=model.input_device)
    if is_known:
        inputs["image_features"] = encode_once(model, left, prompt.hd_num, origin)
    return Begun(inputs, cache, tokens, origin)


def num_computed(
    prompt: ChatPrompt, tokens: Sequence[Hashable], earlier: PromptCache | None, origin: Hashable
) -> int:
    """How many leading tokens of a prompt `earlier` holds: never all, and each picture whole or not at all.

    Args:
        tokens: what is at each position of the prompt: ids, and the identities of pictures.
        origin: what else keys and values would depend on.
    """
    shared = 0 if earlier is None else earlier.shared_length(tokens[:-1], origin)
    return next((start for start, stop in prompt.spans() if start < shared < stop), shared)


@torch.no_grad()
def encode_once(model: nn.Module, visuals: Sequence[Visual], hd_num: int, origin: Hashable) -> list[Tensor]:
    """(tokens, hidden) of each picture, from its memo, where they are put if they are not known yet."""
    origin = origin, hd_num
    missing = [visual for visual in visuals if visual.memo is None or visual.memo.origin != origin]
    if missing:
        pictures = prepare_visuals(missing, model.config, hd_num, font=model.font)
        encoded = iter(model.get_image_features(*pictures).pooler_output)
    features = []
    for visual in visuals:
        memo = PictureMemo() if visual.memo is None else visual.memo
        if memo.origin != origin:
            memo.features, memo.origin = next(encoded), origin
        features.append(memo.features)
    return features


@torch.no_grad()
def prefill_before_copies(model: nn.Module, begun: dict, attention_mask: Tensor | None, kwargs: dict) -> dict:
    """Compute keys and values of all but the last token, once for all beams or samples of a prompt.

    Args:
        begun: the cache, in batch size, which is filled and then repeated for each copy; `inputs_embeds`
            (batch, tokens, hidden) after what it holds, at least one token; `im_mask` (batch, tokens).
        attention_mask: (batch, cached and new tokens), `None` if nothing is padding.

    Returns:
        What `generate` needs to continue from there: the cache, and the last token's embedding.
    """
    embeds, im_mask, cache = begun["inputs_embeds"], begun["im_mask"], begun[CACHE]
    if embeds.shape[1] > 1:
        model.run_decoder(
            None,
            embeds[:, :-1],
            for_loss=False,
            attention_mask=None if attention_mask is None else attention_mask[:, :-1],
            cache=cache,
            im_mask=None if im_mask is None else im_mask[:, :-1],
            infer_mode=kwargs.get("infer_mode", "base"),
            use_cache=True,
        )
    cache.batch_repeat_interleave(num_copies(model, kwargs))
    return {CACHE: cache, "inputs_embeds": embeds[:, -1:], "im_mask": None}


def positional_settings(args: Sequence) -> dict:
    """The names of arguments that `generate` was given by position after its first."""
    names = list(inspect.signature(GenerationMixin.generate).parameters)[2:]
    return dict(zip(names, args, strict=False))


# ---- sampling ----


# What draws random numbers, from a generator if one is passed.
_DRAWS = {torch.multinomial, torch.rand, torch.randn, torch.randint, torch.bernoulli}
_DRAWS |= {Tensor.multinomial, Tensor.uniform_, Tensor.exponential_, Tensor.normal_, Tensor.random_}


class SeededDraws(TorchFunctionMode):
    """Within it, this thread draws random numbers from generators of its own, which start at a seed.

    The generators that all threads share are neither used nor changed, so other threads may sample too.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed, self._generators = seed, {}

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in _DRAWS and kwargs.get("generator") is None:
            kwargs["generator"] = self._generator(_device_of(args, kwargs))
        return function(*args, **kwargs)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _device_of(args: Sequence, kwargs: dict) -> torch.device:
    """Where an operation draws: on the device of its tensor, or on the one that it is asked for."""
    tensor = next((value for value in args if isinstance(value, Tensor)), None)
    return tensor.device if tensor is not None else torch.device(kwargs.get("device") or "cpu")


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Make all processes that share a model sample the same tokens, whatever their own random states.

    They sample from a seed that the first process draws from its own generator. A model that is not shared
    samples as usual.
    """
    if model.num_processes == 1:
        yield
        return
    mesh = model.get_output_embeddings().weight.device_mesh
    group = mesh.get_group("tp") if "tp" in (mesh.mesh_dim_names or ()) else mesh.get_group()
    seed = torch.randint(2**63 - 1, (1,)).to(model.input_device)
    torch.distributed.broadcast(seed, group=group, group_src=0)
    with SeededDraws(int(seed)):
        yield


class RowPenalty(LogitsProcessor):
    """The repetition penalty (arXiv:1909.05858) over generated tokens, and over the prompts of some rows.

    Padding never counts, and beams share the prompt of their row.

    Args:
        prompts: for each row, the ids that count from the start.
    """

    def __init__(self, penalty: float, prompts: Sequence[Sequence[int]]) -> None:
        self.penalty = penalty
        self.prompts = [torch.tensor(sorted(set(prompt)), dtype=torch.long) for prompt in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, new tokens) ids and (rows, vocabulary) scores -> scores."""
        copies = len(scores) // len(self.prompts)
        seen = torch.zeros_like(scores, dtype=torch.bool)
        for row, prompt in enumerate(self.prompts):
            if len(prompt):
                seen[row * copies : (row + 1) * copies, prompt.to(scores.device)] = True
        seen.scatter_(1, input_ids, True)
        penalised = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen, penalised, scores)


def penalise_rows(inputs: dict, kwargs: dict) -> dict:
    """`generate`'s arguments with a repetition penalty that sees what it would for each prompt on its own.

    The library's own counts from the end of the left padding, or from the start of guessed tokens.
    """
    ids, mask = inputs["input_ids"], kwargs["attention_mask"]
    penalty = kwargs.get("repetition_penalty", 1.0)
    if penalty == 1.0:
        return kwargs
    if is_assisted(kwargs):
        processor = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=ids.shape[1])
    else:
        flags = inputs.get("penalise_prompt", [False] * len(ids))
        rows = zip(ids, mask.bool(), flags, strict=True)
        processor = RowPenalty(penalty, [row[real].tolist() if flag else [] for row, real, flag in rows])
    return {**kwargs, **_with_processor(processor, kwargs)}


def _with_processor(processor: LogitsProcessor, kwargs: dict) -> dict:
    """Our penalty before the caller's processors, in place of the library's own."""
    others = kwargs.get("logits_processor") or []
    return {"repetition_penalty": 1.0, "logits_processor": LogitsProcessorList([processor, *others])}


class EndMarkFilter(BaseStreamer):
    """Passes on to another streamer everything but the ids that end an answer."""

    def __init__(self, streamer: BaseStreamer, stop_ids: Sequence[int]) -> None:
        self.streamer, self.stop_ids = streamer, set(stop_ids)
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """One step's token ids, the prompt first."""
        if not self._is_prompt:
            value = torch.tensor([i for i in value.flatten().tolist() if i not in self.stop_ids])
        if self._is_prompt or value.numel():
            self.streamer.put(value)
        self._is_prompt = False

    def end(self) -> None:
        """No more tokens."""
        self.streamer.end()
