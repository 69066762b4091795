"""What nano can be asked: the wordings of every question, and the words its answers are made of.

No picture and no random state here: `ask` picks a wording with the generator that the caller passes.
"""

import random

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black")
NUMBER_WORDS = ("one", "two", "three", "four", "five", "six")
MOST_OBJECTS = len(NUMBER_WORDS)
WAYS = ("left", "right", "up", "down")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
ABILITIES = (
    "number",
    "word",
    "code",
    "small",
    "total",
    "shape",
    "colour",
    "count",
    "where",
    "which",
    "more",
    "way",
    "last",
    "follow-up",
    "caption",
    "talk",
)

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

# The tokenizer was not made for these, and need not have been: it knows all characters.
MORE_QUESTIONS = {
    "total": (
        "What is the total?",
        "How much is the total?",
        "Read the total.",
        "What is the total on the receipt?",
        "What does it cost altogether?",
        "Which number stands beside TOTAL?",
    ),
    "price": ("How much is {name}?", "What does {name} cost?", "Which number stands beside {name}?"),
    "where": (
        "Where is the object?",
        "Where is the {shape}?",
        "Where in the picture is the {shape}?",
        "In which part of the picture is the object?",
        "What is the position of the object?",
    ),
    "caption": (
        "Describe the picture in one sentence.",
        "Write a caption for the picture.",
        "Write a short caption.",
        "Caption this image.",
        "Describe this image in a sentence.",
    ),
    "more": (
        "Which picture has the most objects?",
        "Which picture shows the most objects?",
        "In which picture are the most objects?",
        "Where are the most objects?",
    ),
    "which_of_three": (
        "Which picture shows the {thing}?",
        "In which picture is the {thing}?",
        "Which of the three pictures shows the {thing}?",
        "Which image contains the {thing}?",
    ),
    "shape_of_all": (
        "What shape are the objects?",
        "Which shape do the objects have?",
        "What shape are they?",
    ),
    "colour_of_all": (
        "What colour are the objects?",
        "What color are the objects?",
        "What colour are they?",
        "What color are they?",
    ),
    "colour_of_text": (
        "What colour is the text?",
        "What color is the text?",
        "In which colour is it written?",
    ),
    "length": ("How many characters does it have?", "How many characters are there?", "How long is it?"),
    "way": (
        "Which way does the object move?",
        "In which direction does the object move?",
        "Which way does the {shape} move?",
        "Where does the object go?",
    ),
    "where_at_first": ("Where is the object in the first frame?", "Where does the {shape} start?"),
    "where_at_last": ("Where is the object in the last frame?", "Where does the {shape} end?"),
    "last": (
        "What number is in the last frame?",
        "Which number do you see in the last frame?",
        "Read the number in the last frame.",
        "What is the last number?",
        "Which number does the video end with?",
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
COUNT_IN_ONE = ("How many objects are in picture {place}?", "How many objects does picture {place} show?")

# How several pictures are listed: the first, and each later one. With the question first, each picture is
# read with the thing asked for in mind.
PICTURE_LISTS = (
    ("Picture 1: {mark}", "; picture {place}: {mark}"),
    ("Picture 1 {mark}", "; picture {place} {mark}"),
    ("Image1 {mark}", "; Image{place} {mark}"),
    ("\nPicture 1: {mark}", "\nPicture {place}: {mark}"),
)
QUESTION_FIRST, QUESTION_LAST = PICTURE_LISTS, PICTURE_LISTS[:2]


def ask(kind: str, rng: random.Random, **fields: str) -> str:
    """One wording of a question of `kind`, drawn with `rng`; `fields` fill the names in braces."""
    wordings = QUESTIONS[kind] if kind in QUESTIONS else MORE_QUESTIONS[kind]
    return rng.choice(wordings).format(**fields)


def ask_about_one(kind: str, place: int, rng: random.Random) -> str:
    """A question about picture `place` of several, counted from 1."""
    wordings = COUNT_IN_ONE if kind == "count" else ABOUT_ONE_OF_TWO[kind]
    return rng.choice(wordings).format(place=place)


def frame_pictures(
    question: str, mark: str, rng: random.Random, count: int = 2, question_first: bool = True
) -> str:
    """`question` with `count` pictures, each of them where a `mark` (such as `<ImageHere>`) is."""
    return _frame(
        rng.choice(QUESTION_FIRST if question_first else QUESTION_LAST), question, mark, count, question_first
    )


def _frame(pieces: tuple[str, str], question: str, mark: str, count: int, question_first: bool) -> str:
    first, later = pieces
    pictures = first + "".join(later.format(place=place, mark="{mark}") for place in range(2, count + 1))
    pictures = pictures.replace("{mark}", mark)
    if not question_first:
        return f"{pictures}; {question}"
    return f"{question}{pictures}" if first.startswith("\n") else f"{question} {pictures}"


def every_text() -> list[str]:
    """All wordings with all fillings, and every closed-set answer: what a tokenizer must know."""
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES] + list(SHAPES) + list(COLOURS)
    texts = [*things, *NUMBER_WORDS, "1", "2", "3", "4", "5"]
    texts += [f"a {thing}" for thing in things]
    for wordings in ABOUT_ONE_OF_TWO.values():
        texts += [wording.format(place=place) for wording in wordings for place in (1, 2)]
    for wordings in QUESTIONS.values():
        for wording in wordings:
            texts += _fillings(wording, things)
    for question_first, lists in ((True, QUESTION_FIRST), (False, QUESTION_LAST)):
        for pieces in lists:
            texts += [_frame(pieces, wording, "", 2, question_first) for wording in QUESTIONS["which"]]
    return texts


def _fillings(wording: str, things: list[str]) -> list[str]:
    if "{thing}" in wording:
        return [wording.format(thing=thing) for thing in things]
    if "{shape}" in wording or "{shapes}" in wording:
        return [wording.format(shape=shape, shapes=PLURALS[shape]) for shape in SHAPES]
    return [wording]
