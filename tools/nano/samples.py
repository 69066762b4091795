"""Questions about drawn pictures with their answers, and what of them the model is given."""

import dataclasses
import random

from .pictures import Picture, Thing, draw_object, draw_objects, draw_text, random_thing
from .questions import COLOURS, PLURALS, ask, ask_about_one_of_two, frame_pair
from .words import random_string

IMAGE_MARK = "<ImageHere>"
QUESTION_FIRST_SHARE = 0.65  # of the training pairs; the rest name the thing behind the pictures
EMPTY_SHARE = 0.1  # of the training pairs have nothing in the other picture: easy, and a step to the rest
TURN, END_OF_TURN = "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
MIX = {"number": 0.17, "word": 0.34, "object": 0.05, "count": 0.18, "which": 0.26}  # of training
EXPLICIT_MARK_SHARE = 0.25  # of questions about one picture that say where it stands


@dataclasses.dataclass
class Sample:
    """Pictures, and turns of (question, answer) about them; marks stand in the first question or nowhere."""

    ability: str
    pictures: list[Picture]
    turns: list[tuple[str, str]]


def draw_sample(ability: str, split: str, rng: random.Random, families: list[list[str]]) -> Sample:
    """One sample of an ability (or of "object": several questions about one object)."""
    if ability in ("number", "word"):
        return _text_sample(ability, split, rng, families)
    if ability == "which":
        return _pair_sample(split, rng, families)
    return _count_sample(split, rng) if ability == "count" else _object_sample(ability, split, rng)


def draw_training_sample(rng: random.Random, families: list[list[str]]) -> Sample:
    """A sample of the training mix; some say `<ImageHere>` themselves."""
    sample = draw_sample(rng.choices(list(MIX), list(MIX.values()))[0], "train", rng, families)
    if len(sample.pictures) == 1 and rng.random() < EXPLICIT_MARK_SHARE:
        question, answer = sample.turns[0]
        blank = rng.choice(("", "", " ", "\n"))
        sample.turns[0] = (f"{IMAGE_MARK}{blank}{question}", answer)
    return sample


def _text_sample(ability: str, split: str, rng: random.Random, families: list[list[str]]) -> Sample:
    text = random_string(ability, split, rng)
    kind = "text" if split == "train" and len(text) > 1 and rng.random() < 0.1 else ability
    return Sample(ability, [draw_text(rng, split, text, families)], [(ask(kind, rng), text)])


def _object_sample(ability: str, split: str, rng: random.Random) -> Sample:
    thing = random_thing(rng)
    turns = [
        (ask("shape", rng), thing.shape),
        (ask("colour", rng, shape=thing.shape), thing.colour),
        (ask("both", rng), _with_article(thing)),
    ]
    rng.shuffle(turns)
    if ability != "object":
        turns = [turn for turn in turns if turn[1] == getattr(thing, ability)]
    return Sample(ability, [draw_object(rng, split, thing)], turns)


def _with_article(thing: Thing) -> str:
    return f"an {thing.name}" if thing.colour == "orange" else f"a {thing.name}"


def _count_sample(split: str, rng: random.Random) -> Sample:
    count, thing = rng.randint(1, 5), random_thing(rng)
    style = rng.random()
    if style < 0.6:  # all of one shape, of one colour or of many
        colours = [thing.colour if style < 0.4 else rng.choice(COLOURS) for _ in range(count)]
        things = [Thing(thing.shape, colour) for colour in colours]
        kind = "count_shape" if rng.random() < 0.5 else "count"
    else:
        things, kind = [random_thing(rng) for _ in range(count)], "count"
    question = ask(kind, rng, shapes=PLURALS[thing.shape])
    return Sample("count", [draw_objects(rng, split, things)], [(question, str(count))])


def _pair_sample(split: str, rng: random.Random, families: list[list[str]]) -> Sample:
    """Two pictures, one of which holds the thing asked for and the other something else.

    Training asks about each of the two as well: what is where has to be known before it can be compared.
    """
    asked = random_thing(rng)
    other, name = random_thing(rng, but=asked), asked.name
    if other.shape != asked.shape and rng.random() < 0.3:
        name = asked.shape
    elif other.colour != asked.colour and rng.random() < 0.2:
        name = f"{asked.colour} object"
    sides = [(draw_object(rng, split, thing), thing, _with_article(thing)) for thing in (asked, other)]
    style = rng.random()
    if split == "train" and style < EMPTY_SHARE:
        sides[1] = (draw_objects(rng, split, []), None, "")
    elif style > 0.88:
        kind = rng.choice(("number", "word"))
        text = random_string(kind, split, rng, rng.choice((2, 3, 4)))
        sides[1] = (draw_text(rng, split, text, families), None, f"a {kind}")
        if rng.random() < 0.5:
            sides.reverse()
            name = kind
    place = rng.randrange(2)
    sides = sides if place == 0 else sides[::-1]
    turns = [(ask("which", rng, thing=name), f"picture {place + 1}")]
    if split == "train":
        turns += [_turn_about(number + 1, *side[1:], rng) for number, side in enumerate(sides) if side[2]]
    question_first = split != "train" or rng.random() < QUESTION_FIRST_SHARE
    turns[0] = (frame_pair(turns[0][0], IMAGE_MARK, rng, question_first), turns[0][1])
    return Sample("which", [picture for picture, _, _ in sides], turns)


def _turn_about(place: int, thing: Thing | None, description: str, rng: random.Random) -> tuple[str, str]:
    """A question about one of two pictures, with its answer."""
    kind = rng.choice(("both", "colour", "shape")) if thing else "both"
    answer = description if kind == "both" else getattr(thing, kind)
    return ask_about_one_of_two(kind, place, rng), answer


def segments(sample: Sample) -> list[tuple[str | None, bool]]:
    """The markup of version 2.5 as pieces of (text, is an answer); the text of a picture is None.

    A picture that no mark places stands before everything else. Text between pictures is a piece of its
    own, as `chat` has it.
    """
    marked = IMAGE_MARK in sample.turns[0][0]
    pieces: list[tuple[str | None, bool]] = [] if marked else [(None, False)] * len(sample.pictures)
    before = ""
    for question, answer in sample.turns:
        first, *rest = f"{before}{TURN}user\n{question}{END_OF_TURN}\n{TURN}assistant\n".split(IMAGE_MARK)
        pieces.append((first, False))
        for text in rest:
            pieces += [(None, False), (text, False)]
        pieces.append((answer + END_OF_TURN, True))
        before = "\n"
    return pieces
