"""The tokenizer of the first generation: published ids and decodings, added tokens, saving and errors."""

import json
import shutil

import pytest
from first_generation import first_tokenizer, golden, needs_first_tokenizer, small_vocabulary
from internlm_xcomposer2 import InternLMXComposerTokenizer
from internlm_xcomposer2.tokenization_internlm_xcomposer2 import encode_text, markup_of
from test_tokenization import MARKUP, train_model
from transformers import AutoTokenizer


@pytest.fixture(scope="module", params=["chat", "vl"])
def published(request, tmp_path_factory) -> InternLMXComposerTokenizer:
    """The tokenizers of both published kinds, as their files are."""
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copyfile(first_tokenizer(), folder / "tokenizer.model")
    (folder / "config.json").write_text(json.dumps({"model_type": "InternLMXComposer"}))
    if request.param == "vl":
        recorded, _ = golden("tokenizer")
        (folder / "added_tokens.json").write_text(json.dumps(recorded["added_vl"]))
    return AutoTokenizer.from_pretrained(folder)


@needs_first_tokenizer
def test_ids_and_texts_are_the_published_ones(published):
    recorded, _ = golden("tokenizer")
    is_vl = len(published) == recorded["length_vl"]
    assert len(published) == recorded["length_vl" if is_vl else "length"]
    specials = {name: getattr(published, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    assert specials == {name: recorded[name] for name in specials}
    for index, piece in recorded["pieces"].items():
        assert published.convert_ids_to_tokens(int(index)) == piece
    for case in recorded["cases_vl" if is_vl else "cases"]:
        ids = published(case["text"])["input_ids"]
        plain = published(case["text"], add_special_tokens=False)["input_ids"]
        assert (ids, plain) == (case["ids"], case["ids_no_special"]), case["text"]
        assert published.decode(ids) == case["decoded"], case["text"]
        assert published.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"], case["text"]
        assert published.decode(plain) == case["decoded_no_special"], case["text"]


@needs_first_tokenizer
def test_it_is_saved_and_comes_back(published, tmp_path):
    published.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is InternLMXComposerTokenizer and len(again) == len(published)
    text = " <|User|>:a <ITG_TOKEN> b\n<TOKENS_UNUSED_0> <|Bot|>: 敦煌<TOKENS_UNUSED_1> </s>"
    ids = published(text)["input_ids"]
    assert again(text)["input_ids"] == ids and again.decode(ids) == published.decode(ids)


@needs_first_tokenizer
def test_added_tokens_are_markup_that_can_be_hidden(published):
    marks = ["<TOKENS_UNUSED_0>", "</s>", *published.get_added_vocab()]
    for mark in marks:
        hidden = markup_of(published).hide(f"say {mark} now")
        ids = encode_text(published, hidden, add_special_tokens=False)
        assert published.convert_tokens_to_ids(mark) not in ids
        assert published.decode(ids) == f"say {mark} now"


def test_a_vocabulary_of_the_second_generation_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_model(MARKUP))
    with pytest.raises(ValueError, match="has no <TOKENS_UNUSED_0>, <TOKENS_UNUSED_1>"):
        InternLMXComposerTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(small_vocabulary())
    tokenizer = InternLMXComposerTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("a <TOKENS_UNUSED_1> </s>", add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<TOKENS_UNUSED_1>")
    assert ids[-2:] == [end, tokenizer.eos_token_id]
