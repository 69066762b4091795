"""How rows become prompts of the first generation, whose turns are written in another way."""

from collections.abc import Sequence

from internlm_xcomposer2.chat_internlm_xcomposer import align_text, answer_labels
from internlm_xcomposer2.configuration_internlm_xcomposer2 import FIRST_GENERATION
from internlm_xcomposer2.inputs_internlm_xcomposer2 import IGNORED
from internlm_xcomposer2.processing_internlm_xcomposer2 import default_template
from internlm_xcomposer2.prompt_internlm_xcomposer2 import encode_prompt, format_first_system, place_images
from internlm_xcomposer2.tokenization_internlm_xcomposer2 import (
    BOT_OPENING,
    END_OF_ANSWER,
    END_OF_QUESTION,
    IMAGE_MARK,
    USER_OPENING,
    encode_text,
)

from .rows import Turn

# What no text of a row may contain: it would count as the beginning or the end of a turn.
FIRST_MARKUP = (
    END_OF_QUESTION,
    END_OF_ANSWER,
    USER_OPENING.strip().removesuffix(":"),
    BOT_OPENING.strip().removesuffix(":"),
)
_OPENINGS = {"user": USER_OPENING, "assistant": BOT_OPENING}


def encode_first(
    processor, turns: Sequence[Turn], lengths: Sequence[int], layout: str
) -> tuple[list[int], list[int], list[bool]]:
    """A conversation with its pictures -> ids, labels, and which ids stand for image tokens.

    Args:
        lengths: tokens of each picture.
        layout: `"inference"` for the turns of the chat template; `"training"` for those of the published
            trainer, in which a row without pictures has no BOS.
    """
    tokenizer = processor.tokenizer
    turns = mark_first_picture(turns, len(lengths))
    is_chat = layout == "inference"
    texts = [chat_text(tokenizer, turns)] if is_chat else training_texts(turns)
    if len(texts) != len(lengths) + 1:
        texts = place_images("".join(texts), len(lengths), version=FIRST_GENERATION)
    prompt = encode_prompt(
        tokenizer,
        texts,
        lengths,
        version=FIRST_GENERATION,
        image_token_id=processor.image_token_id,
        add_bos=is_chat or bool(lengths),
    )
    ends = [tokenizer.convert_tokens_to_ids(mark) for mark in (END_OF_QUESTION, END_OF_ANSWER)]
    opening = len(encode_text(tokenizer, BOT_OPENING, add_special_tokens=False))
    labels = answer_labels(prompt.ids, *ends, tokenizer.eos_token_id, opening)
    labels = [IGNORED if image else label for label, image in zip(labels, prompt.is_image, strict=True)]
    return prompt.ids, labels, prompt.is_image


def mark_first_picture(turns: Sequence[Turn], num_pictures: int) -> list[Turn]:
    """The turns with a mark for their only picture, in front of the first question if it has none."""
    turns = list(turns)
    first = next(index for index, turn in enumerate(turns) if turn.role == "user")
    if num_pictures == 1 and not any(IMAGE_MARK in turn.text for turn in turns):
        turns[first] = Turn("user", IMAGE_MARK + turns[first].text)
    return turns


def chat_text(tokenizer, turns: Sequence[Turn]) -> str:
    """The turns of the chat template and the end of the text, without BOS."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    template = default_template(FIRST_GENERATION)
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, allow_markup=True)
    return text.removeprefix(tokenizer.bos_token) + tokenizer.eos_token


def training_texts(turns: Sequence[Turn]) -> list[str]:
    """The turns as the published trainer writes them: one text, or two around a picture at the very front."""
    has_system = turns[0].role == "system"
    header = format_first_system(turns[0].text) if has_system else ""
    said = [(_OPENINGS[turn.role], turn.text) for turn in turns[has_system:]]
    question = said[0][1]
    if question.startswith(IMAGE_MARK) and sum(text.count(IMAGE_MARK) for _, text in said) == 1:
        others = [f"{opening} {text}" for opening, text in said[1:]]
        rest = "\n".join([question.removeprefix(IMAGE_MARK), *others])
        return [f"{header}{USER_OPENING}", align_text(rest)]
    return [align_text(header + "\n".join(f"{opening} {text}" for opening, text in said))]
