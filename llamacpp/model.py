"""The methods of the family on a checkpoint as GGUF: the vision half in torch, the decoder in llama.cpp."""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.utils import logging

from ..build_mlp import VisionMixin
from ..cache_internlm_xcomposer2 import PromptCache, rotates_by_length
from ..chat_internlm_xcomposer import PUBLISHED_SETTINGS, FirstChatMixin
from ..chat_internlm_xcomposer2 import ChatMixin
from ..checkpoint_internlm_xcomposer2 import choose_adapters
from ..compose_internlm_xcomposer2 import ComposeMixin
from ..configuration_internlm_xcomposer import InternLMXComposerConfig
from ..configuration_internlm_xcomposer2 import ADAPTERS_OF_MODE, CheckpointConfig, InternLMXcomposer2Config
from ..generation_internlm_xcomposer2 import num_computed
from ..ixc_utils import get_font
from ..modeling_internlm_xcomposer import (
    FirstVisionMixin,
    InternLMXComposerPreTrainedModel,
    weight_conversions,
)
from ..prompt_internlm_xcomposer2 import ChatPrompt, batch_inputs
from ..settings_internlm_xcomposer2 import check_values
from ..tokenization_internlm_xcomposer2 import InternLMXComposer2Tokenizer, tokenizer_class
from ..writing_internlm_xcomposer2 import WritingMixin, takes_arguments_of
from .answers import Answer, check_answerable
from .decoder import BASE, KV_TYPES, PICTURES, LlamaDecoder, load_decoder
from .files import DECODER, VISION, check_complete, is_first_generation, mode_file

logger = logging.get_logger(__name__)


class VisionHalf(VisionMixin, PreTrainedModel):
    """A checkpoint without its decoder: pictures -> embeddings.

    Attributes:
        projector: the weight whose type stands for all.
    """

    config_class = InternLMXcomposer2Config
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _keys_to_ignore_on_load_missing = [r"vit\..*\.post_layernorm\."]
    projector = "vision_proj.0.weight"

    def __init__(self, config: InternLMXcomposer2Config) -> None:
        super().__init__(config)
        self._build_vision()
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.vit.vision_tower.get_input_embeddings()


