"""Questions about drawn pictures with their answers, and what the model gets to see of them."""

import dataclasses
import random

from .pictures import Picture, Thing, draw_object, draw_objects, draw_text, random_thing
from .questions import COLOURS, MOST_OBJECTS, NUMBER_WORDS, PLURALS, WAYS, ask, ask_about_one, frame_pictures
from .scenes import (
    COMPRESSED_SHARE,
    compress,
    draw_at,
    draw_motion,
    draw_numbers,
    draw_receipt,
    draw_small_print,
    place_in,
)
from .talk import article, small_talk, web_page
from .words import KINDS, WEIGHTS, random_string

IMAGE_MARK = "<ImageHere>"
QUESTION_FIRST_SHARE = 0.65  # of the training pairs; the rest name the thing after the pictures
EMPTY_SHARE = 0.1  # of the training pairs, with nothing in the other picture: easy, a step towards the rest
THREE_SHARE = 0.4  # of what is asked about several pictures
TURN, END_OF_TURN = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
EXPLICIT_MARK_SHARE = 0.25  # of questions about one picture that say where it goes
SMALL_BUDGETS = {9: 3, 6: 2, 4: 2}  # hd_num: tiles along a square picture
SMALL_LENGTHS = (2, 3, 4, 5, 6)
FRAMES = (2, 3, 4, 5)  # seconds of a video, of which one frame each is seen
NAMES_LENGTHS = (2, 3, 4)  # of what is on a receipt
LESSONS = {  # the share of each kind of sample in training, at the beginning and from the middle on
    "number": (0.11, 0.07),
    "word": (0.18, 0.11),
    "code": (0.08, 0.15),
    "small": (0.00, 0.15),
    "total": (0.05, 0.13),
    "object": (0.04, 0.01),
    "count": (0.12, 0.06),
    "where": (0.05, 0.02),
    "which": (0.16, 0.04),
    "more": (0.05, 0.03),
    "way": (0.06, 0.05),
    "last": (0.02, 0.08),
    "caption": (0.03, 0.05),
    "talk": (0.03, 0.03),
    "page": (0.01, 0.01),
    "article": (0.01, 0.01),
}


@dataclasses.dataclass
class Sample:
    """Pictures, and turns of (question, answer) about them; marks are in the first question or nowhere."""

    ability: str
    pictures: list[Picture]
    turns: list[tuple[str, str]]
    hd_num: int = 1  # tiles that a picture may be cut into
    frames: list[Picture] = dataclasses.field(default_factory=list)  # of a video, which is then the picture


