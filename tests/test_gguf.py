"""Checkpoints as GGUF: what `ixc2 gguf` writes, and that llama.cpp answers as the torch model does."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    FAMILIES,
    ROOT,
    call_of,
    content_of,
    flat_config,
    golden_case,
    golden_cases,
    needs_published_tokenizer,
    published_source,
    published_tokenizer,
    published_weights,
    tiny_model,
    write_published,
)
from packers import pack_checkpoint

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import gguf  # noqa: E402
import llama_cpp  # noqa: E402
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, from_gguf  # noqa: E402
from internlm_xcomposer2.cache_internlm_xcomposer2 import ChatHistory  # noqa: E402
from internlm_xcomposer2.ixc2.gguf import export, known_types  # noqa: E402
from internlm_xcomposer2.ixc2.main import main  # noqa: E402
from internlm_xcomposer2.llamacpp import library  # noqa: E402
from internlm_xcomposer2.prompt_internlm_xcomposer2 import batch_inputs, plan_chat  # noqa: E402
from transformers import AutoTokenizer, LogitsProcessor  # noqa: E402

sys.path.insert(0, str(ROOT))

from examples.demo import QUESTIONS  # noqa: E402

GREEDY = {"do_sample": False, "max_new_tokens": 24}
EXAMPLES = ROOT / "examples"
STAR, RING = str(EXAMPLES / "star.png"), str(EXAMPLES / "ring.jpg")


@pytest.fixture(scope="module")
def nano():
    return InternLMXComposer2ForCausalLM.from_pretrained(ROOT).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Type -> nano in that type, written once."""
    folder = tmp_path_factory.mktemp("gguf")

    def get(type: str) -> Path:
        if not (folder / type).exists():
            export(ROOT, folder / type, type)
        return folder / type

    return get


@pytest.fixture(scope="module")
def llama(exported):
    """Nano in float32, run by llama.cpp. Shared: it has one context, which every call changes."""
    return from_gguf(exported("f32"), n_threads=1)


@torch.no_grad()
def logits_of_prompt(model, prompt, mode="base") -> torch.Tensor:
    """(vocabulary,) logits after a prompt, by llama.cpp."""
    model._clear()
    return torch.from_numpy(model._prefill(prompt, 0, 0, mode))


@torch.no_grad()
def torch_logits_of_prompt(model, prompt, mode="base") -> torch.Tensor:
    inputs = batch_inputs(model.config, [prompt], font=model.font)
    inputs.pop("penalise_prompt", None)
    return model(**inputs, infer_mode=mode, logits_to_keep=1).logits[0, -1]


class Counter:
    """Counts the tokens of prompts that a decoder is given, and keeps the logits after the last one."""

    def __init__(self, decoder, monkeypatch) -> None:
        self.pictures = self.text = 0
        prefill = decoder.prefill

        def counting(content, *args):
            if isinstance(content, np.ndarray):
                self.pictures += len(content)
            else:
                self.text += len(content)
            self.logits = torch.from_numpy(prefill(content, *args))
            return self.logits.numpy().copy()

        monkeypatch.setattr(decoder, "prefill", counting)


# ---- the same answers ----