class LlamaCppEngine:
    """Answers to prompts by a checkpoint as GGUF.

    It has one context. What is computed stays there after an answer, and the next prompt reuses what it has
    in common with it, whether it is another turn or another question about the same picture. Calls from
    several threads wait for each other.

    Attributes:
        config: the checkpoint's, with the length of the context in place of the decoder's.
        generation_config: defaults of sampling.
        tokenizer: the checkpoint's own, `None` if it came without one.
        font: of the labels in videos.
        input_device: where prompts are put together, and the vision half is.
        has_partial_lora: whether pictures are decoded with low-rank weights of their own.
    """

    has_partial_lora = True

    def __init__(
        self,
        config: InternLMXcomposer2Config,
        generation_config: GenerationConfig,
        vision: PreTrainedModel,
        decoder: LlamaDecoder,
        tokenizer: InternLMXComposer2Tokenizer | None,
    ) -> None:
        self.config, self.generation_config, self.tokenizer = config, generation_config, tokenizer
        self.vision, self.decoder = vision, decoder
        self.font = get_font()
        self._lock = threading.Lock()
        self._kept: PromptCache | None = None  # what the context holds; keys and values stay in llama.cpp

    @property
    def input_device(self) -> torch.device:
        return self.vision.device

    # ---- answers ----

    @torch.no_grad()
    def _answer(
        self,
        prompts: Sequence[ChatPrompt],
        settings: dict,
        earlier: PromptCache | None = None,
        keep: bool = False,
    ) -> tuple[list[list[int]], None]:
        """Prompts -> the ids of an answer to each.

        Args:
            settings: arguments of `generate`.
            earlier: ignored: what may be reused is in the context.
            keep: whether what the context holds may be used, and what is computed stays there.
        """
        with self._lock:
            if keep and len(prompts) == 1:
                return [self._continue(prompts[0], settings)], None
            answers: list[list[int]] = []
            for group in self._groups(prompts, settings):
                self._clear()
                answers += self._answer_group(group, settings)
            self._clear()
            return answers, None

    def _continue(self, prompt: ChatPrompt, settings: dict) -> list[int]:
        """An answer that begins with what the context has in common with the prompt."""
        identities = [visual.identity(self.config, prompt.hd_num, self.font) for visual in prompt.visuals]
        tokens, origin = prompt.tokens(identities), settings["infer_mode"]
        shared = num_computed(prompt, tokens, self._kept, origin)
        if shared:
            self.decoder.forget(0, shared)
        else:
            self.decoder.forget()  # an interrupted batch leaves other sequences
        self._kept = PromptCache(tokens[:shared], (), origin)  # all that is left if this is interrupted
        (ids,) = self._answer_group([prompt], settings, shared)
        self._kept = PromptCache([*tokens, *ids[:-1]], (), origin)  # the last token was never decoded
        return ids

    def _clear(self) -> None:
        self.decoder.forget()
        self._kept = None

    def _groups(self, prompts: Sequence[ChatPrompt], settings: dict) -> Iterator[list[ChatPrompt]]:
        """Prompts that fit in the context together with their answers, in order; at least one at a time."""
        group, taken = [], 0
        for prompt in prompts:
            needed = len(prompt.ids) + (settings.get("max_new_tokens") or self.decoder.num_positions)
            is_full = len(group) == self.decoder.num_sequences
            if group and (is_full or taken + needed > self.decoder.num_positions):
                yield group
                group, taken = [], 0
            group.append(prompt)
            taken += needed
        yield group

    def _answer_group(
        self, prompts: Sequence[ChatPrompt], settings: dict, num_computed: int = 0
    ) -> list[list[int]]:
        """Answers to prompts that are decoded side by side.

        Args:
            num_computed: how many leading tokens of the only prompt the context holds.
        """
        answers = []
        for sequence, prompt in enumerate(prompts):
            room = self.decoder.num_positions - len(prompt.ids) + 1
            answers.append(Answer(prompt, settings, room, self.generation_config))
            answers[-1].grow(self._prefill(prompt, sequence, num_computed, settings["infer_mode"]))
        self.decoder.use(_adapters(settings["infer_mode"]))
        while growing := [sequence for sequence, answer in enumerate(answers) if not answer.is_complete]:
            ids = [answers[sequence].ids[-1] for sequence in growing]
            lengths = [len(prompts[sequence].ids) + len(answers[sequence].ids) - 1 for sequence in growing]
            for sequence, logits in zip(growing, self.decoder.step(ids, lengths, growing), strict=True):
                answers[sequence].grow(logits)
        if any(answer.is_cut for answer in answers):
            logger.warning(
                f"an answer ends where the context of {self.decoder.num_positions} tokens does; load the "
                "checkpoint with a larger n_ctx"
            )
        return [answer.ids for answer in answers]

    def _prefill(self, prompt: ChatPrompt, sequence: int, start: int, infer_mode: str) -> np.ndarray:
        """Decode a prompt from position `start` on -> (vocabulary,) logits of what follows it."""
        features = iter(self._picture_features(prompt, start))
        spans = {first: stop for first, stop in prompt.spans() if first >= start}
        logits = np.empty(0)
        while start < len(prompt.ids):
            is_picture = start in spans
            following = (first for first in spans if first > start)
            stop = spans[start] if is_picture else min(following, default=len(prompt.ids))
            self.decoder.use(_adapters(infer_mode, is_picture and self.has_partial_lora))
            content = next(features) if is_picture else prompt.ids[start:stop]
            logits = self.decoder.prefill(content, start, sequence)
            start = stop
        return logits

    def _picture_features(self, prompt: ChatPrompt, num_computed: int) -> list[np.ndarray]:
        """(tokens, hidden) embeddings of each picture of a prompt that isn't computed yet."""
        inputs = batch_inputs(
            self.config, [prompt], num_cached=num_computed, font=self.font, device=self.input_device
        )
        pictures = inputs.get("image_features", ())
        if "pixel_values" in inputs:
            given = inputs["pixel_values"], inputs["image_grid_hw"]
            pictures = self.vision.get_image_features(*given).pooler_output
        return [picture.float().cpu().numpy() for picture in pictures]

    # ---- arguments ----

    def _check_settings(self, settings: dict) -> None:
        """Raise `ValueError` or `TypeError` for what can't be used, before any compute."""
        check_values(self.config.text_config, settings)
        check_answerable(settings)


