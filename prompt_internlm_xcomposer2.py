"""What a prompt is: turns, system text and pictures -> checked ids, by the rules of each version.

Functions of a configuration, a tokenizer and what a caller passed. `plan_chat` and `plan_conversation` make
every check and read every picture, but cut none; `batch_inputs` turns their prompts into tensors. Anything
that answers a prompt, the model in this package or another engine, starts here.
"""

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .configuration_internlm_xcomposer2 import InternLMXcomposer2Config
from .image_processing_internlm_xcomposer2 import (
    Visual,
    as_visuals,
    count_tokens,
    default_hd_num,
    load_media,
    num_visuals,
    prepare_visuals,
)
from .ixc_utils import Font, check_hd_num
from .media_internlm_xcomposer2 import (
    MAX_FRAMES,
    Medium,
)
from .messages_internlm_xcomposer2 import read_messages
from .tokenization_internlm_xcomposer2 import (
    BEGIN_OF_TURN,
    END_OF_TURN,
    IMAGE_MARK,
    REWARD_MARK,
    SYSTEM_END,
    SYSTEM_OPENING,
    Markup,
    encode_text,
    end_mark,
    markup_of,
)

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

# The published system text of the first generation, which its `chat` always uses.
FIRST_META_INSTRUCTION = (
    "You are an AI assistant whose name is 浦语.\n"
    "- 浦语 is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- 浦语 can understand and communicate fluently in the language chosen by the user such as English and "
    "中文."
)

ROLES = ("system", "user", "assistant")

# Of a text with more characters for each token of the context, the beginning is counted first.
CHARACTERS_PER_TOKEN = 8

History = Sequence[tuple[str, str]]
Conversation = Sequence[Mapping]


# ---- turns ----


@dataclass(frozen=True)
class PromptIds:
    """A prompt as ids, and which of them stand for image tokens."""

    ids: list[int]
    is_image: list[bool]


def format_turn(role: str, text: str) -> str:
    """One whole turn with its markup."""
    return f"{BEGIN_OF_TURN}{role}\n{text}{END_OF_TURN}\n"


def format_first_system(text: str) -> str:
    """The system text of the first generation with what surrounds it."""
    return f"{SYSTEM_OPENING}{text}{SYSTEM_END}"


def format_prompt(
    query: str,
    history: Sequence[tuple[str, str]] = (),
    meta_instruction: str | None = "",
    markup: Markup | None = None,
    answer_prefix: str = "",
) -> str:
    """System text (if any), earlier turns, the question, and the opening of the answer.

    Args:
        markup: what is plain text in them. By default nothing is: names of markup count as such.
        answer_prefix: what the answer begins with.
    """
    turns = [("system", meta_instruction)] if meta_instruction else []
    for question, answer in history:
        turns += [("user", question), ("assistant", answer)]
    parts = [format_said(role, text, markup) for role, text in [*turns, ("user", query)]]
    begun = answer_prefix if markup is None else markup.hide(answer_prefix, with_marks=True)
    return "".join([*parts, f"{BEGIN_OF_TURN}assistant\n", begun])


def format_said(role: str, text: str, markup: Markup | None) -> str:
    """A turn whose text is plain. A mark in it is an image in a user's turn, and else plain text too."""
    hidden = text if markup is None else markup.hide(text, with_marks=role != "user")
    return format_turn(role, hidden)


def mark_pictures(questions: Sequence[str], counts: Sequence[int], *, version: str) -> list[str]:
    """The questions of a dialogue with a mark for each of their pictures.

    Pictures are numbered through the dialogue as on the model cards. A question that has marks stays as it
    is, and so does a single picture's in version 2.5, which reads it first of all.

    Args:
        counts: how many pictures each question came with.

    Raises:
        ValueError: a question has marks, but not one for each of its pictures.
    """
    marked, number = [], 0
    for question, count in zip(questions, counts, strict=True):
        num_marks = question.count(IMAGE_MARK)
        if num_marks not in (0, count):
            raise ValueError(
                f"a question has {num_marks} {IMAGE_MARK} marks but came with {count} pictures; write one "
                "for each, or none"
            )
        numbers = range(number + 1, number + 1 + count)
        number += count
        if num_marks == 0 and sum(counts) == 1:
            question = question if version == "2.5" or not count else IMAGE_MARK + question
        elif num_marks == 0:
            question = "".join(f"Image{i} {IMAGE_MARK}; " for i in numbers) + question
        marked.append(question)
    return marked


