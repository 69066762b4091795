"""The methods of the first generation: the published ones, streams, batches, histories, and its clients."""

import pytest
import torch
from first_generation import (
    expected_ids,
    first_tokenizer,
    golden,
    needs_first_tokenizer,
    picture,
    small_vocabulary,
    tiny_first,
    write_first,
)
from internlm_xcomposer2 import InternLMXComposerForCausalLM, InternLMXComposerTokenizer
from internlm_xcomposer2.cache_internlm_xcomposer2 import ChatHistory
from internlm_xcomposer2.chat_internlm_xcomposer import (
    EveryBeamEnds,
    Turn,
    past_turn,
    plan_segments,
    prompt_segments,
)
from PIL import Image
from transformers import AutoProcessor, pipeline

SMALL = {"num_beams": 1, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> InternLMXComposerForCausalLM:
    """The goldens' checkpoint with the published tokenizer. Shared: don't change it."""
    directory = write_first(tmp_path_factory.mktemp("first") / "checkpoint")
    loaded = InternLMXComposerForCausalLM.from_pretrained(directory, dtype="float32").eval()
    loaded.tokenizer = InternLMXComposerTokenizer(str(first_tokenizer()))
    return loaded


@pytest.fixture(scope="module")
def tiny() -> InternLMXComposerForCausalLM:
    """A random model with the small vocabulary. Shared: don't change it."""
    return tiny_first()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    Image.linear_gradient("L").resize((70, 50)).convert("RGB").save(path)
    return path


# ---- answers of the published code ----


@needs_first_tokenizer
@pytest.mark.parametrize("name", ["single_small", "single_photo_zh", "text_none"])
def test_generate_gives_the_published_answers(model, name):
    case, _ = golden(name)
    text, path = case["call"]["text"], picture(case["call"]["image"])
    pictures = [] if path is None else list(model.encode_img(path).detach())
    prompt = plan_segments(model.config, prompt_segments(model.tokenizer, text, pictures, []))
    assert prompt.ids == expected_ids(case["segments"], model.config.image_token_id)
    for expected in case["generations"]:
        settings = {key: expected[key] for key in ("num_beams", "repetition_penalty")}
        assert model.generate(text, path, max_new_tokens=32, **settings) == expected["response"]
        assert model.generate(text=text, image=path, max_length=33, **settings) == expected["response"]


@needs_first_tokenizer
@pytest.mark.parametrize("name", ["two_turns", "three_turns_two_images"])
@pytest.mark.parametrize("form", ["turns", "turns without reuse", "embeddings"])
def test_chat_gives_the_published_answers_turn_by_turn(model, name, form):
    case, _ = golden(name)
    history: list | None = None if form.startswith("turns") else []
    for turn in case["turns"]:
        path = picture(turn["image"])
        pictures = [] if path is None else list(model.encode_img(path).detach())
        segments = prompt_segments(model.tokenizer, turn["text"], pictures, history or [])
        for expected in turn["generations"]:
            settings = {key: expected[key] for key in ("num_beams", "repetition_penalty")}
            answer, _ = model.chat(turn["text"], path, history, max_new_tokens=32, **settings)
            assert answer == expected["response"]
        answer, longer = model.chat(
            turn["text"], path, history, reuse=form == "turns", **turn["answer_settings"]
        )
        assert answer == turn["answer"]
        assert (
            plan_segments(model.config, segments).ids.count(1)
            == sum(part[1].count(1) for part in turn["segments"] if part[0] == "text")
            or isinstance(history, list)
            and form == "embeddings"
        )
        if form == "embeddings":
            parts = [
                model.get_input_embeddings()(torch.tensor([part[1]]))
                if part[0] == "text"
                else pictures[0][None]
                for part in turn["history_entry_segments"]
            ]
            history.append(torch.cat(parts, dim=1).detach())
            assert history[-1].shape[1] == turn["history_entry_tokens"]
        else:
            history = longer


@needs_first_tokenizer
@pytest.mark.parametrize("number", [0, 1])
def test_a_beam_search_ends_by_the_published_rule(model, number):
    case, _ = golden("stop_eoa")
    expected = case["generations"][number]
    bias = {tuple(ids): value for ids, value in expected["sequence_bias"]}
    settings = {key: expected[key] for key in ("num_beams", "repetition_penalty")}
    answer = model.generate(case["call"]["text"], max_new_tokens=32, sequence_bias=bias, **settings)
    assert answer == expected["response"]


@needs_first_tokenizer
def test_a_batch_gives_each_question_its_published_answer(model):
    case, _ = golden("batch_left_pad")
    answers = model.batch_chat(case["texts"], num_beams=1, max_new_tokens=24)
    expected = [
        model.tokenizer.decode(ids, skip_special_tokens=True).split("<TOKENS_UNUSED_1>")[0]
        for ids in case["single"]
    ]
    assert [answer for answer, _ in answers] == expected


# ---- pictures and text ----


def test_pictures_are_encoded_under_autocast_to_the_other_half_type(image):
    model = tiny_first().bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
        assert model.encode_img(str(image)).dtype == torch.bfloat16
        assert isinstance(model.generate("a", str(image), **SMALL), str)


def test_published_helpers(tiny):
    assert tiny.wrap_text("a", "b") == " <|User|>:a \n<TOKENS_UNUSED_0> <|Bot|>:b"
    assert tiny.wrap_text("a", add_special=False) == " <|User|>:a \n <|Bot|>:"
    assert (tiny.eoh, tiny.eoa) == ("<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>")
    ids = tiny.tokenizer("word<TOKENS_UNUSED_1>more")["input_ids"]
    assert tiny.decode_text([ids, ids]) == "word"
    assert tiny.encode_img(None) is None
    assert tiny.encode_text("ab", add_special_tokens=True).shape[1] == 1 + tiny.encode_text("ab").shape[1]


def test_pictures_from_any_source_give_the_same_rows(tiny, image):
    with torch.no_grad():
        expected = tiny.encode_img(str(image))
        assert expected.shape == (1, 8, 32)
        for source in (image, image.read_bytes(), Image.open(image)):
            assert torch.equal(tiny.encode_img(source), expected)
        pixels = tiny.vis_processor(Image.open(image))[None]
        assert torch.equal(tiny.encode_img(pixels), expected)
        assert torch.equal(tiny.encode_img([str(image), str(image)])[1:], expected)
    with pytest.raises(ValueError, match=r"56 x 56 px, not \(3, 64, 64\)"):
        tiny.encode_img(torch.zeros(1, 3, 64, 64))


# ---- histories ----


def test_a_history_has_turns_and_reuses_what_was_computed(tiny, image, monkeypatch):
    answer, history = tiny.chat("What is it?", str(image), **SMALL)
    assert isinstance(history, ChatHistory)
    assert (history[0].question, history[0].answer) == ("What is it?", answer)
    second = tiny.chat("And this?", None, history, **SMALL)[1]
    fresh = tiny.chat("Why?", None, list(second), reuse=False, **SMALL)[0]
    computed = []
    run = tiny.run_decoder

    def counting(ids, embeds, *arguments, **kwargs):
        computed.append((ids if embeds is None else embeds).shape[1])
        return run(ids, embeds, *arguments, **kwargs)

    monkeypatch.setattr(tiny, "run_decoder", counting)
    encoded = []
    monkeypatch.setattr(tiny, "get_image_features", lambda *a, **k: encoded.append(1))
    assert tiny.chat("Why?", None, second, **SMALL)[0] == fresh
    past = sum(len(segment) for segment in second[0].segments)
    whole = len(plan_segments(tiny.config, prompt_segments(tiny.tokenizer, "Why?", [], second)).ids)
    assert computed[0] <= whole - past  # the first turn, with its picture, is already there
    assert not encoded


def test_what_is_said_forges_no_markup(tiny):
    mark = tiny.tokenizer.convert_tokens_to_ids("<TOKENS_UNUSED_1>")
    _, history = tiny.chat("a<TOKENS_UNUSED_1>b", **SMALL)
    assert not any(mark in segment for segment in history[0].segments)
    _, history = tiny.chat("a<TOKENS_UNUSED_1>b", allow_markup=True, **SMALL)
    assert mark in history[0].segments[1]
    for generated, counts in (([mark], False), ([tiny.config.image_token_id, mark], True)):
        turn = past_turn(tiny.tokenizer, "a", "x<TOKENS_UNUSED_3>", [], False, generated)
        assert (tiny.config.image_token_id in turn.segments[-1]) == counts


def test_the_list_passed_as_history_is_left_alone(tiny):
    _, history = tiny.chat("a", **SMALL)
    passed = list(history)
    _, longer = tiny.chat("b", None, passed, **SMALL)
    assert len(passed) == 1
    assert len(longer) == 2


@pytest.mark.parametrize("bad", [[("a", "b")], ["a"], [3]])
def test_a_history_of_something_else_is_refused(tiny, bad):
    with pytest.raises(TypeError, match="history must be what chat returned"):
        tiny.chat("a", None, bad)


# ---- streams and batches ----


def test_a_stream_gives_the_answer_and_its_history(tiny, image):
    expected, history = tiny.chat("What?", str(image), **SMALL)
    stream = tiny.chat_stream("What?", str(image), max_new_tokens=6)
    assert "".join(stream) == expected.rstrip("\ufffd")  # half a character is never shown
    assert isinstance(stream.history[0], Turn)
    assert stream.history[0].answer == expected.rstrip("\ufffd")
    assert stream.history.prompt_cache.nbytes == history.prompt_cache.nbytes
    with pytest.raises(ValueError, match="num_beams is 5"):
        tiny.chat_stream("a", num_beams=5)
    with pytest.raises(ValueError, match="has its own streamer"):
        tiny.chat_stream("a", streamer=object())


@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_question_of_a_batch_is_answered_as_alone(tiny, image, num_beams):
    settings = {"num_beams": num_beams, "max_new_tokens": 8}
    _, history = tiny.chat("First?", str(image), **settings)
    questions, images = ["One?", "A longer question?", "Two?"], [None, str(image), None]
    histories = [None, None, history]
    together = tiny.batch_chat(questions, images, histories, **settings)
    for (answer, longer), *asked in zip(together, questions, images, histories, strict=True):
        assert answer == tiny.chat(*asked, **settings)[0]
        assert longer[-1].question == asked[0]
    with pytest.raises(ValueError, match="3 queries but 1 images"):
        tiny.batch_chat(questions, [None])


# ---- where an answer ends ----


def test_the_published_rule_needs_every_beam():
    rule = EveryBeamEnds(num_prompts=2, num_beams=2, stops=[8, 9], eos=2)
    first, second = [8, 2, 8, 5], [9, 8, 9, 9]  # candidates, the best first; those at eos are no beams
    ids = torch.tensor([[0, last] for last in (*first, *second)])
    assert rule(ids).tolist() == [True] * 4 + [False] * 4


def test_each_beam_can_end_at_the_mark(tiny):
    mark = tiny.config.end_token_id
    settings = {"num_beams": 2, "max_new_tokens": 8, "sequence_bias": {(mark,): 8.0}}
    _, history = tiny.chat("a", ends_each_beam=True, **settings)
    assert history.prompt_cache is None or len(history[0].answer) < 8
    given = tiny._settings(tiny.tokenizer, ends_each_beam=True)
    assert mark in given["eos_token_id"]
    assert tiny._settings(tiny.tokenizer)["eos_token_id"] == [2]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an int"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be above 0"),
        ({"infer_mode": "write"}, ValueError, "needs the adapters sft, dpo"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_computed(tiny, settings, error, message, monkeypatch):
    monkeypatch.setattr(tiny, "get_image_features", None)
    with pytest.raises(error, match=message):
        tiny.chat("a", torch.zeros(1, 3, 56, 56), **settings)


def test_a_missing_file_and_a_long_prompt_are_refused(tiny):
    with pytest.raises(FileNotFoundError):
        tiny.chat("a", "nowhere.png")
    with pytest.raises(ValueError, match="the context holds 2048"):
        tiny.chat("word " * 3000)
    other = tiny_first()
    other.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        other.chat("a")


# ---- today's interfaces ----


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """`tiny` as `save_pretrained` writes it, without processor files."""
    directory = tmp_path_factory.mktemp("saved")
    tiny.save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(small_vocabulary())
    return directory


def messages_of(image, text="What is it?"):
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(image)}, {"type": "text", "text": text}],
        }
    ]


