"""Answers as they grow: an iterator of text around a thread, and what a streamer gets to see."""

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Queue

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from .prefix_internlm_xcomposer2 import ChatHistory, PendingCache, PromptCache
from .prompt_internlm_xcomposer2 import cut_response

UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character


class StopEvent(StoppingCriteria):
    """Stops every sequence once it is set."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


class EndMarkFilter(BaseStreamer):
    """Passes on to a caller's streamer everything but the ids that end an answer."""

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


class AnswerStreamer(TextIteratorStreamer):
    """An iterator of text that can be stopped, and that raises what the generating thread raised.

    Text comes out token by token, without special tokens and ids in `stop_ids`, and never ends within a
    character of several bytes. No blank is taken away afterwards, as that would shift what was shown already.
    """

    def __init__(self, tokenizer, stop_ids: Sequence[int] = ()) -> None:
        super().__init__(
            tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self.stop, self.stop_ids = StopEvent(), set(stop_ids)
        self.errors: Queue = Queue()

    def put(self, value: Tensor) -> None:
        """One step's token ids, the prompt first."""
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.token_cache += [i for i in value.flatten().tolist() if i not in self.stop_ids]
        text = self._decode()
        whole = text.rstrip(UNFINISHED)
        if len(whole) > self.print_len:
            self.on_finalized_text(whole[self.print_len :])
            self.print_len = len(whole)
        if text.endswith("\n"):  # decode no more than a line at a time; one token keeps the next one's blank
            self.token_cache = self.token_cache[-1:]
            self.print_len = len(self._decode())

    def end(self) -> None:
        """No more tokens; half a character that is left is never shown."""
        self.token_cache, self.print_len = [], 0
        self.next_tokens_are_prompt = True
        self.on_finalized_text("", stream_end=True)

    def _decode(self) -> str:
        return self.tokenizer.decode(self.token_cache, **self.decode_kwargs)

    def fail(self, error: BaseException) -> None:
        """Hand an error to the reader, in whose thread it is raised."""
        self.errors.put(error)
        self.text_queue.put(self.stop_signal)

    def __next__(self) -> str:
        try:
            return super().__next__()
        except StopIteration:
            if not self.errors.empty():
                raise self.errors.get() from None
            raise


class ChatStream(Iterator[str]):
    """An answer as it is written: an iterator of pieces of text, and a context manager.

    Generation runs in a thread, from the first `next`. Closing stops it after the current token.

    Attributes:
        response: the answer so far.
        history: the turns with this one added; complete, and with its keys and values, at the end.
    """

    def __init__(
        self,
        streamer: AnswerStreamer,
        generate: Callable[[AnswerStreamer, StoppingCriteriaList], PromptCache | None],
        query: str,
        history: Sequence[tuple[str, str]],
    ) -> None:
        self.response = ""
        self._query, self._turns, self._pending = query, list(history), PendingCache()
        self._streamer, self._generate = streamer, generate
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def history(self) -> ChatHistory:
        return ChatHistory([*self._turns, (self._query, self.response)], self._pending)

    def __next__(self) -> str:
        while not self._is_closed:
            self._start()
            try:
                text = next(self._streamer)
            except BaseException:
                self.close()
                raise
            response = cut_response(self.response + text)
            piece, self.response = response[len(self.response) :], response
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Stop writing and wait for the thread."""
        self._is_closed = True
        self._streamer.stop.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> "ChatStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        self._streamer.stop.set()

    def _start(self) -> None:
        if self._thread is None:
            arguments = (self._generate, self._streamer, self._pending)
            self._thread = threading.Thread(target=_write, args=arguments, daemon=True)
            self._thread.start()


def _write(generate: Callable, streamer: AnswerStreamer, pending: PendingCache) -> None:
    """The thread's work; knows nothing of the reader, so that the reader's end can stop it."""
    try:
        pending.result = generate(streamer, StoppingCriteriaList([streamer.stop]))
    except BaseException as error:
        streamer.fail(error)
