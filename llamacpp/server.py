"""`/v1/chat/completions` over a checkpoint as GGUF: OpenAI's messages in, answers out, whole or streamed.

FastAPI answers, and the types are those of the `openai` package. Requests wait for each other, because there
is one context. A conversation that goes on, or another question about the same picture, finds in it what is
computed already.
"""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Literal

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from openai.types import CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, full
from transformers import StoppingCriteria

from ..access_internlm_xcomposer2 import bad_requests
from ..chat_internlm_xcomposer2 import ChatStream
from ..image_processing_internlm_xcomposer2 import default_hd_num, load_media
from ..ixc_utils import check_hd_num
from ..messages_internlm_xcomposer2 import read_messages
from ..prompt_internlm_xcomposer2 import plan_chat, text_of
from .model import LlamaCppModel

MAX_NEW_TOKENS = 1024  # unless a request says otherwise


class StreamOptions(BaseModel):
    """What a stream tells besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(BaseModel):
    """A request for an answer; what isn't here is refused, so that nothing is silently ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[dict] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 0.8
    n: Literal[1] | None = None
    user: str | None = None
    # Not OpenAI's: through `extra_body`.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    hd_num: int | None = None

    def settings(self) -> dict:
        """The arguments of `generate`; temperature 0 takes the most likely tokens."""
        limit = self.max_completion_tokens or self.max_tokens or MAX_NEW_TOKENS
        settings = {"max_new_tokens": limit, "repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return {**settings, "do_sample": False}
        sampling = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        given = {name: value for name, value in sampling.items() if value is not None}
        return {**settings, **given, "do_sample": True}


class TokenCounter(StoppingCriteria):
    """Stops nothing; counts the tokens of an answer, without the one that ended it."""

    count = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.count = input_ids.shape[1]
        return full((len(input_ids),), False)


class Answering:
    """One answer: its stream, and what is told about it.

    Raises:
        ValueError, TypeError, FileNotFoundError, PermissionError: what is wrong with the request, before any
            compute.
    """

    def __init__(self, model: LlamaCppModel, name: str, request: Request) -> None:
        tokenizer, self._counter, settings = model.tokenizer, TokenCounter(), request.settings()
        self.id, self.created, self.model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), name
        meta, turns, query, image = read_turns(request.messages, model.config, request.hd_num)
        self.stream: ChatStream = model.chat_stream(
            tokenizer,
            query,
            image,
            request.hd_num,
            turns,
            use_meta=meta is not None,
            meta_instruction=meta,
            stopping_criteria=[self._counter],
            **settings,
        )
        prompt = plan_chat(model.config, tokenizer, query, image, request.hd_num, turns, meta)
        self._num_prompt = len(prompt.ids)
        room = model.decoder.num_positions - self._num_prompt + 1
        self._limit = min(settings["max_new_tokens"], room)

    @property
    def usage(self) -> CompletionUsage:
        """How many tokens there are."""
        prompt, answer = self._num_prompt, self._counter.count
        return CompletionUsage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Whether the answer ended by itself, or for want of tokens."""
        return "length" if self._counter.count >= self._limit else "stop"

    def completion(self) -> ChatCompletion:
        """The whole answer."""
        with self.stream as pieces:
            text = "".join(pieces)
        message = ChatCompletionMessage(role="assistant", content=text)
        choice = Choice(index=0, message=message, finish_reason=self.finish_reason)
        return ChatCompletion(
            id=self.id,
            choices=[choice],
            created=self.created,
            model=self.model,
            object="chat.completion",
            usage=self.usage,
        )

    def events(self, with_usage: bool) -> Iterator[str]:
        """The answer as server-sent events; ends early if the client has gone."""
        yield self._event(ChoiceDelta(role="assistant", content=""))
        with self.stream as pieces:
            for piece in pieces:
                yield self._event(ChoiceDelta(content=piece))
        yield self._event(ChoiceDelta(), self.finish_reason)
        if with_usage:
            yield self._chunk([], self.usage)
        yield "data: [DONE]\n\n"

    def _event(self, delta: ChoiceDelta, finish_reason: str | None = None) -> str:
        return self._chunk([ChunkChoice(index=0, delta=delta, finish_reason=finish_reason)])

    def _chunk(self, choices: list[ChunkChoice], usage: CompletionUsage | None = None) -> str:
        chunk = ChatCompletionChunk(
            id=self.id,
            choices=choices,
            created=self.created,
            model=self.model,
            object="chat.completion.chunk",
            usage=usage,
        )
        return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def read_turns(
    messages: Sequence[Mapping], config, hd_num: int | None = None
) -> tuple[str | None, list[tuple[str, str]], str, list]:
    """OpenAI's messages -> the system text, earlier turns, the question, and all pictures and videos.

    Raises:
        ValueError, TypeError, FileNotFoundError, PermissionError: they aren't a system message or none, then
            questions and answers in turn that end with a question; or a picture can't be read.
    """
    rendered, media = read_messages(messages, need_sources=True)
    roles = [message["role"] for message in rendered]
    said = [text_of(message["content"]) for message in rendered]
    meta = said.pop(0) if roles[0] == "system" else None
    expected = [*["system"] * (meta is not None), *islice(cycle(("user", "assistant")), len(said))]
    if roles != expected or roles[-1] != "user":
        raise ValueError(
            "messages must be a system message or none, then user and assistant in turn, and the last from "
            f"user; these are {', '.join(roles)}"
        )
    hd_num = default_hd_num(config, len(media)) if hd_num is None else check_hd_num(hd_num)
    visuals = load_media(media, config, hd_num=hd_num)
    return meta, list(zip(said[:-1:2], said[1::2], strict=True)), said[-1], visuals


def build_app(model: LlamaCppModel, name: str) -> FastAPI:
    """The application.

    Args:
        name: of the model, which requests are answered with; whatever name they ask for.
    """
    app = FastAPI(title="InternLM-XComposer2 by llama.cpp", docs_url=None, redoc_url=None)
    started = int(time.time())

    @app.get("/health")
    def health() -> dict:
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict:
        known = Model(id=name, created=started, object="model", owned_by="user")
        return {"object": "list", "data": [known.model_dump()]}

    @app.post("/v1/chat/completions", response_model=None)
    def chat_completions(request: Request) -> StreamingResponse | dict:
        with bad_requests():
            answering = Answering(model, name, request)
        if not request.stream:
            return answering.completion().model_dump()
        with_usage = request.stream_options is not None and request.stream_options.include_usage
        return StreamingResponse(answering.events(with_usage), media_type="text/event-stream")

    return app