@pytest.mark.parametrize(("names", "question", "hd_num"), QUESTIONS)
def test_nano_answers_as_with_torch(names, question, hd_num, nano, llama, tokenizer):
    paths = [str(EXAMPLES / name) for name in names]
    expected, _ = nano.chat(tokenizer, question, paths, hd_num, **GREEDY)
    assert llama.chat(tokenizer, question, paths, hd_num, **GREEDY)[0] == expected
    prompt = plan_chat(nano.config, tokenizer, question, paths, hd_num)
    close = {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(logits_of_prompt(llama, prompt), torch_logits_of_prompt(nano, prompt), **close)


def test_text_alone_and_the_published_form(nano, llama, tokenizer):
    for image in ((), None):
        expected, _ = nano.chat(tokenizer, "Who are you?", image, **GREEDY)
        assert llama.chat(tokenizer, "Who are you?", image, **GREEDY)[0] == expected


def test_partial_lora_acts_on_pictures_only(nano, llama, tokenizer, monkeypatch):
    prompt = plan_chat(nano.config, tokenizer, "What shape is the object?", STAR, 1)
    right = torch_logits_of_prompt(nano, prompt)
    use = llama.decoder.use
    monkeypatch.setattr(llama.decoder, "use", lambda names: use([]))
    off = (logits_of_prompt(llama, prompt) - right).abs().max()
    monkeypatch.setattr(llama.decoder, "use", lambda names: use(["pictures"]))
    everywhere = (logits_of_prompt(llama, prompt) - right).abs().max()
    assert off > 0.1 and everywhere > 0.1


@pytest.mark.parametrize("mode", ["write", "web"])
def test_task_adapters_act_on_text_and_pictures(mode, nano, llama, tokenizer):
    prompt = plan_chat(nano.config, tokenizer, "A page for a bakery.", STAR, 1)
    base, right = (torch_logits_of_prompt(nano, prompt, which) for which in ("base", mode))
    torch.testing.assert_close(logits_of_prompt(llama, prompt, mode), right, rtol=0, atol=1e-3)
    assert (base - right).abs().max() > 0.1


def test_articles_and_pages_are_those_of_torch(nano, llama, tokenizer, tmp_path):
    nano.tokenizer = tokenizer
    greedy = {"do_sample": False, "max_new_tokens": 48}
    article = {"inst": "Write a travel note.", "image": [STAR], **greedy}
    assert llama.write_artical(**article) == nano.write_artical(**article)
    (tmp_path / "resume.md").write_text("# Ann\n\nBaker")
    pages = {**greedy, "num_beams": 1, "save": False}
    for method, arguments in (
        ("write_webpage", ("A page for a bakery.",)),
        ("resume_2_webpage", (str(tmp_path / "resume.md"),)),
        ("screen_2_webpage", ("", [STAR])),
    ):
        expected = getattr(nano, method)(*arguments, **pages)
        assert getattr(llama, method)(*arguments, **pages) == expected
        del pages["num_beams"]  # one is the default here
        assert getattr(llama, method)(*arguments, **pages) == expected
        pages["num_beams"] = 1


def test_sampling_draws_as_with_torch(nano, llama, tokenizer):
    nano.tokenizer = tokenizer
    settings = {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2, "seed": 3}
    article = {"inst": "Write a travel note.", "max_new_tokens": 32, "infer_mode": "base", **settings}
    assert llama.write_artical(**article) == nano.write_artical(**article)
    assert llama.write_artical(**article) != llama.write_artical(**{**article, "seed": 4})
    article |= {"min_p": 0.2, "top_k": 0}
    assert llama.write_artical(**article) == nano.write_artical(**article)


def test_the_penalty_counts_new_tokens(nano, llama, tokenizer):
    greedy = {**GREEDY, "repetition_penalty": 5.0}
    for image in (STAR, None):  # and with None those of the prompt, as published
        expected, _ = nano.chat(tokenizer, "What is a star star star?", image, **greedy)
        assert llama.chat(tokenizer, "What is a star star star?", image, **greedy)[0] == expected


def test_a_batch_answers_as_one_by_one(nano, llama, tokenizer):
    queries = ["What shape is the object?", "Who are you?", "What colour is the object?"] * 7
    images = [STAR, None, [RING]] * 7
    _, history = nano.chat(tokenizer, "What shape is it?", STAR, **GREEDY)
    histories = [(), (), ()] * 6 + [history, (), ()]
    expected = nano.batch_chat(tokenizer, queries, images, 1, histories, **GREEDY)
    found = llama.batch_chat(tokenizer, queries, images, 1, histories, **GREEDY)
    assert found == expected and len(found) > llama.decoder.num_sequences


# ---- turns and streams ----


def test_later_turns_compute_only_what_is_new(nano, llama, tokenizer, monkeypatch):
    questions = ["What shape is the object?", "What colour is it?", "What shape is the object?"]
    counts, mine, theirs = [], [], []
    for question in questions:
        with monkeypatch.context() as patch:
            counter = Counter(llama.decoder, patch)
            answer, mine = llama.chat(tokenizer, question, STAR, history=mine, **GREEDY)
        counts.append((counter.pictures, counter.text))
        expected, theirs = nano.chat(tokenizer, question, STAR, history=theirs, **GREEDY)
        assert answer == expected
    assert mine == theirs and isinstance(mine, ChatHistory)
    new = len(tokenizer(f"{questions[1]}")["input_ids"])
    assert counts[0][0] == nano.num_image_tokens(1, 1)
    assert [pictures for pictures, _ in counts[1:]] == [0, 0]
    assert all(text < new + 20 for _, text in counts[1:])


def test_what_differs_is_computed_again(nano, llama, tokenizer, monkeypatch):
    llama.chat(tokenizer, "What shape is the object?", STAR, **GREEDY)
    counter = Counter(llama.decoder, monkeypatch)
    for question, image, reuse, pictures in (
        ("What colour is the object?", STAR, True, 0),  # another question about the same picture
        ("What colour is the object?", RING, True, 41),
        ("What colour is the object?", RING, False, 41),
    ):
        counter.pictures = 0
        expected, _ = nano.chat(tokenizer, question, image, 1, **GREEDY)
        assert llama.chat(tokenizer, question, image, 1, reuse=reuse, **GREEDY)[0] == expected
        assert counter.pictures == pictures


def test_modes_share_nothing_in_the_context(nano, llama, tokenizer):
    for mode in ("base", "web", "base"):
        settings = {**GREEDY, "infer_mode": mode}
        expected, _ = nano.chat(tokenizer, "A page for a bakery.", STAR, 1, **settings)
        assert llama.chat(tokenizer, "A page for a bakery.", STAR, 1, **settings)[0] == expected


def test_streams(nano, llama, tokenizer):
    question = "What shape is the object?"
    expected, history = nano.chat(tokenizer, question, STAR, **GREEDY)
    stream = llama.chat_stream(tokenizer, question, STAR, **GREEDY)
    assert "".join(stream) == expected and stream.history == history
    so_far = [text for text, _ in llama.stream_chat(tokenizer, question, STAR, **GREEDY)]
    assert so_far[0] == "" and so_far[-1] == expected


def test_a_closed_stream_stops_and_leaves_the_context_usable(nano, llama, tokenizer):
    endless = {"do_sample": False, "max_new_tokens": 400, "eos_token_id": None}
    with llama.chat_stream(tokenizer, "Who are you?", **endless) as stream:
        next(stream)
    assert len(tokenizer(stream.response)["input_ids"]) < 400
    expected, _ = nano.chat(tokenizer, "What shape is the object?", STAR, **GREEDY)
    assert llama.chat(tokenizer, "What shape is the object?", STAR, **GREEDY)[0] == expected


def test_a_streamer_gets_the_ids_without_the_end(llama, tokenizer):
    class Collector:
        ids, ended = [], False

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ended = True

    collector = Collector()
    answer, _ = llama.chat(tokenizer, "What shape is the object?", STAR, streamer=collector, **GREEDY)
    assert tokenizer.decode(collector.ids) == answer and collector.ended


def test_an_answer_ends_where_the_context_does(exported, tokenizer, caplog):
    small = from_gguf(exported("f32"), n_ctx=256, n_threads=1)
    settings = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 1000}
    counted = []

    class Collector:
        def put(self, value):
            counted.extend(value.flatten().tolist())

        def end(self):
            pass

    small.chat(tokenizer, "Who are you?", streamer=Collector(), **settings)
    prompt = plan_chat(small.config, tokenizer, "Who are you?", ())
    assert len(counted) == 256 - len(prompt.ids) + 1
    again = from_gguf(exported("f32"), n_ctx=4096, n_threads=1)
    more = []
    counted, kept = more, list(counted)
    again.chat(tokenizer, "Who are you?", streamer=Collector(), **{**settings, "max_new_tokens": len(kept)})
    assert more == kept  # up to its last token, a full context is a context


