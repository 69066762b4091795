"""The recipes in `examples/`: their prompts, what they pass to `chat`, and answers of nano if any."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from demo_helpers import nano_service
from helpers import ROOT, tiny_model
from internlm_xcomposer2.ixc_utils import get_font
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

EXAMPLES = ROOT / "examples"
GREEDY = {"do_sample": False, "num_beams": 1}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their own module
    spec.loader.exec_module(module)
    return module


caption_video, dual_focus, many_pictures, outline_essay = map(
    example, ("caption_video", "dual_focus", "many_pictures", "outline_essay")
)


@pytest.fixture(scope="module")
def nano() -> tuple:
    """The model and the tokenizer in the root."""
    return nano_service().model, nano_service().tokenizer


class Recorder:
    """Stands where a model is called: answers `a1`, `a2` and so on, and keeps what it was asked."""

    def __init__(self, version: str = "2-4khd") -> None:
        self.calls: list[dict] = []
        self.config = tiny_model(version).config

    def chat(self, tokenizer, query: str, image=(), **settings) -> tuple[str, list]:
        self.calls.append({"query": query, "image": image, **settings})
        return f"a{len(self.calls)}", []

    chat_stream = chat


# ---- captions of videos ----


def frames(*colours: str, size: tuple[int, int] = (40, 30)) -> list[Image.Image]:
    return [Image.new("RGB", size, colour) for colour in colours]


def test_the_sliding_window_asks_as_published():
    model = Recorder()
    pictures = frames("red", "green", "blue")
    assert list(caption_video.caption_frames(model, None, pictures)) == ["a1", "a2", "a3"]
    assert [call["query"] for call in model.calls] == [
        "<ImageHere>This is the first frame of a video, describe it in detail.",
        "<ImageHere>Here are the Video frame 1 at 2.00 Second(s) and Video frame 2 at 4.00 Second(s) of a "
        "video, describe what happend between them. What happend before is: a1",
        "<ImageHere>Here are the Video frame 2 at 4.00 Second(s) and Video frame 3 at 6.00 Second(s) of a "
        "video, describe what happend between them. What happend before is: a2",
    ]
    assert [call["image"].size for call in model.calls] == [(40, 30), (40, 110), (40, 110)]
    second = model.calls[1]["image"]
    assert [second.getpixel((0, y)) for y in (0, 40, 90)] == [(255, 0, 0), (255, 255, 255), (0, 128, 0)]
    settings = {"hd_num": 9, "num_beams": 3, "do_sample": False, "use_meta": False}
    assert all(settings.items() <= call.items() for call in model.calls)


def test_descriptions_are_summarised_as_published():
    model = Recorder()
    assert caption_video.summarise(model, None, ["one", "two"]) == "a1"
    assert model.calls[0]["query"] == (
        "Summarize the following per frame descriptions:\n"
        "Video frame 1 at 0.00 Second(s) description: one\n"
        "Video frame 2 at 2.00 Second(s) description: two\n"
    )
    assert model.calls[0]["image"] == ()


def test_the_fast_way_and_the_detailed_caption():
    model = Recorder()
    caption_video.caption_at_once(model, None, frames("red", "green"))
    caption_video.recaption(model, None, "a cat")
    fast, detailed = model.calls
    assert fast["query"] == (
        "<ImageHere>Here are a few key frames of a video, discribe this video in detail."
    )
    assert fast["hd_num"] == 16 and fast["image"].height == 110 and fast["image"].width > 100
    assert detailed["query"] == "Translate this brief generation prompt into a detailed caption: a cat"


def test_labels_are_left_of_their_frames():
    picture = caption_video.stack(frames("red", "green"), gap=50, labels=get_font())
    left = picture.crop((0, 0, picture.width - 40, picture.height))
    assert left.getcolors(1 << 20)[0] and (255, 0, 0) not in {colour for _, colour in left.getcolors(1 << 20)}
    assert picture.getpixel((picture.width - 1, 0)) == (255, 0, 0)


def test_key_frames_of_a_video(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "five.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = 64, 32
        for index in range(21):  # five seconds and a frame, the first two of one colour
            image = Image.new("RGB", (64, 32), (index * 12, 100, 100))
            image.paste("white", (0, 0, 20 if index >= 8 else 0, 32))
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    found = caption_video.key_frames(path)
    reds = [frame.getpixel((60, 16))[0] for frame in found]
    assert len(found) == 3 and all(
        abs(red - index * 12) < 16 for red, index in zip(reds, (8, 16, 20), strict=True)
    )
    with pytest.raises(OSError):
        caption_video.key_frames(tmp_path / "none.mp4")


def test_frames_that_repeat_are_dropped(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**sizes, "image_size": 28, "patch_size": 14}, text_config={**sizes, "vocab_size": 9}
    )
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        tmp_path
    )
    half = Image.new("RGB", (30, 30), "white")
    half.paste("black", (0, 0, 15, 30))
    shown = [half, half, Image.new("RGB", (30, 30), "red"), half, half]
    kept = caption_video.drop_repeats(shown, str(tmp_path))
    assert kept[0] is half and kept[-1] is half and 2 <= len(kept) < 5
    assert caption_video.drop_repeats([half] * 3, str(tmp_path)) == [half, half]


# ---- details ----


def test_a_detail_is_read_in_its_box(nano):
    picture = Image.open(EXAMPLES / "small.png").convert("RGB")
    focus = dual_focus.dual_focus(
        *nano, "What word is printed in the picture?", picture, (165, 130, 235, 168), max_new_tokens=16
    )
    assert focus.answer == focus.micro == "ART" and focus.macro != "ART"
    assert focus.micro_loss < focus.macro_loss


def test_without_a_box_the_first_answer_stays(nano):
    focus = dual_focus.dual_focus(*nano, "What shape is the object?", Image.open(EXAMPLES / "star.png"))
    assert (focus.answer, focus.micro, focus.box) == ("star", None, None)


@pytest.mark.parametrize(
    ("version", "answer"), [("2.5", "[100, 200, 300, 400]"), ("2-4khd", "[0.100, 0.200, 0.300, 0.400]")]
)
def test_the_box_is_asked_for_and_read_as_published(monkeypatch, version, answer):
    model = Recorder(version)
    replies = iter(["first", answer, "second"])
    chat = model.chat
    monkeypatch.setattr(model, "chat", lambda *args, **kwargs: (next(replies), chat(*args, **kwargs)[1]))
    monkeypatch.setattr(dual_focus, "loss_of", lambda *args: {"first": 2.0, "second": 1.0}[args[-1]])
    picture = Image.new("RGB", (1000, 500))
    focus = dual_focus.dual_focus(model, None, "Which?", picture)
    assert (focus.answer, focus.box) == ("second", (100, 100, 300, 200))
    assert [call["query"] for call in model.calls] == [
        "<ImageHere>Which?",
        "<ImageHere>Please provide the bounding box coordinate of the region this question asks: Which?",
        "<ImageHere>Please combine the information from these two images and answer this question: Which?",
    ]
    last = model.calls[-1]
    assert last["history"] == [(model.calls[1]["query"], answer)]
    assert last["image"][1].size == (250, 250)
    assert dual_focus.as_answer(focus.box, (500, 1000), version) == answer


def test_a_box_becomes_a_square_with_a_margin_inside_of_the_picture():
    assert dual_focus.enlarged_box((100, 100, 200, 140), (500, 500)) == (75, 45, 225, 195)
    assert dual_focus.enlarged_box((0, 0, 40, 40), (50, 60)) == (0, 0, 60, 50)


def test_the_loss_is_the_models_own(nano):
    model, tokenizer = nano
    query, pictures = "What shape is the object?", [str(EXAMPLES / "star.png")]
    inputs = model.prepare_chat(tokenizer, query, pictures)
    losses = {
        text: dual_focus.loss_of(model, tokenizer, query, pictures, (), text) for text in ("star", "ring")
    }
    logits = model(**{name: inputs[name] for name in ("input_ids", "pixel_values", "image_grid_hw")}).logits
    (first,) = tokenizer("star", add_special_tokens=False)["input_ids"][:1]
    assert losses["star"] < losses["ring"] and int(logits[0, -1].argmax()) == first


# ---- many pictures ----


def test_what_the_history_saves(nano):
    dialogue = [
        (question, [str(EXAMPLES / name) for name in names]) for question, names in many_pictures.DIALOGUE
    ]
    turns = many_pictures.converse(*nano, dialogue)
    naive = many_pictures.converse(*nano, dialogue, reuse=False)
    assert [turn.answer for turn in turns] == [turn.answer for turn in naive]
    assert [turn.answer for turn in turns[:2]] == ["star", "orange"]
    assert turns[0].positions == naive[0].positions
    assert all(turn.positions < other.positions for turn, other in zip(turns[1:], naive[1:], strict=True))
    assert sum(turn.positions for turn in naive) > 3 * sum(turn.positions for turn in turns)
    assert [turn.num_pictures for turn in turns] == [1, 1, 2, 2, 3, 4]


# ---- essays ----


def test_the_outline_and_the_essay_are_asked_for_as_published():
    model = Recorder()
    outline_essay.outline_of(model, None, "桥")
    outline_essay.essay_of(model, None, "桥", "一、二、三", max_new_tokens=9)
    outline, essay = model.calls
    assert outline["query"] == "请列出下面的作文题目对应的写作大纲。\n**题目：**\n桥"
    assert essay["query"] == (
        "根据下面的题目和写作大纲进行写作。\n**题目**\n桥\n\n**大纲：**\n一、二、三\n\n**正文写作：**\n"
    )
    assert (outline["top_p"], essay["top_p"], essay["max_new_tokens"]) == (0.8, 1.0, 9)


def test_both_are_streamed(nano):
    outline = "".join(outline_essay.outline_of(*nano, "CLOUD", **GREEDY, max_new_tokens=8))
    assert "".join(outline_essay.essay_of(*nano, "CLOUD", outline, **GREEDY, max_new_tokens=8))


# ---- as scripts ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["dual_focus.py", "small.png", "What word is it?", "--box", "165", "130", "235", "168"], "answer:"),
        (["caption_video.py", "circle.mp4", "--max-new-tokens", "4"], "frame 1 of"),
        (["outline_essay.py", "CLOUD", "--max-new-tokens", "4"], "\n"),
        (["many_pictures.py", "dialogue.json"], "the naive way computes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_they_run(arguments, printed, tmp_path):
    rows = [{"question": "What shape is the object?", "pictures": [str(EXAMPLES / "star.png")]}]
    (tmp_path / "dialogue.json").write_text(
        json.dumps([*rows, {"question": "What colour is it?", "pictures": []}])
    )
    script, first, *rest = arguments
    source = EXAMPLES / first if (EXAMPLES / first).is_file() else Path(first)
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, source, *rest],
        capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert printed in result.stdout