def place_images(prompt: str, num_images: int, *, version: str) -> list[str]:
    """Split a prompt at its image marks into `num_images + 1` texts.

    A single picture without a mark goes to the very front in version 2.5, before system text and history.

    Raises:
        ValueError: the numbers of marks and pictures differ.
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

    BOS goes once at the start in versions 1.0 and 2.5, and before every non-empty text in 2 and 4KHD.

    Args:
        texts: one more than there are pictures.
        image_lengths: how many tokens each picture takes.
        add_bos: False leaves every BOS out.
    """
    ids: list[int] = []
    is_image: list[bool] = []
    for position, text in enumerate(texts):
        if text or position == 0:
            with_bos = position == 0 if version in ("1.0", "2.5") else bool(text)
            piece = encode_text(tokenizer, text, add_special_tokens=with_bos and add_bos)
            ids += piece
            is_image += [False] * len(piece)
        if position < len(image_lengths):
            ids += [image_token_id] * image_lengths[position]
            is_image += [True] * image_lengths[position]
    return PromptIds(ids, is_image)


def cut_response(text: str, end: str = END_OF_TURN) -> str:
    """The text before the mark that ends the turn."""
    return text.split(end)[0]


def check_turns(query: str, history: History | None) -> list[tuple[str, str]]:
    """The history as a list of pairs of text.

    Raises:
        TypeError: the question is not a text, or the history not a list of (question, answer).
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
    """How many tokens the decoder reads: the trained positions times their scaling factor."""
    text = config.text_config
    return int(text.max_position_embeddings * text.rope_parameters.get("factor", 1.0))


def check_length(
    num_tokens: int,
    image_lengths: Sequence[int],
    limit: int,
    hd_num: int = 1,
    count: Callable[[int], int] | None = None,
) -> None:
    """Raise `ValueError` for a prompt longer than the context, with what would fit.

    Args:
        limit: how many tokens the context holds.
        count: the number of tokens at a number of local tiles.
    """
    if num_tokens <= limit:
        return
    remedy = "shorten the text or the history"
    if image_lengths and count is not None and count(1) != count(hd_num):
        fitting = bisect_right(range(1, hd_num), limit, key=count)  # the count grows with the budget
        remedy = f"hd_num={fitting} would fit" if fitting else "pass fewer pictures or frames, or less text"
    raise ValueError(
        f"the prompt has {num_tokens} tokens, {sum(image_lengths)} of them for "
        f"{len(image_lengths)} pictures, but the context holds {limit}; {remedy}"
    )


def count_prompt(config, num_text: int, visuals: Sequence[Visual], hd_num: int) -> int:
    """The tokens of a prompt: those of its text, and those of images in at most `hd_num` local tiles."""
    return num_text + sum(count_tokens(config, visuals, hd_num))


def check_characters(tokenizer, texts: Iterable[str], limit: int | None) -> None:
    """Raise `ValueError` for texts that together are longer than `limit` tokens, however long they are.

    Of a very long text only as much is encoded as is needed to know.
    """
    if limit is None:
        return
    text = "".join(texts)
    size = CHARACTERS_PER_TOKEN * limit
    if size < len(text):
        longest = max(map(len, tokenizer.get_vocab()))  # a run of spaces can be one piece
        if len(text) > longest * limit:
            raise ValueError(
                f"the text has {len(text)} characters, at least {len(text) // longest} tokens, but the "
                f"context holds {limit}; shorten the text or the history"
            )
    while size < len(text):
        num_tokens = len(encode_text(tokenizer, text[:size], add_special_tokens=False))
        if num_tokens > limit:
            raise ValueError(
                f"the text has {len(text)} characters, the first {size} of them {num_tokens} tokens, but the "
                f"context holds {limit}; shorten the text or the history"
            )
        size *= 2


# ---- checked prompts ----


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt that is checked and counted, with pictures that are not cut yet.

    Attributes:
        penalise_prompt: whether the repetition penalty sees the prompt, as in the published text-only form.
    """

    ids: list[int]
    is_image: list[bool]
    visuals: tuple[Visual, ...] = ()
    lengths: tuple[int, ...] = ()
    hd_num: int = 1
    penalise_prompt: bool = False

    def spans(self) -> list[tuple[int, int]]:
        """(first, one past the last) position of each picture's tokens."""
        spans, position = [], 0
        for length in self.lengths:
            start = self.is_image.index(True, position)
            position = start + length
            spans.append((start, position))
        return spans

    def tokens(self, identities: Sequence[Hashable]) -> list[Hashable]:
        """What is at each position: ids, and the identity of their picture for image tokens."""
        tokens: list[Hashable] = list(self.ids)
        for (start, stop), identity in zip(self.spans(), identities, strict=True):
            tokens[start:stop] = [identity] * (stop - start)
        return tokens