def test_an_article_is_composed_with_pictures(nano, llama, tokenizer):
    settings = {"tokenizer": tokenizer, "do_sample": False, "max_new_tokens": 60, "reuse": False}
    given = {"instruction": "Write a short article about TIGER.", "images": [STAR, RING], "num_pictures": 1}
    assert llama.compose(**given, **settings) == nano.compose(**given, **settings)


def test_the_terminal_asks_it(exported, capsys):
    command = ["ask", STAR, "What shape is the object?", "--model", str(exported("f32"))]
    assert main(command) == 0
    assert "star" in capsys.readouterr().out
    assert main([*command, "--backend", "torch"]) == 1


# ---- goldens ----


@pytest.fixture(scope="module")
def family_llama(checkpoint, tmp_path_factory):
    """Family and type -> its golden checkpoint in that type, run by llama.cpp."""
    folder, loaded = tmp_path_factory.mktemp("families"), {}

    def get(family: str, type: str):
        if (family, type) not in loaded:
            target = folder / type / family
            export(checkpoint(family), target, type, tokenizer=published_tokenizer())
            loaded[family, type] = from_gguf(target, n_threads=1)
        return loaded[family, type]

    return get


@needs_published_tokenizer
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_and_answers_of_the_original(family, family_llama, monkeypatch):
    model = family_llama(family, "f32")
    counter = Counter(model.decoder, monkeypatch)
    for name in golden_cases(family):
        case, tensors = golden_case(family, name)
        for golden in case["generations"]:
            if golden["num_beams"] > 1:
                continue
            response, history = model.chat(
                model.tokenizer,
                **call_of(case),
                do_sample=False,
                repetition_penalty=golden["repetition_penalty"],
                max_new_tokens=32,
                reuse=False,
            )
            assert response == golden["response"], name
            assert [list(turn) for turn in history] == golden["history_out"]
            expected = tensors["logits_last"].flatten()
            torch.testing.assert_close(counter.logits, expected, rtol=0, atol=1e-3)


