"""The tokenizer: published ids and decodings, the markup of turns, loading, saving and clear errors."""

import copy
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from helpers import golden_directory, needs_published_tokenizer, published_tokenizer
from internlm_xcomposer2.tokenization_internlm_xcomposer2 import InternLMXComposer2Tokenizer
from transformers import AutoTokenizer

ROOT = Path(__file__).parent.parent
MARKUP = ["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"]
MODULES = ["tokenization_internlm_xcomposer2.py", "tokenization_internlm2.py", "files_internlm_xcomposer2.py"]
QUESTION = [{"role": "user", "content": "hi"}]


def train_model(pieces: list[str]) -> bytes:
    """A byte-level toy vocabulary that treats text as the published one does."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, this is a small text for a small model", "user assistant"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        pad_id=-1,
        user_defined_symbols=pieces,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our root modules next to a toy tokenizer.model and a configuration in the published style."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in MODULES:
        shutil.copy(ROOT / name, folder)
    (folder / "tokenizer.model").write_bytes(train_model(MARKUP))
    write_config(folder, "tokenization_internlm_xcomposer2.InternLMXComposer2Tokenizer")
    return folder


@pytest.fixture
def tokenizer(directory: Path) -> InternLMXComposer2Tokenizer:
    return InternLMXComposer2Tokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def published() -> InternLMXComposer2Tokenizer:
    return InternLMXComposer2Tokenizer(published_tokenizer())


def write_config(folder: Path, reference: str) -> None:
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "auto_map": {"AutoTokenizer": [reference, None]},
        "tokenizer_class": reference.split(".")[1],
        "added_tokens_decoder": {
            str(index): {"content": content, **special}
            for index, content in enumerate(["<unk>", "<s>", "</s>"])
        },
        "additional_special_tokens": [],
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "decode_with_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def golden() -> dict:
    return json.loads((golden_directory() / "tokenizer.json").read_text())


# The published vocabulary


@needs_published_tokenizer
@pytest.mark.parametrize("row", golden()["rows"], ids=lambda row: repr(row["text"])[:30])
def test_published_rows(published, row):
    assert published(row["text"]).input_ids == row["ids"]
    assert published(row["text"], add_special_tokens=False).input_ids == row["ids_nobos"]
    assert published.tokenize(row["text"]) == row["tokens"]
    assert published.decode(row["ids"], skip_special_tokens=True) == row["decode_skip"]
    assert published.decode(row["ids"], skip_special_tokens=False) == row["decode_keep"]
    assert published.decode(row["ids_nobos"], skip_special_tokens=True) == row["decode_nobos"]


@needs_published_tokenizer
@pytest.mark.parametrize("row", golden()["decode"], ids=lambda row: str(row["ids"]))
def test_published_decodings(published, row):
    assert published.decode(row["ids"], skip_special_tokens=True) == row["skip"]
    assert published.decode(torch.tensor(row["ids"]), add_special_tokens=False) == row["keep"]


@needs_published_tokenizer
def test_published_facts(published):
    info = golden()["info"]
    assert (published.vocab_size, len(published)) == (info["vocab_size"], info["len"])
    ids = (published.bos_token_id, published.eos_token_id, published.pad_token_id, published.unk_token_id)
    assert ids == (info["bos"], info["eos"], info["pad"], info["unk"])
    assert published.all_special_tokens == info["all_special"]
    assert (published.padding_side, published.truncation_side) == (
        info["padding_side"],
        info["truncation_side"],
    )
    assert str(published.get_added_vocab()) == info["added"]
    assert dict(published(["a b c", "hello"], padding=True)) == info["pad_example"]


@needs_published_tokenizer
def test_published_template(published):
    ids = published.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert ids == [1, 92543, 1008, 364, 6176, 92542, 364, 92543, 525, 11353, 364]


@needs_published_tokenizer
def test_published_vocabulary_grows_at_its_end():
    tokenizer = InternLMXComposer2Tokenizer(published_tokenizer())
    assert tokenizer.add_tokens("<ImageHere>", special_tokens=True) == 1
    assert tokenizer("<ImageHere>").input_ids == [1, 92544]


# Any vocabulary


@pytest.mark.parametrize(
    "text",
    [
        "",
        " a",
        "a ",
        "\n",
        "a\x00b",
        "\t  x",
        "你好",
        "😀 👨‍👩‍👧‍👦",
        "[UNUSED_TOKEN_145]\n",
        "e\u0301",
        "0123 HELLO",
        "\r\n",
    ],
)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids) == f" <s>{text}"


def test_markup_is_matched_whole_and_stays_visible(tokenizer):
    ids = tokenizer("x[UNUSED_TOKEN_145]y", add_special_tokens=False).input_ids
    assert ids[1] == tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_145]") and len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x[UNUSED_TOKEN_145]y"


def test_a_space_precedes_a_run_that_ends_in_a_special_token(tokenizer):
    assert tokenizer.decode(tokenizer("a</s>").input_ids) == " <s> a</s>"
    assert tokenizer.decode([1, 1, 2, 2]) == " <s><s></s></s>"
    assert tokenizer.decode([0]) == " <unk>"


def test_added_tokens_appear_as_they_are(tokenizer):
    size = len(tokenizer)
    assert tokenizer.add_tokens("<ImageHere>", special_tokens=True) == 1
    assert len(tokenizer) == size + 1 and tokenizer.vocab_size == size
    ids = tokenizer("a <ImageHere> b", add_special_tokens=False).input_ids
    assert ids.count(size) == 1
    assert tokenizer.decode(ids) == "a <ImageHere> b"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a  b"


def test_batches_are_padded_with_the_end_token_on_either_side(tokenizer):
    short, long = tokenizer("a").input_ids, tokenizer("a b c").input_ids
    padding = [tokenizer.eos_token_id] * (len(long) - len(short))
    batch = tokenizer(["a", "a b c"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [short + padding, long]
    assert batch.attention_mask.tolist()[0] == [1] * len(short) + [0] * len(padding)
    tokenizer.padding_side = "left"
    assert tokenizer(["a", "a b c"], padding=True).input_ids == [padding + short, long]
    assert tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True) == ["a", "a b c"]


def test_empty_text_gives_integer_tensors(tokenizer):
    assert tokenizer("", return_tensors="pt").input_ids.tolist() == [[tokenizer.bos_token_id]]
    nothing = tokenizer("", return_tensors="pt", add_special_tokens=False).input_ids
    assert nothing.shape == (1, 0)


def test_start_and_end_tokens_are_switched_by_the_constructor(directory):
    tokenizer = InternLMXComposer2Tokenizer(
        directory / "tokenizer.model", add_bos_token=False, add_eos_token=True
    )
    ids = tokenizer("a").input_ids
    assert ids[-1] == tokenizer.eos_token_id and len(ids) == 2
    assert tokenizer.num_special_tokens_to_add() == 1
    assert tokenizer("a", return_special_tokens_mask=True).special_tokens_mask == [0, 1]


# Turns


def test_template_writes_turns(tokenizer):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}, {"type": "video"}]},
        {"role": "assistant", "content": "a"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<s>[UNUSED_TOKEN_146]system\ns[UNUSED_TOKEN_145]\n"
        "[UNUSED_TOKEN_146]user\n<ImageHere>q<ImageHere>[UNUSED_TOKEN_145]\n"
        "[UNUSED_TOKEN_146]assistant\na[UNUSED_TOKEN_145]\n"
    )


def test_template_starts_once_and_opens_the_answer(tokenizer):
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text == "<s>[UNUSED_TOKEN_146]user\nhi[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True).input_ids
    assert ids == tokenizer(text.removeprefix("<s>")).input_ids


def test_template_keeps_leading_and_trailing_spaces(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "\n hi \n"}], tokenize=False)
    assert text == "<s>[UNUSED_TOKEN_146]user\n\n hi \n[UNUSED_TOKEN_145]\n"


def test_template_rejects_unknown_parts(tokenizer):
    with pytest.raises(Exception, match="not audio"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}], tokenize=False)


def test_a_checkpoints_own_template_wins(directory):
    tokenizer = InternLMXComposer2Tokenizer.from_pretrained(directory, chat_template="own")
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False) == "own"


# Loading and saving


@pytest.mark.parametrize(
    "reference",
    [
        "tokenization_internlm_xcomposer2.InternLMXComposer2Tokenizer",
        "tokenization_internlm2.InternLM2Tokenizer",
    ],
)
def test_auto_tokenizer_loads_a_published_directory(directory, tmp_path, tokenizer, reference):
    shutil.copytree(directory, tmp_path / "copy")
    write_config(tmp_path / "copy", reference)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "copy", trust_remote_code=True, use_fast=False)
    assert type(loaded).__name__ == reference.split(".")[1] and not loaded.is_fast
    assert loaded("hello\nworld").input_ids == tokenizer("hello\nworld").input_ids
    assert loaded.all_special_tokens == ["<s>", "</s>", "<unk>"]


def test_saved_tokenizer_is_the_same(directory, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True, padding_side="left")
    tokenizer.add_tokens("<ImageHere>", special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert (tmp_path / "tokenizer.model").read_bytes() == (directory / "tokenizer.model").read_bytes()
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.padding_side == "left"
    assert loaded("a <ImageHere>").input_ids == tokenizer("a <ImageHere>").input_ids
    assert loaded.get_chat_template() == tokenizer.get_chat_template()


def test_vocabulary_is_saved_even_when_its_file_is_gone(directory, tmp_path):
    source = tmp_path / "source.model"
    shutil.copy(directory / "tokenizer.model", source)
    tokenizer = InternLMXComposer2Tokenizer(source)
    source.unlink()
    (saved,) = tokenizer.save_vocabulary(str(tmp_path), filename_prefix="my")
    assert Path(saved).name == "my-tokenizer.model"
    assert InternLMXComposer2Tokenizer(saved).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(NotADirectoryError, match="missing"):
        tokenizer.save_vocabulary(str(tmp_path / "missing"))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_are_equal(tokenizer, clone):
    tokenizer.add_tokens("<ImageHere>", special_tokens=True)
    copied = clone(tokenizer)
    assert copied("hello <ImageHere>").input_ids == tokenizer("hello <ImageHere>").input_ids
    assert copied.decode([1, 5, 2]) == tokenizer.decode([1, 5, 2])


# Errors


def test_missing_vocabulary(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        InternLMXComposer2Tokenizer(tmp_path / "tokenizer.model")
    shutil.copy(directory / "tokenizer_config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        InternLMXComposer2Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "text", "half", "short"])
def test_damaged_vocabulary(directory, tmp_path, damage):
    content = (directory / "tokenizer.model").read_bytes()
    text = b"version https://git-lfs.github.com/spec/v1\n"
    pieces = {"empty": b"", "text": text, "half": content[: len(content) // 2], "short": content[:-1]}
    (tmp_path / "tokenizer.model").write_bytes(pieces[damage])
    with pytest.raises(ValueError, match="tokenizer.model"):
        InternLMXComposer2Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("index", [-1, 320])
def test_unknown_ids_are_rejected(tokenizer, index):
    with pytest.raises(ValueError, match=f"{index} is outside 0..319"):
        tokenizer.decode([1, index])


def test_vocabulary_of_another_family(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_model(["[UNUSED_TOKEN_145]"]))
    with pytest.raises(ValueError, match=r"320 pieces has no \[UNUSED_TOKEN_146\]"):
        InternLMXComposer2Tokenizer.from_pretrained(tmp_path)


# The nano vocabulary in the root


def test_nano_reads_capitals_and_digits_one_by_one():
    tokenizer = InternLMXComposer2Tokenizer.from_pretrained(ROOT)
    assert tokenizer.tokenize("WHATS90210") == list("WHATS90210")
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
