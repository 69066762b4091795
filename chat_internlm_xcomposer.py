"""What users call on a model of the first generation: the published methods, streams and batches.

The published history is a list of embeddings. Here it is a `ChatHistory` of turns, each of which knows its
ids and the embeddings of its pictures; a list of embeddings is accepted too. In both, earlier turns have
another form than the current one, without system text and without the mark at the end of the question.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from .build_mlp import leaves_autocast
from .cache_internlm_xcomposer2 import ChatHistory
from .chat_internlm_xcomposer2 import AnswerWriter, ChatStream, check_batch
from .image_processing_internlm_xcomposer2 import Visual, as_visuals, check_pixels, prepare_visuals
from .inputs_internlm_xcomposer2 import IGNORED
from .prompt_internlm_xcomposer2 import (
    FIRST_META_INSTRUCTION,
    ChatPrompt,
    check_length,
    check_tokenizer,
    context_length,
    cut_response,
    format_first_system,
)
from .tokenization_internlm_xcomposer2 import (
    BOT_OPENING,
    END_OF_ANSWER,
    END_OF_QUESTION,
    USER_OPENING,
    encode_text,
    markup_of,
)

# How the published methods generate unless told otherwise.
PUBLISHED_SETTINGS = {
    "num_beams": 5,
    "do_sample": False,
    "repetition_penalty": 1.5,
    "length_penalty": 1.0,
    "temperature": 1.0,
    "max_new_tokens": 500,
}
TRAINING_IMAGE_MARK = "<image>"  # in the texts of the published trainer


# ---- prompts ----


@dataclass(frozen=True)
class Turn:
    """A question and its answer, as later prompts repeat them.

    Attributes:
        segments: in order, the ids of a text or the (tokens, hidden) embeddings of a picture.
    """

    question: str
    answer: str
    segments: tuple[tuple[int, ...] | Tensor, ...]


History = Sequence[Turn | Tensor]
Segments = list[Sequence[int] | Tensor]


def past_turn(
    tokenizer,
    question: str,
    answer: str,
    pictures: Sequence[Tensor],
    allow_markup: bool = False,
    generated: Sequence[int] = (),
) -> Turn:
    """A finished turn: each of its two sides begins with BOS, and no mark ends either.

    Args:
        generated: the ids of the answer. Markup in its text counts if it was generated as such.
    """
    pieces, ends = markup_of(tokenizer).pieces, (END_OF_ANSWER, tokenizer.eos_token)
    tokens = takewhile(lambda token: token not in ends, tokenizer.convert_ids_to_tokens(list(generated)))
    is_markup = any(pieces.fullmatch(token) for token in tokens)
    said = plain_text(tokenizer, question, allow_markup)
    answered = plain_text(tokenizer, answer, allow_markup or is_markup)
    opening, closing = _ids(tokenizer, USER_OPENING, bos=True), _ids(tokenizer, BOT_OPENING)
    segments = opening, *pictures, _ids(tokenizer, said), closing, _ids(tokenizer, answered, bos=True)
    return Turn(question, answer, tuple(segments))


def prompt_segments(tokenizer, question: str, pictures: Sequence[Tensor], history: History) -> Segments:
    """Earlier turns, the question with its pictures in front, and the opening of the answer.

    The system text belongs to the first turn only.
    """
    past: Segments = []
    for turn in history:
        past += [turn[0] if turn.ndim == 3 else turn] if isinstance(turn, Tensor) else turn.segments
    system = "" if history else format_first_system(FIRST_META_INSTRUCTION)
    opening = _ids(tokenizer, f"{system}{USER_OPENING}", bos=not history)
    closing = _ids(tokenizer, f"\n{END_OF_QUESTION}{BOT_OPENING}")
    return [*past, opening, *pictures, _ids(tokenizer, question), closing]


def plain_text(tokenizer, text: str, allow_markup: bool) -> str:
    """What somebody says, in which names of markup are plain text unless they are allowed."""
    return text if allow_markup else markup_of(tokenizer).hide(text, with_marks=True)


def _ids(tokenizer, text: str, *, bos: bool = False) -> tuple[int, ...]:
    return tuple(encode_text(tokenizer, text, add_special_tokens=bos))


def plan_segments(config, segments: Segments) -> ChatPrompt:
    """Ids with embeddings between them -> a prompt, checked to fit the context.

    Raises:
        ValueError: it is too long.
    """
    ids: list[int] = []
    is_image: list[bool] = []
    embedded = [segment for segment in segments if isinstance(segment, Tensor)]
    for segment in segments:
        is_tensor = isinstance(segment, Tensor)
        ids += [config.image_token_id] * len(segment) if is_tensor else segment
        is_image += [is_tensor] * len(segment)
    lengths = [len(rows) for rows in embedded]
    check_length(len(ids), lengths, context_length(config))
    return ChatPrompt(ids, is_image, tuple(Visual(embeds=rows) for rows in embedded), tuple(lengths))


def check_history(question: str, history: History | None) -> list[Turn | Tensor]:
    """The turns of a history.

    Raises:
        TypeError: the question is not a text, or an entry is neither a turn nor embeddings.
    """
    if not isinstance(question, str):
        raise TypeError(f"text must be a str, not {type(question).__name__}")
    turns = list(history or ())
    for turn in turns:
        if not isinstance(turn, Turn | Tensor):
            raise TypeError(
                "history must be what chat returned, or a list of (1, tokens, hidden) embeddings; one entry "
                f"is {turn!r:.80}"
            )
    return turns


# ---- where an answer ends ----


class EveryBeamEnds(StoppingCriteria):
    """Stops a prompt's beam search once all its beams end with the same one of several ids, as published.

    Args:
        num_prompts, num_beams: how many are searched at once, and with how many beams each.
        stops: the ids.
        eos: sequences that end with it are finished, and not among the beams any more.
    """

    def __init__(self, num_prompts: int, num_beams: int, stops: Sequence[int], eos: int) -> None:
        self.num_prompts, self.num_beams, self.stops, self.eos = num_prompts, num_beams, stops, eos

    def __call__(self, input_ids: Tensor, scores: Tensor | None = None, **kwargs) -> Tensor:
        """(prompts * candidates, tokens), the best candidates first -> (prompts * candidates,)."""
        last = input_ids[:, -1].view(self.num_prompts, -1)
        stopped = [self._all_end(row) for row in last.tolist()]
        return torch.tensor(stopped, device=input_ids.device).repeat_interleave(last.shape[1])

    def _all_end(self, row: list[int]) -> bool:
        beams = [token for token in row if token != self.eos][: self.num_beams]
        return beams[0] in self.stops and set(beams) == {beams[0]} if beams else False


class TurnStream(ChatStream):
    """A `ChatStream` whose history has the turns of the first generation.

    Args:
        said: the (tokens, hidden) embeddings of the question's pictures, and whether its markup counts.
    """

    def __init__(
        self, writer: AnswerWriter, generate: Callable, query: str, turns, said: tuple[list[Tensor], bool]
    ) -> None:
        super().__init__(writer, generate, query, turns, END_OF_ANSWER)
        self._said = said

    def _turn(self) -> Turn:
        return past_turn(self._writer.tokenizer, self._query, self.response, *self._said)


# ---- the methods ----


class FirstChatMixin:
    """The methods that users call. Needs `config`, `tokenizer`, `get_image_features` and `_answer`.

    Attributes:
        published_settings: how the published methods generate unless told otherwise.
    """

    eoh, eoa = END_OF_QUESTION, END_OF_ANSWER
    published_settings = PUBLISHED_SETTINGS

    # ---- text and pictures ----

    def encode_text(self, text: str, add_special_tokens: bool = False) -> Tensor:
        """Text -> (1, tokens, hidden); special tokens put BOS first."""
        ids = _ids(self._own_tokenizer(), text, bos=add_special_tokens)
        return self.get_input_embeddings()(torch.tensor([ids], dtype=torch.long, device=self.input_device))

    def decode_text(self, out_embeds: Sequence) -> str:
        """The first of several sequences of ids -> its text before the mark that ends an answer."""
        ids = torch.as_tensor(out_embeds[0]).flatten().tolist()
        return self._text_of(self._own_tokenizer(), ids)

    def wrap_text(self, user_text: str, bot_text: str = "", add_special: bool = True) -> str:
        """A question and the start of its answer in the published form."""
        end = END_OF_QUESTION if add_special else ""
        return f"{USER_OPENING}{user_text} \n{end}{BOT_OPENING}{bot_text}"

    @leaves_autocast
    def encode_img(self, image) -> Tensor | None:
        """Pictures -> (pictures, tokens, hidden), the two flags of each included; `None` for `None`.

        Args:
            image: a picture from any source as in `chat`, a list of them, or (pictures, 3, side, side) pixels
                that `vis_processor` normalised, of any type and device.

        Raises:
            ValueError, TypeError, FileNotFoundError: the picture can't be read, or pixels have a wrong size.
        """
        if image is None:
            return None
        if isinstance(image, Tensor) and image.ndim == 4:
            check_pixels(image[0], self.config)
            pixels = image
        else:
            pixels, _ = prepare_visuals(as_visuals(image, self.config), self.config, 1)
        return torch.stack(self.get_image_features(pixels).pooler_output)

    def _own_tokenizer(self):
        check_tokenizer(self.config, self.tokenizer)
        return self.tokenizer

    @staticmethod
    def _text_of(tokenizer, ids: Sequence[int]) -> str:
        return cut_response(tokenizer.decode(ids, skip_special_tokens=True), END_OF_ANSWER)

    # ---- questions ----

    @torch.no_grad()
    def generate(self, text=None, image=None, *args, **kwargs):
        """Answer a question, as published; anything but a text is what transformers' `generate` accepts.

        Args:
            text: the question.
            image: as in `chat`.
            kwargs: as in `chat`, or transformers' own.

        Returns:
            The answer's text for a text, else what transformers returns.

        Raises:
            ValueError, TypeError, FileNotFoundError: as in `chat`.
        """
        if isinstance(text, str):
            return self.chat(text, image, *args, reuse=False, **kwargs)[0]
        given = [argument for argument in (text, image) if argument is not None]
        return super().generate(*given, *args, **kwargs)

    @torch.no_grad()
    @leaves_autocast
    def chat(
        self,
        text: str,
        image=None,
        history: History | None = None,
        *,
        reuse: bool = True,
        allow_markup: bool = False,
        **settings,
    ) -> tuple[str, ChatHistory]:
        """Answer a question, with or without a picture.

        Args:
            image: nothing, one picture or a list of them, which stand before the text: path, URL, `data:`
                URI, bytes, `PIL.Image`, array or (3, height, width) tensor in 0..1; a (pictures, 3, side,
                side) tensor is taken as pixels that are already normalised.
            history: what an earlier call returned, or a list of embeddings as published. It has the pictures
                of its turns, so only new ones are passed.
            reuse: whether the returned history keeps what was computed (`model.reuse_limit` bytes at most),
                and whether what the passed one kept is used.
            allow_markup: whether names of markup in the text, such as `<TOKENS_UNUSED_0>`, count as markup,
                as they did in the published code.
            settings: anything that `generate` of transformers accepts, over `PUBLISHED_SETTINGS`; and
                `ends_each_beam`, whether each beam ends at the mark of an answer's end. By default, as
                published, a beam search goes on until every beam ends there, and the text is cut afterwards.

        Returns:
            The answer, and the history with this turn added.

        Raises:
            ValueError, TypeError, FileNotFoundError: anything wrong with the arguments, before any compute.
        """
        tokenizer = self._own_tokenizer()
        settings = self._settings(tokenizer, **settings)
        turns = check_history(text, history)
        said = plain_text(tokenizer, text, allow_markup)
        (pictures,) = self._encode_all(tokenizer, [image], [(said, turns)])
        prompt = plan_segments(self.config, prompt_segments(tokenizer, said, pictures, turns))
        earlier = getattr(history, "prompt_cache", None)
        (sequence,), cache = self._answer([prompt], settings, earlier, keep=reuse)
        answer = self._text_of(tokenizer, sequence)
        turn = past_turn(tokenizer, text, answer, pictures, allow_markup, sequence)
        return answer, ChatHistory([*turns, turn], cache)

    @torch.no_grad()
    @leaves_autocast
    def batch_chat(
        self,
        texts: Sequence[str],
        images: Sequence | None = None,
        histories: Sequence[History] | None = None,
        *,
        allow_markup: bool = False,
        **settings,
    ) -> list[tuple[str, ChatHistory]]:
        """Answer several questions at once, each as `chat` would on its own, except for what sampling draws.

        Args:
            images: for each question, what `chat` accepts as `image`.
            histories: for each question, its earlier turns.
            allow_markup, settings: as in `chat`.

        Returns:
            For each question, the answer and its history with this turn added.

        Raises:
            ValueError, TypeError, FileNotFoundError: anything wrong with the arguments, before any compute.
        """
        return self._batch_chat(self._own_tokenizer(), texts, images, histories, allow_markup, **settings)

    def _batch_chat(
        self, tokenizer, texts: Sequence[str], images, histories, allow_markup: bool, **settings
    ) -> list[tuple[str, ChatHistory]]:
        check_batch(texts, images, histories, settings)
        settings = self._settings(tokenizer, len(texts), **settings)
        nothing = [None] * len(texts)
        turns = [check_history(*pair) for pair in zip(texts, histories or nothing, strict=True)]
        said = [plain_text(tokenizer, text, allow_markup) for text in texts]
        asked = list(zip(said, turns, strict=True))
        pictures = self._encode_all(tokenizer, images or nothing, asked)
        prompts = [
            plan_segments(self.config, prompt_segments(tokenizer, text, rows, earlier))
            for (text, earlier), rows in zip(asked, pictures, strict=True)
        ]
        sequences, _ = self._answer(prompts, settings)
        answers = [self._text_of(tokenizer, ids) for ids in sequences]
        return [
            (answer, ChatHistory([*earlier, past_turn(tokenizer, text, answer, rows, allow_markup, ids)]))
            for answer, text, earlier, rows, ids in zip(
                answers, texts, turns, pictures, sequences, strict=True
            )
        ]

    @torch.no_grad()
    @leaves_autocast
    def _ask_about(self, tokenizer, question: str, images: Sequence, **settings) -> list[str]:
        """One question about each of several pictures -> the answers, for `Composer`."""
        questions = [question] * len(images)
        answers = self._batch_chat(tokenizer, questions, images, None, False, **settings)
        return [answer for answer, _ in answers]

    @torch.no_grad()
    def chat_stream(
        self,
        text: str,
        image=None,
        history: History | None = None,
        *,
        reuse: bool = True,
        allow_markup: bool = False,
        num_beams: int = 1,
        **settings,
    ) -> ChatStream:
        """Like `chat` with one beam, but returns an iterator of pieces of the answer.

        At the end it has the `history`. Closing it stops the computation after the current token.

        Raises:
            ValueError, TypeError, FileNotFoundError: as in `chat`, when called.
        """
        if settings.get("streamer") is not None:
            raise ValueError("a stream has its own streamer; pass yours to chat")
        tokenizer = self._own_tokenizer()
        writer = AnswerWriter(tokenizer)
        criteria = [*(settings.get("stopping_criteria") or ()), writer.stopping_criterion]
        settings |= {"num_beams": num_beams, "streamer": writer, "stopping_criteria": criteria}
        settings = self._settings(tokenizer, **settings)
        turns = check_history(text, history)
        said = plain_text(tokenizer, text, allow_markup)
        (pictures,) = self._encode_all(tokenizer, [image], [(said, turns)])
        prompt = plan_segments(self.config, prompt_segments(tokenizer, said, pictures, turns))
        earlier = getattr(history, "prompt_cache", None)

        def generate():
            return self._answer([prompt], settings, earlier, keep=reuse)[1]

        return TurnStream(writer, generate, text, turns, (pictures, allow_markup))

    def _encode_all(
        self, tokenizer, images: Sequence, asked: Sequence[tuple[str, History]]
    ) -> list[list[Tensor]]:
        """The pictures of each question -> the (tokens, hidden) embeddings of each, in one pass of the tower.

        Args:
            asked: the questions and their earlier turns, which are checked before anything is encoded.
        """
        rows = [[] if image is None else as_visuals(image, self.config) for image in images]
        blank = torch.empty(self.config.tokens_per_square, 0)
        for (text, turns), visuals in zip(asked, rows, strict=True):
            blanks = [blank] * len(visuals)
            plan_segments(self.config, prompt_segments(tokenizer, text, blanks, turns))
        if not any(rows):
            return [[] for _ in rows]
        pixels, _ = prepare_visuals([visual for visuals in rows for visual in visuals], self.config, 1)
        features = iter(self.get_image_features(pixels).pooler_output)
        return [[next(features) for _ in visuals] for visuals in rows]

    # ---- settings ----

    def _settings(self, tokenizer, num_prompts: int = 1, *, ends_each_beam: bool = False, **settings) -> dict:
        """`generate`'s arguments: how tokens are chosen, where an answer ends, and what the caller adds.

        Raises:
            ValueError, TypeError: they are unusable.
        """
        limit = settings.pop("max_length", None)
        if limit is not None and settings.get("max_new_tokens") is None:
            settings["max_new_tokens"] = limit - 1  # as published, it counts BOS and the new tokens
        settings = {**self.published_settings, "infer_mode": "base", **settings}
        eos = tokenizer.eos_token_id
        stops = [tokenizer.convert_tokens_to_ids(mark) for mark in (END_OF_QUESTION, END_OF_ANSWER)]
        ends = [eos, *stops] if settings["num_beams"] == 1 or ends_each_beam else [eos]
        settings.setdefault("eos_token_id", ends)
        if len(ends) == 1:
            rule = EveryBeamEnds(num_prompts, settings["num_beams"], stops, eos)
            given = settings.get("stopping_criteria") or ()
            settings["stopping_criteria"] = StoppingCriteriaList([*given, rule])
        settings.setdefault("pad_token_id", tokenizer.pad_token_id)
        if settings.get("stop_strings") is not None:
            settings.setdefault("tokenizer", tokenizer)
        self._check_settings(settings)
        return settings

    # ---- training ----

    def embed_samples(self, samples: dict) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of the published trainer -> embeddings, attention mask and labels, padded right.

        Args:
            samples: `text_input`, a list of conversations; and `image`, their normalised pixels
                (conversations, 3, side, side), if they have pictures, each in its first question.

        Raises:
            ValueError: a conversation lacks a picture, or the other way round.
        """
        tokenizer, texts = self._own_tokenizer(), samples["text_input"]
        texts = [texts] if isinstance(texts, str) else list(texts)
        pixels = samples.get("image")
        front = None
        if pixels is not None:
            front, texts = self._embed_front(texts, pixels)
        rows = [_ids(tokenizer, align_text(text))[: self.max_length] for text in texts]
        embeds, mask, labels = self._embed_rows(tokenizer, rows)
        if front is None:
            return embeds, mask, labels
        ones = torch.ones(front.shape[:2], dtype=mask.dtype, device=mask.device)
        return (
            torch.cat([front, embeds], dim=1),
            torch.cat([ones, mask], dim=1),
            torch.cat([torch.full_like(ones, IGNORED), labels], dim=1),
        )

    def _embed_front(self, texts: list[str], pixels: Tensor) -> tuple[Tensor, list[str]]:
        """What precedes the first question, its picture included, (texts, tokens, hidden); and the rest."""
        features = self.encode_img(pixels)
        if len(features) != len(texts):
            raise ValueError(f"samples have {len(texts)} conversations but {len(features)} pictures")
        user = USER_OPENING.strip()
        header = texts[0].split(USER_OPENING)[0]
        opening = self.encode_text(f"{header}{USER_OPENING}", add_special_tokens=True)
        front = torch.cat([opening.expand(len(texts), -1, -1), features.to(opening.device)], dim=1)
        rest = [text.split(user, 1)[-1].lstrip().replace(TRAINING_IMAGE_MARK, "") for text in texts]
        return front, rest

    def _embed_rows(self, tokenizer, rows: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of conversations -> embeddings, attention mask and labels of one length."""
        longest, pad, device = max(map(len, rows)), tokenizer.pad_token_id, self.input_device
        pads = [longest - len(row) for row in rows]
        ids = torch.tensor([[*row, *[pad] * n] for row, n in zip(rows, pads, strict=True)], device=device)
        mask = torch.tensor(
            [[1] * len(row) + [0] * n for row, n in zip(rows, pads, strict=True)], device=device
        )
        ends = [tokenizer.convert_tokens_to_ids(mark) for mark in (END_OF_QUESTION, END_OF_ANSWER)]
        opening = len(_ids(tokenizer, BOT_OPENING))
        labels = [
            [*answer_labels(row, *ends, tokenizer.eos_token_id, opening), *[IGNORED] * n]
            for row, n in zip(rows, pads, strict=True)
        ]
        return self.get_input_embeddings()(ids), mask, torch.tensor(labels, device=device)


def align_text(text: str) -> str:
    """A conversation with the marks that end its questions and answers."""
    user, bot = USER_OPENING.removesuffix(":"), BOT_OPENING.strip().removesuffix(":")
    text = f"{text}{END_OF_ANSWER} </s>".replace(bot, f"{END_OF_QUESTION} {bot}")
    text = text.replace(user, f"{END_OF_ANSWER}{user}")
    first_answer, first_question = text.find(END_OF_ANSWER), text.find(END_OF_QUESTION)
    return text.replace(END_OF_ANSWER, "", 1) if first_answer < first_question else text


def answer_labels(
    ids: Sequence[int], question_end: int, answer_end: int, eos: int, opening: int
) -> list[int]:
    """Labels of a conversation: its answers with the marks that end them, and its last end.

    Args:
        opening: tokens that open an answer after the mark that ends its question.
    """
    labels, start = list(ids), 0
    last_question = -1
    for index, token in enumerate(ids):
        if token == question_end:
            labels[start : index + opening + 1] = [IGNORED] * len(labels[start : index + opening + 1])
            last_question = index
        elif token == answer_end:
            start = index + 1
        elif token == eos:
            return labels[: index + 1] + [IGNORED] * (len(ids) - index - 1)
    if start > last_question:  # cut off inside a question
        labels[start:] = [IGNORED] * (len(ids) - start)
    return labels
