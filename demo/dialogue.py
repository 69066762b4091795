"""A visitor's dialogue with a model: questions with files, answers and their cost. Knows nothing of pages."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from internlm_xcomposer2.cache_internlm_xcomposer2 import ChatHistory
from internlm_xcomposer2.demo.service import Service
from internlm_xcomposer2.demo.tiles import draw_tiles
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import as_visuals
from internlm_xcomposer2.ixc_utils import check_hd_num
from internlm_xcomposer2.prompt_internlm_xcomposer2 import (
    META_INSTRUCTION,
    ChatPrompt,
    mark_pictures,
    plan_chat,
    system_text,
)
from PIL import Image
from torch import Tensor

MAX_TEXT = 20_000  # characters of a question, or of a system text
MAX_FILES = 20  # pictures and videos of a dialogue
MAX_TURNS = 100
MAX_TILES = 64
MAX_BEAMS = 5
MAX_NEW_TOKENS = 8192
MAX_SECONDS = 600.0  # of one answer
MAX_DRAWN = 4  # of a question's pictures, as the model sees them


# ---- what is asked and answered ----


@dataclass(frozen=True)
class Question:
    """What a visitor wrote, and the paths of the pictures and videos that came with it."""

    text: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens and seconds of one answer."""

    prompt_tokens: int
    image_tokens: int
    answer_tokens: int
    first_seconds: float
    seconds: float


@dataclass(frozen=True)
class Turn:
    """A question that was answered."""

    question: Question
    answer: str
    usage: Usage


@dataclass(frozen=True)
class Settings:
    """How a question is answered.

    Attributes:
        hd_num: how many local tiles a picture may be cut into; `None` for the checkpoint's own number.
        system: the system text; empty for none, `None` for the checkpoint's own habit.
    """

    hd_num: int | None = None
    system: str | None = None
    do_sample: bool = True
    num_beams: int = 1
    temperature: float = 1.0
    top_p: float = 0.8
    repetition_penalty: float = 1.005
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.hd_num is not None and check_hd_num(self.hd_num) > MAX_TILES:
            raise ValueError(f"hd_num is {self.hd_num}, but at most {MAX_TILES} tiles are cut here")
        for name, most in (("num_beams", MAX_BEAMS), ("max_new_tokens", MAX_NEW_TOKENS)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}, but the limit here is {most}; lower it")
        check_text("the system text", self.system or "")

    def decoding(self) -> dict:
        """Arguments of `chat` and of `generate`."""
        names = ("do_sample", "num_beams", "temperature", "top_p", "repetition_penalty", "max_new_tokens")
        return {name: getattr(self, name) for name in names}

    def system_arguments(self) -> dict:
        """`use_meta` and `meta_instruction` of `chat`."""
        if self.system is None:
            return {"use_meta": None, "meta_instruction": META_INSTRUCTION}
        return {"use_meta": bool(self.system), "meta_instruction": self.system}


def check_text(what: str, text: str) -> str:
    """Raise `ValueError` for a text that is too long to be looked at."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"{what} has {len(text)} characters, but the limit here is {MAX_TEXT}; shorten it")
    return text


# ---- what it costs ----


class Meter:
    """A stopping criterion of `generate` that counts tokens, takes the time, and can end an answer."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.num_tokens = 0
        self._started = time.perf_counter()
        self._first: float | None = None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    @property
    def first_seconds(self) -> float:
        """Until the first token, or until now if there is none."""
        return self.seconds if self._first is None else self._first

    @property
    def ends(self) -> bool:
        """Whether it was stopped, or took too long."""
        return self.stop.is_set() or self.seconds > MAX_SECONDS

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        """(sequences,), all true once the answer was stopped or took too long."""
        self.num_tokens += 1
        if self._first is None:
            self._first = self.seconds
        return torch.full((len(input_ids),), self.ends, device=input_ids.device)

    def usage(self, prompt_tokens: int, image_tokens: int) -> Usage:
        """What an answer took that ends now."""
        return Usage(prompt_tokens, image_tokens, self.num_tokens, self.first_seconds, self.seconds)


def mark_questions(version: str, questions: Sequence[Question]) -> list[str]:
    """The texts of a dialogue's questions, with a mark for each of their files.

    Raises:
        ValueError: a question has some marks, but not one for each file.
    """
    counts = [len(question.files) for question in questions]
    return mark_pictures([question.text for question in questions], counts, version=version)


# ---- the dialogue ----


