"""Training data: both formats and mixtures are read, and everything wrong with a row is reported."""

import json
import random

import pytest
import torch
from conversations import VIDEO, message_row, published_row, row_of, write_json, write_lines
from helpers import tiny_model
from internlm_xcomposer2.processing_internlm_xcomposer2 import InternLMXComposer2Processor

from finetune.dataset import ConversationDataset
from finetune.rows import (
    RowFault,
    Turn,
    draw_rows,
    read_data,
    read_mixture,
    read_rows,
    read_sources,
)

# ---- reading ----


def test_the_published_form(tmp_path):
    turns = [
        {"from": "human", "value": " <ImageHere> <ImageHere>Compare.\n"},
        {"from": "bot", "value": "They differ. "},
        {"from": "user", "value": "Why?"},
        {"from": "assistant", "value": "因为颜色。"},
    ]
    entries = [
        {"id": 0, "conversations": turns, "image": ["a.png", "/b/c.png"]},
        published_row(image="d.mp4"),
    ]
    entries.append(published_row("Hi", image=None))
    path = write_json(tmp_path / "data.json", entries)
    rows = read_rows(path)
    assert [turn.role for turn in rows[0].turns] == ["user", "assistant", "user", "assistant"]
    assert (
        rows[0].turns[0].text == "<ImageHere> <ImageHere>Compare." and rows[0].turns[3].text == "因为颜色。"
    )
    assert rows[0].media == (str(tmp_path / "a.png"), "/b/c.png")
    assert rows[1].media == (str(tmp_path / "d.mp4"),) and rows[2].media == ()
    assert [(row.source, row.index, row.faults) for row in rows] == [(path, i, ()) for i in range(3)]
    assert read_rows(path, media_root="/elsewhere")[0].media[0] == "/elsewhere/a.png"


def test_messages(tmp_path):
    entries = [
        message_row([{"type": "image"}, {"type": "text", "text": " What? "}], images=["a.png"]),
        message_row("One <ImageHere> and <ImageHere>.", images=["a.png", "b.png"]),
        message_row([{"type": "image", "image": "own.png"}, {"type": "image"}], image="column.png"),
        message_row([{"type": "image_url", "image_url": {"url": "https://x.org/y.png"}}]),
        message_row("Which way? <VideoHere> not <ImageHere>", images=["a.png"], videos=["v.mp4"]),
        message_row([{"type": "video", "video": ["1.png", "2.png"]}], [{"type": "text", "text": "Left"}]),
        {"messages": [{"role": "system", "content": "Be brief."}, *message_row()["messages"]]},
    ]
    rows = read_rows(write_lines(tmp_path / "data.jsonl", entries))
    here = [tuple(str(tmp_path / name) for name in names.split()) for names in ("a.png", "a.png b.png")]
    assert [row.faults for row in rows] == [()] * len(entries)
    assert rows[0].turns[0].text == "<ImageHere> What? " and rows[0].media == here[0]
    assert rows[1].turns[0].text == "One <ImageHere> and <ImageHere>." and rows[1].media == here[1]
    assert rows[2].media == (str(tmp_path / "own.png"), str(tmp_path / "column.png"))
    assert rows[3].media == ("https://x.org/y.png",)
    assert rows[4].turns[0].text == "Which way? <ImageHere> not <ImageHere>"
    assert rows[4].media == (str(tmp_path / "v.mp4"), *here[0])
    assert rows[5].media == ((str(tmp_path / "1.png"), str(tmp_path / "2.png")),)
    assert rows[5].turns[1].text == "Left"
    assert rows[6].turns[0] == Turn("system", "Be brief.")


def test_forms_and_files_can_be_mixed(tmp_path):
    lines = write_lines(tmp_path / "published.jsonl", [published_row("Hi", image=None)])
    lines.write_text(f"\ufeff\n{lines.read_text()}\n\n")
    listed = write_json(tmp_path / "messages.json", [message_row()])
    rows = read_data([lines, listed])
    assert [(row.index, row.line, row.faults) for row in rows] == [(0, 2, ()), (0, None, ())]