class Scores(LogitsProcessor):
    """Keeps the scores that each token of an answer is chosen by."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores[0].float())
        return scores


@needs_published_tokenizer
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_gives_the_tokens_of_the_original(family, family_llama, monkeypatch):
    """Up to where two are as likely: weights in f16 move a random model's logits by a few hundredths."""
    model, moved = family_llama(family, "f16"), 5e-2
    counter, num_same, num_all = Counter(model.decoder, monkeypatch), 0, 0
    for name in golden_cases(family):
        case, tensors = golden_case(family, name)
        for golden in case["generations"]:
            if golden["num_beams"] > 1:
                continue
            scores, expected = Scores(), golden["new_tokens"]
            settings = {
                "do_sample": False,
                "max_new_tokens": 32,
                "reuse": False,
                "logits_processor": [scores],
            }
            settings["repetition_penalty"] = golden["repetition_penalty"]
            model.chat(model.tokenizer, **call_of(case), **settings)
            logits = tensors["logits_last"].flatten()
            torch.testing.assert_close(counter.logits, logits, rtol=0, atol=moved)
            pairs = list(zip(scores.steps, expected, strict=False))
            first = next((i for i, (step, id) in enumerate(pairs) if step.argmax() != id), len(expected))
            num_same, num_all = num_same + first, num_all + len(expected)
            if first < len(expected):
                step, id = pairs[first]
                assert step.max() - step[id] < 2 * moved, f"{name}: token {first} is another"
    assert num_same > 0.9 * num_all


# ---- what is exported ----


