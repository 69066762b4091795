"""Articles with pictures: written, illustrated and edited by the model, step by step.

An instruction becomes an article. The model chooses lines of it that get a picture, and writes a caption for
each. A source finds candidates for the caption, and the model chooses one. `Composer` has these steps one by
one, and `compose` runs them all.
"""

import zlib
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor

from .article_internlm_xcomposer2 import Article, Candidate, Paragraph, Picture
from .cache_internlm_xcomposer2 import PromptCache
from .chat_internlm_xcomposer2 import AnswerWriter, ChatStream
from .compose_prompts_internlm_xcomposer2 import (
    INSERTIONS,
    LETTERS,
    ComposerPrompt,
    Step,
    build_prompt,
    check_spots,
    composer_rules,
    earlier_captions,
    fill_spots,
    number_lines,
    offer_pictures,
    read_caption,
    read_choice,
    read_spots,
    split_article,
    text_so_far,
)
from .image_processing_internlm_xcomposer2 import PictureMemo, Visual, count_tokens
from .ixc_utils import check_hd_num
from .media_internlm_xcomposer2 import MediaSource, load_image
from .prompt_internlm_xcomposer2 import (
    CHARACTERS_PER_TOKEN,
    ChatPrompt,
    check_characters,
    check_tokenizer,
    context_length,
    cut_response,
    join_prompt,
)
from .sources_internlm_xcomposer2 import PictureSource, as_source, find_candidates
from .tokenization_internlm_xcomposer2 import IMAGE_MARK, end_mark, markup_of
from .writing_internlm_xcomposer2 import NO_SEED, check_seed, seeded_generators

NUM_CANDIDATES = 4
FALLBACK_LENGTH = 50  # characters of a line that replace an empty caption
CAPTION_LENGTH = 128  # tokens of the description of a picture in a folder
SAMPLING = ("temperature", "top_p", "top_k")


class LetterScores(LogitsProcessor):
    """Allows only some ids, and remembers how likely each of them was among them.

    Attributes:
        probabilities: of the first row, in the order of the ids.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self.probabilities: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, tokens) ids and (rows, vocabulary) scores -> scores."""
        allowed = scores[:, self.ids]
        self.probabilities = allowed[0].float().softmax(-1).tolist()
        masked = torch.full_like(scores, -torch.inf)
        masked[:, self.ids] = allowed
        return masked


def letter_ids(tokenizer, before: str, num_letters: int, sign: str = "") -> list[int]:
    """The ids of the first letters where they follow `before`.

    Args:
        sign: what is between that and the letter, if one piece has both.
    """
    known = tokenizer(before, add_special_tokens=False)["input_ids"]
    ids = []
    for letter in LETTERS[:num_letters]:
        with_letter = tokenizer(before + sign + letter, add_special_tokens=False)["input_ids"]
        stands_alone = with_letter[:-1] == known
        ids.append(with_letter[-1] if stands_alone else tokenizer.convert_tokens_to_ids(letter))
    return ids