def test_keys_without_meaning_can_be_ignored(tmp_path):
    path = write_json(tmp_path / "data.json", [published_row(width=640)])
    assert "unknown keys width" in read_rows(path)[0].faults[0]
    assert read_rows(path, ignore_keys=["width"])[0].faults == ()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.json", b"", "isn't a list of rows"),
        ("data.json", b'{"data": []}', "isn't a list of rows"),
        ("data.json", b"[]", "no rows"),
        ("data.json", b'[{"id": 1},\n  oops]', "not JSON: .* line 2 column 3"),
        ("data.json", b'["\xff"]', "not UTF-8"),
        ("data.jsonl", b"\n\n", "no rows"),
        ("data.txt", b"# nothing\n\n", "lists no files"),
        ("data.txt", b"a.json 0.0001\n", "line 1: a count of 0.0001 thousand is 0 samples"),
        ("data.txt", b"\na.json -1\n", "line 2: a count"),
        ("data.txt", b"a.json nan\n", "line 1: a count"),
    ],
)
def test_files_that_hold_no_rows(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_data([tmp_path / name])
    assert str(tmp_path / name) in str(caught.value)


def test_files_that_are_missing(tmp_path):
    (tmp_path / "data.txt").write_text("none.json 1")
    for name in ("data.json", "data.txt"):
        with pytest.raises(FileNotFoundError, match="none.json" if name == "data.txt" else name):
            read_data([tmp_path / name])


# ---- mixtures ----


def test_a_mixture_draws_what_it_says(tmp_path):
    (tmp_path / "sub dir").mkdir()
    for name, count in (("text.json", 4), ("sub dir/more.jsonl", 30), ("whole.json", 3)):
        write = write_lines if name.endswith("l") else write_json
        write(tmp_path / name, [published_row(f"Hi {i}", image=None) for i in range(count)])
    mixture = tmp_path / "data.txt"
    mixture.write_text("text.json\t0.01\n# a comment\nsub dir/more.jsonl  0.02 \nwhole.json\n")
    assert read_sources(mixture) == [
        (tmp_path / "text.json", 10),
        (tmp_path / "sub dir" / "more.jsonl", 20),
        (tmp_path / "whole.json", None),
    ]
    rows = read_mixture(mixture)
    counts = {name: [0] * 30 for name in ("text.json", "more.jsonl", "whole.json")}
    for row in rows:
        counts[row.source.name][row.index] += 1
    assert sorted(counts["text.json"][:4]) == [2, 2, 3, 3]  # up: each as often as the others, or once more
    assert sorted(counts["more.jsonl"]) == [0] * 10 + [1] * 20  # down: none twice
    assert counts["whole.json"][:3] == [1, 1, 1]
    assert [row.source for row in rows] != sorted((row.source for row in rows), key=str)
    assert rows == read_mixture(mixture) and rows != read_mixture(mixture, seed=1)


def test_a_path_with_a_space_and_no_count_is_one_path(tmp_path):
    (tmp_path / "data.txt").write_text("my data.json\n")
    assert read_sources(tmp_path / "data.txt") == [(tmp_path / "my data.json", None)]


def test_drawing_is_even():
    rows = [row_of("a", str(i)) for i in range(7)]
    for num_samples in (1, 6, 7, 8, 50):
        drawn = draw_rows(rows, num_samples, random.Random(0))
        counts = [drawn.count(row) for row in rows]
        assert len(drawn) == num_samples and max(counts) - min(counts) <= 1


# ---- faults ----

FAULTS = {
    "missing file": (published_row(image="none.png"), "no such file: '{folder}/none.png'"),
    "folder": (published_row(image="."), "is not a file"),
    "unreadable picture": (published_row(image="noise.png"), "'{folder}/noise.png' is not a picture"),
    "broken picture": (published_row(image="broken.png"), "'{folder}/broken.png' is truncated or broken"),
    "broken video": (published_row(image="broken.mp4"), "'{folder}/broken.mp4' can't be read as a video"),
    "marks without pictures": (published_row(image=None), "1 <ImageHere> marks but the row has 0 pictures"),
    "pictures without marks": (
        published_row("What?", image=["wide.png"] * 2),
        "0 <ImageHere> marks but the row has 2 pictures",
    ),
    "too few marks": (
        published_row(image=["wide.png", "wide.png"]),
        "1 <ImageHere> marks but the row has 2 pictures",
    ),
    "mark without image": (message_row("<ImageHere>A"), "1 images in the messages have no source"),
    "more videos than places": (
        message_row("A", videos=["a.mp4"]),
        "0 videos in the messages have no source",
    ),
    "empty answer": (published_row(answer=" \n"), "turn 1, the assistant's, is empty"),
    "empty question": (published_row("", image=None), "turn 0, the user's, is empty"),
    "answer first": (
        {"conversations": published_row()["conversations"][::-1], "image": "wide.png"},
        "turn 0 is the assistant's but should be the user's",
    ),
    "two questions": (
        {"messages": [*message_row()["messages"][:1] * 2, message_row()["messages"][1]]},
        "turn 1 is the user's but should be the assistant's",
    ),
    "late system": (
        {"messages": [*message_row()["messages"], {"role": "system", "content": "x"}]},
        "turn 2 is the system's but should be the user's",
    ),
    "no answer": ({"messages": message_row()["messages"][:1]}, "the last turn, 0, is the user's"),
    "only system": ({"messages": [{"role": "system", "content": "x"}]}, "the last turn, 0, is the system's"),
    "unknown role": ({"conversations": [{"from": "cat", "value": "x"}]}, "unknown role 'cat'"),
    "no role": ({"messages": [{"content": "x"}]}, "unknown role None"),
    "unknown key": (published_row(imgae="x"), "the row has unknown keys imgae"),
    "unknown key of a turn": (
        {"messages": [{"role": "user", "content": "x", "name": "y"}]},
        "turn 0 has unknown keys name",
    ),
    "no form": ({"id": 3, "text": "x"}, "this one has neither"),
    "both forms": ({**published_row(), **message_row()}, "this one has conversations and messages"),
    "no object": ([1, 2], "a row must be an object, not list"),
    "no turns": ({"conversations": []}, "conversations must be a list of turns, not an empty list"),
    "turns of another kind": ({"messages": "Hi"}, "messages must be a list of turns, not str"),
    "turn of another kind": ({"messages": ["Hi"]}, "turn 0 is not an object"),
    "value of another kind": ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 is not an object"),
    "content of another kind": (message_row(3), "content must be a text or a list of parts, not int"),
    "part of another kind": (message_row(["x"]), "content must consist of dicts with a type"),
    "part of an unknown type": (message_row([{"type": "audio"}]), "unknown content type 'audio'"),
    "two sources": (message_row([{"type": "image", "image": "a", "url": "b"}]), "has 2 sources"),
    "image of another kind": (published_row(image=[3]), "image must give files by their paths, not by 3"),
    "markup": (
        published_row("[UNUSED_TOKEN_145]", image=None),
        "turn 0 contains the markup [UNUSED_TOKEN_145]",
    ),
    "end of text": (published_row(answer="a</s>"), "turn 1 contains the markup </s>"),
    "image piece": (published_row("{piece}", image=None), "turn 0 contains the markup {piece}"),
    "video mark": (published_row("<VideoHere>", image=None), "turn 0 contains the markup <VideoHere>"),
    "too long": (published_row(answer="word " * 500), "answers are beyond it"),
}


def with_piece(value: object, piece: str) -> object:
    return json.loads(json.dumps(value).replace("{piece}", piece))


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_names_file_row_and_fault(processor, pictures, name):
    entry, message = FAULTS[name]
    (pictures / "noise.png").write_bytes(b"noise" * 100)
    whole = (pictures / "wide.png").read_bytes()
    (pictures / "broken.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "broken.mp4").write_bytes(VIDEO.read_bytes()[:2000])
    entries = [published_row(), with_piece(entry, processor.image_piece)]
    path = write_lines(pictures / "data.jsonl", entries)
    data = ConversationDataset(read_rows(path), processor, max_length=300)
    assert len(data[0]["input_ids"]) <= 300
    with pytest.raises(RowFault) as caught:
        data[1]
    message = message.format(folder=pictures, piece=processor.image_piece)
    assert str(caught.value).startswith(f"{path}, row 1 (line 2): ") and message in str(caught.value)


def test_a_line_that_is_not_json_is_a_row_with_a_fault(processor, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(message_row())}\n\n{{oops\n")
    rows = read_rows(path)
    assert [(row.index, row.line, bool(row.faults)) for row in rows] == [(0, 1, False), (1, 3, True)]
    with pytest.raises(RowFault, match=r"data.jsonl, row 1 \(line 3\): line 3 is not JSON: .* column 2"):
        ConversationDataset(rows, processor)[1]


def test_all_faults_of_a_row_are_reported_at_once(processor, tmp_path):
    path = write_json(tmp_path / "data.json", [published_row("</s>", " ", image=["a.png", "b.png"])])
    with pytest.raises(RowFault) as caught:
        ConversationDataset(read_rows(path), processor)[0]
    assert len(caught.value.faults) == 5  # empty answer, markup, marks, two missing files


def test_older_versions_do_not_read_videos(tokenizer):
    processor = InternLMXComposer2Processor.for_config(tiny_model("2").config, tokenizer)
    data = ConversationDataset([row_of("<ImageHere>A", "B", media=[VIDEO])], processor)
    for ask in (lambda: data[0], lambda: data.lengths):
        with pytest.raises(RowFault, match="version 2 doesn't read videos"):
            ask()


# ---- too long ----


def test_long_rows_are_cut_only_on_request_and_only_after_an_answer(processor, pictures):
    row = row_of("Hi", "Hello!", "More", "word " * 50)
    whole = ConversationDataset([row], processor)[0]
    limit = len(whole["input_ids"]) - 20
    with pytest.raises(RowFault, match=f"has {limit + 20} tokens, 0 of them .* is {limit}; 20 of"):
        ConversationDataset([row], processor, limit)[0]
    cut = ConversationDataset([row], processor, limit, too_long="cut")
    assert cut.lengths == [limit] and cut.encoder.plan(row).num_cut == 20
    assert all(torch.equal(cut[0][name], whole[name][:limit]) for name in whole)
    with pytest.raises(RowFault, match="of its answers are beyond it; raise max_length"):
        ConversationDataset([row], processor, 5, too_long="cut")[0]
    late = row_of("Hi", "Hello!", "And <ImageHere>?", "A cat", media=[pictures / "wide.png"])
    with pytest.raises(RowFault, match="part of a picture"):
        ConversationDataset([late], processor, 30, too_long="cut")[0]