def types_in(path: Path) -> dict[str, str]:
    """The type of each tensor of a GGUF file, by name."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_export_leaves_the_source_alone_and_does_nothing_twice(tmp_path, capsys):
    published_source(tmp_path / "source")
    before = content_of(tmp_path / "source")
    command = ["gguf", str(tmp_path / "source"), str(tmp_path / "target"), "--type", "q8_0"]
    assert main(command) == 0
    assert "wrote" in capsys.readouterr().out
    first = content_of(tmp_path / "target")
    assert {"decoder.gguf", "plora.gguf", "vision.safetensors", "config.json", "tokenizer.model"} <= set(
        first
    )
    assert not {"write.gguf", "web.gguf", "unquantised.gguf"} & set(first)
    assert main(command) == 0
    assert "everything is in place" in capsys.readouterr().out
    assert content_of(tmp_path / "target") == first and content_of(tmp_path / "source") == before
    (tmp_path / "target" / "plora.gguf").unlink()
    assert main(command) == 0
    assert "wrote" in capsys.readouterr().out
    assert from_gguf(tmp_path / "target").config.version == "2.5"
    assert main([*command[:-1], "f16"]) == 0
    assert types_in(tmp_path / "target" / "decoder.gguf")["output.weight"] == "F16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    published_source(tmp_path / "source")
    monkeypatch.setattr("internlm_xcomposer2.ixc2.gguf._quantise", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(tmp_path / "source", tmp_path / "target", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_rows_that_a_type_can_t_hold_fall_back_and_are_listed(exported):
    done = export(ROOT, exported("q4_k_m"), "q4_k_m")
    assert "decoder.gguf: blk.*.ffn_down.weight has rows of 384" in " ".join(done.fallbacks)
    assert (
        "plora.gguf: blk.*.attn_q.weight.lora_b has rows of 8 and is stored as f16 (6 of them)"
        in done.fallbacks
    )
    found = types_in(exported("q4_k_m") / "decoder.gguf")
    assert {kind for name, kind in found.items() if "norm" not in name} <= {"Q5_0", "Q8_0"}
    assert not export(ROOT, exported("f16"), "f16").fallbacks
    wide = types_in(exported("q8_0") / "decoder.gguf")
    assert {kind for name, kind in wide.items() if "norm" not in name} == {"Q8_0"}
    assert {kind for name, kind in wide.items() if "norm" in name} == {"F32"}


def test_the_usual_types_are_known():
    assert {"f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"} <= set(known_types())


@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_0", "q4_k_m"])
def test_nano_still_answers_in_other_types(type, exported, tokenizer):
    model = from_gguf(exported(type), n_threads=1)
    assert model.chat(tokenizer, "What shape is the object?", STAR, **GREEDY)[0] == "star"
    assert model.chat(tokenizer, "What colour is the object?", RING, **GREEDY)[0]


@pytest.mark.parametrize("type", ["f32", "f16"])
def test_whole_and_half_precision_give_the_tokens_of_torch(type, nano, exported, tokenizer):
    model = from_gguf(exported(type), n_threads=1)
    for names, question, hd_num in QUESTIONS:
        paths = [str(EXAMPLES / name) for name in names]
        expected, _ = nano.chat(tokenizer, question, paths, hd_num, **GREEDY)
        assert model.chat(tokenizer, question, paths, hd_num, **GREEDY)[0] == expected
    video, mine, theirs = [str(EXAMPLES / "circle.mp4")], [], []
    for question in ("What happens in the video?", "What colour is it?", "How many circles are there?"):
        expected, theirs = nano.chat(tokenizer, question, video, history=theirs, **GREEDY)
        answer, mine = model.chat(tokenizer, question, video, history=mine, **GREEDY)
        assert answer == expected


@pytest.mark.parametrize("kind", ["bin", "sharded", "gptq", "awq"])
def test_sources_of_every_kind(kind, tmp_path, tokenizer):
    model = tiny_model("2.5", intermediate_size=128, hidden_size=64)
    weights, fields = published_weights(model), flat_config(model)
    if kind in ("gptq", "awq"):
        weights, _ = pack_checkpoint(weights, kind, act_order=kind == "gptq")
    options = {"bin": {"kind": "bin"}, "sharded": {"shards": 3}}.get(kind, {})
    write_published(tmp_path / "source", weights, fields, **options)
    shutil.copy(ROOT / "tokenizer.model", tmp_path / "source")
    source = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "source", dtype="float32").eval()
    export(tmp_path / "source", tmp_path / "target", "f32")
    found = from_gguf(tmp_path / "target", n_threads=1)
    prompt = plan_chat(source.config, tokenizer, "What is it?", STAR, 2)
    torch.testing.assert_close(
        logits_of_prompt(found, prompt), torch_logits_of_prompt(source, prompt), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("version", ["2", "2-4khd"])
def test_other_versions_and_a_scale_of_partial_lora(version, tmp_path, tokenizer):
    changes = {"plora_rank": 4, "plora_wqkv_rank": 2, "plora_wqkv_alpha": 6.0, "plora_alpha": 2.0}
    model = tiny_model(version, **changes)
    write_published(tmp_path / "source", published_weights(model), {**flat_config(model), **changes})
    shutil.copy(ROOT / "tokenizer.model", tmp_path / "source")
    export(tmp_path / "source", tmp_path / "target", "f32")
    source = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "source", dtype="float32").eval()
    assert source.config.plora_alpha == 2.0
    found = from_gguf(tmp_path / "target", n_threads=1)
    query = "<ImageHere>What is it?"
    prompt = plan_chat(source.config, tokenizer, query, STAR)
    torch.testing.assert_close(
        logits_of_prompt(found, prompt), torch_logits_of_prompt(source, prompt), rtol=0, atol=1e-3
    )


def test_plain_llama_cpp_reads_the_file_as_text(exported, tokenizer):
    reader = gguf.GGUFReader(exported("f32") / "decoder.gguf")
    field = reader.fields["tokenizer.chat_template"]
    assert bytes(field.parts[field.data[0]]).decode() == tokenizer.chat_template
    plain = llama_cpp.Llama(str(exported("f32") / "decoder.gguf"), vocab_only=True, verbose=False)
    for text in ("Who are you?", "a  star\n<ImageHere>", "第一 é"):
        for special in ("", "[UNUSED_TOKEN_146]user\n"):
            expected = tokenizer(special + text)["input_ids"]
            assert plain.tokenize((special + text).encode(), add_bos=True, special=True) == expected, text
    assert plain.token_eos() == tokenizer.eos_token_id
    marked = "[UNUSED_TOKEN_145]"
    assert tokenizer.convert_tokens_to_ids(marked) not in plain.tokenize(marked.encode(), special=False)


# ---- what is refused ----


def broken(exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported("f32"), tmp_path / "broken"))


def test_a_directory_must_be_complete_and_of_one_export(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a directory; write one with: ixc2 gguf"):
        from_gguf(tmp_path / "nowhere")
    for name in ("decoder.gguf", "plora.gguf", "vision.safetensors", "config.json"):
        folder = broken(exported, tmp_path)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"has no {name}; write such a directory with: ixc2 gguf"):
            from_gguf(folder)
        shutil.rmtree(folder)
    for name in ("decoder.gguf", "plora.gguf", "web.gguf", "vision.safetensors"):
        folder = broken(exported, tmp_path)
        shutil.copy(exported("f16") / name, folder)
        with pytest.raises(ValueError, match="is from another export than decoder.gguf"):
            from_gguf(folder)
        shutil.rmtree(folder)


def test_a_damaged_or_foreign_file_is_named(exported, tmp_path):
    folder = broken(exported, tmp_path)
    for name in ("decoder.gguf", "plora.gguf", "vision.safetensors"):
        whole = (folder / name).read_bytes()
        for content in (whole[: len(whole) // 2], b"nothing", b""):
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=name):
                from_gguf(folder)
        (folder / name).write_bytes(whole)
    published_source(tmp_path / "source")
    export(tmp_path / "source", tmp_path / "other", "f32")
    writer = gguf.GGUFWriter(folder / "decoder.gguf", "llama")
    for field in gguf.GGUFReader(tmp_path / "other" / "decoder.gguf").fields.values():
        if field.name.startswith(("llama.", "tokenizer.")):
            writer.add_key_value(field.name, field.contents(), field.types[0], *field.types[1:])
    for tensor in gguf.GGUFReader(tmp_path / "other" / "decoder.gguf").tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"decoder.gguf in .* is not from this package"):
        from_gguf(folder)


def test_unusable_numbers(exported, llama, tokenizer):
    for arguments, error, message in (
        ({"n_ctx": 0}, ValueError, "n_ctx must be at least 1, not 0"),
        ({"n_ctx": 5000}, ValueError, "trained with 4096 positions"),
        ({"n_threads": "two"}, TypeError, "n_threads must be an int"),
        ({"n_gpu_layers": -2}, ValueError, "n_gpu_layers must be at least -1"),
        ({"kv_type": "int3"}, ValueError, "kv_type must be one of f32, f16"),
        ({"adapters": ["sing"]}, ValueError, "no adapters for the mode 'sing'"),
    ):
        with pytest.raises(error, match=message):
            from_gguf(exported("f32"), **arguments)
    for settings, message in (
        ({"num_beams": 3}, "num_beams is 3; pass num_beams=1"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2"),
        ({"penalty_alpha": 0.6}, "doesn't take penalty_alpha; it takes max_new_tokens"),
        ({"do_sample": True, "top_k": -1}, "top_k"),
        ({"do_sample": True, "min_p": 2.0}, "min_p"),
        ({"infer_mode": "sing"}, "unknown infer_mode 'sing'"),
    ):
        for method in (llama.chat, llama.chat_stream):
            with pytest.raises(ValueError, match=message):
                method(tokenizer, "Who are you?", **{**GREEDY, **settings})
    llama.tokenizer = None
    with pytest.raises(ValueError, match="num_beams is 2"):
        llama.write_webpage("A page.", num_beams=2, save=False, tokenizer=tokenizer)


def test_a_prompt_must_fit_the_context(exported, nano, tokenizer):
    question, picture = "What word is printed in the picture?", str(EXAMPLES / "small.png")
    lengths = [len(plan_chat(nano.config, tokenizer, question, picture, hd_num).ids) for hd_num in (1, 9)]
    small = from_gguf(exported("f32"), n_ctx=lengths[0], n_threads=1)
    needed = rf"has {lengths[1]} tokens, \d+ of them .* holds {lengths[0]}; hd_num=\d would fit"
    with pytest.raises(ValueError, match=needed):
        small.chat(tokenizer, question, picture, 9)
    assert small.chat(tokenizer, question, picture, 1, **GREEDY)[0]
    with pytest.raises(ValueError, match=f"but the context holds {lengths[0]}; shorten the text"):
        small.chat(tokenizer, "word " * 400)


def test_dynamic_ntk_ends_at_the_trained_length(tmp_path):
    published_source(tmp_path / "source", changes={"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    export(tmp_path / "source", tmp_path / "target", "f32")
    assert from_gguf(tmp_path / "target", n_ctx=1024).config.text_config.max_position_embeddings == 1024
    with pytest.raises(ValueError, match=r"n_ctx is 1025, but .* trained with 1024 .*dynamic NTK"):
        from_gguf(tmp_path / "target", n_ctx=1025)


def test_task_adapters_can_be_left_out(exported, tmp_path, tokenizer):
    model = from_gguf(exported("f32"), adapters=["web"], n_threads=1)
    assert model.write_webpage("A page.", tokenizer=tokenizer, max_new_tokens=2, save=False) is not None
    with pytest.raises(ValueError, match="infer_mode 'write' needs the adapters sft, dpo"):
        model.write_artical("A note.", tokenizer=tokenizer)
    folder = broken(exported, tmp_path)
    (folder / "web.gguf").unlink()
    with pytest.raises(ValueError, match="infer_mode 'web' needs the adapters web"):
        from_gguf(folder, n_threads=1).write_webpage("A page.", tokenizer=tokenizer, save=False)


def test_quantised_keys_and_values(exported, tokenizer):
    model = from_gguf(exported("f16"), kv_type="q8_0", n_threads=1)
    assert model.chat(tokenizer, "What shape is the object?", STAR, **GREEDY)[0] == "star"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn' can't be exported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' can't be exported"),
    ],
)
def test_models_that_llama_cpp_doesn_t_compute(changes, message, tmp_path):
    published_source(tmp_path / "source", changes=changes)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "source", tmp_path / "target", "f16")
    assert not (tmp_path / "target").exists()


def test_exports_that_are_refused_write_nothing(tmp_path, monkeypatch, capsys):
    model = published_source(tmp_path / "source")
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    assert main(["gguf", source, target, "--type", "q17"]) == 1
    assert "unknown type 'q17'; llama.cpp's quantiser knows f32, f16" in capsys.readouterr().err
    weights = published_weights(model)
    weights["score.weight"] = weights.pop("output.weight")[:1]
    write_published(tmp_path / "reward", weights, flat_config(model))
    assert main(["gguf", str(tmp_path / "reward"), target]) == 1
    assert "is a reward model" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert main(["gguf", source, str(tmp_path / "full")]) == 1
    assert "holds files that were not exported" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
        assert main(["gguf", source, target]) == 1
    assert "make room" in capsys.readouterr().err
    assert not Path(target).exists() and not Path(f"{target}.partial").exists()


@pytest.mark.parametrize("name", ["llama_cpp", "gguf"])
def test_a_missing_library_says_what_to_install(name, tmp_path, monkeypatch, exported):
    published_source(tmp_path / "source")
    folder = exported("f32")
    monkeypatch.setitem(sys.modules, name, None)
    library.load_library.cache_clear()
    with pytest.raises(ImportError, match="pip install .*gguf.*llama-cpp-python"):
        export(tmp_path / "source", tmp_path / "target", "f16")
    if name == "llama_cpp":
        with pytest.raises(ImportError, match="pip install"):
            from_gguf(folder)
    assert not (tmp_path / "target").exists()
    library.load_library.cache_clear()


# ---- memory ----


PEAK = """
import sys
from pathlib import Path

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