def test_the_processor_is_built_from_the_configuration(saved, image):
    processor = AutoProcessor.from_pretrained(saved)
    assert processor.version == "1.0"
    inputs = processor(images=str(image), text=" <|User|>:<ImageHere>a", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 8
    with pytest.raises(ValueError, match="1 texts have 0 <ImageHere> marks but 1 pictures"):
        processor(images=str(image), text="no mark")


def test_the_template_has_the_published_turns(saved, image):
    processor = AutoProcessor.from_pretrained(saved)
    messages = [*messages_of(image), {"role": "assistant", "content": "A ring."}]
    text = processor.apply_chat_template(
        [*messages, {"role": "user", "content": "Sure?"}], add_generation_prompt=True
    )
    system, _, turns = text.partition("conversation\n")
    assert system.startswith("<s>meta instruction\nYou are an AI assistant whose name is 浦语.\n")
    assert turns == (
        " <|User|>:<ImageHere>What is it?\n<TOKENS_UNUSED_0> <|Bot|>:A ring.<TOKENS_UNUSED_1>"
        " <|User|>:Sure?\n<TOKENS_UNUSED_0> <|Bot|>:"
    )
    plain = processor.apply_chat_template(messages, use_meta=False)
    assert plain.startswith("<s> <|User|>:")
    own = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, *messages])
    assert own.startswith("<s>meta instruction\nBe brief.\nconversation\n <|User|>:")


def test_generate_and_the_pipeline_answer_messages(saved, image):
    pipe = pipeline("image-text-to-text", model=str(saved), trust_remote_code=False)
    (answer,) = pipe(text=messages_of(image), max_new_tokens=4, return_full_text=False)
    inputs = pipe.processor.apply_chat_template(
        messages_of(image), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    outputs = pipe.model.generate(**inputs, max_new_tokens=4)
    new = outputs[0, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"] == pipe.processor.decode(new, skip_special_tokens=True)
    assert pipe.model.generation_config.eos_token_id == [2, pipe.model.config.end_token_id]
    assert pipe.model.generation_config.pad_token_id == 2
