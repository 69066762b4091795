"""Turns, system text and pictures -> the token ids of a prompt, by the rules of each version. No tensors."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

BEGIN_OF_TURN = "[UNUSED_TOKEN_146]"
END_OF_TURN = "[UNUSED_TOKEN_145]"
IMAGE_MARK = "<ImageHere>"

# The published system text; 2.5 uses it only on request, 2 and 4KHD always.
META_INSTRUCTION = (
    "You are an AI assistant whose name is InternLM-XComposer (浦语·灵笔).\n"
    "- InternLM-XComposer (浦语·灵笔) is a multi-modality conversational language model that is developed by "
    "Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM-XComposer (浦语·灵笔) can understand and communicate fluently in the language chosen by the "
    "user such as English and 中文.\n"
    "- InternLM-XComposer (浦语·灵笔) is capable of comprehending and articulating responses effectively "
    "based on the provided image."
)


History = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class PromptIds:
    """A prompt as ids, and which of them stand for image tokens."""

    ids: list[int]
    is_image: list[bool]


def format_turn(role: str, text: str) -> str:
    """One whole turn with its markup."""
    return f"{BEGIN_OF_TURN}{role}\n{text}{END_OF_TURN}\n"


def format_prompt(
    query: str, history: Sequence[tuple[str, str]] = (), meta_instruction: str | None = ""
) -> str:
    """System text (if any), earlier turns, the question, and the opening of the answer."""
    parts = [format_turn("system", meta_instruction)] if meta_instruction else []
    for question, answer in history:
        parts += [format_turn("user", question), format_turn("assistant", answer)]
    return "".join([*parts, format_turn("user", query), f"{BEGIN_OF_TURN}assistant\n"])


def place_images(prompt: str, num_images: int, *, version: str) -> list[str]:
    """Split a prompt at its image marks into `num_images + 1` texts.

    A single picture without a mark goes to the very front in version 2.5, before system text and history.

    Raises:
        ValueError: marks and pictures differ in number.
    """
    texts = prompt.split(IMAGE_MARK)
    num_marks = len(texts) - 1
    if num_marks == 0 and num_images == 1 and version == "2.5":
        return ["", prompt]
    if num_marks != num_images:
        raise ValueError(
            f"the prompt has {num_marks} {IMAGE_MARK} marks (history included) but {num_images} pictures "
            f"were given; put one mark where each belongs, and pass the pictures of earlier turns again"
        )
    return texts


def encode_prompt(
    tokenizer,
    texts: Sequence[str],
    image_lengths: Sequence[int],
    *,
    version: str,
    image_token_id: int,
    add_bos: bool = True,
) -> PromptIds:
    """Token ids of texts with pictures between them.

    BOS stands once at the start in version 2.5, and before every non-empty text in 2 and 4KHD.

    Args:
        texts: one more than there are pictures.
        image_lengths: how many tokens each picture takes.
        add_bos: False leaves every BOS out.
    """
    ids: list[int] = []
    is_image: list[bool] = []
    for position, text in enumerate(texts):
        if text or position == 0:
            with_bos = position == 0 if version == "2.5" else bool(text)
            piece = tokenizer(text, add_special_tokens=with_bos and add_bos)["input_ids"]
            ids += piece
            is_image += [False] * len(piece)
        if position < len(image_lengths):
            ids += [image_token_id] * image_lengths[position]
            is_image += [True] * image_lengths[position]
    return PromptIds(ids, is_image)


def cut_response(text: str) -> str:
    """What stands before the end of the turn."""
    return text.split(END_OF_TURN)[0]


def check_turns(query: str, history: History | None) -> list[tuple[str, str]]:
    """The history as a list of pairs of text.

    Raises:
        TypeError: the question is no text, or the history no list of (question, answer).
    """
    if not isinstance(query, str):
        raise TypeError(f"query must be a str, not {type(query).__name__}")
    turns = []
    for turn in history or ():
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise TypeError(f"history must be a list of (question, answer) texts; one turn is {turn!r:.80}")
        turns.append((turn[0], turn[1]))
    return turns


def context_length(config) -> int:
    """How many tokens the decoder reads: the trained positions times what their scaling stretches them by."""
    text = config.text_config
    return int(text.max_position_embeddings * text.rope_parameters.get("factor", 1.0))


def check_length(num_tokens: int, image_lengths: list[int], config, hd_num: int = 1, count=None) -> None:
    """Raise `ValueError` for a prompt longer than the context, with what would fit."""
    limit = context_length(config)
    if num_tokens <= limit:
        return
    remedy = "shorten the text or the history"
    if image_lengths and count is not None and config.is_tiled:
        fitting = bisect_right(range(1, hd_num), limit, key=count)  # the count grows with the budget
        remedy = f"hd_num={fitting} would fit" if fitting else "pass fewer pictures or frames, or less text"
    raise ValueError(
        f"the prompt has {num_tokens} tokens, {sum(image_lengths)} of them for "
        f"{len(image_lengths)} pictures, but the context holds {limit}; {remedy}"
    )
