"""Checkpoints of the first generation as GGUF: llama.cpp answers as torch and the published code do."""

import json
import re
import shutil

import pytest
import torch
from first_generation import (
    first_tokenizer,
    golden,
    needs_first_tokenizer,
    picture,
    published_fields,
    recipe_state_dict,
    tiny_first,
    write_first,
)
from packers import pack_checkpoint
from PIL import Image

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import llama_cpp  # noqa: E402
from finetune_helpers import save_model  # noqa: E402
from internlm_xcomposer2 import InternLMXComposerForCausalLM, InternLMXComposerTokenizer, from_gguf  # noqa: E402
from internlm_xcomposer2.ixc2.gguf import export  # noqa: E402
from internlm_xcomposer2.ixc2.main import main  # noqa: E402
from test_gguf import Counter  # noqa: E402

GREEDY = {"num_beams": 1, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def golden_llama(tmp_path_factory):
    """The goldens' checkpoint in float32, run by llama.cpp. Shared: it has one context."""
    folder = tmp_path_factory.mktemp("golden")
    export(write_first(folder / "source"), folder / "target", "f32")
    return from_gguf(folder / "target", n_threads=1)


@pytest.fixture(scope="module")
def tiny():
    return tiny_first(internlm_lora={"lora_r": 4, "lora_alpha": 8}, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "source"
    save_model(tiny, tiny.tokenizer, "", folder)
    return folder


@pytest.fixture(scope="module")
def target(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "target"
    export(source, folder, "f32")
    return folder


@pytest.fixture(scope="module")
def llama(target):
    return from_gguf(target, n_threads=1)


@pytest.fixture
def image():
    return Image.linear_gradient("L").resize((70, 50)).convert("RGB")


# ---- the published answers ----


@needs_first_tokenizer
@pytest.mark.parametrize("name", ["single_small", "single_photo_zh", "text_none"])
def test_numbers_and_answers_of_the_original(golden_llama, name, monkeypatch):
    case, tensors = golden(name)
    path = picture(case["call"]["image"])
    if path:
        rows = golden_llama.encode_img(path)[0]
        torch.testing.assert_close(rows, tensors["img0_embeds"], rtol=0, atol=2e-5)
    counter = Counter(golden_llama.decoder, monkeypatch)
    for expected in case["generations"]:
        if expected["num_beams"] == 1:
            settings = {"repetition_penalty": expected["repetition_penalty"], "max_new_tokens": 32}
            assert golden_llama.generate(case["call"]["text"], path, **settings) == expected["response"]
            found, wanted = counter.logits.topk(5), case["last_top5"]
            assert found.indices.tolist() == [token for token, _ in wanted]
            assert found.values.tolist() == pytest.approx([score for _, score in wanted], abs=2e-4)


@needs_first_tokenizer
@pytest.mark.parametrize("name", ["two_turns", "three_turns_two_images"])
def test_later_turns_are_those_of_torch(golden_llama, name, tmp_path):
    model = InternLMXComposerForCausalLM.from_pretrained(write_first(tmp_path)).eval()
    model.tokenizer = golden_llama.tokenizer
    case, _ = golden(name)
    ours = theirs = None
    for turn in case["turns"]:
        path = picture(turn["image"])
        answer, theirs = model.chat(turn["text"], path, theirs, **GREEDY)
        assert golden_llama.chat(turn["text"], path, ours, **GREEDY)[0] == answer
        _, ours = golden_llama.chat(turn["text"], path, ours, **GREEDY)


@needs_first_tokenizer
def test_packed_weights_with_biases_are_unpacked(tmp_path):
    weights, plain = pack_checkpoint(
        recipe_state_dict(lora=False), "gptq", group_size=32, suffix="", symmetric=(".weight",)
    )
    write_first(tmp_path / "packed", lora=False, state_dict=weights)
    says = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "quant_method": "gptq"}
    fields = json.dumps({**published_fields(lora=False), "quantization_config": says})
    (tmp_path / "packed" / "config.json").write_text(fields)
    write_first(tmp_path / "plain", lora=False, state_dict=plain)
    export(tmp_path / "packed", tmp_path / "target", "f32")
    expected = InternLMXComposerForCausalLM.from_pretrained(tmp_path / "plain", dtype="float32").eval()
    expected.tokenizer = InternLMXComposerTokenizer(str(first_tokenizer()))
    found = from_gguf(tmp_path / "target", n_threads=1)
    assert found.chat("Hello.", **GREEDY)[0] == expected.chat("Hello.", **GREEDY)[0]


@needs_first_tokenizer
def test_plain_llama_cpp_reads_the_file_as_text(golden_llama, tmp_path):
    export(write_first(tmp_path / "source"), tmp_path / "target", "q8_0")
    llm = llama_cpp.Llama(str(tmp_path / "target" / "decoder.gguf"), vocab_only=True, verbose=False)
    text = " <|User|>:Who are you? 你好\n<TOKENS_UNUSED_0> <|Bot|>:"
    ids = llm.tokenize(text.encode(), add_bos=True, special=True)
    assert ids == golden_llama.tokenizer(text)["input_ids"]


# ---- the methods ----


def test_every_way_to_ask_answers_as_with_torch(llama, tiny, image):
    for question, given in (("what is it", image), ("who", None), ("which", [image, image])):
        assert llama.chat(question, given, **GREEDY)[0] == tiny.chat(question, given, **GREEDY)[0]
        assert llama.generate(question, given, max_new_tokens=12) == tiny.generate(question, given, **GREEDY)
    questions, images = ["what is it", "who"], [image, None]
    answers = [answer for answer, _ in tiny.batch_chat(questions, images, **GREEDY)]
    assert [answer for answer, _ in llama.batch_chat(questions, images, max_new_tokens=12)] == answers
    with llama.chat_stream("what is it", image, max_new_tokens=12) as stream:
        assert "".join(stream) == answers[0].rstrip("\ufffd")  # an unfinished character is never shown
    sampled = {"do_sample": True, "top_k": 5, "num_beams": 1, "max_new_tokens": 12}
    torch.manual_seed(1)
    expected = tiny.chat("who", **sampled)[0]
    torch.manual_seed(1)
    assert llama.chat("who", **sampled)[0] == expected


def test_later_turns_compute_only_what_is_new(llama, image, monkeypatch):
    _, history = llama.chat("what is it", image, **GREEDY)
    counter = Counter(llama.decoder, monkeypatch)
    llama.chat("what is it", image, **GREEDY)
    assert (counter.pictures, counter.text) == (0, 1)  # the last token gives the logits
    llama.chat("and now", image, history, **GREEDY)
    assert counter.pictures == 2 * llama.config.tokens_per_square  # earlier turns are written in another form


def test_an_article_is_composed_with_pictures(llama, tiny, image):
    settings = {"max_new_tokens": 20, "num_beams": 1, "fill_spots": True}
    pictures = [(number, Image.new("RGB", (40, 30), (90 * number, 9, 9))) for number in range(3)]
    ours, theirs = (
        model.compose("cats", source=lambda *_: pictures, num_pictures=1, **settings)
        for model in (llama, tiny)
    )
    assert ours.lines == theirs.lines
    assert [p.caption for p in ours.pictures.values()] == [p.caption for p in theirs.pictures.values()]
    assert [p.choice for p in ours.pictures.values()] == [p.choice for p in theirs.pictures.values()]
    del settings["num_beams"]
    assert llama.compose("cats", source=lambda *_: pictures, num_pictures=1, **settings) == ours


@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_0"])
def test_other_types_answer_and_leave_the_pictures_alone(source, llama, image, tmp_path, capsys, type):
    assert main(["gguf", str(source), str(tmp_path / "target"), "--type", type]) == 0
    assert "from_gguf" in capsys.readouterr().out
    model = from_gguf(tmp_path / "target", n_threads=1)
    assert torch.equal(model.encode_img(image), llama.encode_img(image))
    assert model.chat("what is it", image, max_new_tokens=4)[0]
    fields = json.loads((tmp_path / "target" / "config.json").read_text())
    assert fields["internlm_lora"] is None and not (tmp_path / "target" / "plora.gguf").exists()
    assert main(["gguf", str(source), str(tmp_path / "target"), "--type", type]) == 0  # all is in place


def test_what_llama_cpp_has_not_is_refused(llama, target, tmp_path):
    with pytest.raises(ValueError, match="num_beams is 3; pass num_beams=1"):
        llama.chat("who", num_beams=3)
    with pytest.raises(TypeError, match="answers a text, not a Tensor"):
        llama.generate(torch.ones(1, 4))
    for call in (lambda: llama.encode_text("who"), lambda: llama.embed_samples({"text_input": ["who"]})):
        with pytest.raises(NotImplementedError, match="load the checkpoint with torch"):
            call()
    with pytest.raises(ValueError, match=re.escape("needs sft, dpo, but this checkpoint has none")):
        from_gguf(target, adapters=("write",))
    broken = shutil.copytree(target, tmp_path / "broken")
    (broken / "vision.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no vision.safetensors; write such a directory"):
        from_gguf(broken)


def test_it_is_not_served(target, capsys):
    assert main(["serve", str(target)]) == 1
    assert "first generation, which ixc2 serve doesn't know" in capsys.readouterr().err