def plan_chat(
    config: InternLMXcomposer2Config,
    tokenizer,
    query: str,
    image: object,
    hd_num: int | None = None,
    history: History = (),
    meta_instruction: str | None = "",
    *,
    fps: float = 1.0,
    num_frames: int = MAX_FRAMES,
    allow_markup: bool = False,
    answer_prefix: str = "",
) -> ChatPrompt:
    """A question with its pictures and earlier turns, fully checked; pictures are read, but not cut.

    Args:
        image: pictures and videos as in `chat`; `None` for the published text-only form.
        hd_num: how many local tiles a picture may be cut into, `default_hd_num` by default.
        fps, num_frames: frames per second of a video, and the most frames to take.
        allow_markup: whether names of markup in the texts count as such, and image marks in all of them.
        answer_prefix: what the answer begins with.

    Raises:
        FileNotFoundError, TypeError, ValueError: anything wrong with the arguments, or too long.
    """
    if hd_num is not None:
        check_hd_num(hd_num)
    if not isinstance(answer_prefix, str):
        raise TypeError(f"answer_prefix must be a str, not {type(answer_prefix).__name__}")
    meta_instruction = str(meta_instruction or "")  # some clients pass a tuple, because of a stray comma
    said = [meta_instruction, *(text for turn in history for text in turn), query, answer_prefix]
    check_characters(tokenizer, said, context_length(config))
    markup = None if allow_markup else markup_of(tokenizer)
    text = format_prompt(query, history, meta_instruction, markup, answer_prefix)
    if image is None or (config.version != "2.5" and isinstance(image, list | tuple) and not image):
        place_images(text, 0, version=config.version)
        ids = text_only_ids(tokenizer, text)
        check_length(len(ids), [], context_length(config))
        return ChatPrompt(ids, [False] * len(ids), penalise_prompt=True)
    hd_num = default_hd_num(config, num_visuals(image)) if hd_num is None else hd_num
    visuals = as_visuals(image, config, fps=fps, num_frames=num_frames, hd_num=hd_num)
    return _plan(config, tokenizer, text, visuals, hd_num, bos_rule=config.version)


def plan_conversation(
    config: InternLMXcomposer2Config,
    tokenizer,
    messages: Conversation,
    image: object = (),
    hd_num: int | None = None,
    max_length: int | None = None,
) -> ChatPrompt:
    """A conversation to be scored, planned as `plan_chat` plans a question. Its texts are plain.

    Args:
        messages: dicts of `role` and `content`, the last of them an answer.
        image: its pictures and videos, unless they are parts of the content.
        max_length: a longer conversation is an error; the decoder's context by default.

    Raises:
        FileNotFoundError, TypeError, ValueError: anything wrong with the arguments, or too long.
    """
    if hd_num is not None:
        check_hd_num(hd_num)
    check_characters(tokenizer, said_in(messages), context_length(config))
    text, media = format_conversation(messages, markup_of(tokenizer))
    text += f"{tokenizer.eos_token}{reward_mark(tokenizer)}"
    # One BOS, as in the training of every version.
    prompt = _plan(config, tokenizer, text, _visuals_of(media, image, config), hd_num, bos_rule="2.5")
    if max_length is not None and len(prompt.ids) > max_length:
        raise ValueError(
            f"the conversation has {len(prompt.ids)} tokens, {sum(prompt.lengths)} of them for "
            f"{len(prompt.visuals)} pictures, but max_length is {max_length}; raise it, lower hd_num or "
            "shorten the conversation"
        )
    return prompt


