"""What nano says without a picture: small talk, pages of HTML and short articles.

Texts only, no random state: every function draws with the generator that the caller passes. Wordings are
assembled from parts, and a hash of the whole decides which split it belongs to, as for printed strings.
"""

import functools
import random

from .questions import COLOURS
from .words import random_string, split_of_string

# What is asked for -> (its wordings, the answer).
SMALL_TALK = {
    "who": (
        ("who are you?", "what are you?", "introduce yourself.", "tell me who you are."),
        "I am nano, a small model of the InternLM-XComposer family.",
    ),
    "name": (
        ("what is your name?", "tell me your name.", "do you have a name?", "what are you called?"),
        "My name is nano.",
    ),
    "can": (
        ("what can you do?", "how can you help me?", "what do you know?", "tell me what you can do."),
        "I read short texts, name shapes and colours, count objects and compare pictures.",
    ),
    "well": (
        ("how are you?", "how are you today?", "are you well?", "how do you do?"),
        "I am fine, thank you.",
    ),
    "made": (
        (
            "how were you trained?",
            "how did you learn?",
            "what were you trained on?",
            "where do you come from?",
        ),
        "I was trained from scratch on drawn pictures.",
    ),
    "photos": (
        ("do you know photos?", "can you read photos?", "what about photos?", "can I show you a photo?"),
        "No, I only know drawn pictures.",
    ),
    "size": (
        ("how big are you?", "how large are you?", "are you a large model?", "how many weights do you have?"),
        "I have fewer than four million weights.",
    ),
    "languages": (
        ("which languages do you speak?", "do you speak English?", "do you speak Chinese?"),
        "I speak a little English.",
    ),
    "thanks": (("thank you.", "thanks.", "thank you very much.", "thanks a lot."), "You are welcome."),
    "bye": (("goodbye.", "bye.", "see you later.", "that is all."), "Goodbye!"),
    "hello": (("good morning.", "good evening.", "nice to meet you."), "Hello! Show me a picture."),
}
BEFORE = ("", "Hello, ", "Hi, ", "Nano, ", "Please, ", "Now, ", "So, ", "Well, ", "OK, ", "Hello nano, ")
ECHO = ("Repeat this: {text}", "Repeat after me: {text}", "Say: {text}", "Write: {text}")
ECHO_SHARE = 0.6  # of the small talk in training

PAGE_WORDINGS = (
    "Make a {colour} web page with the title {title}.",
    "Write a web page titled {title} in {colour}.",
    "Generate a page called {title} with a {colour} background.",
    "A web page named {title}. The background should be {colour}.",
    "Create a simple {colour} page. Its title is {title}.",
    "I need a website called {title}, in {colour}.",
)
PAGE_BEFORE = ("", "Please: ", "Hello. ", "Task: ", "Now: ", "Today: ")
PAGE = (
    "<!DOCTYPE html>\n<html>\n<head>\n<title>{title}</title>\n"
    "<style>body {{ background: {colour}; }}</style>\n</head>\n"
    "<body>\n<h1>{title}</h1>\n</body>\n</html>"
)

ARTICLE_WORDINGS = (
    "Write a short article about {word}.",
    "Please write about {word}.",
    "Write a paragraph on {word}.",
    "I would like to read something about {word}.",
    "A short text on {word}, please.",
    "Compose a few sentences about {word}.",
)
ARTICLES = (
    "{word} is a word that people know. They see {word} in the morning and in the evening. I like {word}.",
    "This is a story about {word}. It is short, and it is about nothing but {word}.",
    "There was a time without {word}. Now people have {word}, and they like it.",
)


def small_talk(split: str, rng: random.Random) -> tuple[str, str]:
    """(question, answer) of `split`; training is asked to repeat something as well.

    A piece that is never said can't be distinguished from others that are never said: what the adapters will
    write must have been said before, in any order.
    """
    if split == "train" and rng.random() < ECHO_SHARE:
        text = _text_to_repeat(split, rng)
        return rng.choice(ECHO).format(text=text), text
    while True:
        wordings, answer = SMALL_TALK[rng.choice(list(SMALL_TALK))]
        before, wording = rng.choice(BEFORE), rng.choice(wordings)
        text = before + wording if before else wording[0].upper() + wording[1:]
        if split_of_string(text) == split:
            return text, answer


def _text_to_repeat(split: str, rng: random.Random) -> str:
    """A word in capitals, or up to six words of pages, articles and small talk in any order."""
    if rng.random() < 0.3:
        return random_string("word", split, rng)
    return rng.choice(("", " ", " ")).join(rng.choices(_words_to_say(), k=rng.randint(1, 6)))


@functools.cache
def _words_to_say() -> list[str]:
    answers = [answer for _, answer in SMALL_TALK.values()]
    articles = [text.format(word="A") for text in ARTICLES]
    return sorted(set(" ".join((PAGE.format(title="A", colour="red"), *articles, *answers)).split()))


def web_page(split: str, rng: random.Random) -> tuple[str, str]:
    """(instruction, HTML) for `write_webpage`, with a title of `split`."""
    fields = {"title": random_string("word", split, rng), "colour": rng.choice(COLOURS)}
    instruction = rng.choice(PAGE_BEFORE) + rng.choice(PAGE_WORDINGS).format(**fields)
    return instruction, PAGE.format(**fields)


def article(split: str, rng: random.Random) -> tuple[str, str]:
    """(instruction, article) for `write_artical`, about a word of `split`.

    The wording determines which of the articles it is, so that there is one right answer.
    """
    word, index = random_string("word", split, rng), rng.randrange(len(ARTICLE_WORDINGS))
    instruction = rng.choice(PAGE_BEFORE) + ARTICLE_WORDINGS[index].format(word=word)
    return instruction, ARTICLES[index % len(ARTICLES)].format(word=word)
