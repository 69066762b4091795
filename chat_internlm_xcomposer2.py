"""`chat`, `batch_chat` and streams: questions about pictures and videos, in both generations of the API.

A question becomes a `ChatPrompt` (`plan_chat`), the prompt an answer (`_answer` of the model that has these
methods), and the answer a turn of the `ChatHistory`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from torch import Tensor
from transformers import BatchEncoding
from transformers.generation.streamers import BaseStreamer

from .cache_internlm_xcomposer2 import ChatHistory, PromptCache
from .media_internlm_xcomposer2 import MAX_FRAMES
from .prompt_internlm_xcomposer2 import (
    META_INSTRUCTION,
    History,
    batch_inputs,
    check_tokenizer,
    check_turns,
    cut_response,
    plan_chat,
    stop_token_ids,
    system_text,
)
from .tokenization_internlm_xcomposer2 import END_OF_TURN

UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character


# ---- streams ----


class AnswerWriter(BaseStreamer):
    """The writing end of a stream: turns ids into text as they arrive. It knows nothing about the reader.

    Text comes out token by token, without special tokens, and never ends inside a multi-byte character. No
    space is removed afterwards, as that would shift what has already been shown.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts: SimpleQueue[str | None] = SimpleQueue()  # `None` at the end
        self.stop = threading.Event()
        self._is_prompt, self._ids, self._num_shown = True, [], 0

    def stopping_criterion(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        """(sequences,), all true once `stop` is set."""
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)

    def put(self, value: Tensor) -> None:
        """One step's token ids, the prompt first."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._ids += value.flatten().tolist()
        text = self._decode()
        whole = text.rstrip(UNFINISHED)
        if len(whole) > self._num_shown:
            self.texts.put(whole[self._num_shown :])
            self._num_shown = len(whole)
        if text.endswith("\n"):  # decode one line at most; keep a token so that the next keeps its space
            self._ids = self._ids[-1:]
            self._num_shown = len(self._decode())

    def end(self) -> None:
        """No more tokens; an incomplete character at the end is never shown."""
        self.texts.put(None)

    def _decode(self) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(self._ids, **options)


class ChatStream(Iterator[str]):
    """An answer as it is written: an iterator of pieces of text, and a context manager.

    Generation runs in a thread that the first `next` starts. Closing stops it after the current token.

    Attributes:
        response: the answer so far.
        history: the turns with this one added; at the end it is complete, with its keys and values.
        end: the mark that ends an answer, which is never shown.
    """

    def __init__(
        self,
        writer: AnswerWriter,
        generate: Callable[[], PromptCache | None],
        query: str,
        turns: Sequence[tuple[str, str]],
        end: str = END_OF_TURN,
        answer_prefix: str = "",
    ) -> None:
        self.response, self.end, self._answer_prefix = "", end, answer_prefix
        self._query, self._turns, self._kept = query, list(turns), Future()
        self._writer, self._generate = writer, generate
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def history(self) -> ChatHistory:
        return ChatHistory([*self._turns, self._turn()], self._kept)

    def _turn(self):
        """The turn that this stream adds to the history."""
        return self._query, self._answer_prefix + self.response

    def __next__(self) -> str:
        if self._thread is None and not self._is_closed:
            arguments = self._generate, self._writer, self._kept
            self._thread = threading.Thread(target=_write, args=arguments, daemon=True)
            self._thread.start()
        while not self._is_closed:
            text = self._next_text()
            if text is None:
                self.close()
                self._kept.result()  # raises here whatever was raised there
                break
            response = cut_response(self.response + text, self.end)
            piece, self.response = response[len(self.response) :], response
            if piece:
                return piece
        raise StopIteration

    def _next_text(self) -> str | None:
        try:
            return self._writer.texts.get()
        except BaseException:  # the reader was interrupted
            self.close()
            raise

    def close(self) -> None:
        """Stop writing and wait for the thread."""
        self._is_closed = True
        self._writer.stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "ChatStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        self._writer.stop.set()


def _write(generate: Callable[[], PromptCache | None], writer: AnswerWriter, kept: Future) -> None:
    """The thread's work; it holds no reference to the reader, so that deleting the reader can stop it."""
    try:
        kept.set_result(generate())
    except BaseException as error:
        kept.set_exception(error)
    writer.texts.put(None)