def _plan(
    config: InternLMXcomposer2Config,
    tokenizer,
    text: str,
    visuals: Sequence[Visual],
    hd_num: int | None,
    *,
    bos_rule: str,
) -> ChatPrompt:
    """A text with its pictures -> ids, after checking that they fit the context."""
    hd_num = default_hd_num(config, len(visuals)) if hd_num is None else hd_num
    texts = place_images(text, len(visuals), version=config.version)
    prompt = join_prompt(config, tokenizer, texts, visuals, hd_num, bos_rule=bos_rule)
    count = partial(count_prompt, config, len(prompt.ids) - sum(prompt.lengths), visuals)
    check_length(len(prompt.ids), prompt.lengths, context_length(config), hd_num, count)
    return prompt


def join_prompt(
    config: InternLMXcomposer2Config,
    tokenizer,
    texts: Sequence[str],
    visuals: Sequence[Visual],
    hd_num: int,
    *,
    bos_rule: str,
) -> ChatPrompt:
    """Texts with pictures between them -> ids, of any length.

    Args:
        texts: one more than there are pictures.
        bos_rule: the version whose rule for BOS counts, as in `encode_prompt`.
    """
    lengths = count_tokens(config, visuals, hd_num)
    piece = config.image_token_id
    prompt = encode_prompt(tokenizer, texts, lengths, version=bos_rule, image_token_id=piece)
    return ChatPrompt(prompt.ids, prompt.is_image, tuple(visuals), tuple(lengths), hd_num)


def text_only_ids(tokenizer, prompt: str) -> list[int]:
    """The ids of the published text-only form of a prompt, with BOS twice."""
    return encode_text(tokenizer, f"{tokenizer.bos_token}{prompt}", add_special_tokens=True)