class Composer:
    """The steps of an article with pictures, for one model and one set of settings.

    Each step reads what is there of the article. Keys and values of the article's text, and what the tower
    made of pictures, are kept from step to step, so use one composer for one article.

    Args:
        model: a chat model of version 1.0, 2 or 2.5, or another engine with its `_answer`.
        tokenizer: `model.tokenizer` by default.
        hd_num: how many local tiles a picture may be cut into. By default 18 in version 2.5, or fewer if the
            checkpoint's own default is less, or as many as a prompt has room for.
        seed: of the article; every other step and line has a seed that follows from it, so that repeating one
            leaves the others as they are. With -1, sampling uses the generators as they are.
        use_meta: whether the system text of the demos goes first.
        choose_by: `"logits"` takes the candidate whose letter is most likely, `"text"` generates an answer
            and reads the letter in it, as published.
        infer_mode: which task adapters act, `"write"` in version 2.5 and else `"base"` by default.
        fill_spots: whether lines are added when the model names fewer than asked for.
        max_new_tokens: the length of the article, by default that of the demos, or what the context leaves.
        reuse: whether computed keys and values are kept.
        settings: how tokens of all texts are chosen, as in `chat`; as published for each step by default.

    Raises:
        ValueError, TypeError: an argument, the version or the tokenizer is unusable.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        hd_num: int | None = None,
        seed: int = NO_SEED,
        use_meta: bool = False,
        choose_by: str = "logits",
        infer_mode: str | None = None,
        fill_spots: bool = False,
        max_new_tokens: int | None = None,
        reuse: bool = True,
        **settings,
    ) -> None:
        self.model, self.config = model, model.config
        self.tokenizer = model.tokenizer if tokenizer is None else tokenizer
        self.rules = composer_rules(self.config.version)
        check_tokenizer(self.config, self.tokenizer)
        check_seed(seed)
        if choose_by not in ("logits", "text"):
            raise ValueError(f"choose_by must be 'logits' or 'text', not {choose_by!r}")
        self.hd_num = min(self.rules.hd_num, self.config.hd_num) if hd_num is None else check_hd_num(hd_num)
        self.has_own_tiles = hd_num is not None
        self.seed, self.choose_by, self.reuse, self.adds_spots = seed, choose_by, reuse, fill_spots
        self.markup, self.meta = markup_of(self.tokenizer), self.rules.meta_instruction if use_meta else ""
        self.infer_mode = self.rules.infer_mode if infer_mode is None else infer_mode
        self.max_new_tokens = max_new_tokens
        self.settings = settings
        self._settings_of(self.rules.article)  # raises what is wrong with them
        self._kept: dict[str, PromptCache | None] = {}
        self._visuals: dict[Hashable, Visual] = {}

    # ---- all steps ----

    def compose(
        self,
        instruction: str,
        images: MediaSource | Sequence[MediaSource] | None = None,
        source: object = None,
        num_pictures: int | None = None,
    ) -> Article:
        """All steps at once; arguments and errors as in `ComposeMixin.compose`."""
        *_, (_, article) = self.stages(instruction, images, source, num_pictures)
        return article

    def stages(
        self,
        instruction: str,
        images: MediaSource | Sequence[MediaSource] | None = None,
        source: object = None,
        num_pictures: int | None = None,
    ) -> Iterator[tuple[str, Article]]:
        """Like `compose`, but yields the name of each step that is done, and the article so far.

        The names are `"article"` and those of `illustrate`.
        """
        check_instruction(instruction)
        uploads, source = self._check_pictures(images, source, num_pictures)
        return self._stages(instruction, uploads, source, num_pictures)

    def _stages(
        self, instruction: str, uploads: list[Candidate], source: PictureSource | None, count: int | None
    ) -> Iterator[tuple[str, Article]]:
        article = self.write(instruction, [upload.image for upload in uploads])
        yield "article", article
        yield from self._illustrate(article, uploads, source, count)

    def illustrate(
        self,
        article: Article,
        images: MediaSource | Sequence[MediaSource] | None = None,
        source: object = None,
        num_pictures: int | None = None,
    ) -> Iterator[tuple[str, Article]]:
        """Give an article pictures in place of those it has; arguments as in `ComposeMixin.compose`.

        Yields the name of each step that is done, and the article so far: `"spots"`, then for each of them
        `"caption"` (not with uploads), `"candidates"` and `"choice"` (both not if there are none).
        """
        uploads, source = self._check_pictures(images, source, num_pictures)
        return self._illustrate(article, uploads, source, num_pictures)

    def _illustrate(
        self, article: Article, uploads: list[Candidate], source: PictureSource | None, count: int | None
    ) -> Iterator[tuple[str, Article]]:
        article = replace(article, paragraphs=tuple(Paragraph(line) for line in article.lines))
        if count == 0 or (count is None and not uploads and source is None):
            return
        spots = self.find_spots(article, count, [upload.image for upload in uploads])
        for spot in spots:
            article = article.with_picture(spot, Picture())
        yield "spots", article
        if not uploads:
            for spot in spots:
                article = article.with_picture(spot, Picture(self.caption(article, spot)))
                yield "caption", article
        for spot in spots if uploads or source is not None else ():
            found = self.find_candidates(article, spot, source) if source else unused(article, uploads)
            if not found:
                article = article.with_picture(spot, None)
                continue
            article = article.with_picture(spot, replace(article.pictures[spot], candidates=found))
            yield "candidates", article
            article = article.with_choice(spot, self.choose(article, spot))
            yield "choice", article

    def add_picture(
        self, article: Article, line: int, source: object = None, caption: str | None = None
    ) -> Article:
        """The article with a picture after one more line, or another one there.

        Args:
            caption: what it shows, written by the model by default.

        Raises:
            ValueError, TypeError: no such line, or an unusable source.
        """
        _, source = self._check_pictures(None, source, None)
        article = article.with_picture(line, None)
        picture = Picture(self.caption(article, line) if caption is None else caption)
        article = article.with_picture(line, picture)
        if source is None:
            return article
        found = self.find_candidates(article, line, source)
        article = article.with_picture(line, replace(picture, candidates=found))
        return article.with_choice(line, self.choose(article, line)) if found else article

    # ---- single steps ----

    def write(self, instruction: str, images: Sequence[MediaSource] = ()) -> Article:
        """Write the article, about the pictures if there are any."""
        prompt = self._article_prompt(instruction, images)
        return self.article_of(instruction, self._ask(self.rules.article, prompt, "article", keep="text"))

    def stream(self, instruction: str, images: Sequence[MediaSource] = ()) -> ChatStream:
        """Like `write`, but returns an iterator of pieces of the text; closing it stops the computation.

        `article_of(instruction, stream.response)` makes an article of the text.
        """
        writer = AnswerWriter(self.tokenizer)
        stream = {"streamer": writer, "stopping_criteria": [writer.stopping_criterion]}
        stream["num_beams"] = self.settings.get("num_beams", 1)  # several can't be shown as they grow
        prompt = self._article_prompt(instruction, images)
        step, key = self.rules.article, "article"

        def generate() -> PromptCache | None:
            return self._run(step, prompt, key, "text", **stream)[1]

        return ChatStream(writer, generate, instruction, (), end_mark(self.config.version))

    def article_of(self, instruction: str, text: str) -> Article:
        """A text as an article without pictures."""
        lines = split_article(text, self.rules.max_lines)
        return Article(instruction, tuple(Paragraph(line) for line in lines))

    def find_spots(
        self, article: Article, num_pictures: int | None = None, images: Sequence[Image.Image] = ()
    ) -> list[int]:
        """The lines after which there should be a picture, in order.

        Args:
            num_pictures: how many at most; `None` leaves it to the model.
            images: uploads, of which each is used once at most.
        """
        lines = article.lines[: self.rules.max_lines]
        if not lines or num_pictures == 0:
            return []
        most = len(images) or len(lines)
        wanted = None if num_pictures is None else min(num_pictures, most)
        step = self.rules.spots
        front = [piece for image in images for piece in (image, " ")]
        prompts = [
            self._build(
                step,
                pictures=front,
                lines=number_lines(lines, start),
                count="" if wanted is None else wanted,
            )
            for start in range(len(lines))
        ]
        prompt = self._fit(step, prompts)
        spots = read_spots(step.opening + self._ask(step, prompt, "spots", keep="text"))
        spots = check_spots(spots, len(lines), most if wanted is None else wanted)
        return fill_spots(spots, len(lines), wanted) if self.adds_spots and wanted else spots

    def caption(self, article: Article, line: int) -> str:
        """What the picture after a line should show, by the text and captions up to the line after it.

        An empty answer is replaced by the end of the line.
        """
        text = article.paragraph(line).text
        seen = article.lines[: line + 2]
        captions = {
            i: picture.caption
            for i, picture in article.pictures.items()
            if i != line and i < len(seen) and picture.caption
        }
        step = self.rules.caption
        past = earlier_captions(captions)
        prompts = [
            self._build(step, lines=number_lines(seen, start), past=past, line=line)
            for start in range(line + 1)
        ]
        answer = self._ask(step, self._fit(step, prompts), f"caption {line}", keep="text")
        caption = read_caption(answer, self.rules.caption_end)
        return caption if caption.strip() else text[-FALLBACK_LENGTH:]

    def find_candidates(
        self, article: Article, line: int, source: object, k: int = NUM_CANDIDATES
    ) -> tuple[Candidate, ...]:
        """Pictures for the caption after a line, first of all those not offered elsewhere in the article."""
        others = [picture for i, picture in article.pictures.items() if i != line]
        offered = {one.id for picture in others for one in picture.candidates}
        chosen = {picture.chosen.id for picture in others if picture.chosen is not None}
        source = as_source(source, self.describe)
        caption = picture_at(article, line).caption
        return find_candidates(source, caption, offered, k) or find_candidates(source, caption, chosen, k)

    def choose(self, article: Article, line: int) -> int:
        """The index of the candidate after a line that the model finds most suitable.

        Raises:
            ValueError: there is no picture after this line, or no candidates, or more than letters.
        """
        candidates = picture_at(article, line).candidates
        if not 0 < len(candidates) <= len(LETTERS):
            raise ValueError(
                f"paragraph {line} has {len(candidates)} candidates; choose between 1 and {len(LETTERS)}"
            )
        if len(candidates) == 1:
            return 0
        if self.choose_by == "text":
            step = self.rules.choice
            answer = self._ask(
                step, self._choice_prompt(step, article, line), f"choice {line}", keep="choice"
            )
            return read_choice(answer, len(candidates))
        probabilities = self.score(article, line)
        return probabilities.index(max(probabilities))

    def score(self, article: Article, line: int) -> list[float]:
        """How likely the model is to choose each of the candidates after a line; the sum is one."""
        rules, candidates = self.rules, picture_at(article, line).candidates
        step = replace(rules.choice, opening=rules.choice.opening + rules.before_letter, max_new_tokens=1)
        prompt = self._choice_prompt(step, article, line)
        forms = [
            letter_ids(self.tokenizer, step.opening, len(candidates), sign) for sign in rules.letters_after
        ]
        scores = LetterScores([token for ids in forms for token in ids])
        plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        self._run(step, prompt, f"choice {line}", "choice", **plain, logits_processor=[scores])
        return [sum(scores.probabilities[i :: len(candidates)]) for i in range(len(candidates))]

    def edit(self, article: Article, index: int, action: str, material: str = "") -> Article:
        """The article with one paragraph changed, or another one next to it.

        Args:
            action: `"expand"`, `"rewrite"`, `"abbreviate"`, `"insert_before"` or `"insert_after"`.
            material: what to use, or for a new paragraph its outline.

        A paragraph for which the model writes nothing is removed.

        Raises:
            ValueError: no such paragraph or action, or no outline.
        """
        paragraph, edits = article.paragraph(index), self.rules.edits
        if action not in edits:
            raise ValueError(f"unknown action {action!r}; choose one of {', '.join(edits)}")
        if action in INSERTIONS and not material.strip():
            raise ValueError(f"{action} needs an outline of the new paragraph; pass it as material")
        lines = ["", *article.lines, ""]
        around = {"before": lines[index], "text": paragraph.text, "after": lines[index + 2]}
        prompt = self._build(edits[action], **around, material=material)
        key = f"{action} {index}"
        answer = self._ask(edits[action], self._fit(edits[action], [prompt]), key, infer_mode="base")
        text = answer.replace("\n", " ").strip()
        if action in INSERTIONS:
            place = index + (action == "insert_after")
            return article.with_paragraphs(place, place, *([Paragraph(text)] if text else []))
        return article.with_text(index, text) if text else article.with_paragraphs(index, index + 1)

    def describe(self, images: Sequence[Image.Image], question: str) -> list[str]:
        """An answer about each picture, as captions of a folder."""
        plain = {"max_new_tokens": CAPTION_LENGTH, "do_sample": False, "num_beams": 1}
        answers = self.model._ask_about(self.tokenizer, question, list(images), **plain)
        return [answer.strip() for answer in answers]

    # ---- prompts and answers ----

    def _build(self, step: Step, **values) -> ComposerPrompt:
        return build_prompt(step, self.markup, self.meta, **values)

    def _article_prompt(self, instruction: str, images: Sequence[MediaSource]) -> ChatPrompt:
        check_instruction(instruction)
        pictures = [piece for image in images for piece in (" ", load_image(image))][1:]
        step = self.rules.article
        return self._fit(step, [self._build(step, pictures=pictures, instruction=instruction)])

    def _choice_prompt(self, step: Step, article: Article, line: int) -> ChatPrompt:
        chosen = {i: p.chosen.image for i, p in article.pictures.items() if p.chosen is not None}
        offer = offer_pictures([one.image for one in article.pictures[line].candidates])
        prompts = [
            self._build(step, text=text_so_far(article.lines, line, chosen, start), offer=offer)
            for start in range(line + 1)
        ]
        return self._fit(step, prompts)

    def _fit(self, step: Step, prompts: Sequence[ComposerPrompt]) -> ChatPrompt:
        """The first of several prompts, each shorter than the one before, that fits with its answer.

        Raises:
            ValueError: none does; the message has the numbers of the last.
        """
        reserve = 1 if step is self.rules.article else step.max_new_tokens
        limit = min(self.rules.max_prompt, context_length(self.config) - reserve)
        check_characters(self.tokenizer, prompts[-1].texts, limit)
        for prompt in prompts:
            is_far_too_long = sum(map(len, prompt.texts)) > CHARACTERS_PER_TOKEN * limit
            if is_far_too_long and prompt is not prompts[-1]:
                continue
            planned = self._plan(prompt, limit)
            if len(planned.ids) <= limit:
                return planned
        raise ValueError(
            f"the prompt has {len(planned.ids)} tokens, {sum(planned.lengths)} of them for "
            f"{len(planned.lengths)} pictures, but at most {limit} fit; pass fewer pictures, lower hd_num or "
            "shorten the text"
        )

    def _plan(self, prompt: ComposerPrompt, limit: int) -> ChatPrompt:
        """A prompt with as many tiles as fit, but at least one, or as many as the user wants."""
        visuals = [self._visual(image) for image in prompt.pictures]
        # One BOS at the very start, in every version of the demos.
        plan = partial(join_prompt, self.config, self.tokenizer, prompt.texts, visuals, bos_rule="2.5")
        planned = plan(self.hd_num)
        if len(planned.ids) <= limit or self.has_own_tiles:
            return planned
        num_text = len(planned.ids) - sum(planned.lengths)
        budgets = range(1, self.hd_num + 1)  # the count grows with the budget
        num_fitting = bisect_right(
            budgets, limit - num_text, key=lambda budget: sum(count_tokens(self.config, visuals, budget))
        )
        return plan(max(1, num_fitting))

    def _visual(self, image: Image.Image) -> Visual:
        """The same for the same pixels, so that they are encoded once."""
        visual = Visual(image=image, layout=self.rules.layout, memo=PictureMemo() if self.reuse else None)
        return self._visuals.setdefault(visual.identity(self.config, self.hd_num, None), visual)

    def _settings_of(self, step: Step, **changes) -> dict:
        """`generate`'s arguments for one step."""
        published = {**self.rules.sampling, **step.decoding}
        if not self.model.searches_with_beams:
            published.pop("num_beams", None)
        settings = {"infer_mode": self.infer_mode, **published, **self.settings, **changes}
        if not settings["do_sample"]:
            settings = {name: value for name, value in settings.items() if name not in SAMPLING}
        length = step.max_new_tokens
        if step is self.rules.article and self.max_new_tokens is not None:
            length = self.max_new_tokens
        return self.model._settings(self.tokenizer, max_new_tokens=length, **settings)

    def _run(self, step: Step, prompt: ChatPrompt, key: str, keep: str | None, **changes):
        """The ids of the answer to a prompt, and what is kept of its computation."""
        settings = self._settings_of(step, **changes)
        room = context_length(self.config) - len(prompt.ids)
        settings["max_new_tokens"] = min(settings["max_new_tokens"], room)
        earlier = self._kept.get(keep) or self._kept.get("text")
        seed = self.seed if key == "article" or self.seed == NO_SEED else step_seed(self.seed, key)
        with seeded_generators(seed):
            (ids,), cache = self.model._answer(
                [prompt], settings, earlier, keep=self.reuse and keep is not None
            )
        if keep is not None:
            self._kept[keep] = cache
        return ids, cache

    def _ask(self, step: Step, prompt: ChatPrompt, key: str, *, keep: str | None = None, **changes) -> str:
        """The answer to a prompt, without markup and what follows it."""
        ids, _ = self._run(step, prompt, key, keep, **changes)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return cut_response(text, end_mark(self.config.version))

    def _check_pictures(
        self, images: object, source: object, num_pictures: int | None
    ) -> tuple[list[Candidate], PictureSource | None]:
        """Uploads as candidates, and the source."""
        if num_pictures is not None and (isinstance(num_pictures, bool) or not isinstance(num_pictures, int)):
            raise TypeError(f"num_pictures must be an int, not {num_pictures!r}")
        if num_pictures is not None and num_pictures < 0:
            raise ValueError(f"num_pictures must be at least 0, not {num_pictures}")
        images = [] if images is None else images
        images = list(images) if isinstance(images, list | tuple) else [images]
        if images and source is not None:
            raise ValueError(f"{len(images)} pictures and a source of pictures were given; pass one of them")
        if len(images) > len(LETTERS):
            raise ValueError(f"{len(images)} pictures were given, but at most {len(LETTERS)} can be offered")
        uploads = [Candidate(number, load_image(image)) for number, image in enumerate(images, 1)]
        return uploads, as_source(source, self.describe)


