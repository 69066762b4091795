"""The checker of training data: every bad row is named in the same words with which training would stop."""

import json
import runpy
import sys

import pytest
from conversations import message_row, published_row, write_json, write_lines
from helpers import ROOT, read_json

from finetune.check_data import check_data, check_file, main
from finetune.dataset import ConversationDataset, RowEncoder
from finetune.rows import RowFault, read_rows


@pytest.fixture
def data(pictures):
    """A mixture of a published file with three bad rows of five, and a good one of messages."""
    (pictures / "broken.png").write_bytes((pictures / "wide.png").read_bytes()[:400])
    published = [
        published_row(),
        published_row(image="none.png"),
        published_row("<ImageHere> and <ImageHere>?"),
        published_row("Hi", "Hello", image=None),
        published_row(image="broken.png"),
    ]
    write_json(pictures / "bad.json", published)
    write_lines(pictures / "good.jsonl", [message_row("Hi", "word " * i) for i in range(1, 8)])
    (pictures / "data.txt").write_text("bad.json 0.01\ngood.jsonl\n")
    return pictures


def test_every_bad_row_is_reported_as_by_the_dataset(data, processor):
    encoder = RowEncoder(processor, 1000)
    bad, good = check_data([data / "data.txt"], encoder)
    assert (bad.rows, bad.samples, good.rows, good.samples) == (5, 10, 7, None)
    assert [finding.row for finding in bad.faults] == [1, 2, 4] and not good.faults
    rows = ConversationDataset(read_rows(data / "bad.json"), processor, 1000)
    for finding in bad.faults:
        with pytest.raises(RowFault) as caught:
            rows[finding.row]
        assert str(finding) == str(caught.value)
    lengths = sorted(len(rows[index]["input_ids"]) for index in (0, 3))
    assert bad.token_counts()["min"] == lengths[0] and bad.token_counts()["max"] == lengths[1]
    assert bad.token_counts()["total"] == sum(lengths) and good.token_counts()["median"] == good.tokens[3]


def test_headers_alone_show_everything_but_what_comes_after_them(data, processor):
    report = check_file(data / "bad.json", RowEncoder(processor), decode=False)
    assert [finding.row for finding in report.faults] == [1, 2]


def test_threads_find_the_same(data, processor):
    one, several = (check_data([data / "data.txt"], RowEncoder(processor), workers=n) for n in (1, 3))
    assert one == several


def test_answers_that_would_be_cut_off_are_warned_about(data, processor):
    longest = check_file(data / "good.jsonl", RowEncoder(processor)).tokens[-1]
    kept = check_file(data / "good.jsonl", RowEncoder(processor, longest - 3, too_long="cut"))
    assert not kept.faults and kept.tokens[-1] == longest - 3
    assert str(kept.warnings[-1]) == (
        f"{data / 'good.jsonl'}, row 6 (line 7): 3 tokens of the answers are beyond max_length "
        f"{longest - 3} and are cut off"
    )
    refused = check_file(data / "good.jsonl", RowEncoder(processor, longest - 3))
    assert refused.faults[-1].row == 6 and "; 3 of the" in refused.faults[-1].text
    nothing = check_file(data / "good.jsonl", RowEncoder(processor, 5, too_long="cut"))
    assert len(nothing.faults) == 7 and not nothing.tokens


def test_unreadable_files_do_not_hide_others(data, processor):
    (data / "data.txt").write_text("none.json 1\ngood.jsonl 0.003\n")
    (data / "empty.txt").write_text("")
    (data / "broken.json").write_text("[")
    paths = [data / name for name in ("data.txt", "empty.txt", "broken.json", "none.txt")]
    reports = check_data(paths, RowEncoder(processor))
    texts = ["no such data file", "", "lists no files", "is not JSON", "no such data file"]
    assert len(reports) == len(texts)
    for report, text in zip(reports, texts, strict=True):
        assert bool(report.faults) == bool(text) and all(text in str(fault) for fault in report.faults)


def test_the_command_prints_faults_and_counts(data, capsys):
    arguments = ["--model", str(ROOT), "--workers", "1", "--hd-num", "1"]
    assert main([*arguments, str(data / "data.txt")]) == 1
    lines = capsys.readouterr().out.splitlines()
    faults = [line for line in lines if line.startswith("FAULT ")]
    assert [line.split(": ")[0].removeprefix("FAULT ") for line in faults] == [
        f"{data / 'bad.json'}, row {row}" for row in (1, 2, 4)
    ]
    assert lines[3].startswith(f"{data / 'bad.json'}: 5 rows, 10 drawn; tokens min ")
    assert lines[3].endswith("; 3 bad") and lines[4].endswith("; all good")
    assert lines[5] == "3 faults in 12 rows of 2 files"
    assert main([*arguments, str(data / "good.jsonl")]) == 0


def test_the_command_as_json(data, capsys):
    arguments = ["--model", str(ROOT), "--json", "--workers", "1", "--max-length", "500"]
    assert main([*arguments, str(data / "data.txt")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["max_length"] == 500
    assert [file["rows"] for file in report["files"]] == [5, 7]
    fault = report["files"][0]["faults"][0]
    assert fault["row"] == 1 and fault["text"] == f"no such file: '{data / 'none.png'}'"
    assert set(report["files"][1]["tokens"]) == {"min", "median", "max", "total"}


def test_the_command_runs_as_a_module_and_uses_the_limit_of_training(data, capsys, monkeypatch):
    path = write_json(data / "more.json", [published_row(width=130, height=60)])
    ignored = ["--ignore-key", "width", "--ignore-key", "height"]
    monkeypatch.setattr(sys, "argv", ["check_data", "--model", str(ROOT), "--json", *ignored, str(path)])
    monkeypatch.delitem(sys.modules, "finetune.check_data")  # so that it is run as if for the first time
    with pytest.raises(SystemExit) as done:
        runpy.run_module("finetune.check_data", run_name="__main__")
    assert done.value.code == 0
    limit = read_json(ROOT / "config.json")["max_length"]
    assert json.loads(capsys.readouterr().out)["max_length"] == limit
