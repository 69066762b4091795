"""What nano can be asked: the wordings of every question, and the words its answers are made of.

No picture and no random state here: `ask` picks a wording with the generator that the caller passes.
"""

import random

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
NUMBER_WORDS = ("one", "two", "three", "four", "five")
ABILITIES = ("number", "word", "shape", "colour", "count", "which")

PLURALS = {name: name + ("es" if name == "cross" else "s") for name in SHAPES}

QUESTIONS = {
    "number": (
        "What number is printed in the picture?",
        "Which number do you see?",
        "Read the number in this image.",
        "What is the number?",
        "What number does the picture show?",
        "Please read the number.",
        "Which number is written here?",
        "Tell me the number in the image.",
    ),
    "word": (
        "What word is printed in the picture?",
        "Which word do you see?",
        "Read the word in this image.",
        "What is the word?",
        "What word does the picture show?",
        "Please read the word.",
        "Which word is written here?",
        "Tell me the word in the image.",
    ),
    "text": (
        "What is written in the picture?",
        "Read the text.",
        "What does it say?",
        "What text is in this image?",
    ),
    "shape": (
        "What shape is the object?",
        "What shape is it?",
        "Which shape do you see?",
        "Name the shape in the picture.",
        "What is the shape of the object in this image?",
        "Which shape does the picture show?",
    ),
    "colour": (
        "What colour is the object?",
        "What color is the object?",
        "What colour is it?",
        "What color is it?",
        "Name the colour of the object in the picture.",
        "Name the color of the object in the picture.",
        "Which colour does the object have?",
        "Which color does the object have?",
        "What is the colour of the {shape}?",
        "What is the color of the {shape}?",
        "What colour is the {shape}?",
        "What color is the {shape}?",
    ),
    "both": (
        "What is in the picture?",
        "What do you see?",
        "Describe the object.",
        "What object is shown in this image?",
    ),
    "count": (
        "How many objects are there?",
        "How many objects are in the picture?",
        "How many objects do you see?",
        "Count the objects.",
        "Count the objects in this image.",
        "What is the number of objects in the picture?",
    ),
    "count_shape": (
        "How many {shapes} are there?",
        "How many {shapes} are in the picture?",
        "How many {shapes} do you see?",
        "Count the {shapes}.",
        "Count the {shapes} in this image.",
    ),
    "which": (
        "Which picture shows the {thing}?",
        "In which picture is the {thing}?",
        "Which of the two pictures shows the {thing}?",
        "Which image contains the {thing}?",
        "Where is the {thing}: picture 1 or picture 2?",
    ),
}

ABOUT_ONE_OF_TWO = {
    "both": (
        "What is in picture {place}?",
        "What do you see in picture {place}?",
        "Describe picture {place}.",
    ),
    "colour": (
        "What colour is the object in picture {place}?",
        "What color is the object in picture {place}?",
    ),
    "shape": ("What shape is the object in picture {place}?", "Which shape does picture {place} show?"),
}

# With the question first, each picture is read with the thing asked for in mind.
QUESTION_FIRST = (
    "{question} Picture 1: {mark}; picture 2: {mark}",
    "{question} Picture 1 {mark}; picture 2 {mark}",
    "{question} Image1 {mark}; Image2 {mark}",
    "{question}\nPicture 1: {mark}\nPicture 2: {mark}",
)
QUESTION_LAST = (
    "Picture 1: {mark}; picture 2: {mark}; {question}",
    "Picture 1 {mark}; picture 2 {mark}; {question}",
)


def ask(kind: str, rng: random.Random, **fields: str) -> str:
    """One wording of a question of `kind`, drawn with `rng`; `fields` fill the names in braces."""
    return rng.choice(QUESTIONS[kind]).format(**fields)


def ask_about_one_of_two(kind: str, place: int, rng: random.Random) -> str:
    """A question about picture `place` of two, counted from 1."""
    return rng.choice(ABOUT_ONE_OF_TWO[kind]).format(place=place)


def frame_pair(question: str, mark: str, rng: random.Random, question_first: bool = True) -> str:
    """`question` beside two pictures, each standing where `mark` (such as `<ImageHere>`) stands."""
    return rng.choice(QUESTION_FIRST if question_first else QUESTION_LAST).format(
        mark=mark, question=question
    )


def every_text() -> list[str]:
    """All wordings with all fillings, and every closed-set answer: what a tokenizer has to know."""
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES] + list(SHAPES) + list(COLOURS)
    texts = [*things, *NUMBER_WORDS, "1", "2", "3", "4", "5"]
    texts += [f"a {thing}" for thing in things]
    for wordings in ABOUT_ONE_OF_TWO.values():
        texts += [wording.format(place=place) for wording in wordings for place in (1, 2)]
    for wordings in QUESTIONS.values():
        for wording in wordings:
            texts += _fillings(wording, things)
    for frame in QUESTION_FIRST + QUESTION_LAST:
        texts += [frame.format(mark="", question=wording) for wording in QUESTIONS["which"]]
    return texts


def _fillings(wording: str, things: list[str]) -> list[str]:
    if "{thing}" in wording:
        return [wording.format(thing=thing) for thing in things]
    if "{shape}" in wording or "{shapes}" in wording:
        return [wording.format(shape=shape, shapes=PLURALS[shape]) for shape in SHAPES]
    return [wording]