class Drawer:
    """Draws samples of one split."""

    def __init__(
        self,
        split: str,
        rng: random.Random,
        families: list[list[str]],
        lessons: dict[str, tuple[float, float]] = LESSONS,
    ):
        """Training asks several questions about a picture; other splits ask one, with all lengths alike."""
        self.split, self.rng, self.families = split, rng, families
        self.training, self.lessons = split == "train", lessons

    def draw(self, progress: float = 1.0) -> Sample:
        """A sample of the lessons' mix at `progress`, from 0 to 1; some say `<ImageHere>` themselves."""
        rng, later = self.rng, min(1.0, 2 * progress)
        shares = [first + later * (last - first) for first, last in self.lessons.values()]
        sample = self.sample(rng.choices(list(self.lessons), shares)[0])
        if len(sample.pictures) == 1 and not sample.frames and rng.random() < EXPLICIT_MARK_SHARE:
            question, answer = sample.turns[0]
            blank = rng.choice(("", "", " ", "\n"))
            sample.turns[0] = (f"{IMAGE_MARK}{blank}{question}", answer)
        return sample

    def sample(self, ability: str) -> Sample:
        """One sample of an ability (or of "object": several questions about one object)."""
        if ability in KINDS:
            return self._text(ability)
        methods = {
            "small": self._small,
            "total": self._receipt,
            "count": self._count,
            "where": self._where,
            "which": self._which,
            "more": self._more,
            "way": self._way,
            "last": self._last,
            "follow-up": self._follow_up,
            "caption": self._caption,
            "talk": self._talk,
            "page": self._page,
            "article": self._article,
        }
        return methods[ability]() if ability in methods else self._object(ability)

    # ---- text ----

    def string(self, kind: str, length: int | None = None) -> str:
        weights = WEIGHTS[kind] if self.training else [min(1, weight) for weight in WEIGHTS[kind]]
        return random_string(kind, self.split, self.rng, length, weights)

    def _text(self, kind: str) -> Sample:
        text = self.string(kind)
        picture = draw_text(self.rng, self.split, text, self.families)
        turns = self._text_turns(kind, text, picture)
        if self.training:
            turns = self._some(turns, always=0 if self.rng.random() < 0.2 else 1)
        return Sample(kind, [picture], turns if self.training else turns[:1])

    def _text_turns(self, kind: str, text: str, picture: Picture) -> list[tuple[str, str]]:
        """What it says, and then what else can be asked."""
        rng = self.rng
        wording = (
            "text" if kind == "code" or (self.training and len(text) > 1 and rng.random() < 0.1) else kind
        )
        turns = [
            (ask(wording, rng), text),
            (ask("caption", rng), f'The picture shows the text "{text}".'),
            (ask("length", rng), str(len(text))),
        ]
        colour = picture.marks[0].colour
        return turns + [(ask("colour_of_text", rng), colour)] * (colour is not None)

    def _some(self, turns: list[tuple[str, str]], always: int = 0) -> list[tuple[str, str]]:
        """The first turns, and sometimes some of the others."""
        if self.rng.random() < 0.6:
            return turns[: max(1, always)]
        rest = turns[always:]
        self.rng.shuffle(rest)
        return turns[:always] + rest[: self.rng.randint(1, 2)]

    def _small(self) -> Sample:
        rng = self.rng
        kind, length = rng.choice(KINDS), rng.choice(SMALL_LENGTHS)
        hd_num = rng.choices(list(SMALL_BUDGETS), (3, 1, 1))[0] if self.training else 9
        text = self.string(kind, length)
        picture = draw_small_print(rng, self.split, text, self.families, SMALL_BUDGETS[hd_num])
        return Sample("small", [picture], [(ask("text" if kind == "code" else kind, rng), text)], hd_num)

    def _receipt(self) -> Sample:
        rng = self.rng
        total = random_string("number", self.split, rng, rng.choice((2, 3, 3, 3)))
        count = rng.randint(2, 3)
        if int(total) < count:
            return self._receipt()
        cuts = sorted(rng.sample(range(1, int(total)), count - 1))
        prices = [str(end - begin) for begin, end in zip([0, *cuts], [*cuts, int(total)], strict=True)]
        names = [random_string("word", self.split, rng, rng.choice(NAMES_LENGTHS)) for _ in prices]
        lines = [*zip(names, prices, strict=True), ("TOTAL", total)]
        turns = [(ask("total", rng), total)]
        if self.training and len(set(names)) == count:
            turns += [(ask("price", rng, name=name), price) for name, price in lines[:-1]]
            turns = self._some(turns, always=0 if rng.random() < 0.3 else 1)
        return Sample("total", [draw_receipt(rng, self.split, lines, self.families)], turns)

    # ---- objects ----

    def _object_turns(self, thing: Thing) -> list[tuple[str, str]]:
        rng = self.rng
        return [
            (ask("shape", rng), thing.shape),
            (ask("colour", rng, shape=thing.shape), thing.colour),
            (ask("both", rng), with_article(thing)),
        ]

    def _object(self, ability: str) -> Sample:
        thing = random_thing(self.rng)
        picture, turns = draw_object(self.rng, self.split, thing), self._object_turns(thing)
        turns += [(ask("count", self.rng), "1"), self._captioned(f"a {thing.name}")]
        self.rng.shuffle(turns)
        if ability == "object":
            turns = turns[:3]
        elif ability != "follow-up":
            turns = [turn for turn in turns if turn[1] == getattr(thing, ability)]
        return Sample(ability, [picture], turns)

    def _captioned(self, what: str) -> tuple[str, str]:
        what = f"an {what[2:]}" if what.startswith("a orange") else what
        return ask("caption", self.rng), f"The picture shows {what}."

    def _count(self) -> Sample:
        rng = self.rng
        count, thing = rng.randint(1, MOST_OBJECTS), random_thing(rng)
        style = rng.random()
        if style < 0.6:  # all of one shape, of one colour or of many
            colours = [thing.colour if style < 0.4 else rng.choice(COLOURS) for _ in range(count)]
            things = [Thing(thing.shape, colour) for colour in colours]
            kind = "count_shape" if rng.random() < 0.5 else "count"
        else:
            things, kind = [random_thing(rng) for _ in range(count)], "count"
        turns = [(ask(kind, rng, shapes=PLURALS[thing.shape]), str(count))]
        if self.training and count > 1 and style < 0.6:
            turns = self._some(turns + self._group_turns(things), always=0 if rng.random() < 0.3 else 1)
        return Sample("count", [draw_objects(rng, self.split, things)], turns)

    def _group_turns(self, things: list[Thing]) -> list[tuple[str, str]]:
        """Questions about several objects of one shape, and about their colour if they share it."""
        rng, first = self.rng, things[0]
        turns = [(ask("shape_of_all", rng), first.shape)]
        if len({thing.colour for thing in things}) == 1:
            words = f"{NUMBER_WORDS[len(things) - 1]} {first.colour} {PLURALS[first.shape]}"
            turns += [(ask("colour_of_all", rng), first.colour), self._captioned(words)]
        return turns

    def _where(self) -> Sample:
        thing = random_thing(self.rng)
        picture, place = draw_at(self.rng, self.split, thing)
        turns = [(ask("where", self.rng, shape=thing.shape), place)]
        if self.training:
            turns = self._some(turns + self._object_turns(thing), always=1)
        return Sample("where", [picture], turns)

    def _follow_up(self) -> Sample:
        """Three questions about one picture."""
        rng, style = self.rng, self.rng.random()
        if style < 0.4:
            kind = rng.choice(KINDS)
            text = self.string(kind, rng.randint(2, 5))
            picture = draw_text(rng, self.split, text, self.families)
            turns = self._text_turns(kind, text, picture)[1:]
        elif style < 0.7:
            return self._first_three(self._object("follow-up"))
        else:
            thing, count = random_thing(rng), rng.randint(2, MOST_OBJECTS)
            picture = draw_objects(rng, self.split, [thing] * count)
            turns = [(ask("count", rng), str(count)), *self._group_turns([thing] * count)]
        rng.shuffle(turns)
        return self._first_three(Sample("follow-up", [picture], turns))

    def _first_three(self, sample: Sample) -> Sample:
        return dataclasses.replace(sample, turns=sample.turns[:3])

    def _caption(self) -> Sample:
        rng, style = self.rng, self.rng.random()
        if style < 0.4:
            thing = random_thing(rng)
            return Sample(
                "caption", [draw_object(rng, self.split, thing)], [self._captioned(f"a {thing.name}")]
            )
        if style < 0.7:
            things = [random_thing(rng)] * rng.randint(2, MOST_OBJECTS)
            return Sample("caption", [draw_objects(rng, self.split, things)], self._group_turns(things)[-1:])
        kind = rng.choice(KINDS)
        text = self.string(kind, rng.randint(2, 5))
        picture = draw_text(rng, self.split, text, self.families)
        return Sample("caption", [picture], self._text_turns(kind, text, picture)[1:2])

    # ---- several pictures ----

    def _which(self) -> Sample:
        """Pictures of which one shows the thing asked about and the others something else.

        Training asks about each of them as well: what is where must be known before it can be compared.
        """
        rng = self.rng
        count = 3 if rng.random() < THREE_SHARE else 2
        asked = random_thing(rng)
        others = [random_thing(rng, but=asked) for _ in range(count - 1)]
        name = self._name_apart(asked, others)
        sides = [
            (draw_object(rng, self.split, thing), thing, with_article(thing)) for thing in (asked, *others)
        ]
        style = rng.random()
        if self.training and style < EMPTY_SHARE:
            sides[1] = (draw_objects(rng, self.split, []), None, "")
        elif style > 0.88 and count == 2:
            kind = rng.choice(("number", "word"))
            text = self.string(kind, rng.choice((2, 3, 4)))
            sides[1] = (draw_text(rng, self.split, text, self.families), None, f"a {kind}")
            if rng.random() < 0.5:
                sides.reverse()
                name = kind
        place = rng.randrange(count)
        sides[0], sides[place] = sides[place], sides[0]
        kind = "which" if count == 2 else "which_of_three"
        turns = [(ask(kind, rng, thing=name), f"picture {place + 1}")]
        if self.training:
            turns += [self._about(number + 1, *side[1:]) for number, side in enumerate(sides) if side[2]]
        return self._framed("which", [picture for picture, _, _ in sides], turns)

    def _name_apart(self, asked: Thing, others: list[Thing]) -> str:
        """What to call the thing asked about: sometimes only by what sets it apart."""
        rng = self.rng
        if all(other.shape != asked.shape for other in others) and rng.random() < 0.3:
            return asked.shape
        if all(other.colour != asked.colour for other in others) and rng.random() < 0.2:
            return f"{asked.colour} object"
        return asked.name

    def _about(self, place: int, thing: Thing | None, description: str) -> tuple[str, str]:
        """A question about one of several pictures, with its answer."""
        kind = self.rng.choice(("both", "colour", "shape")) if thing else "both"
        answer = description if kind == "both" else getattr(thing, kind)
        return ask_about_one(kind, place, self.rng), answer

    def _more(self) -> Sample:
        """Which of two or three pictures has the most objects; training asks how many each of them has."""
        rng = self.rng
        counts = rng.sample(range(1, MOST_OBJECTS + 1), 3 if rng.random() < THREE_SHARE else 2)
        thing = random_thing(rng)
        pictures = [draw_objects(rng, self.split, [thing] * count) for count in counts]
        turns = [(ask("more", rng), f"picture {counts.index(max(counts)) + 1}")]
        if self.training:
            turns += [
                (ask_about_one("count", number + 1, rng), str(count)) for number, count in enumerate(counts)
            ]
            if rng.random() < 0.3:
                turns = turns[1:] + turns[:1]
        return self._framed("more", pictures, turns)

    def _framed(self, ability: str, pictures: list[Picture], turns: list[tuple[str, str]]) -> Sample:
        first = not self.training or self.rng.random() < QUESTION_FIRST_SHARE
        question = frame_pictures(turns[0][0], IMAGE_MARK, self.rng, len(pictures), first)
        return Sample(ability, pictures, [(question, turns[0][1]), *turns[1:]])

    # ---- videos and no picture ----

    def _way(self) -> Sample:
        rng, thing, way = self.rng, random_thing(self.rng), self.rng.choice(WAYS)
        seconds = rng.choice(FRAMES)
        frames = draw_motion(rng, self.split, thing, way, [at / (seconds - 1) for at in range(seconds)])
        turns = [(ask("way", rng, shape=thing.shape), way)]
        if self.training:
            turns += [
                (ask("where_at_first", rng, shape=thing.shape), place_in(frames[0])),
                (ask("where_at_last", rng, shape=thing.shape), place_in(frames[-1])),
            ]
            if rng.random() < 0.5:
                turns = turns[1:] + turns[:1]  # the way follows from the places
            turns = turns if rng.random() < 0.5 else self._some(turns + self._object_turns(thing), always=1)
        return self._video("way", frames, turns)

    def _last(self) -> Sample:
        rng, seconds = self.rng, self.rng.choice(FRAMES)
        lengths = (1, 2, 3, 3, 4, 4, 4) if self.training else (1, 2, 3, 4)
        numbers = [self.string("number", rng.choice(lengths)) for _ in range(seconds)]
        frames = draw_numbers(rng, self.split, numbers, self.families)
        return self._video("last", frames, [(ask("last", rng), numbers[-1])])

    def _video(self, ability: str, frames: list[Picture], turns: list[tuple[str, str]]) -> Sample:
        if self.training and self.rng.random() < COMPRESSED_SHARE:
            frames = compress(self.rng, frames)
        return Sample(ability, [], turns, frames=frames)

    def _talk(self) -> Sample:
        turns = [small_talk(self.split, self.rng)]
        if self.training and self.rng.random() < 0.3:
            turns.append(small_talk(self.split, self.rng))
        return Sample("talk", [], turns)

    def _page(self) -> Sample:
        return Sample("page", [], [web_page(self.split, self.rng)])

    def _article(self) -> Sample:
        return Sample("article", [], [article(self.split, self.rng)])


def with_article(thing: Thing) -> str:
    return f"an {thing.name}" if thing.colour == "orange" else f"a {thing.name}"


def segments(sample: Sample) -> list[tuple[str | None, bool]]:
    """The markup of version 2.5 as pieces of (text, is an answer); the text of a picture is None.

    A picture without a mark comes before everything else. Text between pictures is a separate piece, as in
    `chat`.
    """
    marked = IMAGE_MARK in sample.turns[0][0]
    pieces: list[tuple[str | None, bool]] = [] if marked else [(None, False)] * num_pictures(sample)
    before = ""
    for question, answer in sample.turns:
        first, *rest = f"{before}{TURN}user\n{question}{END_OF_TURN}\n{TURN}assistant\n".split(IMAGE_MARK)
        pieces.append((first, False))
        for text in rest:
            pieces += [(None, False), (text, False)]
        pieces.append((answer + END_OF_TURN, True))
        before = "\n"
    return pieces


def num_pictures(sample: Sample) -> int:
    """How many pictures the model sees: a video is one."""
    return len(sample.pictures) + bool(sample.frames)