# ---- questions ----


class ChatMixin:
    """The methods that users call. Needs `config`, `font`, `input_device`, `_answer` and `_check_settings`.

    The last two come from `GenerateMixin`, or from another engine.
    """

    @torch.no_grad()
    def chat(
        self,
        tokenizer,
        query: str,
        image=(),
        hd_num: int | None = None,
        history: History = (),
        streamer=None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        num_beams: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.8,
        repetition_penalty: float = 1.005,
        infer_mode: str = "base",
        use_meta: bool | None = None,
        meta_instruction: str | None = META_INSTRUCTION,
        reuse: bool = True,
        fps: float = 1.0,
        num_frames: int = MAX_FRAMES,
        allow_markup: bool = False,
        answer_prefix: str = "",
        **generate_kwargs,
    ) -> tuple[str, ChatHistory]:
        """Answer a question, with or without pictures and videos.

        Args:
            image: nothing, one picture or video, or a list of them: path, URL, `data:` URI, bytes,
                `PIL.Image`, array or (3, height, width) tensor in 0..1; a list of frames inside the list is a
                video; a (pictures, 3, side, side) tensor is taken as pixels that are already normalised.
                `None` selects the published text-only prompt in version 2.5, with BOS twice.
            hd_num: how many local tiles a picture may be cut into; `config.hd_num` by default, but at most 6
                in version 2.5 if there are several pictures. Squares ignore it.
            history: earlier (question, answer) turns. Pass the pictures of all turns each time.
            streamer: gets the ids as they are generated, without those that end the answer.
            use_meta: whether the system text goes first; only on request in 2.5, by default in 2 and 4KHD.
            reuse: whether the returned history keeps what was computed (`model.reuse_limit` bytes at most),
                and whether what the passed one kept is used: only what differs from it is computed again.
            fps, num_frames: frames per second of a video, and the most frames to take.
            allow_markup: whether names of markup in the texts, such as `[UNUSED_TOKEN_145]` or `</s>`, count
                as in the published code. By default they are plain text, and `<ImageHere>` counts in
                questions only.
            answer_prefix: what the answer begins with, written for the model.
            generate_kwargs: anything `generate` accepts.

        Returns:
            The answer from after its prefix, and the history with this turn added.

        Raises:
            ValueError, TypeError, FileNotFoundError: anything wrong with the arguments, before any compute.
        """
        if isinstance(hd_num, list | tuple):  # in the older API, history is the fourth argument
            if history:
                raise TypeError("arguments after a history in fourth place must be passed by name")
            hd_num, history = None, hd_num
        settings = self._settings(
            tokenizer,
            streamer=streamer,
            infer_mode=infer_mode,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            num_beams=num_beams,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            **generate_kwargs,
        )
        turns = check_turns(query, history)
        meta = system_text(self.config.version, use_meta, meta_instruction)
        prompt = plan_chat(
            self.config,
            tokenizer,
            query,
            image,
            hd_num,
            turns,
            meta,
            allow_markup=allow_markup,
            answer_prefix=answer_prefix,
            fps=fps,
            num_frames=num_frames,
        )
        earlier = getattr(history, "prompt_cache", None)
        (sequence,), cache = self._answer([prompt], settings, earlier, keep=reuse)
        response = cut_response(tokenizer.decode(sequence, skip_special_tokens=True))
        return response, ChatHistory([*turns, (query, answer_prefix + response)], cache)

    @torch.no_grad()
    def batch_chat(
        self,
        tokenizer,
        queries: Sequence[str],
        images: Sequence | None = None,
        hd_num: int | None = None,
        histories: Sequence[History] | None = None,
        *,
        use_meta: bool | None = None,
        meta_instruction: str | None = META_INSTRUCTION,
        fps: float = 1.0,
        num_frames: int = MAX_FRAMES,
        allow_markup: bool = False,
        answer_prefix: str = "",
        **settings,
    ) -> list[tuple[str, ChatHistory]]:
        """Answer several questions at once, each as `chat` would on its own, except for what sampling draws.

        Args:
            images: for each question, what `chat` accepts as `image`: none, one or several, of any size.
            histories: for each question, its earlier turns.
            fps, num_frames, answer_prefix: as in `chat`.
            settings: how answers are generated, with the names and defaults of `chat`, and anything else that
                `generate` accepts.

        Returns:
            For each question, the answer and its history with this turn added.

        Raises:
            ValueError, TypeError, FileNotFoundError: anything wrong with the arguments, before any compute.
        """
        check_batch(queries, images, histories, settings)
        settings = self._settings(tokenizer, **settings)
        meta = system_text(self.config.version, use_meta, meta_instruction)
        nothing = [()] * len(queries)
        turns = [check_turns(*pair) for pair in zip(queries, histories or nothing, strict=True)]
        prompts = [
            plan_chat(
                self.config,
                tokenizer,
                query,
                image,
                hd_num,
                earlier,
                meta,
                allow_markup=allow_markup,
                answer_prefix=answer_prefix,
                fps=fps,
                num_frames=num_frames,
            )
            for query, image, earlier in zip(queries, images or nothing, turns, strict=True)
        ]
        sequences, _ = self._answer(prompts, settings)
        answers = [cut_response(tokenizer.decode(ids, skip_special_tokens=True)) for ids in sequences]
        return [
            (answer, ChatHistory([*earlier, (query, answer_prefix + answer)]))
            for answer, earlier, query in zip(answers, turns, queries, strict=True)
        ]

    def chat_stream(
        self,
        tokenizer,
        query: str,
        image=(),
        hd_num: int | None = None,
        history: History = (),
        *,
        use_meta: bool | None = None,
        meta_instruction: str | None = META_INSTRUCTION,
        reuse: bool = True,
        fps: float = 1.0,
        num_frames: int = MAX_FRAMES,
        allow_markup: bool = False,
        answer_prefix: str = "",
        **settings,
    ) -> ChatStream:
        """Like `chat`, but returns an iterator of pieces of the answer, which has the `history` at the end.

        Closing the iterator stops the computation after the current token.

        Args:
            fps, num_frames, answer_prefix: as in `chat`.
            settings: as in `batch_chat`.

        Raises:
            ValueError, TypeError, FileNotFoundError: as in `chat`, when called.
        """
        if settings.get("streamer") is not None:
            raise ValueError("a stream has its own streamer; pass yours to chat")
        writer = AnswerWriter(tokenizer)
        criteria = [*(settings.get("stopping_criteria") or ()), writer.stopping_criterion]
        settings |= {"streamer": writer, "stopping_criteria": criteria}
        settings = self._settings(tokenizer, **settings)
        turns = check_turns(query, history)
        meta = system_text(self.config.version, use_meta, meta_instruction)
        prompt = plan_chat(
            self.config,
            tokenizer,
            query,
            image,
            hd_num,
            turns,
            meta,
            allow_markup=allow_markup,
            fps=fps,
            num_frames=num_frames,
            answer_prefix=answer_prefix,
        )
        earlier = getattr(history, "prompt_cache", None)
        return ChatStream(
            writer,
            lambda: self._answer([prompt], settings, earlier, keep=reuse)[1],
            query,
            turns,
            answer_prefix=answer_prefix,
        )

    def stream_chat(
        self,
        tokenizer,
        query: str,
        image=None,
        history: History = (),
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        repetition_penalty: float = 1.005,
        hd_num: int | None = None,
        **kwargs,
    ) -> Iterator[tuple[str, ChatHistory]]:
        """Like `chat_stream`, with the defaults and results of the older API.

        Returns:
            An iterator of (answer so far, history so far) that begins with an empty answer.

        Raises:
            ValueError, TypeError, FileNotFoundError: as in `chat`, when called.
        """
        settings = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "temperature": temperature}
        settings |= {"top_p": top_p, "repetition_penalty": repetition_penalty, **kwargs}
        stream = self.chat_stream(tokenizer, query, image, hd_num, history, **settings)
        return _answers_so_far(stream)

    # ---- prompts ----

    def build_inputs(
        self,
        tokenizer,
        query: str,
        history: History = (),
        meta_instruction: str | None = "",
        *,
        allow_markup: bool = False,
    ) -> BatchEncoding:
        """The published text-only prompt as (1, tokens) ids on the model's device, with BOS twice.

        Raises:
            ValueError, TypeError: anything wrong with the arguments.
        """
        turns = check_turns(query, history)
        prompt = plan_chat(
            self.config, tokenizer, query, None, None, turns, meta_instruction, allow_markup=allow_markup
        )
        ids = torch.tensor([prompt.ids], device=self.input_device)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def prepare_chat(
        self,
        tokenizer,
        query: str,
        image=(),
        hd_num: int | None = None,
        history: History = (),
        meta: str | None = "",
        *,
        allow_markup: bool = False,
    ) -> dict:
        """Everything `forward` needs for one prompt, fully checked but with nothing computed by the model.

        Returns:
            `input_ids`, and with pictures also `pixel_values`, `image_grid_hw` and `im_mask`.

        Raises:
            ValueError, TypeError, FileNotFoundError: anything wrong with the arguments.
        """
        turns = check_turns(query, history)
        prompt = plan_chat(
            self.config, tokenizer, query, image, hd_num, turns, meta, allow_markup=allow_markup
        )
        return batch_inputs(self.config, [prompt], font=self.font, device=self.input_device)

    # ---- settings ----

    def _settings(
        self,
        tokenizer,
        *,
        max_new_tokens: int | None = 1024,
        do_sample: bool = True,
        num_beams: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.8,
        repetition_penalty: float = 1.005,
        infer_mode: str = "base",
        **settings,
    ) -> dict:
        """`generate`'s arguments: how tokens are chosen, where an answer ends, and what the caller adds.

        Raises:
            ValueError, TypeError: they, or the tokenizer, are unusable.
        """
        check_tokenizer(self.config, tokenizer)
        settings = {
            "max_new_tokens": max_new_tokens,
            "do_sample": do_sample,
            "num_beams": num_beams,
            **({"temperature": temperature, "top_p": top_p} if do_sample else {}),
            "repetition_penalty": repetition_penalty,
            "infer_mode": infer_mode,
            "eos_token_id": stop_token_ids(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            **settings,
        }
        if settings.get("stop_strings") is not None:
            settings = {"tokenizer": tokenizer, **settings}
        self._check_settings(settings)
        return settings


def _answers_so_far(stream: ChatStream) -> Iterator[tuple[str, ChatHistory]]:
    with stream:
        yield "", stream.history
        for _ in stream:
            yield stream.response, stream.history


def check_batch(
    queries: Sequence[str], images: Sequence | None, histories: Sequence | None, settings: dict
) -> None:
    """Raise `TypeError` or `ValueError` unless there is one entry for each question."""
    if isinstance(queries, str) or not isinstance(queries, Sequence) or not queries:
        raise TypeError(f"queries must be a list of questions, at least one, not {queries!r:.80}")
    for name, values in (("images", images), ("histories", histories)):
        if values is None:
            continue
        if isinstance(values, str) or not isinstance(values, list | tuple):
            raise TypeError(f"{name} must be a list with one entry per question, not {type(values).__name__}")
        if len(values) != len(queries):
            raise ValueError(f"there are {len(queries)} queries but {len(values)} {name}; give one for each")
    if settings.get("streamer") is not None:
        beams = settings.get("num_beams", 1)
        several = (
            f"{len(queries)} queries" if beams == 1 else f"{len(queries)} queries and num_beams is {beams}"
        )
        raise ValueError(f"a streamer shows one answer, but there are {several}; use chat")
