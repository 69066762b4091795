"""The processor: texts or messages with pictures and videos -> everything that `generate` needs."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from .access_internlm_xcomposer2 import MediaAccess, bad_requests
from .checkpoint_internlm_xcomposer2 import (
    check_small_files,
    checkpoint_config,
    has_file,
    hub_arguments_in,
)
from .configuration_internlm_xcomposer2 import FIRST_GENERATION, PROCESSOR_AUTO_MAP
from .files_internlm_xcomposer2 import PROCESSOR_FILES, TOKENIZER_FILES, blaming
from .image_processing_internlm_xcomposer2 import (
    InternLMXComposer2ImageProcessor,
    Visual,
    count_tokens,
    grid_of_frames,
    grid_of_image,
)
from .ixc_utils import check_hd_num
from .media_internlm_xcomposer2 import MAX_FRAMES, Medium
from .messages_internlm_xcomposer2 import pair_media, read_messages, split_conversations
from .prompt_internlm_xcomposer2 import (
    FIRST_META_INSTRUCTION,
    META_INSTRUCTION,
    check_characters,
    check_length,
    context_length,
    count_prompt,
    encode_prompt,
    format_first_system,
    format_turn,
    place_images,
    said_in,
)
from .tokenization_internlm_xcomposer2 import (
    FIRST_TURNS_TEMPLATE,
    IMAGE_MARK,
    TURNS_TEMPLATE,
    VIDEO_MARK,
    check_markup_options,
    end_mark,
    markup_of,
)

Ids = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Tensor


class InternLMXComposer2TextKwargs(TypedDict, total=False):
    """How texts become rows.

    Args:
        padding: True or "longest" (the default), "max_length", or False for rows as they are.
        padding_side: "left" (the default), as generation needs it, or "right".
        max_length: what rows are padded to with `padding="max_length"`; a longer row is an error.
        pad_to_multiple_of: a number that the length of padded rows is a multiple of.
        truncation: accepted for callers that pass it; nothing is ever cut.
        add_special_tokens: whether BOS is added where the version has it and the text doesn't.
        return_mm_token_type_ids: add `mm_token_type_ids`, 1 on image tokens.
        return_text_replacement_offsets: add `text_replacement_offsets`, what each mark was replaced by.
        return_tensors: "pt", "np", or None for lists of ids.
    """

    padding: bool | str
    padding_side: str
    max_length: int | None
    pad_to_multiple_of: int | None
    truncation: bool | str | None
    add_special_tokens: bool
    return_mm_token_type_ids: bool
    return_text_replacement_offsets: bool
    return_tensors: str | None


class InternLMXComposer2ImagesKwargs(TypedDict, total=False):
    """How pictures are cut.

    Args:
        hd_num: how many local tiles a picture may be cut into, the checkpoint's own number by default.
        return_tensors: as for texts.
    """

    hd_num: int | None
    return_tensors: str | None


class InternLMXComposer2VideosKwargs(TypedDict, total=False):
    """How videos are sampled.

    Args:
        fps, num_frames: frames per second of a video, one by default, and the most frames to take.
        return_tensors: as for texts.
    """

    fps: float
    num_frames: int
    return_tensors: str | None


class InternLMXComposer2ProcessorKwargs(ProcessingKwargs, total=False):
    """Every option of the processor, by name or in the groups of transformers."""

    text_kwargs: InternLMXComposer2TextKwargs
    images_kwargs: InternLMXComposer2ImagesKwargs
    videos_kwargs: InternLMXComposer2VideosKwargs
    _defaults = {
        "text_kwargs": {"padding": True, "padding_side": "left", "add_special_tokens": True},
        "images_kwargs": {"hd_num": None},
        "videos_kwargs": {"fps": 1.0, "num_frames": MAX_FRAMES},
    }


OPTION_GROUPS = {
    "text_kwargs": InternLMXComposer2TextKwargs,
    "images_kwargs": InternLMXComposer2ImagesKwargs,
    "videos_kwargs": InternLMXComposer2VideosKwargs,
}
ACCESS_SETTINGS = ("allowed_local_media_path", "allowed_media_domains")
OPTIONS = {name for group in OPTION_GROUPS.values() for name in group.__annotations__}


def check_options(kwargs: Mapping[str, object]) -> None:
    """Raise `TypeError` or `ValueError` for an unknown or invalid option, by name or in a group."""
    groups = (*OPTION_GROUPS, "common_kwargs")
    given = {name: value for name, value in kwargs.items() if name not in groups}
    for group in groups:
        given |= kwargs.get(group) or {}
    if unknown := set(given) - OPTIONS:
        raise TypeError(
            f"unknown option {', '.join(sorted(map(str, unknown)))}; the processor accepts "
            f"{', '.join(sorted(OPTIONS))}"
        )
    if (hd_num := given.get("hd_num")) is not None:
        check_hd_num(hd_num)
    for name in ("pad_to_multiple_of", "max_length"):
        if (number := given.get(name)) is not None:
            check_positive(name, number)
    if (side := given.get("padding_side", "left")) not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', not {side!r}")


def check_positive(name: str, number: object) -> None:
    """Raise `TypeError` or `ValueError` for what is no number of tokens."""
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(f"{name} must be an integer, got {number!r:.80}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}; leave it out for none")


def default_template(version: str) -> str:
    """The turns that a version was trained on, with the published system text if `chat` has it.

    `use_meta` switches that text on or off; a system message of the conversation takes its place.
    """
    wanted = "use_meta is defined and use_meta" if version == "2.5" else "use_meta is not defined or use_meta"
    is_first = version == FIRST_GENERATION
    system = (
        format_first_system(FIRST_META_INSTRUCTION) if is_first else format_turn("system", META_INSTRUCTION)
    )
    system = system.replace("\n", "\\n")
    turns = FIRST_TURNS_TEMPLATE if is_first else TURNS_TEMPLATE
    return (
        "{{- bos_token }}"
        "{%- if (" + wanted + ") and messages[0]['role'] != 'system' %}"
        "{{- '" + system + "' }}"
        "{%- endif %}" + turns
    )


class InternLMXComposer2Processor(ProcessorMixin):
    """Image processor and tokenizer of one checkpoint, with the interface of transformers' processors.

    `image_token` (`<ImageHere>`) marks a picture in a text; in the ids it is a run of `image_token_id`.

    Args:
        image_token_id: the vocabulary piece that stands for one image token.
        chat_template: a Jinja template, by default `default_template` of the version.
        context_length: how many tokens the decoder reads; longer texts are an error. Without it,
            only the model checks.

    Attributes:
        allowed_local_media_path, allowed_media_domains: which files and URLs may be read, as `MediaAccess.of`
            takes them. They belong to a place, not to a checkpoint, so they are never saved with one.

    Raises:
        ValueError: `image_token_id` is missing.
    """

    image_token = IMAGE_MARK
    video_token = VIDEO_MARK
    valid_processor_kwargs = InternLMXComposer2ProcessorKwargs

    def __init__(
        self,
        image_processor: InternLMXComposer2ImageProcessor,
        tokenizer,
        image_token_id: int | None = None,
        chat_template: str | dict[str, str] | None = None,
        context_length: int | None = None,
    ) -> None:
        if image_token_id is None:
            raise ValueError("image_token_id is missing: the vocabulary piece that stands for an image token")
        template = chat_template or default_template(image_processor.version)
        super().__init__(image_processor, tokenizer, chat_template=template)
        self.image_token_id = image_token_id
        self.context_length = context_length
        self.auto_map = dict(PROCESSOR_AUTO_MAP)
        self.allowed_local_media_path, self.allowed_media_domains = None, None

    # ---- loading ----

    @classmethod
    def for_config(cls, config, tokenizer) -> "InternLMXComposer2Processor":
        """The processor of a checkpoint, by its configuration and its tokenizer."""
        images = InternLMXComposer2ImageProcessor.for_config(config)
        return cls(images, tokenizer, config.image_token_id, context_length=context_length(config))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> "InternLMXComposer2Processor":
        """Load what `save_pretrained` wrote, or build it from `config.json`, the weights and the tokenizer.

        Args:
            kwargs: `allowed_local_media_path` and `allowed_media_domains` set these attributes.

        Raises:
            OSError: there is neither.
        """
        settings = {name: kwargs.pop(name) for name in ACCESS_SETTINGS if name in kwargs}
        processor = cls._load(pretrained_model_name_or_path, **kwargs)
        for name, value in settings.items():
            setattr(processor, name, value)
        return processor

    @classmethod
    def _load(cls, source: str | os.PathLike, **kwargs) -> "InternLMXComposer2Processor":
        hub_arguments = hub_arguments_in(kwargs)
        if has_file(source, PROCESSOR_NAME, **hub_arguments) or not has_file(
            source, CONFIG_NAME, **hub_arguments
        ):
            check_small_files(source, (*PROCESSOR_FILES, *TOKENIZER_FILES), **hub_arguments)
            with blaming(source):
                return super().from_pretrained(source, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        return cls.for_config(checkpoint_config(source, **hub_arguments), tokenizer)

    @property
    def access(self) -> MediaAccess:
        """Which files and URLs may be read."""
        return MediaAccess.of(self.allowed_local_media_path, self.allowed_media_domains)

    @property
    def version(self) -> str:
        """`"1.0"`, `"2"`, `"2-4khd"` or `"2.5"`."""
        return self.image_processor.version

    # ---- texts and media to inputs ----

    @bad_requests()
    def __call__(
        self,
        images=None,
        text: str | Sequence[str] | None = None,
        videos=None,
        **kwargs,
    ) -> BatchFeature:
        """Prepare a batch, one row for each text.

        Args:
            images: pictures from any source of `load_image`: one, a list for the marks of all texts in order,
                or a list for each text. In version 2.5, a text without any mark may have one picture, which
                then goes to the front.
            text: one or more texts, each with a mark for each of its media; BOS is added where it is missing.
            videos: one video or a list of them from any source of `load_video`; a list of frames is a video.
                If there are pictures too, the text marks videos with `video_token`.
            kwargs: those of `InternLMXComposer2ProcessorKwargs`, by name or in the groups of transformers.

        Returns:
            `input_ids` and `attention_mask` (texts, tokens), and with media `pixel_values`
            (tiles, 3, side, side) and `image_grid_hw` (media, 2).

        Raises:
            FileNotFoundError, TypeError, ValueError: anything wrong with the arguments, before any picture
                is cut.
        """
        options = self._options(kwargs)
        if text is None:
            options = options["images_kwargs"]
            return self.image_processor.preprocess(images, videos, access=self.access, **options)
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
            raise TypeError("text must be a str or a list of at least one str")
        texts, media = pair_media(texts, images, videos, allow_unmarked=self.version == "2.5")
        return self._process(texts, media, options)

    def _options(self, kwargs: Mapping[str, object]) -> dict[str, dict]:
        """Options by their group, with the defaults of those that a caller left out.

        Raises:
            TypeError, ValueError: an option that is unknown or invalid.
        """
        check_options(kwargs)
        return self._merge_kwargs(InternLMXComposer2ProcessorKwargs, **kwargs)

    @bad_requests()
    def apply_chat_template(
        self,
        conversation: Sequence,
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list[dict] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: dict | None = None,
        allow_markup: bool = False,
        sanitize_control_tokens: bool = False,
        **kwargs,
    ):
        """One conversation or several -> a text, ids, or with `return_dict` all inputs.

        Content is a text or a list of `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` and
        `{"type": "video", "video": ...}`, whose source may also be under `url`, `path` or `base64`, and of
        `image_url` and `video_url` as in OpenAI's API. Sound is never read, so `load_audio_from_video` has no
        effect. What messages say is plain text: names of markup don't count in it, and `<ImageHere>` counts
        in a user's turn only. (In a text of `tokenize=False`, U+FDD0 marks such names; `__call__` reads it.)

        Args:
            processor_kwargs: options of `__call__`; they may also be given as keywords.
            allow_markup: whether names of markup count in all texts, as they did in the published code.
            sanitize_control_tokens: whether `<ImageHere>` in a user's text is plain text too.
            kwargs: anything else is a variable of the template, such as `use_meta`.

        Raises:
            FileNotFoundError, TypeError, ValueError: as in `__call__`, and for anything but messages.
        """
        if return_assistant_tokens_mask:
            raise ValueError("return_assistant_tokens_mask needs offsets, which sentencepiece doesn't have")
        check_markup_options(allow_markup, sanitize_control_tokens, tokenize)
        conversations, is_batch = split_conversations(conversation)
        for messages in conversations:
            check_characters(self.tokenizer, said_in(messages), self.context_length)
        read = [read_messages(messages, need_sources=tokenize) for messages in conversations]
        said = [messages for messages, _ in read]
        if not allow_markup:
            markup = markup_of(self.tokenizer)
            said = [markup.hide_messages(each, with_marks=sanitize_control_tokens) for each in said]
            hidden = (markup.hide_all(each, with_marks=True) for each in (tools, documents, kwargs))
            tools, documents, kwargs = hidden
        names = OPTIONS | {*OPTION_GROUPS, "common_kwargs"}
        given = {name: kwargs.pop(name) for name in names & set(kwargs)}
        options = {**given, **(processor_kwargs or {}), "return_tensors": return_tensors}
        texts = self.tokenizer.apply_chat_template(
            said,
            chat_template=self._template(chat_template),
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            allow_markup=True,  # or already hidden
            **kwargs,
        )
        if not tokenize:
            return texts if is_batch else texts[0]
        inputs = self._process(texts, [media for _, media in read], self._options(options))
        return inputs if return_dict else inputs["input_ids"]

    def _template(self, name: str | None) -> str:
        """The template of this name, or `name` itself if it is a template."""
        if not isinstance(self.chat_template, dict):
            return name or self.chat_template
        if name is None and "default" not in self.chat_template:
            raise ValueError(f"choose one of the chat templates: {', '.join(self.chat_template)}")
        return self.chat_template.get(name or "default", name)

    def _process(
        self, texts: Sequence[str], media: Sequence[Sequence[Medium]], options: dict[str, dict]
    ) -> BatchFeature:
        """Texts with an `IMAGE_MARK` for each of their media -> a batch."""
        text_options, sampling = options["text_kwargs"], options["videos_kwargs"]
        bos = self.tokenizer.bos_token
        bare = [text.removeprefix(bos) for text in texts]
        for text in bare:
            check_characters(self.tokenizer, [text], self.context_length)
        pieces = [
            place_images(text, len(row), version=self.version) for text, row in zip(bare, media, strict=True)
        ]
        sampling = {name: sampling[name] for name in ("fps", "num_frames")}
        hd_num = options["images_kwargs"]["hd_num"]
        budgets = [hd_num or self.image_processor.default_hd_num(len(row)) for row in media]
        visuals = [
            self.image_processor.load(row, access=self.access, hd_num=budget, **sampling)
            for row, budget in zip(media, budgets, strict=True)
        ]
        lengths = [count_tokens(self.image_processor, *row) for row in zip(visuals, budgets, strict=True)]
        with_bos = [text_options["add_special_tokens"] or text.startswith(bos) for text in texts]
        rows = [self._encode(*row) for row in zip(pieces, lengths, with_bos, strict=True)]
        for row, *counted in zip(rows, visuals, lengths, budgets, strict=True):
            self._check_length(len(row), *counted)
        outputs = self._pad(rows, text_options)
        if any(visuals):
            outputs |= self._pixels(visuals, budgets)
        batch = BatchFeature(outputs, tensor_type=text_options.get("return_tensors"))
        if text_options.get("return_text_replacement_offsets"):
            batch["text_replacement_offsets"] = [
                self._offsets(*row) for row in zip(texts, lengths, strict=True)
            ]
        return batch

    def _encode(self, pieces: list[str], lengths: list[int], add_bos: bool) -> list[int]:
        """Texts with pictures of these lengths between them -> ids, as `chat` makes them."""
        prompt = encode_prompt(
            self.tokenizer,
            pieces,
            lengths,
            version=self.version,
            image_token_id=self.image_token_id,
            add_bos=add_bos,
        )
        if prompt.ids.count(self.image_token_id) != sum(prompt.is_image):
            raise ValueError(
                f"the text contains {self.image_piece}, which stands for image tokens; mark pictures with "
                f"{self.image_token} and leave the piece out"
            )
        return prompt.ids

    def _check_length(self, num_tokens: int, visuals: list[Visual], lengths: list[int], hd_num: int) -> None:
        """Raise `ValueError` for a row that is longer than the context, with what would fit."""
        if self.context_length is not None:
            num_text = num_tokens - sum(lengths)
            count = partial(count_prompt, self.image_processor, num_text, visuals)
            check_length(num_tokens, lengths, self.context_length, hd_num, count)

    def _pad(self, rows: list[list[int]], options: dict) -> dict[str, list[list[int]]]:
        """Rows of ids -> `input_ids` and `attention_mask` of one length."""
        longest, max_length = max(map(len, rows)), options.get("max_length")
        if max_length is not None and longest > max_length:
            raise ValueError(
                f"a text has {longest} tokens with its pictures but max_length is {max_length}; "
                "raise it, shorten the text or lower hd_num"
            )
        padded = self.tokenizer.pad(
            {"input_ids": rows},
            padding=options["padding"],
            max_length=max_length,
            pad_to_multiple_of=options.get("pad_to_multiple_of"),
            padding_side=options["padding_side"],
            return_attention_mask=True,
        )
        outputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
        if options.get("return_mm_token_type_ids"):
            outputs["mm_token_type_ids"] = self.create_mm_token_type_ids(outputs["input_ids"])
        return outputs

    def create_mm_token_type_ids(self, input_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """1 for each image token, 0 for all others."""
        return [[int(token == self.image_token_id) for token in row] for row in input_ids]

    def _pixels(self, visuals: list[list[Visual]], budgets: list[int]) -> dict[str, Tensor]:
        """`pixel_values` and `image_grid_hw` of all rows."""
        prepared = [
            self.image_processor.prepare(row, budget)
            for row, budget in zip(visuals, budgets, strict=True)
            if row
        ]
        pixels, grids = zip(*prepared, strict=True)
        return {"pixel_values": torch.cat(pixels), "image_grid_hw": torch.cat(grids)}

    # ---- what engines ask for ----

    @property
    def image_piece(self) -> str:
        """The vocabulary piece of `image_token_id`."""
        return self.tokenizer.convert_ids_to_tokens(self.image_token_id)

    @property
    def image_token_ids(self) -> list[int]:
        """The ids that stand for pictures."""
        return [self.image_token_id]

    def encode_text(
        self, text: str, image_lengths: Sequence[int] = (), *, add_special_tokens: bool = True
    ) -> list[int]:
        """A whole prompt with a mark for each picture -> ids, for engines that count pictures themselves.

        Args:
            text: BOS is added where it is missing; in version 2.5, a single picture needs no mark.
            image_lengths: how many tokens each picture takes, in the order of the marks.
            add_special_tokens: False leaves BOS out unless the text begins with it.

        Raises:
            ValueError: the numbers of marks and pictures differ, or the text contains `image_piece`.
        """
        bos = self.tokenizer.bos_token
        pieces = place_images(text.removeprefix(bos), len(image_lengths), version=self.version)
        return self._encode(pieces, list(image_lengths), add_special_tokens or text.startswith(bos))

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What the mark of a picture becomes: its piece, once for each of its tokens.

        Args:
            image_inputs: the outputs of the image processor.
        """
        rows, cols = (int(count) for count in image_inputs["image_grid_hw"][image_idx])
        return self.image_piece * self.image_processor.num_image_tokens(rows, cols)

    def _offsets(self, text: str, lengths: list[int]) -> list[dict]:
        """Where each mark of a text is, and where its replacement is in the text without marks."""
        found, grown, end = [], 0, 0
        for length in lengths:
            start = text.find(self.image_token, end)
            if start < 0:  # a single picture without a mark
                break
            end = start + len(self.image_token)
            replacement = self.image_piece * length
            span = start + grown, start + grown + len(replacement)
            entry = {"type": "image", "span": (start, end), "new_span": span}
            found.append({**entry, "text": self.image_token, "replacement": replacement})
            grown += len(replacement) - len(self.image_token)
        return found

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[Sequence[int]] | None = None,
        video_sizes: Sequence[Sequence[int]] | None = None,
        hd_num: int | None = None,
        **kwargs,
    ) -> MultiModalData:
        """Tokens, and rows of `pixel_values`, for the media of one prompt, from their sizes alone.

        Args:
            image_sizes: (height, width) of each picture in pixels.
            video_sizes: (frames, height, width) of each video after sampling.
        """
        counts = {}
        count = self.image_processor
        if image_sizes is not None:
            budget = hd_num or count.default_hd_num(len(image_sizes))
            grids = [grid_of_image(count, height, width, budget) for height, width in image_sizes]
            counts["num_image_tokens"] = [count.num_image_tokens(*grid) for grid in grids]
            counts["num_image_patches"] = [count.num_tiles(*grid) for grid in grids]
        if video_sizes is not None:
            grids = [grid_of_frames(count, [(height, width)] * num) for num, height, width in video_sizes]
            counts["num_video_tokens"] = [count.num_image_tokens(*grid) for grid in grids]
        return MultiModalData(**counts)

    # ---- ids to text ----

    def decode(self, token_ids: Ids, skip_special_tokens: bool = False, **kwargs) -> str | list[str]:
        """The text of ids, or of each row of them.

        With `skip_special_tokens`, image tokens and the mark at the end of an answer are left out too; the
        tokenizer itself keeps both.
        """
        rows = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(rows, int):
            rows = [rows]
        if len(rows) and not isinstance(rows[0], int):
            return [self.decode(row, skip_special_tokens, **kwargs) for row in rows]
        if not skip_special_tokens:
            return self.tokenizer.decode(rows, **kwargs)
        words = [token for token in rows if token != self.image_token_id]
        text = self.tokenizer.decode(words, skip_special_tokens=True, **kwargs)
        return text.removesuffix(end_mark(self.version))

    def batch_decode(self, sequences: Ids, skip_special_tokens: bool = False, **kwargs) -> list[str]:
        """`decode` for each of several sequences."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Ids, skip_special_tokens: bool = True, **kwargs
    ) -> str | list[str]:
        """The text of what `generate` returned."""
        return self.decode(generated_outputs, skip_special_tokens, **kwargs)