import torch
from internlm_xcomposer2 import from_gguf
from internlm_xcomposer2.ixc2.gguf import export
from internlm_xcomposer2.llamacpp.library import load_gguf, load_library

load_gguf(), load_library()
torch.set_num_threads(1)
before = peak()
export(sys.argv[1], sys.argv[2], "q8_0")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_export_takes_the_memory_of_one_tensor(tmp_path):
    model = tiny_model(
        "2.5", hidden_size=512, num_attention_heads=8, intermediate_size=2048, num_hidden_layers=40
    )
    weights = {name: value.bfloat16() for name, value in published_weights(model).items()}
    total = sum(value.nbytes for value in weights.values())
    write_published(tmp_path / "source", weights, flat_config(model), shards=2)
    shutil.copy(ROOT / "tokenizer.model", tmp_path / "source")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "source"), str(tmp_path / "target")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(result.stdout.splitlines()[-1]) < total / 2 and total > 200e6


# ---- the page about it ----


@pytest.mark.parametrize("page", ["docs/gguf.md", "docs/zh/gguf.md"])
def test_the_examples_of_the_page_print_what_it_shows(page, tmp_path, monkeypatch, capsys):
    text = (ROOT / page).read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if line.startswith("ixc2 gguf . "))
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    _, *options = command.replace(" . ", f" {ROOT} ").split()
    assert main(options) == 0
    blocks = re.findall(r"<!-- gguf -->\n```python\n(.*?)```\n(?:\n```\n(.*?)```\n)?", text, re.DOTALL)
    names: dict = {}
    assert len(blocks) == 2
    for code, output in blocks:
        capsys.readouterr()
        exec(code, names)
        if output:
            assert capsys.readouterr().out == output


