"""`chat` and `stream_chat`: ways to call them, prompts, and what is rejected before any computation."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, golden_directory, tiny_model
from internlm_xcomposer2 import InternLMXComposer2Tokenizer
from internlm_xcomposer2.prompt_internlm_xcomposer2 import (
    META_INSTRUCTION,
    batch_inputs,
    encode_prompt,
    format_prompt,
    mark_pictures,
    place_images,
    plan_chat,
    system_text,
)
from PIL import Image

GREEDY = {"do_sample": False, "max_new_tokens": 5}
END, BEGIN = 5, 6  # the markup of the small vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return InternLMXComposer2Tokenizer(str(ROOT / "tokenizer.model"))


@pytest.fixture(scope="module")
def model():
    return tiny_model("2.5")


@pytest.fixture(scope="module")
def picture():
    return Image.open(golden_directory() / "inputs" / "small.png").convert("RGB")


def prompt_ids(model, tokenizer, query="hi", image=(), history=(), meta="", hd_num=None):
    return model.prepare_chat(tokenizer, query, image, hd_num, list(history), meta)["input_ids"][0].tolist()


def test_a_picture_without_a_mark_goes_to_the_front(model, tokenizer, picture):
    history = [("one", "two")]
    ids = prompt_ids(model, tokenizer, "three", picture, history, "system")
    length = ids.count(4)
    assert ids[:1] == [1] and set(ids[1 : 1 + length]) == {4} and length == model.num_image_tokens(3, 4)
    assert (
        ids[1 + length :]
        == tokenizer(format_prompt("three", history, "system"), add_special_tokens=False).input_ids
    )


def test_a_mark_keeps_its_place(model, tokenizer, picture):
    ids = prompt_ids(model, tokenizer, "see <ImageHere> there", picture)
    start = ids.index(4)
    assert tokenizer.decode(ids[1:start]) == "[UNUSED_TOKEN_146]user\nsee "
    assert ids.count(1) == 1


@pytest.mark.parametrize("version", ["2", "2-4khd"])
def test_older_versions_put_bos_before_every_text(version, tokenizer, picture):
    model = tiny_model(version)
    ids = prompt_ids(model, tokenizer, "<ImageHere>what?", str(golden_directory() / "inputs" / "small.png"))
    after = max(i for i, token in enumerate(ids) if token == 4) + 1
    assert ids[0] == 1 and ids[after] == 1 and ids.count(1) == 2
    with pytest.raises(ValueError, match="0 <ImageHere> marks.*1 pictures"):
        prompt_ids(model, tokenizer, "what?", picture)


def test_no_picture_and_an_empty_list_differ_in_bos(model, tokenizer):
    assert prompt_ids(model, tokenizer, image=None)[:3] == [1, 1, BEGIN]
    assert prompt_ids(model, tokenizer, image=[])[:2] == [1, BEGIN]
    assert prompt_ids(tiny_model("2"), tokenizer, image=[])[:3] == [1, 1, BEGIN]


def test_system_text_follows_the_version(tokenizer):
    for version, expected in (("2.5", False), ("2", True), ("2-4khd", True)):
        system = system_text(version, None, META_INSTRUCTION)
        assert bool(system) is expected
    assert system_text("2.5", True, None) == ""


def test_pure_prompt_functions(tokenizer):
    texts = place_images("a<ImageHere>b<ImageHere>", 2, version="2.5")
    assert texts == ["a", "b", ""]
    prompt = encode_prompt(tokenizer, texts, [2, 1], version="2.5", image_token_id=4)
    a, b = (tokenizer(text, add_special_tokens=False).input_ids for text in "ab")
    assert prompt.ids == [1, *a, 4, 4, *b, 4]
    assert prompt.is_image == [False] * (1 + len(a)) + [True] * 2 + [False] * len(b) + [True]


def forms_of(picture: Image.Image, folder: Path):
    """The same picture in every form in which callers keep it."""
    path = folder / "picture.png"
    picture.save(path)
    pixels = np.array(picture)
    import base64

    encoded = base64.b64encode(path.read_bytes()).decode()
    return {
        "path": str(path),
        "pathlib": path,
        "PIL": picture,
        "bytes": path.read_bytes(),
        "file": io.BytesIO(path.read_bytes()),
        "data URI": f"data:image/png;base64,{encoded}",
        "array": pixels,
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1).float() / 255,
        "list": [picture],
        "tuple": (str(path),),
    }


def test_every_form_of_a_picture_gives_the_same_answer(model, tokenizer, picture, tmp_path):
    answers = {
        name: model.chat(tokenizer, "what?", form, **GREEDY)
        for name, form in forms_of(picture, tmp_path).items()
    }
    assert len({response for response, _ in answers.values()}) == 1


@pytest.mark.parametrize("version", ["2", "2-4khd", "2.5"])
def test_forms_of_both_generations(version, tokenizer, picture, tmp_path):
    model, path = tiny_model(version), str(tmp_path / "p.png")
    picture.save(path)
    question = "<ImageHere>what?"
    first, history = model.chat(tokenizer, question, path, **GREEDY)
    assert history == [(question, first)]
    assert model.chat(tokenizer, query=question, image=[path], history=[], **GREEDY)[0] == first
    assert model.chat(tokenizer, question, path, [], **GREEDY)[0] == first  # history as fourth argument
    second, history = model.chat(tokenizer, "and?", path, history=history, **GREEDY)
    assert history == [(question, first), ("and?", second)]
    as_lists = [[question, first]]
    assert model.chat(tokenizer, "and?", path, history=as_lists, **GREEDY)[0] == second


def test_normalised_pixels_are_taken_as_they_are(tokenizer, picture):
    model = tiny_model("2")
    pixels = model.vis_processor(picture)[None]
    expected = model.chat(tokenizer, "<ImageHere>what?", picture, **GREEDY)
    assert model.chat(tokenizer, "<ImageHere>what?", pixels, **GREEDY) == expected
    with pytest.raises(ValueError, match=r"56 x 56.*\(3, 56, 57\)"):
        model.chat(tokenizer, "<ImageHere>what?", torch.rand(1, 3, 56, 57), **GREEDY)


def test_hd_num_defaults_and_wins(tokenizer, picture):
    model = tiny_model("2.5", hd_num=24)
    large = picture.resize((900, 900))
    one, several = prompt_ids(model, tokenizer, "x", large), ["<ImageHere>" * 2, [large, large]]
    assert one.count(4) == model.num_image_tokens(4, 4)
    assert prompt_ids(model, tokenizer, *several).count(4) == 2 * model.num_image_tokens(2, 2)
    assert prompt_ids(model, tokenizer, *several, hd_num=9).count(4) == 2 * model.num_image_tokens(3, 3)
    assert prompt_ids(model, tokenizer, "x", large, hd_num=1).count(4) == model.num_image_tokens(1, 1)


@pytest.mark.parametrize(
    ("questions", "counts", "in_2", "in_25"),
    [
        (["a"], [0], ["a"], ["a"]),
        (["a", "b"], [1, 0], ["<ImageHere>a", "b"], ["a", "b"]),
        (["a"], [2], *[["Image1 <ImageHere>; Image2 <ImageHere>; a"]] * 2),
        (["a", "b"], [1, 1], *[["Image1 <ImageHere>; a", "Image2 <ImageHere>; b"]] * 2),
        (["a <ImageHere>", "b"], [1, 1], *[["a <ImageHere>", "Image2 <ImageHere>; b"]] * 2),
    ],
)
def test_marks_for_pictures(questions, counts, in_2, in_25):
    assert mark_pictures(questions, counts, version="2") == in_2
    assert mark_pictures(questions, counts, version="2.5") == in_25
    with pytest.raises(ValueError, match="1 <ImageHere> marks but came with 2 pictures"):
        mark_pictures(["<ImageHere>"], [2], version="2.5")


def test_a_text_that_spells_the_image_piece_is_not_a_picture(model, tokenizer, picture):
    response, _ = model.chat(tokenizer, "what is [UNUSED_TOKEN_1]?", picture, **GREEDY)
    assert isinstance(response, str)
    assert isinstance(model.chat(tokenizer, "what is [UNUSED_TOKEN_1]?", **GREEDY)[0], str)


def test_a_video_is_one_picture(model, tokenizer):
    frames = [Image.new("RGB", (80, 60), (40 * i, 0, 0)) for i in range(3)]
    from_list = prompt_ids(model, tokenizer, "what?", [frames])
    from_file = prompt_ids(model, tokenizer, "what?", str(golden_directory() / "inputs" / "tall_3s.mp4"))
    assert from_list.count(4) > 0 and from_file.count(4) > 0
    with pytest.raises(ValueError, match="doesn't read videos"):
        prompt_ids(tiny_model("2"), tokenizer, "<ImageHere>?", [frames])


@pytest.fixture
def num_seen(tokenizer, monkeypatch):
    """Model and method -> how many frames of a video of three seconds at ten a second were seen."""
    video = str(ROOT / "examples" / "circle.mp4")

    def count(model, method: str, **sampling) -> int:
        prompts = []

        def answer(given, *args, **kwargs):
            prompts.extend(given)
            return [[5]] * len(given), None

        monkeypatch.setattr(model, "_answer", answer)
        several = method == "batch_chat"
        answers = getattr(model, method)(
            tokenizer, ["what?"] if several else "what?", [video], **sampling, **GREEDY
        )
        for _ in answers:
            pass
        return len(prompts[0].visuals[0].frames)

    return count


@pytest.mark.parametrize("method", ["chat", "batch_chat", "chat_stream", "stream_chat"])
def test_frames_of_a_video_as_asked_for(model, num_seen, method):
    assert num_seen(model, method) == 3
    assert num_seen(model, method, fps=5, num_frames=64) == 15
    assert num_seen(model, method, fps=5, num_frames=4) == 4
    with pytest.raises(ValueError, match="fps"):
        num_seen(model, method, fps=0)
    with pytest.raises(ValueError, match="max_frames"):
        num_seen(model, method, num_frames=0)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"query": 3}, TypeError, "query must be a str, not int"),
        ({"history": ["hello"]}, TypeError, "one turn is 'hello'"),
        ({"history": [("a", "b", "c")]}, TypeError, "one turn is"),
        ({"image": "nowhere.png"}, FileNotFoundError, "nowhere.png"),
        ({"image": 3}, TypeError, "int"),
        ({"image": b"GIF89"}, ValueError, "picture"),
        ({"image": "data:image/png;base64,@@@"}, ValueError, "base64"),
        ({"query": "<ImageHere><ImageHere>"}, ValueError, "2 <ImageHere> marks.*1 pictures"),
        ({"hd_num": 0}, ValueError, "0"),
        ({"hd_num": 0, "image": []}, ValueError, "at least 1 tile"),
        ({"query": "<ImageHere>", "image": None}, ValueError, "1 <ImageHere> marks.*0 pictures"),
        ({"hd_num": 2.5}, TypeError, "2.5|float"),
        ({"infer_mode": "paint"}, ValueError, "'paint'"),
        ({"infer_mode": "web"}, ValueError, "needs the adapters web"),
        ({"num_beams": 2, "streamer": object()}, ValueError, "num_beams is 2"),
        ({"tokenizer": None}, ValueError, "no tokenizer"),
        ({"tokenizer": "path"}, TypeError, "is a str"),
        ({"infer_mode": ["web"]}, ValueError, "web"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": False}, TypeError, "max_new_tokens must be an int, not False"),
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature must be above 0.*do_sample=False"),
        ({"do_sample": True, "top_p": 1.5}, ValueError, "top_p must be above 0 and at most 1"),
        ({"query": "word " * 2000}, ValueError, "context holds 1024"),
    ],
)
def test_bad_input_is_rejected_before_any_compute(model, tokenizer, picture, arguments, error, words):
    call = {"tokenizer": tokenizer, "query": "what?", "image": picture, **GREEDY, **arguments}
    before = dict(vars(model))
    handles = [
        part.register_forward_pre_hook(lambda *_: pytest.fail("ran")) for part in (model.vit, model.model)
    ]
    try:
        with pytest.raises(error, match=words):
            model.chat(**call)
        call.pop("streamer", None)
        with pytest.raises(error, match=words):
            model.stream_chat(**call)
    finally:
        for handle in handles:
            handle.remove()
    assert vars(model).keys() == before.keys()


def test_a_prompt_beyond_the_context_says_what_would_fit(tokenizer, picture):
    model = tiny_model("2.5", max_position_embeddings=128)
    large = picture.resize((900, 900))
    with pytest.raises(ValueError, match=r"the prompt has (\d+) tokens, 79 of them for 1 pictures.*holds 64"):
        small = tiny_model("2.5", max_position_embeddings=64)
        small.chat(tokenizer, "x", large, hd_num=16, **GREEDY)
    with pytest.raises(ValueError, match=r"hd_num=\d+ would fit"):
        model.chat(tokenizer, "x", large, hd_num=100, **GREEDY)
    with pytest.raises(ValueError, match=r"hd_num=35 would fit"):  # soon, however large the number
        model.chat(tokenizer, "x", large, hd_num=10**9, **GREEDY)
    stretched = tiny_model("2.5", max_position_embeddings=64, rope_scaling={"type": "dynamic", "factor": 4.0})
    assert stretched.chat(tokenizer, "x", large, hd_num=16, **GREEDY)[1]


@pytest.mark.parametrize("version", ["2", "2-4khd"])
def test_older_versions_reject_marks_without_pictures(version, tokenizer):
    for image in (None, []):
        with pytest.raises(ValueError, match="1 <ImageHere> marks.*0 pictures"):
            tiny_model(version).chat(tokenizer, "<ImageHere>what?", image, **GREEDY)


@pytest.mark.parametrize("image", [None, "picture"])
def test_an_answer_begins_as_asked(model, tokenizer, picture, image):
    """The prefix ends the prompt and is part of the history; what is returned follows it."""
    greedy = {**GREEDY, "min_new_tokens": 5}
    asked = {"tokenizer": tokenizer, "query": "what?", "image": image and picture, **greedy}
    prefix = "The answer is"
    answer, history = model.chat(**asked, answer_prefix=prefix)
    assert history[-1] == ("what?", prefix + answer)
    plain = plan_chat(model.config, tokenizer, "what?", asked["image"]).ids
    begun = plan_chat(model.config, tokenizer, "what?", asked["image"], answer_prefix=prefix).ids
    assert begun[: len(plain)] == plain and tokenizer.decode(begun[len(plain) :]) == prefix
    ids = torch.tensor([begun])
    inputs = batch_inputs(model.config, [plan_chat(model.config, tokenizer, "what?", asked["image"])])
    with torch.no_grad():
        logits = model(**{**inputs, "input_ids": ids, "im_mask": ids == model.config.image_token_id}).logits
    logits[0, -1, [tokenizer.eos_token_id, END]] = -torch.inf
    assert answer.startswith(tokenizer.decode(logits[0, -1].argmax().item(), skip_special_tokens=True))
    ((batched, _),) = model.batch_chat(tokenizer, ["what?"], [asked["image"]], answer_prefix=prefix, **greedy)
    assert batched == answer and len(answer) > 0
    stream = model.chat_stream(**asked, answer_prefix=prefix)
    assert "".join(stream) == answer and stream.history == history


def test_a_prefix_is_plain_text(model, tokenizer):
    prompt = plan_chat(model.config, tokenizer, "hi", (), answer_prefix="[UNUSED_TOKEN_145]<ImageHere>")
    assert prompt.ids.count(END) == 1 and 4 not in prompt.ids
    with pytest.raises(TypeError, match="answer_prefix must be a str, not int"):
        model.chat(tokenizer, "hi", answer_prefix=3)
    with pytest.raises(ValueError, match="context holds 1024"):
        model.chat(tokenizer, "hi", answer_prefix="word " * 2000)


def test_arguments_of_generate_win(model, tokenizer, picture):
    first = model.chat(tokenizer, "what?", picture, do_sample=False, max_new_tokens=1)[0]
    anything = {"eos_token_id": list(range(640)), "pad_token_id": 2}
    arguments = {"do_sample": False, "max_new_tokens": 9, **anything}
    assert model.chat(tokenizer, "what?", picture, **arguments)[0] == first


def test_a_foreign_vocabulary_is_rejected(tokenizer):
    with pytest.raises(ValueError, match="tokenizer has 640 pieces but the model 100"):
        tiny_model("2.5", vocab_size=100, image_token_id=4).chat(tokenizer, "hi", **GREEDY)
    with pytest.raises(ValueError, match="is 5 but the model's is 900"):
        tiny_model("2.5", vocab_size=1000, end_token_id=900).chat(tokenizer, "hi", **GREEDY)


def test_sampling_is_reproducible_and_differs(model, tokenizer, picture):
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(
            model.chat(tokenizer, "what?", picture, max_new_tokens=8, temperature=2.0, top_p=1.0)[0]
        )
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_streaming_ends_with_the_answer(version, tokenizer, picture):
    model = tiny_model(version)
    question = "<ImageHere>what?"
    steps = list(model.stream_chat(tokenizer, question, picture, do_sample=False, max_new_tokens=8))
    expected = model.chat(tokenizer, question, picture, do_sample=False, max_new_tokens=8)
    assert steps[0] == ("", [(question, "")])
    texts = [text for text, _ in steps]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    plain = InternLMXComposer2Tokenizer(str(ROOT / "tokenizer.model"), clean_up_tokenization_spaces=False)
    whole, _ = model.chat(plain, question, picture, do_sample=False, max_new_tokens=8)
    whole = whole.rstrip("\ufffd")  # an answer that is cut inside a character ends before it
    assert steps[-1] == (whole, [(question, whole)])
    assert whole.replace(" ", "") == expected[0].rstrip("\ufffd").replace(" ", "")


def test_a_stream_can_be_stopped_early(model, tokenizer, picture):
    counted = []
    handle = model.output.register_forward_hook(lambda *_: counted.append(1))
    stream = model.stream_chat(tokenizer, "what?", picture, do_sample=False, max_new_tokens=500)
    next(stream)
    next(stream)
    stream.close()
    handle.remove()
    assert len(counted) < 400


def test_an_error_while_streaming_reaches_the_reader(model, tokenizer, picture):
    def fail(*_):
        raise RuntimeError("broken layer")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="broken layer"):
            list(model.stream_chat(tokenizer, "what?", picture, max_new_tokens=3))
    finally:
        handle.remove()


@pytest.mark.parametrize("image", ["picture", [], None])
def test_guessing_ahead_gives_the_same_answer(model, tokenizer, picture, image):
    assistant = tiny_model("2.5", seed=5)
    call = (tokenizer, "what? what?", picture if image == "picture" else image)
    settings = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.2}
    expected = model.chat(*call, **settings)
    assert model.chat(*call, **settings, prompt_lookup_num_tokens=3) == expected
    assert model.chat(*call, **settings, assistant_model=assistant) == expected


def test_nothing_is_dropped_after_a_history_in_fourth_place(model, tokenizer):
    with pytest.raises(TypeError, match="must be passed by name"):
        model.chat(tokenizer, "hi", [], [("a", "b")], object())


def test_chat_inside_autocast(model, tokenizer, picture):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        response, _ = model.chat(tokenizer, "what?", picture, **GREEDY)
    assert isinstance(response, str)