@dataclass
class Dialogue:
    """The state of one visitor.

    Attributes:
        pending: a question that waits for its answer.
        partial: the answer that is being written.
        tiles: the first pictures of the last question, as the model sees them.
    """

    turns: list[Turn] = field(default_factory=list)
    pending: Question | None = None
    partial: str = ""
    tiles: list[Image.Image] = field(default_factory=list)
    _history: ChatHistory = field(default_factory=ChatHistory)
    _meter: Meter | None = None

    @property
    def is_writing(self) -> bool:
        """Whether an answer is being written."""
        return self._meter is not None

    def ask(self, question: Question) -> None:
        """Let a question wait for its answer, in place of one that was waiting already.

        Raises:
            ValueError: it is empty or too long, or the dialogue is, or an answer is being written.
        """
        self._check_quiet()
        if not question.text.strip() and not question.files:
            raise ValueError("write a question")
        check_text("the question", question.text)
        if len(self.turns) >= MAX_TURNS:
            raise ValueError(f"the dialogue has {MAX_TURNS} turns, which is the limit here; begin a new one")
        num_files = len(question.files) + sum(len(turn.question.files) for turn in self.turns)
        if num_files > MAX_FILES:
            raise ValueError(f"the dialogue has {num_files} files, but the limit here is {MAX_FILES}")
        self.pending = question

    def take_back(self) -> Question | None:
        """Remove the last question, with its answer if it has one, and return it.

        Raises:
            ValueError: an answer is being written.
        """
        self._check_quiet()
        if self.pending is not None:
            question, self.pending = self.pending, None
            return question
        return self.turns.pop().question if self.turns else None

    def stop(self) -> None:
        """End the answer after the current token and keep what is written; drop a question that waits."""
        if self._meter is not None:
            self._meter.stop.set()
        else:
            self.pending = None

    def answer(self, service: Service, settings: Settings) -> Iterator[str]:
        """Answer the waiting question, if there is one.

        Yields the answer so far, and adds the turn at the end. After an error the dialogue is as it was
        before the question.

        Raises:
            ValueError, TypeError, OSError: as in `chat`, and for numbers of files and marks that differ.
        """
        if self.pending is None:
            return
        self._meter, self.tiles = Meter(), []
        try:
            questions = [*(turn.question for turn in self.turns), self.pending]
            texts = mark_questions(service.config.version, questions)
            history = [(text, turn.answer) for text, turn in zip(texts, self.turns, strict=False)]
            files = [file for question in questions for file in question.files]
            plan = _plan(service, texts[-1], files, history, settings)
            yield from self._write(service, texts[-1], plan, history, settings)
            visuals = plan.visuals[len(files) - len(self.pending.files) :][:MAX_DRAWN]
            self.tiles = [draw_tiles(visual, service.config, plan.hd_num) for visual in visuals]
            usage = self._meter.usage(len(plan.ids), sum(plan.lengths))
            self.turns.append(Turn(self.pending, self.partial, usage))
        finally:
            self._meter = self.pending = None
            self.partial = ""

    def _write(
        self,
        service: Service,
        query: str,
        plan: ChatPrompt,
        history: Sequence[tuple[str, str]],
        settings: Settings,
    ) -> Iterator[str]:
        arguments = {
            "image": [visual.image or list(visual.frames) for visual in plan.visuals],
            "hd_num": settings.hd_num,
            "history": ChatHistory(history, self._history.prompt_cache),
            "stopping_criteria": [self._meter],
            **settings.system_arguments(),
            **settings.decoding(),
        }
        if settings.num_beams > 1:  # which beam wins is known at the end
            self.partial, self._history = service.model.chat(service.tokenizer, query, **arguments)
            yield self.partial
        else:
            with service.model.chat_stream(service.tokenizer, query, **arguments) as stream:
                for _ in stream:
                    self.partial = stream.response
                    yield self.partial
                self._history = stream.history
        service.kept.keep(self._history)

    def _check_quiet(self) -> None:
        if self.is_writing:
            raise ValueError("an answer is being written; wait for it, or stop it")


def _plan(
    service: Service,
    query: str,
    files: Sequence[str],
    history: Sequence[tuple[str, str]],
    settings: Settings,
) -> ChatPrompt:
    """Read the files and count the prompt's tokens."""
    media = [visual.image or list(visual.frames) for visual in as_visuals(list(files), service.config)]
    system = system_text(service.config.version, **settings.system_arguments())
    return plan_chat(service.config, service.tokenizer, query, media, settings.hd_num, history, system)
