"""Text to token ids and back, on sentencepiece.

Two vocabularies go through the same class: the one of the published checkpoints (92544 pieces, `<unk>` 0,
`<s>` 1, `</s>` 2, `[UNUSED_TOKEN_145]` 92542, `[UNUSED_TOKEN_146]` 92543) and the small one of the nano
checkpoint, whose ids differ. So there are no ids in this file: every piece is looked up by its name.

The markup of turns, which is defined only here, consists of ordinary pieces. sentencepiece matches them
whole, decoding shows them, and `skip_special_tokens` leaves them in; only `<s>`, `</s>` and `<unk>` are
special. What somebody says may contain their names: `Markup.hide` marks them, so that they are read as the
characters that they are.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import lru_cache, partial
from itertools import chain, groupby
from pathlib import Path
from shutil import copyfile

import sentencepiece
from tokenizers import Tokenizer, decoders, models
from transformers import AddedToken, PreTrainedTokenizer

from .files_internlm_xcomposer2 import (
    TOKENIZER_FILES,
    TOKENIZER_KINDS,
    blaming,
    check_fields,
    check_small_files_in,
    read_small,
)

BEGIN_OF_TURN = "[UNUSED_TOKEN_146]"
END_OF_TURN = "[UNUSED_TOKEN_145]"
IMAGE_MARK = "<ImageHere>"
# In a text with pictures and videos, this marks the videos; if there are only videos, either mark will do.
VIDEO_MARK = "<VideoHere>"
# What follows a conversation that is to be scored.
REWARD_MARK = "[UNUSED_TOKEN_130]"
SPECIAL_PIECES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
# Pieces of the published vocabularies that stand for no text; some of them are markup.
_UNUSED_PIECES = r"\[UNUSED_TOKEN_\d+\]|<TOKENS_UNUSED_\d+>"
_LONGEST_UNUSED = 24
# Goes after the first character of a name that is plain text. Unicode has no character here, nor ever will.
CUT = "\ufdd0"

TURNS_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '" + BEGIN_OF_TURN + "' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string %}"
    "{{- message['content'] }}"
    "{%- else %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}"
    "{{- part['text'] }}"
    "{%- elif part['type'] in ['image', 'image_url', 'video', 'video_url'] %}"
    "{{- '" + IMAGE_MARK + "' }}"
    "{%- else %}"
    "{{- raise_exception('a part of a message is text, image or video, not ' + part['type']) }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- endif %}"
    "{{- '" + END_OF_TURN + "\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '" + BEGIN_OF_TURN + "assistant\\n' }}"
    "{%- endif %}"
)
CHAT_TEMPLATE = "{{- bos_token }}" + TURNS_TEMPLATE


# ---- what somebody says ----


@dataclass(frozen=True)
class Markup:
    """The names that a vocabulary reads as markup, and how a text keeps them as plain text.

    Attributes:
        pieces: matches names of pieces: turns, special tokens and tokens added later.
        marks: matches those, and the marks of pictures and videos.
        longest: the number of characters of the longest name.
    """

    pieces: re.Pattern
    marks: re.Pattern
    longest: int

    def hide(self, text: str, *, with_marks: bool = False) -> str:
        """A text in which all names are plain text: `CUT` is after the first character of each.

        Args:
            with_marks: whether the marks of pictures and videos are hidden too.
        """
        pattern = self.marks if with_marks else self.pieces
        while pattern.search(text):  # again for names that begin in another
            text = pattern.sub(lambda found: found[0][0] + CUT + found[0][1:], text)
        return text

    def hide_all(self, value: object, *, with_marks: bool = False) -> object:
        """Lists and mappings with `hide` applied to each text in them, except for the keys."""
        if isinstance(value, str):
            return self.hide(value, with_marks=with_marks)
        value = _without_class(value)
        if isinstance(value, Mapping):
            return {name: self.hide_all(item, with_marks=with_marks) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_all(item, with_marks=with_marks) for item in value]
        return value

    def hide_messages(self, messages: Sequence, *, with_marks: bool = False) -> list:
        """Messages in which all that is said is plain text. Marks of pictures count in a user's turn only.

        Args:
            with_marks: whether they don't count there either.
        """
        hidden = []
        for message in map(_without_class, messages):
            if not isinstance(message, Mapping):
                hidden.append(message)
                continue
            marks = with_marks or message.get("role") != "user"
            content = message.get("content")
            parts = list(map(_without_class, content)) if isinstance(content, list | tuple) else content
            message = {**message, "content": self._hide_parts(parts, marks)} if parts else message
            hidden.append(self.hide_all(message, with_marks=marks))
        return hidden

    def _hide_parts(self, parts: object, with_marks: bool) -> object:
        """Parts of a message in which no name is spread over several texts, because a template joins them."""
        if not isinstance(parts, list):
            return parts
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
        places = [place for place, text in enumerate(texts) if isinstance(text, str)]
        parts = list(parts)
        hidden = self.hide("".join(texts[place] for place in places), with_marks=with_marks)
        start = 0
        for place in places:
            stop = len(hidden) if place == places[-1] else _end_in(hidden, start, texts[place])
            parts[place] = {**parts[place], "text": hidden[start:stop]}
            start = stop
        return parts

    def chunks(self, text: str) -> list[str]:
        """A text without the `CUT`s of `hide`: each chunk is encoded on its own, and they form no names."""
        parts, start = [], 0
        for found in re.finditer(CUT, text):
            first, second = found.span()
            following = text[second : second + 2 * self.longest].replace(CUT, "")
            if first > start and self.marks.match(text[first - 1] + following):
                parts.append(text[start:first])
                start = second
        return [*parts, text[start:]]


def _end_in(hidden: str, start: int, text: str) -> int:
    """Where a text ends that begins at `start` of a hidden one."""
    if hidden.startswith(text, start) and hidden[start + len(text) : start + len(text) + 1] != CUT:
        return start + len(text)
    position = start
    for character in text:
        position += 1 + (hidden[position : position + 1] != character)  # over a `CUT` that `hide` put there
    return position + (hidden[position : position + 1] == CUT)


def _without_class(value: object) -> object:
    """A message, or a part of one, as a mapping: transformers takes dataclasses and pydantic models too."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.model_dump() if hasattr(value, "model_dump") else value


