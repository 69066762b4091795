"""Numbers and words to print, split by a hash of the string: a held-back string is never drawn in training.

A single character cannot be held back (there are only 36), so those are in every split.
"""

import hashlib
import random
import string
from collections.abc import Sequence

REAL_WORDS = """
AM AN AS AT BE BY DO GO HE HI IF IN IS IT ME MY NO OF OH OK ON OR OX SO TO UP US WE
ACT ADD AGE AIR ALL AND ANT ANY APE ARM ART ASK BAD BAG BAR BED BEE BIG BOX BOY BUS CAB CAR CAT COW CUP DAY
DOG EAR EGG END EYE FAR FIG FIT FLY FOX FUN GAS GUM HAT HEN HOT ICE INK JAM JAR JET JOB JOY KEY KID LEG LIP
LOG MAP MIX MUD NET NUT OAK OIL OLD OWL PAN PEN PIG PIN POT RAT RED RUN SEA SKY SUN TEA TOP TOY VAN WAX WEB
WIN YES ZIP ZOO
ABLE ACID BABY BACK BALL BAND BANK BEAR BELL BIRD BLUE BOAT BOOK CAKE CARD CITY COAT CODE COLD COOK CORN DARK
DEEP DEER DESK DOOR DUCK EAST EDGE EXIT FACE FARM FILM FIRE FISH FLAG FOOD FROG GAME GATE GIFT GOLD HAND HELP
HOME HOPE JUMP KEEP KING KITE LAKE LAMP LEAF LION MILK MOON NEST NOTE OPEN OVEN PAGE PARK QUIZ RAIN RING ROAD
ROCK ROOF SALT SHIP SHOE SHOP SNOW STAR STOP TAXI TREE WALK WALL WAVE WIND WOLF WOOD YARD ZERO ZONE
ALARM APPLE BEACH BLACK BREAD BRICK CHAIR CLOCK CLOUD DANCE DREAM EAGLE EARTH EMPTY FLAME FRUIT GLASS GRAPE
GREEN GUIDE HAPPY HEART HORSE HOTEL HOUSE IMAGE JUICE KNIFE LEMON LIGHT LUCKY MAGIC METAL MONEY MOUSE MUSIC
NIGHT OCEAN ONION PAPER PIANO PILOT PIZZA PLANT QUEEN QUICK RADIO RIVER ROBOT SALAD SHEEP SMILE SOLAR SPACE
STONE STORM SUGAR TABLE TIGER TRAIN TRUCK VIDEO VOICE WATER WHALE WHEEL WHITE WORLD YOUNG ZEBRA
""".split()  # noqa: SIM905
VOWELS, CONSONANTS = "AEIOU", "BCDFGHJKLMNPQRSTVWXYZ"
KINDS = ("number", "word", "code")  # digits, capitals, both
# How often training draws each length: long strings are the hard ones.
WEIGHTS = {
    "number": (1, 1, 2, 2, 3, 4, 5, 6),
    "word": (1, 1, 2, 3, 4, 5, 6, 7),
    "code": (0, 1, 2, 3, 3, 4, 5, 6),
}


def split_of_string(text: str) -> str:
    """Where `text` may be drawn: eight strings in ten in training, one in validation, one held back."""
    bucket = hashlib.sha256(text.encode()).digest()[0] % 10
    return "held_back" if bucket == 0 else "validation" if bucket == 1 else "train"


def random_string(
    kind: str,
    split: str,
    rng: random.Random,
    length: int | None = None,
    weights: Sequence[int] | None = None,
) -> str:
    """A string of `kind` and `split`; without a length, `weights` say how often each from 1 on is drawn."""
    weights = weights or WEIGHTS[kind]
    length = length or rng.choices(range(1, len(weights) + 1), weights)[0]
    draw = {"number": _number, "word": _word, "code": _code}[kind]
    while True:
        text = draw(length, rng)
        if length == 1 or split_of_string(text) == split:
            return text


def _number(length: int, rng: random.Random) -> str:
    return str(rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length))


def _word(length: int, rng: random.Random) -> str:
    style = rng.random()
    real = [word for word in REAL_WORDS if len(word) == length]
    if style < 0.2 and real:
        return rng.choice(real)
    if style < 0.4:
        start = rng.randrange(2)
        return "".join(rng.choice((CONSONANTS, VOWELS)[(start + place) % 2]) for place in range(length))
    return "".join(rng.choice(string.ascii_uppercase) for _ in range(length))


def _code(length: int, rng: random.Random) -> str:
    """Letters and digits, at least one of each; no I and O, which some fonts draw as 1 and 0."""
    while True:
        text = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ" + string.digits) for _ in range(length))
        if not text.isdigit() and not text.isalpha():
            return text