def picture_at(article: Article, line: int) -> Picture:
    """The picture after a line.

    Raises:
        ValueError: there is none.
    """
    picture = article.paragraph(line).picture
    if picture is None:
        raise ValueError(f"paragraph {line} has no picture; add one with a caption first")
    return picture


def unused(article: Article, uploads: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The uploads that the article has not chosen yet."""
    used = {picture.chosen.id for picture in article.pictures.values() if picture.chosen is not None}
    return tuple(upload for upload in uploads if upload.id not in used)


def step_seed(seed: int, key: str) -> int:
    """A seed for one step and line, which depends on both."""
    return (seed + zlib.crc32(key.encode())) % 2**32


def check_instruction(instruction: str) -> None:
    """Raise `TypeError` or `ValueError` unless there is something to write about."""
    if not isinstance(instruction, str):
        raise TypeError(f"instruction must be a str, not {type(instruction).__name__}")
    if not instruction.strip():
        raise ValueError("the instruction is empty; say what the article should be about")


class ComposeMixin:
    """`compose` and `composer`. Needs `ChatMixin`, and `self.tokenizer` if none is passed.

    Attributes:
        searches_with_beams: whether the engine can, so that steps published with several have them.
    """

    searches_with_beams = True

    def compose(
        self,
        instruction: str,
        images: MediaSource | Sequence[MediaSource] | None = None,
        source: object = None,
        num_pictures: int | None = None,
        *,
        tokenizer=None,
        **settings,
    ) -> Article:
        """Write an article with pictures.

        Args:
            instruction: what to write.
            images: the user's own pictures, each used once at most.
            source: where else pictures come from: a folder, a function of (caption, exclude, k), or an object
                with such a method `search`. Nothing is fetched from the network.
            num_pictures: how many there should be; `None` leaves it to the model. Without `images` and
                `source`, an article has captions at these places, but no pictures.
            settings: as in `Composer`.

        Returns:
            The article, with the caption, candidates and choice of each picture.

        Raises:
            ValueError, TypeError, OSError: anything wrong with the arguments, before any compute.
        """
        composer = self.composer(tokenizer, **settings)
        return composer.compose(instruction, images, source, num_pictures)

    def composer(self, tokenizer=None, **settings) -> Composer:
        """The steps of `compose`, to be called one by one."""
        return Composer(self, tokenizer, **settings)

    def _ask_about(self, tokenizer, question: str, images: Sequence[Image.Image], **settings) -> list[str]:
        """One question about each of several pictures -> the answers."""
        questions = [f"{IMAGE_MARK}{question}"] * len(images)
        answers = self.batch_chat(tokenizer, questions, list(images), **settings)
        return [answer for answer, _ in answers]