def markup_of(tokenizer) -> Markup:
    """The names that a tokenizer reads as markup, of any class."""
    names = {*tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens, *SPECIAL_PIECES.values()}
    return _markup(tuple(sorted(name for name in names if len(name) > 1)))


@lru_cache(maxsize=16)
def _markup(names: tuple[str, ...]) -> Markup:
    longest = max(_LONGEST_UNUSED, *map(len, names))
    marks = re.escape(IMAGE_MARK), re.escape(VIDEO_MARK)
    pieces = [*map(re.escape, sorted(names, key=len, reverse=True)), _UNUSED_PIECES]
    return Markup(re.compile("|".join(pieces)), re.compile("|".join((*marks, *pieces))), longest)


def encode_text(tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """The ids of a text, in which names that `Markup.hide` marked are plain text.

    Raises ValueError for half of a surrogate pair, which is no character.
    """
    check_characters_exist(text)
    first, *others = markup_of(tokenizer).chunks(text) if CUT in text else [text]
    ids = list(tokenizer(first, add_special_tokens=add_special_tokens)["input_ids"])
    for chunk in others:
        ids += tokenizer(chunk, add_special_tokens=False)["input_ids"]
    return ids


def check_characters_exist(text: str) -> None:
    """Raise `ValueError` for half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text, {text[error.start]!r}, is half of a surrogate pair; "
            "remove it, or decode the text's source with errors='replace'"
        ) from None


class InternLMXComposer2Tokenizer(PreTrainedTokenizer):
    """The tokenizer of every checkpoint of the family: `tokenizer.model` read by sentencepiece.

    `<s>` goes before each text unless `add_special_tokens=False`; `</s>` goes after it only with
    `add_eos_token=True`. `</s>` is also the padding. `apply_chat_template` writes the turns that the
    models were trained on, `<s>` once at the very start, an image or video as `<ImageHere>`.
    Decoding removes the space before punctuation, as it did when the checkpoints were published, unless
    `clean_up_tokenization_spaces=False`.

    Raises FileNotFoundError if `vocab_file` does not exist, ValueError if it holds no sentencepiece model
    or one without the special and markup pieces of this family.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]
    # What turns are made of: every vocabulary of the class has these pieces.
    markup = (BEGIN_OF_TURN, END_OF_TURN)
    template = CHAT_TEMPLATE

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        unk_token: str | AddedToken = "<unk>",
        bos_token: str | AddedToken = "<s>",
        eos_token: str | AddedToken = "</s>",
        pad_token: str | AddedToken = "</s>",
        sp_model_kwargs: dict[str, bool | int | float] | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = True,
        chat_template: str | dict[str, str] | list[dict[str, str]] | None = None,
        **kwargs,
    ):
        specials = (unk_token, bos_token, eos_token)
        self.vocab_file = _existing_file(vocab_file, kwargs.get("name_or_path"))
        self.sp_model = _load_model(self.vocab_file, sp_model_kwargs or {}, (*specials, *self.markup))
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        self._stream_decoder: Tokenizer | None = None
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            sp_model_kwargs=sp_model_kwargs or {},
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            chat_template=self.template if chat_template is None else chat_template,
            **kwargs,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *inputs, **kwargs):
        """Like the base class.

        Raises:
            OSError: a file is missing.
            ValueError: a file can't be read, or a field is wrong; names the file and the field.
        """
        source = pretrained_model_name_or_path
        check_small_files_in(os.path.join(source, kwargs.get("subfolder") or ""), TOKENIZER_FILES)
        with blaming(source):
            return super().from_pretrained(source, *inputs, **kwargs)

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        """The constructor's arguments as `from_pretrained` found them, after checking the vocabulary.

        `from_pretrained` hides the constructor's errors: an OSError loses its file name, and in transformers
        5.0 every error becomes a request for protobuf. Raised here, just before, they are visible.
        """
        specials = tuple(kwargs.get(name) or default for name, default in SPECIAL_PIECES.items())
        vocab_file = _existing_file(kwargs.get("vocab_file"), kwargs.get("name_or_path"))
        _load_model(vocab_file, kwargs.get("sp_model_kwargs") or {}, (*specials, *cls.markup))
        return kwargs

    @property
    def vocab_size(self) -> int:
        """The number of pieces in the sentencepiece model, without tokens added later."""
        return self.sp_model.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """All pieces and added tokens with their ids."""
        vocabulary = {self.sp_model.id_to_piece(index): index for index in range(self.vocab_size)}
        return {**vocabulary, **self.added_tokens_encoder}

    def get_added_vocab(self) -> dict[str, int]:
        """Special tokens and tokens added later with their ids, in the order of the ids."""
        return self.added_tokens_encoder

    # The one private name that another part of the library looks for (docs/compatibility.md).
    @property
    def _tokenizer(self) -> Tokenizer:
        """The vocabulary for `tokenizers.decoders.DecodeStream`, with which `transformers serve` streams.

        It only decodes. The end of a turn is special in it, so that no stream shows it.
        """
        if self._stream_decoder is None or self._stream_decoder.get_vocab_size() != len(self):
            self._stream_decoder = _decoder(self.get_vocab(), [*self.all_special_tokens, self.markup[-1]])
        return self._stream_decoder

    def apply_chat_template(
        self,
        conversation: Sequence,
        tools: list | None = None,
        documents: list[dict] | None = None,
        chat_template: str | None = None,
        *args,
        tokenize: bool = True,
        allow_markup: bool = False,
        sanitize_control_tokens: bool = False,
        **kwargs,
    ):
        """As in transformers, but what messages, tools and documents say is plain text.

        A text (`tokenize=False`) has U+FDD0 after the first character of each name of markup in it, where
        this tokenizer reads the name as its characters.

        Args:
            allow_markup: whether markup in them counts, as it did in the published code.
            sanitize_control_tokens: whether `<ImageHere>` in a user's text is plain text too.

        Raises:
            ValueError: as in transformers, and for both options at once.
        """
        check_markup_options(allow_markup, sanitize_control_tokens, tokenize)
        if not allow_markup:
            conversation, hide = self._hide(conversation, sanitize_control_tokens)
            tools, documents, kwargs = map(hide, (tools, documents, kwargs))
        return super().apply_chat_template(
            conversation, tools, documents, chat_template, *args, tokenize=tokenize, **kwargs
        )

    def _hide(self, conversation: Sequence, with_marks: bool) -> tuple[list, Callable]:
        """One conversation or several with plain text, and what makes other values plain."""
        markup = markup_of(self)
        hide = partial(markup.hide_all, with_marks=True)
        conversation = getattr(conversation, "messages", conversation)
        rows = [getattr(item, "messages", item) for item in conversation]
        if rows and all(isinstance(row, list | tuple) for row in rows):
            return [markup.hide_messages(row, with_marks=with_marks) for row in rows], hide
        return markup.hide_messages(conversation, with_marks=with_marks), hide

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        chunks = markup_of(self).chunks(text) if CUT in text else [text]
        return [piece for chunk in chunks for piece in self.sp_model.encode(chunk, out_type=str)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise ValueError(
                f"token id {index} is outside 0..{self.vocab_size - 1}: wrong tokenizer for this model?"
            )
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of `tokens`.

        As published, a space goes before each run of pieces that ends in a special token: "a", "</s>" gives
        " a</s>", and "<s>", "a" gives " <s>a". Tokens added to the vocabulary appear as they are.
        """
        return "".join(self._parts_of_text(tokens))

    def _parts_of_text(self, tokens: list[str]) -> Iterator[str]:
        kinds = dict.fromkeys(self.added_tokens_encoder, "added")
        kinds |= dict.fromkeys(self.special_tokens_map.values(), "special")
        text = ""
        for kind, run in groupby(tokens, key=lambda token: kinds.get(token, "piece")):
            names = list(run)
            if kind == "special":
                yield " " + text + "".join(names)
                text = ""
            else:
                text += "".join(names) if kind == "added" else self.sp_model.decode_pieces(names)
        yield text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """One or two sequences joined, after `<s>` and before `</s>` if those are switched on."""
        start = [self.bos_token_id] if self.add_bos_token else []
        end = [self.eos_token_id] if self.add_eos_token else []
        return start + token_ids_0 + (token_ids_1 or []) + end

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 where `build_inputs_with_special_tokens` puts a special token, else 0."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        num_pieces = len(token_ids_0) + len(token_ids_1 or [])
        return [1] * self.add_bos_token + [0] * num_pieces + [1] * self.add_eos_token

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write `tokenizer.model` into `save_directory` and return its path.

        Raises NotADirectoryError if there is no such directory.
        """
        if not os.path.isdir(save_directory):
            raise NotADirectoryError(f"{save_directory} is not a directory; create it first")
        name = (f"{filename_prefix}-" if filename_prefix else "") + self.vocab_files_names["vocab_file"]
        target = os.path.join(save_directory, name)
        if not os.path.isfile(self.vocab_file):
            Path(target).write_bytes(self.sp_model.serialized_model_proto())
        elif os.path.abspath(self.vocab_file) != os.path.abspath(target):
            copyfile(self.vocab_file, target)
        return (target,)


def check_markup_options(allow_markup: bool, sanitize_control_tokens: bool, tokenize: bool) -> None:
    """Raise `ValueError` for options of a chat template that exclude each other."""
    if not sanitize_control_tokens:
        return
    if allow_markup:
        raise ValueError("allow_markup keeps markup and sanitize_control_tokens makes it text; pass one")
    if not tokenize:
        raise ValueError("sanitize_control_tokens=True needs tokenize=True")


def _decoder(vocabulary: dict[str, int], special: list[str]) -> Tokenizer:
    """A tokenizer that only decodes, as sentencepiece does without a space at the start."""
    decoder = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_PIECES["unk_token"]))
    decoder.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    decoder.add_special_tokens(special)
    return decoder


