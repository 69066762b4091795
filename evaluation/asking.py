"""Samples of a harness -> what `chat` answers, or how likely the model finds an answer. Knows no harness."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from PIL import Image
from transformers.utils import logging

from ..image_processing_internlm_xcomposer2 import num_visuals
from ..ixc_utils import R560_HD18_Identity_transform
from ..prompt_internlm_xcomposer2 import (
    ChatPrompt,
    batch_inputs,
    mark_pictures,
    plan_chat,
)
from .benchmarks import Settings, benchmark_of, settings_of

logger = logging.get_logger(__name__)

# Our versions in the words of the table; 2 is 2-VL there.
TABLE_VERSIONS = {"2": "vl", "2-4khd": "4khd", "2.5": "2.5"}
# Where documents of data sets keep their options: single fields by letter or number, or a list.
OPTION_FIELDS = ("{letter}", "choice_{lower}", "option{number}")
OPTION_LISTS = ("options", "choices", "candidates")
MAX_NEW_TOKENS = 128  # where neither the table nor the task says


@dataclass(frozen=True)
class Sample:
    """One question of a harness.

    Attributes:
        text: the question as the task asks it.
        media: its pictures, and paths of its videos.
        document: the data set's own fields, from which the published prompt is made.
        task: its name, by which the table is searched.
        arguments: how the task wants an answer generated, in the words of `generate`, and `until`.
    """

    text: str
    media: Sequence = ()
    document: Mapping = field(default_factory=dict)
    task: str = ""
    arguments: Mapping = field(default_factory=dict)


class Likelihood(NamedTuple):
    """Of an answer: the log likelihood of its tokens, their number, and whether all are the greedy ones."""

    total: float
    num_tokens: int
    is_greedy: bool


class Asker:
    """Asks a model as the authors of its version did, or as the task says.

    Args:
        benchmark: whose settings to use for every task; by default the one that the task belongs to.
        version: of the table, the model's by default.
        published: whether the table's settings count; without, the task's own do.
        hd_num: local tiles of a picture, whatever the table says.
        batch_size: questions at once.

    Raises:
        ValueError: the table has no such benchmark.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        benchmark: str | None = None,
        version: str | None = None,
        published: bool = True,
        hd_num: int | None = None,
        batch_size: int = 1,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.version = version or TABLE_VERSIONS.get(model.config.version)
        self.benchmark, self.published = benchmark, published
        self.hd_num, self.batch_size = hd_num, batch_size
        if benchmark is not None:
            settings_of(benchmark, self.version)

    def settings(self, task: str) -> Settings | None:
        """What the table says about a task, if it counts and says anything."""
        name = self.benchmark or benchmark_of(task)
        if not self.published or name is None:
            return None
        try:
            return settings_of(name, self.version, "val" if task.endswith("_val") else None)
        except ValueError as error:
            logger.warning_once(f"{task} is asked as the task says: {error}")
            return None

    def answers(self, samples: Sequence[Sample]) -> list[str]:
        """The answers, read as the table says; samples that share their settings are asked together."""
        calls = [self._call(sample) for sample in samples]
        texts: list[str] = [""] * len(samples)
        while any(call is not None for call in calls):
            first = next(call for call in calls if call is not None)
            alike = [at for at, call in enumerate(calls) if call is not None and call[2] == first[2]]
            batch = alike[: self.batch_size]
            queries, media = zip(*(calls[at][:2] for at in batch), strict=True)
            found = self.model.batch_chat(self.tokenizer, list(queries), list(media), **first[2])
            for at, (answer, _) in zip(batch, found, strict=True):
                texts[at], calls[at] = self._read(samples[at], answer), None
        return texts

    def _call(self, sample: Sample) -> tuple[str, list, dict]:
        """The question with its marks, the pictures, and the arguments of `chat`."""
        settings, media = self.settings(sample.task), list(sample.media)
        if settings is None:
            arguments = chat_arguments(sample.arguments)
            if self.hd_num is not None:
                arguments["hd_num"] = self.hd_num
            return self._marked(sample.text, media), media, arguments
        arguments = settings.chat_arguments(len(media))
        arguments.setdefault("max_new_tokens", sample.arguments.get("max_new_tokens", MAX_NEW_TOKENS))
        if self.hd_num is not None:
            arguments["hd_num"] = self.hd_num
        query = published_question(settings, sample)
        if settings.mark and settings.kind != "video":
            return settings.marks(len(media)) + query, self._prepared(media, arguments["hd_num"]), arguments
        return self._marked(query, media), media, arguments

    def _marked(self, query: str, media: Sequence) -> str:
        return mark_pictures([query], [num_visuals(media)], version=self.model.config.version)[0]

    def _prepared(self, media: Sequence, hd_num: int) -> list:
        """Pictures on their tiles as in 2.5's published evaluation: centred, enlarged by half at most."""
        side = self.model.config.img_size
        return [
            R560_HD18_Identity_transform(medium.convert("RGB"), hd_num, tile_size=side)
            if isinstance(medium, Image.Image)
            else medium
            for medium in media
        ]

    def _read(self, sample: Sample, answer: str) -> str:
        for end in _as_list(sample.arguments.get("until")):
            answer = answer.split(end)[0] if end else answer
        settings = self.settings(sample.task)
        return answer.strip() if settings is None else settings.read_answer(answer)

    @torch.no_grad()
    def likelihoods(self, pairs: Sequence[tuple[Sample, str]]) -> list[Likelihood]:
        """How likely the model finds each answer to its question.

        An answer follows the opening of the model's turn at once, so spaces before it don't count.

        Raises:
            ValueError: an answer is empty, or a prompt with it is too long.
        """
        found: list[Likelihood] = []
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            found += self._likelihoods([self._planned(*pair) for pair in batch])
        return found

    def _planned(self, sample: Sample, answer: str) -> tuple[ChatPrompt, int]:
        """The prompt with the answer, and how many of its last ids are the answer's."""
        settings = self.settings(sample.task)
        hd_num = self.hd_num
        if hd_num is None and settings is not None and isinstance(settings.hd_num, int):
            hd_num = settings.tiles(len(sample.media))
        query, media = self._marked(sample.text, sample.media), list(sample.media)
        plan = [
            plan_chat(self.model.config, self.tokenizer, query, media, hd_num, answer_prefix=text)
            for text in ("", answer.lstrip())
        ]
        before, whole = (prompt.ids for prompt in plan)
        pairs = enumerate(zip(before, whole, strict=False))
        same = next((at for at, (one, other) in pairs if one != other), len(before))
        if same == len(whole):
            raise ValueError(f"the answer {answer!r} to {sample.text!r:.80} is empty; give it some text")
        return plan[1], len(whole) - same

    def _likelihoods(self, planned: Sequence[tuple[ChatPrompt, int]]) -> list[Likelihood]:
        prompts, counts = zip(*planned, strict=True)
        model = self.model
        inputs = batch_inputs(
            model.config,
            prompts,
            pad_token_id=self.tokenizer.pad_token_id,
            font=model.font,
            device=model.input_device,
        )
        inputs.pop("penalise_prompt", None)
        logits = model(**inputs, logits_to_keep=max(counts) + 1, use_cache=False).logits[:, :-1].float()
        found = []
        for row, ids, count in zip(logits, inputs["input_ids"], counts, strict=True):
            row, ids = row[-count:].log_softmax(-1), ids[-count:].to(logits.device)  # (count, vocabulary)
            total = row.gather(1, ids[:, None]).sum().item()
            found.append(Likelihood(total, count, bool((row.argmax(-1) == ids).all())))
        return found