def batch_inputs(
    config: InternLMXcomposer2Config,
    prompts: Sequence[ChatPrompt],
    *,
    pad_token_id: int = 0,
    num_cached: int = 0,
    font: Font | None = None,
    device: torch.device | None = None,
) -> dict:
    """Prompts -> tensors, padded on the left.

    Args:
        num_cached: how many leading tokens are already computed; only pictures after them are cut.
        font: of the labels in videos.

    Returns:
        `input_ids` (prompts, tokens), and if needed `attention_mask` and `im_mask` of the same shape,
        `pixel_values` (tiles, 3, side, side) and `image_grid_hw` (pictures, 2), or `image_features`, what the
        tower made of each if that is known already, and `penalise_prompt`, a list.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    pads = [longest - len(prompt.ids) for prompt in prompts]
    rows = [[pad_token_id] * pad + prompt.ids for pad, prompt in zip(pads, prompts, strict=True)]
    inputs = {"input_ids": torch.tensor(rows, device=device)}
    if any(prompt.penalise_prompt for prompt in prompts):
        inputs["penalise_prompt"] = [prompt.penalise_prompt for prompt in prompts]
    if any(pads):
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        inputs["attention_mask"] = torch.tensor(mask, device=device)
    wanted = [
        (visual, prompt.hd_num)
        for prompt in prompts
        for visual, (start, _) in zip(prompt.visuals, prompt.spans(), strict=True)
        if start >= num_cached
    ]
    if wanted:
        visuals, budgets = zip(*wanted, strict=True)
        if all(visual.embeds is not None for visual in visuals):
            inputs["image_features"] = [visual.embeds for visual in visuals]
        else:
            names = ("pixel_values", "image_grid_hw")
            inputs |= zip(names, prepare_visuals(visuals, config, budgets, font=font), strict=True)
    if any(prompt.visuals for prompt in prompts):
        masks = [[False] * pad + prompt.is_image for pad, prompt in zip(pads, prompts, strict=True)]
        inputs["im_mask"] = torch.tensor(masks, device=device)
    return inputs


def system_text(version: str, use_meta: bool | None, meta_instruction: str | None) -> str:
    """The system text if requested; 2.5 leaves it out by default."""
    use_meta = version != "2.5" if use_meta is None else use_meta
    return (meta_instruction or "") if use_meta else ""


def stop_token_ids(tokenizer) -> list[int]:
    """`</s>` and the end of a turn."""
    return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]


def check_tokenizer(config: InternLMXcomposer2Config, tokenizer) -> None:
    """Raise `ValueError` unless the tokenizer's vocabulary is the model's."""
    if tokenizer is None:
        raise ValueError("no tokenizer: pass one, or set model.tokenizer")
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        raise TypeError(f"the tokenizer is a {type(tokenizer).__name__}; load it with AutoTokenizer")
    rows = config.text_config.vocab_size
    if rows not in (tokenizer.vocab_size, len(tokenizer)) and len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} pieces but the model {rows}; load the tokenizer that "
            "comes with the checkpoint"
        )
    mark = end_mark(config.version)
    end, expected = tokenizer.convert_tokens_to_ids(mark), config.end_token_id
    if end in (None, tokenizer.unk_token_id):
        raise ValueError(f"the tokenizer has no piece {mark}, which ends every turn of these models")
    if expected < rows and end != expected:
        raise ValueError(
            f"the tokenizer's id of {mark} is {end} but the model's is {expected}; load the "
            "tokenizer that comes with the checkpoint"
        )


# ---- conversations to be scored ----


def format_conversation(messages: Conversation, markup: Markup | None = None) -> tuple[str, list[Medium]]:
    """A conversation that ends with the answer to be scored -> its turns as text, and media in its content.

    Args:
        messages: dicts of `role` and `content`, a text or a list of parts as in a chat template; a picture
            that is passed separately is `<ImageHere>` or `{"type": "image"}` there.
        markup: as in `format_prompt`.

    Raises:
        TypeError, ValueError: no messages, an unknown role, or the last message is not an answer.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise TypeError(f"a conversation must be a list of at least one message, not {messages!r:.80}")
    rendered, media = read_messages(messages, need_sources=False)
    if unknown := [message["role"] for message in rendered if message["role"] not in ROLES]:
        raise ValueError(f"unknown role {unknown[0]!r}; choose one of {', '.join(ROLES)}")
    if rendered[-1]["role"] != "assistant":
        raise ValueError(
            f"the last message is from {rendered[-1]['role']!r}; it must be the answer to be scored, from "
            "'assistant'"
        )
    if markup is not None:
        rendered = markup.hide_messages(rendered)
    turns = [format_turn(message["role"], text_of(message["content"])) for message in rendered]
    return "".join(turns), media


def said_in(messages: Conversation) -> Iterator[str]:
    """The texts of messages, checked or not."""
    for message in messages if isinstance(messages, list | tuple) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list | tuple) else [{"text": content}]
        texts = (part.get("text") for part in parts if isinstance(part, Mapping))
        yield from (text for text in texts if isinstance(text, str))


def text_of(content: str | list[dict]) -> str:
    """What a message says, with a mark for each of its pictures and videos."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(part["text"] if part["type"] == "text" else IMAGE_MARK for part in parts).strip()


def reward_mark(tokenizer) -> str:
    """The piece that ends a conversation after `</s>`, at which its score is read.

    It is `[UNUSED_TOKEN_130]`, or the end of a turn in a vocabulary that has no such piece, such as nano's.
    """
    known = tokenizer.convert_tokens_to_ids(REWARD_MARK) not in (None, tokenizer.unk_token_id)
    return REWARD_MARK if known else END_OF_TURN


def _visuals_of(media: list[Medium], image: object, config: InternLMXcomposer2Config) -> list[Visual]:
    """The pictures of a conversation, which are in its messages or passed separately, not both."""
    apart = (
        [] if image is None or (isinstance(image, list | tuple) and not image) else as_visuals(image, config)
    )
    if media and apart:
        raise ValueError(
            f"the messages hold {len(media)} pictures and {len(apart)} more were given; pass them one way"
        )
    return load_media(media, config) or apart