def _existing_file(vocab_file: str | os.PathLike | None, source: str | None) -> str:
    name = InternLMXComposer2Tokenizer.vocab_files_names["vocab_file"]
    if vocab_file is None:
        raise FileNotFoundError(f"no {name} in {source or 'the arguments'}; copy it from the checkpoint")
    if not os.path.isfile(vocab_file):
        raise FileNotFoundError(f"{vocab_file} does not exist; it should be the {name} of the checkpoint")
    return os.fspath(vocab_file)


def _load_model(
    vocab_file: str, options: dict[str, bool | int | float], required: tuple[str | AddedToken, ...]
) -> sentencepiece.SentencePieceProcessor:
    check_fields({"sp_model_kwargs": options}, TOKENIZER_KINDS)
    content = read_small(vocab_file)
    try:
        if not content:
            raise RuntimeError("the file is empty")
        model = sentencepiece.SentencePieceProcessor(model_proto=content, **options)
    except RuntimeError as error:
        raise ValueError(
            f"{vocab_file} ({len(content)} bytes) is not a sentencepiece model; "
            "it may be truncated or a Git LFS pointer: download it again"
        ) from error
    _require_pieces(model, vocab_file, required)
    return model


def _require_pieces(
    model: sentencepiece.SentencePieceProcessor, vocab_file: str, required: tuple[str | AddedToken, ...]
) -> None:
    missing = [name for name in map(str, required) if model.id_to_piece(model.piece_to_id(name)) != name]
    if missing:
        raise ValueError(
            f"{vocab_file} with {model.get_piece_size()} pieces has no {', '.join(missing)}; "
            "it does not belong to a checkpoint of this family"
        )