def published_question(settings: Settings, sample: Sample) -> str:
    """A sample's question in the published form, from the fields of its document.

    The task's own text stands in for fields that aren't there, and for a video's question, which has options.
    """
    document = sample.document
    question, options = document.get("question"), options_of(document)
    if settings.option and not options or settings.kind == "video" or not isinstance(question, str):
        return sample.text if settings.option else settings.ask(sample.text)
    return settings.ask(question, options, _text(document.get("hint")))


def options_of(document: Mapping) -> list[str]:
    """The options of a multiple choice, from whichever fields hold them."""
    for name in OPTION_LISTS:
        if isinstance(document.get(name), list | tuple):
            return [str(option) for option in document[name]]
    for form in OPTION_FIELDS:
        names = [form.format(letter=chr(65 + n), lower=chr(97 + n), number=n) for n in range(26)]
        found = [_text(document.get(name)) for name in names]
        if any(found):
            return found[: next((at for at, text in enumerate(found) if not text), len(found))]
    return []


def _text(value: object) -> str:
    """A field as text; data sets write what is missing as None, NaN or "nan"."""
    return "" if value is None or value != value or value == "nan" else str(value)


def chat_arguments(wanted: Mapping) -> dict:
    """A task's arguments of generation as those of `chat`; sampled only if it asks for a temperature."""
    arguments = {
        "max_new_tokens": wanted.get("max_new_tokens", MAX_NEW_TOKENS),
        "num_beams": wanted.get("num_beams") or 1,
        "do_sample": bool(wanted.get("do_sample", wanted.get("temperature", 0))),
        "repetition_penalty": wanted.get("repetition_penalty", 1.0),
    }
    if arguments["do_sample"]:
        arguments |= {name: wanted[name] for name in ("temperature", "top_p") if wanted.get(name)}
    return arguments


def _as_list(until: object) -> list[str]:
    return [until] if isinstance(until, str) else list(until or ())
