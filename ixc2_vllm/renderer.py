"""Prompts: messages or whole texts -> ids by the rules of `chat`, each picture or video a short mark in them.

What messages say is plain text: names of markup don't count in it, `<ImageHere>` neither. The marks
(`processing.mark_of`) are ids that no plain text becomes. vLLM replaces each with as many
image tokens as its picture takes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import jinja2
from internlm_xcomposer2 import InternLMXComposer2Processor, InternLMXComposer2Tokenizer
from internlm_xcomposer2.prompt_internlm_xcomposer2 import ROLES, text_only_ids
from internlm_xcomposer2.tokenization_internlm_xcomposer2 import (
    CHAT_TEMPLATE,
    END_OF_TURN,
    IMAGE_MARK,
    VIDEO_MARK,
    markup_of,
)
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.renderers.base import BaseRenderer
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.utils.async_utils import make_async

from .processing import IMAGE, VIDEO, mark_of


class FamilyTokenizer:
    """The tokenizer mode `ixc2`: the class of the installed package for every checkpoint."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str,
        *args,
        trust_remote_code: bool = False,
        revision: str | None = None,
        download_dir: str | None = None,
        **kwargs,
    ):
        """The tokenizer, wrapped by vLLM's cache of what doesn't change."""
        options = {"revision": revision, "cache_dir": download_dir, **kwargs}
        options.pop("config", None)
        return get_cached_tokenizer(InternLMXComposer2Tokenizer.from_pretrained(path_or_repo_id, **options))


class FamilyRenderer(BaseRenderer):
    """vLLM's way from a request to ids, for this family."""

    def __init__(self, config, tokenizer) -> None:
        super().__init__(config, tokenizer)
        self._finish_async = make_async(self._finish, executor=self._executor)

    @cached_property
    def processor(self) -> InternLMXComposer2Processor:
        """The processor of the checkpoint that is served."""
        return InternLMXComposer2Processor.for_config(self.model_config.hf_config, self.get_tokenizer())

    @cached_property
    def chat_template(self) -> str:
        """The checkpoint's own template, or that of its version, which has the system text of `chat`."""
        own = self.get_tokenizer().chat_template
        return self.processor.chat_template if own == CHAT_TEMPLATE else own

    def get_eos_token_id(self) -> int:
        """The end of a turn. The generation settings of every checkpoint add `</s>`."""
        return self.get_tokenizer().convert_tokens_to_ids(END_OF_TURN)

    # ---- messages ----

    def render_messages(self, messages: list[dict], params: ChatParams) -> tuple[list[dict], TokensPrompt]:
        """A conversation of OpenAI's API -> the same with its media read, and its prompt."""
        with refusals():
            parsed = parse_chat_messages(messages, self.model_config, "openai", *_media_options(params))
        return parsed[0], self._finish(*parsed, params)

    async def render_messages_async(
        self, messages: list[dict], params: ChatParams
    ) -> tuple[list[dict], TokensPrompt]:
        """Like `render_messages`; media are read at the same time."""
        with refusals():
            parsed = await parse_chat_messages_async(
                messages, self.model_config, "openai", *_media_options(params)
            )
        return parsed[0], await self._finish_async(*parsed, params)

    def _finish(self, conversation: list[dict], media, uuids, params: ChatParams) -> TokensPrompt:
        with refusals():
            prompt = TokensPrompt(prompt_token_ids=self._encode_messages(conversation, params))
        if media is not None:
            prompt["multi_modal_data"] = media
        if uuids is not None:
            prompt["multi_modal_uuids"] = uuids
        return prompt

    def _encode_messages(self, conversation: list[dict], params: ChatParams) -> list[int]:
        check_roles(conversation)
        options = params.get_apply_chat_template_kwargs()
        for name in ("tokenize", "return_dict"):
            options.pop(name, None)
        template = options.pop("chat_template", None) or self.chat_template
        tokenizer = self.get_tokenizer()
        markup = markup_of(tokenizer)
        text = tokenizer.apply_chat_template(
            markup.hide_messages(conversation, with_marks=True),
            chat_template=template,
            tokenize=False,
            allow_markup=True,  # what is said is hidden already
            **markup.hide_all(options, with_marks=True),
        )
        return self.encode(text, list(_kinds_of(conversation)))

    # ---- whole prompts ----

    def _tokenize_prompt(self, prompt: TextPrompt, params: TokenizeParams) -> TokensPrompt:
        """A prompt with markup and a mark for each picture, as `/v1/completions` and `generate` take it."""
        text, media = prompt["prompt"], prompt.get("multi_modal_data")
        counts = {}
        if media:
            counts = self.get_mm_processor().info.parse_mm_data(media, validate=False).get_all_counts()
        with refusals("prompt"):
            text, kinds = order_marks(text, counts.get(IMAGE, 0), counts.get(VIDEO, 0))
            ids = self.encode(text, kinds, add_special_tokens=params.add_special_tokens)
        return self._build_tokens_prompt(ids, prompt)

    def encode(self, text: str, kinds: Sequence[str], add_special_tokens: bool = True) -> list[int]:
        """A prompt whose marks are those of media of these kinds -> ids with the mark of each.

        Raises:
            ValueError: the numbers of marks and media differ, or the text contains the image piece.
        """
        if not kinds and add_special_tokens and self.processor.version != "2.5":
            bare = text.removeprefix(self.get_tokenizer().bos_token)
            return text_only_ids(self.get_tokenizer(), bare)
        ids = self.processor.encode_text(text, [1] * len(kinds), add_special_tokens=add_special_tokens)
        marks = iter([mark_of(self.processor, kind) for kind in kinds])
        parts = [next(marks) if token == self.processor.image_token_id else [token] for token in ids]
        return [token for part in parts for token in part]