# ---- the first generation ----

END_OF_QUESTION, END_OF_ANSWER = "<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>"
# Who speaks is plain text, each with its leading space.
USER_OPENING, BOT_OPENING = " <|User|>:", " <|Bot|>:"


def end_mark(version: str) -> str:
    """The piece that ends an answer in a version."""
    return END_OF_ANSWER if version == "1.0" else END_OF_TURN


# What surrounds a system text.
SYSTEM_OPENING, SYSTEM_END = "meta instruction\n", "\nconversation\n"


def _part_of_first_turn(opening: str, end: str) -> str:
    """The template of a message's content between what opens and ends it."""
    content = TURNS_TEMPLATE[
        TURNS_TEMPLATE.index("{%- if message['content'] is string") : TURNS_TEMPLATE.index(
            "{{- '" + END_OF_TURN
        )
    ]
    return "{{- '" + _escaped(opening) + "' }}" + content + "{{- '" + _escaped(end) + "' }}"


def _escaped(text: str) -> str:
    return text.replace("\n", "\\n")


FIRST_TURNS_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}" + _part_of_first_turn(SYSTEM_OPENING, SYSTEM_END) + ""
    "{%- elif message['role'] == 'user' %}" + _part_of_first_turn(USER_OPENING, f"\n{END_OF_QUESTION}") + ""
    "{%- else %}" + _part_of_first_turn(BOT_OPENING, END_OF_ANSWER) + "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '" + BOT_OPENING + "' }}{%- endif %}"
)