def test_the_benchmark_measures_every_type(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    options = ["--size", "tiny", "--repeats", "1", "--same-process", "--threads", "1", "--new-tokens", "3"]
    monkeypatch.setattr(
        sys, "argv", ["gguf_speed.py", *options, "--types", "f32", "q8_0", "--positions", "8"]
    )
    importlib.import_module("gguf_speed").main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["mode"] for row in report["rows"]] == ["f32", "q8_0", "torch float32"]
    for row in report["rows"]:
        assert row["tokens"] == 53 and row["prefill"]["min"] > 0 and row["decode"]["min"] > 0
    first, second = report["rows"][:2]
    assert first["agreement"] == first["among_five"] == 1 and first["error"] == 0 < second["error"] < 0.1
    assert second["file_gb"] < first["file_gb"]
    assert {"python", "decode_of_torch"} < report["ratios"][0].keys()
    for name in ("gguf_speed", "prefill_decode", "common"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_memory_of_writing_and_answering_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gguf_memory = importlib.import_module("gguf_memory")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny = {**gguf_memory.PUBLISHED["1.8b"], **text, "vision_config": vision}
    monkeypatch.setitem(gguf_memory.PUBLISHED, "1.8b", tiny)
    monkeypatch.setattr(gguf_memory, "VOCABULARY", 1000)
    monkeypatch.setattr(
        gguf_memory.common, "measure_apart", lambda function, options, **rest: function(**rest)
    )
    options = ["--layers", "2", "--type", "q8_0", "--n-ctx", "1700", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gguf_memory.py", *options, "--kv-type", "f16"])
    gguf_memory.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    writing, answering = report["rows"]
    assert writing["writing_gb"] > 0 and (tmp_path / "q8_0" / "decoder.gguf").is_file()
    assert 1225 < answering["tokens"] < 1700  # 490 px make 35 x 35 patches
    assert answering["kv_gb"] == round(2 * 2 * 2 * 16 * 2 * 1700 / 1e9, 3)
    assert answering["answering_gb"] >= answering["loading_gb"] >= answering["imports_gb"] > 0
    for name in ("gguf_memory", "common"):
        sys.modules.pop(name, None)