class LlamaCppModel(ChatMixin, WritingMixin, ComposeMixin, LlamaCppEngine):
    """A checkpoint as GGUF with the methods of the torch model: `chat` and its relatives, articles, pages."""

    # Pages are published with two beams, which llama.cpp doesn't have.
    write_webpage = takes_arguments_of(WritingMixin.write_webpage, num_beams=1)(WritingMixin.write_webpage)
    resume_2_webpage = takes_arguments_of(WritingMixin.resume_2_webpage, num_beams=1)(
        WritingMixin.resume_2_webpage
    )
    screen_2_webpage = takes_arguments_of(WritingMixin.screen_2_webpage, num_beams=1)(
        WritingMixin.screen_2_webpage
    )


class FirstVisionHalf(FirstVisionMixin, InternLMXComposerPreTrainedModel):
    """The same for the first generation."""

    main_input_name = "pixel_values"
    projector = "internlm_proj.weight"

    def __init__(self, config: InternLMXComposerConfig) -> None:
        super().__init__(config)
        self._build_vision()
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.visual_encoder.embeddings.patch_embedding


class FirstLlamaCppModel(FirstChatMixin, ComposeMixin, LlamaCppEngine):
    """A checkpoint of the first generation as GGUF: `chat` and its relatives, articles with pictures.

    It decodes with one beam, and has none of the published methods on embeddings of text.
    """

    has_partial_lora = searches_with_beams = False
    published_settings = {**PUBLISHED_SETTINGS, "num_beams": 1}

    def generate(self, text: str, image=None, **settings) -> str:
        """Answer a question, as published; settings as in `chat`."""
        if not isinstance(text, str):
            raise TypeError(f"llama.cpp answers a text, not a {type(text).__name__}; load it with torch")
        return super().generate(text, image, **settings)

    def get_input_embeddings(self) -> torch.nn.Module:
        """What tells the type of the vision half; embeddings of text are in llama.cpp."""
        return self.vision.get_input_embeddings()

    def get_image_features(self, pixel_values: torch.Tensor, *args, **kwargs):
        """Pixels -> embeddings, by the vision half."""
        return self.vision.get_image_features(pixel_values.to(self.input_device), *args, **kwargs)

    def encode_text(self, text: str, add_special_tokens: bool = False) -> torch.Tensor:
        """Not here: the embeddings of text are in llama.cpp."""
        raise NotImplementedError("llama.cpp keeps the embeddings of text; load the checkpoint with torch")

    def embed_samples(self, samples: dict):
        """Not here: llama.cpp doesn't train."""
        raise NotImplementedError("llama.cpp doesn't train; load the checkpoint with torch")


register_checkpoint_conversion_mapping(FirstVisionHalf.__name__, weight_conversions(), overwrite=True)


def _adapters(infer_mode: str, is_picture: bool = False) -> list[str]:
    """Which adapters act on a picture's tokens, or on text."""
    return [*([PICTURES] if is_picture else []), *([infer_mode] if infer_mode != BASE else [])]


# ---- loading ----