def tokenizer_class(version: str) -> type["InternLMXComposer2Tokenizer"]:
    """The class of a version's tokenizer."""
    return InternLMXComposerTokenizer if version == "1.0" else InternLMXComposer2Tokenizer


class InternLMXComposerTokenizer(InternLMXComposer2Tokenizer):
    """The tokenizer of the first generation: 103168 pieces, `<TOKENS_UNUSED_0>` ends a question and
    `<TOKENS_UNUSED_1>` an answer.

    As when the checkpoints were published, white space next to `<s>`, `</s>` and `<unk>` is dropped.
    Their files switch off the clean-up of decoded text.

    Raises the errors of its base class.
    """

    markup = (END_OF_QUESTION, END_OF_ANSWER)
    template = "{{- bos_token }}" + FIRST_TURNS_TEMPLATE

    def tokenize(self, text: str, **kwargs) -> list[str]:
        """The pieces of a text, without the white space next to special and added tokens."""
        added = "|".join(map(re.escape, self.added_tokens_encoder))
        return super().tokenize(re.sub(rf"\s*({added})\s*", r"\1", text), **kwargs)

    def _parts_of_text(self, tokens: list[str]) -> Iterator[str]:
        """As published, with a space on each side of an added token."""
        special = set(self.special_tokens_map.values())
        added = [token for token in self.added_tokens_encoder if token not in special]
        plain = super()._parts_of_text
        runs = [list(run) for _, run in groupby(tokens, key=lambda token: token if token in added else None)]
        texts = [run if run[0] in added else ["".join(plain(run))] for run in runs]
        yield " ".join(chain.from_iterable(texts))