@contextmanager
def refusals(parameter: str = "messages") -> Iterator[None]:
    """Whatever is wrong with a request as the error that vLLM's server answers with status 400 and its text.

    A file that the server doesn't allow is a `RuntimeError` in vLLM.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, jinja2.TemplateError) as error:
        raise VLLMValidationError(str(error), parameter=parameter) from error


def _media_options(params: ChatParams) -> tuple[dict | None, dict | None]:
    return params.media_io_kwargs, params.mm_processor_kwargs


def check_roles(conversation: Sequence[dict]) -> None:
    """Raise `ValueError` for a role that no version knows."""
    for message in conversation:
        if message["role"] not in ROLES:
            raise ValueError(f"unknown role {message['role']!r}; choose one of {', '.join(ROLES)}")


def _kinds_of(conversation: Sequence[dict]) -> Iterator[str]:
    """The kind of each medium of a conversation, in order."""
    for message in conversation:
        for part in message.get("content") or ():
            if part["type"] in (IMAGE, VIDEO):
                yield part["type"]


def order_marks(text: str, num_images: int, num_videos: int) -> tuple[str, list[str]]:
    """A text with `IMAGE_MARK` for every medium, and their kinds in order; videos alone may use either mark.

    Raises:
        ValueError: the marks of videos are not as many as the videos.
    """
    if VIDEO_MARK not in text:
        if num_images and num_videos:
            raise ValueError(f"with pictures and videos, the text must mark each video with {VIDEO_MARK}")
        return text, [IMAGE] * num_images + [VIDEO] * num_videos
    if text.count(VIDEO_MARK) != num_videos:
        raise ValueError(f"the text has {text.count(VIDEO_MARK)} {VIDEO_MARK} marks but {num_videos} videos")
    kinds = []
    for piece in text.split(VIDEO_MARK):
        kinds += [IMAGE] * piece.count(IMAGE_MARK) + [VIDEO]
    return text.replace(VIDEO_MARK, IMAGE_MARK), kinds[:-1]
