"""`batch_chat` equals single calls; streams show whole characters, no end mark, and can be stopped."""

import threading

import pytest
import torch
from helpers import golden_directory, tiny_model
from internlm_xcomposer2.chat_internlm_xcomposer2 import AnswerWriter
from internlm_xcomposer2.generation_internlm_xcomposer2 import EndMarkFilter
from PIL import Image
from transformers import TextIteratorStreamer, TextStreamer

GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def pictures():
    image = Image.open(golden_directory() / "inputs" / "small.png").convert("RGB")
    return [image, image.resize((60, 200)), image.resize((300, 100)).rotate(180)]


MARK = "<ImageHere>"


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"repetition_penalty": 1.4}])
@pytest.mark.parametrize("version", ["2", "2-4khd", "2.5"])
def test_a_batch_equals_single_calls(version, tokenizer, pictures, settings):
    """Rows without pictures in both forms, with one, with several of different sizes, and with a history."""
    model = tiny_model(version)
    queries = ["hi", f"{MARK}what is this, and why?", "a longer question of many words", f"{MARK}or {MARK}?"]
    images = [None, pictures[0], [], pictures[1:]]
    histories = [[], [], [("one", "two")], []]
    ask = {**GREEDY, **settings}
    rows = model.batch_chat(tokenizer, queries, images, histories=histories, **ask)
    for row, query, image, history in zip(rows, queries, images, histories, strict=True):
        assert row == model.chat(tokenizer, query, image, history=history, **ask)
    assert model.batch_chat(tokenizer, queries[:1], **GREEDY) == [model.chat(tokenizer, "hi", **GREEDY)]


def test_a_batch_samples_and_keeps_the_first_of_several(model, tokenizer, pictures):
    ask = {"max_new_tokens": 5, "temperature": 2.0, "top_p": 1.0, "num_return_sequences": 3}
    torch.manual_seed(0)
    rows = model.batch_chat(tokenizer, ["what?", "why?"], [pictures[0], pictures[1]], **ask)
    torch.manual_seed(0)
    assert rows == model.batch_chat(tokenizer, ["what?", "why?"], [pictures[0], pictures[1]], **ask)
    assert [history[-1][0] for _, history in rows] == ["what?", "why?"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"queries": "what?"}, TypeError, "list of questions"),
        ({"queries": []}, TypeError, "at least one"),
        ({"queries": ["a", 3]}, TypeError, "query must be a str, not int"),
        ({"images": "a.png"}, TypeError, "images must be a list with one entry per question"),
        ({"images": [None]}, ValueError, "2 queries but 1 images"),
        ({"histories": [[]]}, ValueError, "2 queries but 1 histories"),
        ({"histories": [[], ["x"]]}, TypeError, "one turn is 'x'"),
        ({"images": [None, "nowhere.png"]}, FileNotFoundError, "nowhere.png"),
        ({"streamer": object()}, ValueError, "2 queries; use chat"),
        ({"streamer": object(), "num_beams": 2}, ValueError, "num_beams is 2"),
        ({"queries": ["a", f"{MARK}?"]}, ValueError, "1 <ImageHere> marks.*0 pictures"),
        ({"infer_mode": "web"}, ValueError, "needs the adapters web"),
    ],
)
def test_bad_batches_are_rejected_before_any_compute(model, tokenizer, arguments, error, words):
    handles = [
        part.register_forward_pre_hook(lambda *_: pytest.fail("ran")) for part in (model.vit, model.model)
    ]
    try:
        with pytest.raises(error, match=words):
            model.batch_chat(tokenizer, **{"queries": ["a", "b"], **GREEDY, **arguments})
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_a_stream_gives_the_answer_in_pieces(version, tokenizer, pictures):
    model = tiny_model(version)
    question = f"{MARK}what?"
    with model.chat_stream(tokenizer, question, pictures[0], **GREEDY) as stream:
        pieces = list(stream)
    answer, _ = model.chat(tokenizer, question, pictures[0], **GREEDY)
    assert "".join(pieces) == stream.response == answer.rstrip("\ufffd")
    assert all(pieces) and len(pieces) > 1
    assert stream.history == [(question, stream.response)]
    assert stream.history.prompt_cache is not None
    tiles = []
    handle = model.vit.register_forward_pre_hook(lambda *_: tiles.append(1))
    answer = model.chat(tokenizer, "and?", pictures[0], history=stream.history, **GREEDY)
    handle.remove()
    assert not tiles
    assert answer == model.chat(tokenizer, "and?", pictures[0], history=list(stream.history), **GREEDY)


def test_a_stream_runs_only_when_read_and_stops_when_abandoned(model, tokenizer, pictures):
    steps = []
    handle = model.output.register_forward_hook(lambda *_: steps.append(1))
    before = threading.active_count()
    stream = model.chat_stream(tokenizer, "what?", pictures[0], do_sample=False, max_new_tokens=500)
    assert not steps and threading.active_count() == before
    next(stream)
    stream.close()
    assert next(stream, None) is None
    assert threading.active_count() == before and len(steps) < 400
    with pytest.raises(RuntimeError, match="reader"):
        for _ in model.chat_stream(tokenizer, "what?", pictures[0], do_sample=False, max_new_tokens=500):
            raise RuntimeError("reader")
    handle.remove()


def test_streams_reject_beams_and_other_streamers(model, tokenizer):
    with pytest.raises(ValueError, match="num_beams is 2"):
        model.chat_stream(tokenizer, "hi", num_beams=2, **GREEDY)
    with pytest.raises(ValueError, match="has its own streamer"):
        model.chat_stream(tokenizer, "hi", streamer=TextStreamer(tokenizer), **GREEDY)


def shown(tokenizer, ids: list[int]) -> list[str]:
    """The texts, one by one, of an answer with these ids that ends as answers end."""
    writer = AnswerWriter(tokenizer)
    streamer = EndMarkFilter(writer, [2, 5])
    streamer.put(torch.tensor([[1, 6]]))
    for token in (*ids, 5, 2):
        streamer.put(torch.tensor([token]))
    streamer.end()
    return list(iter(writer.texts.get, None))


@pytest.mark.parametrize(
    "text", ["né 你好吗 😀!", "two\n  lines\n\n    and  blanks ", "a\n😀 b", "<div>\n  <p>x</p>\n</div>"]
)
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = shown(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_at_the_end_is_not_shown(tokenizer):
    ids = tokenizer("ok 😀", add_special_tokens=False)["input_ids"]
    assert "".join(shown(tokenizer, ids[:-1])) == "ok "


def test_a_callers_streamer_never_sees_the_end_mark(model, tokenizer, pictures):
    stop_at = model.chat(tokenizer, "what?", pictures[0], **GREEDY)[0]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.chat(tokenizer, "what?", pictures[0], streamer=streamer, **GREEDY)
    assert "".join(streamer) == stop_at
    inner = TextIteratorStreamer(tokenizer, skip_prompt=True)
    outer = EndMarkFilter(inner, [2, 5])
    outer.put(torch.tensor([[1, 5, 6]]))  # a prompt may hold the mark
    word = tokenizer("red", add_special_tokens=False)["input_ids"]
    for token in (*word, 5, 2):
        outer.put(torch.tensor([token]))
    outer.end()
    assert "".join(inner) == "red"