def from_gguf(
    directory: str | os.PathLike,
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int = 0,
    kv_type: str | None = None,
    adapters: Sequence[str] | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> LlamaCppModel:
    """Load a directory that `ixc2 gguf` wrote, to be run by llama.cpp.

    Args:
        n_ctx: how many tokens the context holds, prompt and answer together; by default what the checkpoint
            was published with (`config.max_length`).
        n_threads: of llama.cpp on the CPU; by default as many as torch uses.
        n_gpu_layers: how many layers of the decoder go to the GPU, if llama-cpp-python was built for one; -1
            for all.
        kv_type: how keys and values are stored, one of `KV_TYPES`; by default f32 for f32 weights, else f16.
        adapters: as in `from_pretrained`: the inference modes (`"write"`, `"web"`) to load task adapters for,
            by default all whose files are there.
        dtype: of the vision half, by default that of its file.
        device: of the vision half.

    Raises:
        FileNotFoundError: there is no such directory, or it lacks a file.
        ImportError: llama-cpp-python is missing; says what to install.
        ValueError: a number is unusable, a file is damaged or belongs to another model or export, or there is
            too little memory.
        TypeError: a number isn't one.
    """
    directory = Path(directory)
    check_complete(directory)
    config_class, vision_class, model_class = _classes(directory)
    config = config_class.from_pretrained(directory)
    n_ctx = _context_length(config, n_ctx)
    n_threads = torch.get_num_threads() if n_threads is None else _number("n_threads", n_threads, 1)
    n_gpu_layers = _number("n_gpu_layers", n_gpu_layers, -1)
    if kv_type is not None and kv_type not in KV_TYPES:
        raise ValueError(f"kv_type must be one of {', '.join(KV_TYPES)}, not {kv_type!r}")
    modes = _modes_to_load(config, directory, adapters)
    decoder = load_decoder(
        directory,
        modes,
        num_positions=n_ctx,
        num_threads=n_threads,
        num_gpu_layers=n_gpu_layers,
        kv_type=kv_type,
    )
    _check_sizes(config, decoder, directory)
    vision = _load_vision(vision_class, config, directory, dtype).to(device)
    config.text_config.max_position_embeddings = n_ctx
    config.text_config.rope_parameters = {**config.text_config.rope_parameters, "rope_type": "default"}
    config.text_config.rope_parameters.pop("factor", None)
    generation_config = GenerationConfig.from_pretrained(directory)
    has_tokenizer = (directory / "tokenizer.model").is_file()
    tokenizer = tokenizer_class(config.version).from_pretrained(directory) if has_tokenizer else None
    return model_class(config, generation_config, vision, decoder, tokenizer)


def _classes(directory: Path) -> tuple[type, type[PreTrainedModel], type[LlamaCppEngine]]:
    """Of the configuration, the vision half and the model of a directory."""
    if is_first_generation(directory):
        return InternLMXComposerConfig, FirstVisionHalf, FirstLlamaCppModel
    return InternLMXcomposer2Config, VisionHalf, LlamaCppModel


def _context_length(config: InternLMXcomposer2Config, n_ctx: int | None) -> int:
    """The length of the context, checked against what the rotary embedding can do in llama.cpp."""
    text = config.text_config
    trained = text.max_position_embeddings
    if not rotates_by_length(text):
        trained = int(trained * text.rope_parameters.get("factor", 1.0))
    n_ctx = min(config.max_length, trained) if n_ctx is None else _number("n_ctx", n_ctx, 1)
    if n_ctx > trained:
        raise ValueError(
            f"n_ctx is {n_ctx}, but this checkpoint was trained with {trained} positions, and llama.cpp "
            f"can't rotate longer prompts by their length (dynamic NTK); pass at most {trained}, or load the "
            "checkpoint with torch"
        )
    return n_ctx


def _number(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value


def _modes_to_load(
    config: InternLMXcomposer2Config, directory: Path, adapters: Sequence[str] | None
) -> list[str]:
    """The inference modes whose adapters are loaded; the configuration then names no others."""
    modes = [mode for mode, names in ADAPTERS_OF_MODE.items() if names]
    present = [mode for mode in modes if (directory / mode_file(mode)).is_file()]
    choose_adapters(config, present)
    choose_adapters(config, adapters)
    named = getattr(config.text_config, "task_adapters", ())
    return [mode for mode in present if set(ADAPTERS_OF_MODE[mode]) <= set(named)]


def _check_sizes(config: InternLMXcomposer2Config, decoder: LlamaDecoder, directory: Path) -> None:
    text = config.text_config
    expected, found = (text.vocab_size, text.hidden_size), (decoder.vocab_size, decoder.hidden_size)
    if expected != found:
        raise ValueError(
            f"config.json in {directory} describes a vocabulary of {expected[0]} and a width of "
            f"{expected[1]}, but {DECODER} has {found[0]} and {found[1]}; use the files of one export"
        )


def _load_vision(
    vision_class: type[PreTrainedModel], config: CheckpointConfig, directory: Path, dtype: torch.dtype | str
) -> PreTrainedModel:
    """The vision half, without the decoder's weights being read or made."""
    weights = load_file(directory / VISION)
    if dtype == "auto":
        dtype = weights[vision_class.projector].dtype
    return vision_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype).eval()
