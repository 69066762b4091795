"""What the composition demos ask, by version, and how the answers are read.

Data and pure functions: a `Step` with values becomes a prompt, and an answer becomes lines, a caption or a
choice.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from .configuration_internlm_xcomposer2 import FIRST_GENERATION
from .prompt_internlm_xcomposer2 import FIRST_META_INSTRUCTION, format_first_system, format_prompt
from .tokenization_internlm_xcomposer2 import BOT_OPENING, END_OF_QUESTION, USER_OPENING, Markup

# ---- what the versions ask ----

PICTURE_MARK = "<image>"  # where pictures are in the text of a prompt
LETTERS = string.ascii_uppercase

META_INSTRUCTION = (
    "You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\n"
    "- InternLM-XComposer (浦语·灵笔) is a conversational language model that is developed by Shanghai AI "
    "Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently in the language chosen by the "
    "user such as English and 中文.\n"
)

_CAPTION = '给定文章"{lines}" {past}给出适合在<Seg{line}>后插入的图像对应的标题。'
_ONE_SHOT = (
    "<input>\n"
    '给定文章"<Seg0> 大多数的车友们在选车、购车时都会格外关注续航\n'
    "<Seg1> 甚至还有要求电动滑板车跑一百公里的\n"
    "<Seg2> 但这真的是你所需要的吗?\n"
    "<Seg3> 据报告，一线城市上班族通勤半径均在10公里以内\n"
    "<Seg4> 所以大多数通勤出行RND的续航完全可以满足\n"
    "<Seg5> 可能会有人说，续航短导致一天一充或两充很麻烦\n"
    '" 给出适合在<Seg4>后插入的图像对应的标题。</input>\n'
    "<output>\n"
    '标题是"一个人正站在充电桩前给电动滑板车充电，面容看上去有些疲惫"</output>\n'
    f"<input>\n{_CAPTION}</input><output>"
)
_ONE_SHOT_SYSTEM = (
    "请严格按照示例的<input> <output>格式，根据给定的文章，给出适合在某一段后插入的图像对应的标题。"
)


@dataclass(frozen=True)
class Step:
    """One question to the model.

    Attributes:
        question: the user's turn, with names in braces.
        opening: how the answer begins.
        max_new_tokens: how long the rest of it may become.
        system: a system text of its own, whether or not one was asked for.
        turn: what surrounds the question, if it isn't a turn of the second generation.
        decoding: how its tokens are chosen, where that differs from the other steps.
    """

    question: str
    opening: str = ""
    max_new_tokens: int = 200
    system: str | None = None
    turn: tuple[str, str] | None = None
    decoding: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class ComposerRules:
    """What the published demo of a version asks, and how it reads the answers.

    Attributes:
        edits: how a paragraph is changed, by the name of the change.
        infer_mode: which task adapters act, except when a paragraph is changed.
        caption_end: whether a caption ends at the `"first"` or the `"last"` quotation mark.
        before_letter: what the model writes before the letter of its choice.
        letters_after: what may be between that and the letter.
        max_prompt: the longest prompt, in tokens.
        max_lines: how many lines of an article count.
        hd_num: how many local tiles a picture may be cut into, by the rule `layout` of `TILE_RULES`.
        sampling: how tokens are chosen.
        meta_instruction: the system text, for those who ask for one.
    """

    article: Step
    spots: Step
    caption: Step
    choice: Step
    edits: Mapping[str, Step]
    infer_mode: str
    caption_end: str
    max_prompt: int
    hd_num: int
    layout: str | None = None
    before_letter: str = ":"
    letters_after: tuple[str, ...] = ("",)
    max_lines: int = 60
    sampling: Mapping[str, object] = field(
        default_factory=lambda: {
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 0.8,
            "top_k": 40,
            "repetition_penalty": 1.005,
            "length_penalty": 1.0,
        }
    )
    meta_instruction: str = META_INSTRUCTION


_EDITS = {
    "expand": Step("扩写以下段落：{text}\n基于以下素材：{material}", max_new_tokens=500),
    "rewrite": Step("改写以下段落：{text}\n基于以下素材：{material}", max_new_tokens=500),
    "abbreviate": Step("缩写以下段落：{text}", max_new_tokens=500),
    "insert_before": Step(
        "在以下两段中插入一段。\n第一段：{before}\n第二段：{text}\n插入段的大纲：{material}",
        max_new_tokens=500,
    ),
    "insert_after": Step(
        "在以下两段中插入一段。\n第一段：{text}\n第二段：{after}\n插入段的大纲：{material}",
        max_new_tokens=500,
    ),
}
INSERTIONS = ("insert_before", "insert_after")

_TWO = ComposerRules(
    article=Step("{pictures}{instruction}", max_new_tokens=4096),
    spots=Step('{pictures}给定文章"{lines}" 根据上述文章，选择适合插入图像的{count}行', "适合插入图像的行是"),
    caption=Step(_CAPTION, '标题是"'),
    choice=Step(
        "根据给定上下文和候选图像，选择合适的配图：{text}候选图像包括: {offer}",
        "最合适的图是",
        max_new_tokens=10,
    ),
    edits=_EDITS,
    infer_mode="base",
    caption_end="first",
    max_prompt=4096,
    hd_num=1,
)
# A turn of the first generation. Its demo sets blanks and line ends in each step in a way of its own.
_FIRST_TURN = (USER_OPENING, f"\n{END_OF_QUESTION}{BOT_OPENING}")
_FIRST_CHOICE = (f" {USER_OPENING}", f"\n\n{END_OF_QUESTION} {END_OF_QUESTION}{BOT_OPENING}")
_ONE = ComposerRules(
    article=Step(
        "{pictures}根据给定标题写一个图文并茂，不重复的文章：{instruction}",
        max_new_tokens=999,
        turn=_FIRST_TURN,
        decoding={"repetition_penalty": 5.0},
    ),
    spots=replace(
        _TWO.spots,
        question=f"{_TWO.spots.question} ",
        max_new_tokens=299,
        turn=_FIRST_TURN,
        decoding={"repetition_penalty": 1.0},
    ),
    caption=Step(
        f" {_CAPTION} ",
        ' 标题是"',
        max_new_tokens=99,
        turn=_FIRST_TURN,
        decoding={"num_beams": 1, "repetition_penalty": 5.0},
    ),
    choice=Step(
        "根据给定上下文和候选图像，选择合适的配图：{text}\n\n候选图像包括: {offer}",
        "最合适的图是",
        max_new_tokens=9,
        turn=_FIRST_CHOICE,
        decoding={"repetition_penalty": 1.0},
    ),
    edits={name: replace(step, turn=_FIRST_TURN) for name, step in _EDITS.items()},
    infer_mode="base",
    caption_end="first",
    max_prompt=1681,
    hd_num=1,
    before_letter="",
    letters_after=("", " "),
    sampling={"do_sample": False, "num_beams": 5, "repetition_penalty": 1.5, "length_penalty": 1.0},
    meta_instruction=FIRST_META_INSTRUCTION,
)
COMPOSERS = {
    FIRST_GENERATION: _ONE,
    "2": _TWO,
    "2.5": replace(
        _TWO,
        article=replace(_TWO.article, max_new_tokens=8192),
        caption=Step(_ONE_SHOT, '标题是"', system=_ONE_SHOT_SYSTEM),
        infer_mode="write",
        caption_end="last",
        max_prompt=16384,
        hd_num=18,
        layout="centred",
    ),
}


def composer_rules(version: str) -> ComposerRules:
    """The rules of a version.

    Raises:
        ValueError: its checkpoints were not trained for this.
    """
    if version not in COMPOSERS:
        raise ValueError(
            f"version {version} doesn't compose articles with pictures; use one of {', '.join(COMPOSERS)}"
        )
    return COMPOSERS[version]


# ---- prompts ----


@dataclass(frozen=True)
class ComposerPrompt:
    """Texts with pictures between them; `str` of it has a mark for each picture."""

    texts: tuple[str, ...]
    pictures: tuple[Image.Image, ...] = ()

    def __str__(self) -> str:
        return PICTURE_MARK.join(self.texts)


Piece = str | Image.Image


def build_prompt(
    step: Step, markup: Markup, meta: str = "", **values: str | int | Sequence[Piece]
) -> ComposerPrompt:
    """The prompt of a step: its question with the values in place of the names, and how the answer begins.

    Args:
        markup: what is plain text in the values.
        meta: the system text of steps that have none of their own.
        values: a text, or texts and pictures in order.
    """
    pieces: list[Piece] = []
    for literal, name, _, _ in string.Formatter().parse(step.question):
        value = "" if name is None else values[name]
        said = [str(value)] if isinstance(value, str | int) else value
        plain = [markup.hide(piece, with_marks=True) if isinstance(piece, str) else piece for piece in said]
        pieces += [literal, *plain]
    before, after = surroundings(step, meta)
    texts, pictures = [""], []
    for piece in [before, *pieces, after, step.opening]:
        if isinstance(piece, str):
            texts[-1] += piece
        else:
            pictures.append(piece)
            texts.append("")
    return ComposerPrompt(tuple(texts), tuple(pictures))


def surroundings(step: Step, meta: str = "") -> tuple[str, str]:
    """What is before and after the question of a step, up to where the answer begins."""
    if step.turn is None:
        turn = format_prompt("\0", (), meta if step.system is None else step.system)
        before, after = turn.split("\0")
        return before, after
    before, after = step.turn
    return f"{format_first_system(meta)}{before}" if meta else before, after


def number_lines(lines: Sequence[str], start: int = 0) -> str:
    """The lines with their numbers, as the model reads them, without those before `start`."""
    return "".join(f"<Seg{i}> {line}\n" for i, line in enumerate(lines) if i >= start)


def earlier_captions(captions: Mapping[int, str]) -> str:
    """What the model is told about the captions of other lines, in their order."""
    told = [f'<Seg{line}>后插入图像对应的标题是"{caption}"' for line, caption in captions.items()]
    return f"现在{'， '.join(told)}。" if told else ""


def text_so_far(
    lines: Sequence[str], line: int, pictures: Mapping[int, Image.Image], start: int = 0
) -> list[Piece]:
    """The lines from `start` up to and including `line`, and the pictures that earlier ones got."""
    pieces: list[Piece] = []
    for i, text in enumerate(lines[: line + 1]):
        if i >= start:
            pieces += [f"{text}\n", *([pictures[i]] if i in pictures and i < line else [])]
    return pieces


def offer_pictures(pictures: Sequence[Image.Image]) -> list[Piece]:
    """The candidates, each after its letter."""
    pieces: list[Piece] = []
    for letter, picture in zip(LETTERS, pictures, strict=False):
        pieces += [f"{letter}.", picture, "\n"]
    return pieces[:-1]


# ---- answers ----


def split_article(text: str, max_lines: int = 60) -> list[str]:
    """The lines of an article that count; runs of line ends and spaces are one line end."""
    text = re.sub(r"\n\s+", "\n", text.strip())
    return text.split("\n")[:max_lines] if text else []


def read_spots(answer: str) -> list[int]:
    """The numbers of lines that an answer names, in its order."""
    return [int(number) for number in re.findall(r"<Seg([0-9]{1,9})>", answer)]


def check_spots(spots: Sequence[int], num_lines: int, most: int) -> list[int]:
    """The first `most` different spots that are lines, in the order of the lines."""
    return sorted([spot for spot in dict.fromkeys(spots) if spot < num_lines][:most])


def fill_spots(spots: Sequence[int], num_lines: int, wanted: int) -> list[int]:
    """Spots with more of them, as far apart as possible, until there are as many as wanted or as lines."""
    spots = list(spots)
    while len(spots) < min(wanted, num_lines):
        free = [line for line in range(num_lines) if line not in spots]
        gaps = {line: min((abs(line - spot) for spot in spots), default=0) for line in free}
        spots.append(max(free, key=lambda line: gaps[line]))
    return sorted(spots)


def read_caption(answer: str, end: str) -> str:
    """The caption at the start of an answer, up to its `"first"` or `"last"` quotation mark."""
    if end == "first":
        return answer.split('"')[0].strip()
    return answer.rpartition('"')[0]


def read_choice(answer: str, num_candidates: int) -> int:
    """The index of the candidate that an answer names: its first sign, or its first letter that stands alone.

    An answer that names none of them means the first.
    """
    allowed = LETTERS[:num_candidates]
    answer = answer.lstrip(" \n:：")
    if answer[:1] and answer[0] in allowed:
        return allowed.index(answer[0])
    found = re.search(f"(?<![A-Za-z])[{allowed}](?![A-Za-z])", answer)
    return allowed.index(found[0]) if found else 0
