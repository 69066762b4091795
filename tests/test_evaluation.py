"""The table of benchmarks, the metrics of those that no harness has, and the runner that measures them."""

import json
import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT))

from evaluation import run  # noqa: E402
from evaluation.benchmarks import UNKNOWN, VERSIONS, markdown, read_table, settings_of  # noqa: E402
from evaluation.metrics import accuracy, anls, cider, field_f1, mean  # noqa: E402

IMAGES = (
    "MMDU MMStar RealWorldQA Design2Code DocVQA InfoVQA TextVQA ChartQA OCRBench DeepForm WTQ VisualMRC "
    "TabFact MathVista MMMU AI2D MME MMBench MMBench-CN CCBench SEED Q-Bench HallusionBench MM-Vet POPE"
)
VIDEOS = "MVBench MLVU Video-MME MMBench-Video TempCompass"


# ---- the table ----


def test_every_benchmark_of_the_family_is_there():
    benchmarks = read_table()["benchmarks"]
    assert set(benchmarks) == {*IMAGES.split(), *VIDEOS.split()}
    assert {name for name, entry in benchmarks.items() if entry["kind"] == "video"} == set(VIDEOS.split())
    for name, entry in benchmarks.items():
        assert "2.5" in entry["versions"], name
        assert entry.get("harness") or entry.get("runner"), name
        for version in entry["versions"]:
            assert version in VERSIONS and settings_of(name, version).metric


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("DocVQA", "4khd", {"hd_num": 65, "num_beams": 3, "max_new_tokens": 100}),
        ("OCRBench", "4khd", {"hd_num": 55}),
        ("MMBench", "4khd", {"hd_num": 16, "num_beams": 5, "max_new_tokens": 5}),
        ("ChartQA", "4khd", {"hd_num": 25}),
        ("MMBench", "2.5", {"hd_num": 36, "num_beams": 3}),
        ("MVBench", "2.5", {"hd_num": 36, "num_beams": 1, "num_frames": 64}),
        ("MM-Vet", "vl", {"max_new_tokens": 500, "use_meta": True}),
        ("POPE", "2.5", {"max_new_tokens": 10}),
        ("MME", "1.0-vl", {"max_new_tokens": 10, "num_beams": 5}),
    ],
)
def test_settings_become_arguments_of_chat(name, version, expected):
    arguments = settings_of(name, version).chat_arguments()
    assert expected.items() <= arguments.items()
    assert UNKNOWN not in arguments.values() and not arguments["do_sample"]
    assert ("hd_num" in arguments) == (version in ("4khd", "2.5"))


@pytest.mark.parametrize(("pictures", "tiles"), [(1, 36), (2, 18), (5, 7), (20, 4)])
def test_several_pictures_share_the_tiles(pictures, tiles):
    assert settings_of("MMDU", "2.5").chat_arguments(pictures)["hd_num"] == tiles


def test_questions_and_answers_have_the_published_form():
    choice = settings_of("MMBench", "vl")
    assert choice.ask("What is it?", ["a cat", "a dog"]) == (
        "Question: What is it?\nContext: N/A\nOptions: A. a cat B. a dog\n"
    )
    assert choice.prefix == "The answer is"
    assert choice.read_answer(" so it is B. a dog") == "B" and choice.read_answer("none") == ""
    word = settings_of("DocVQA", "2.5")
    assert word.ask("Who?") == "Answer the question using a single word or phrase.Who?"
    mme = settings_of("MME", "vl").ask("Is it red? Please answer yes or no.")
    assert mme == "Is it red? Answer this question briefly"
    with pytest.raises(ValueError, match="no source says how Design2Code"):
        settings_of("Design2Code", "2.5").ask("x")


def test_what_no_source_says_is_marked():
    assert settings_of("MVBench", "2.5").unknown == ["max_new_tokens"]
    assert settings_of("DocVQA", "2.5").unknown == []
    for wrong in (("Chess", "2.5"), ("DocVQA", "vl")):
        with pytest.raises(ValueError, match="choose one of|it has"):
            settings_of(*wrong)


def test_the_documented_table_is_this_one():
    for page in ("docs/evaluation.md", "docs/zh/evaluation.md"):
        rows = [
            line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("| MM")
        ]
        assert rows and all(row in markdown().splitlines() for row in rows)


# ---- metrics, worked by hand ----


def test_anls():
    assert anls("6143", ["6143", "x"]) == 1.0
    assert anls(" New  York", ["new york"]) == 1.0
    assert anls("6143", ["6142"]) == 0.75
    assert anls("abcd", ["abxy"]) == 0.5
    assert anls("abcd", ["axyz"]) == 0.0


def test_accuracy():
    assert accuracy("The Cat.", ["cat"]) == 1.0 and accuracy("cats", ["cat"]) == 0.0
    assert accuracy("1,200", ["1200.0"]) == 1.0 and accuracy("12%", ["12"]) == 1.0
    assert mean(accuracy)(["x b", "c"], [["b"], ["c", "d"]]) == 50.0


def test_f1_of_fields():
    # two of three found are right, two of four wanted are found: 2 * 2 / (3 + 4)
    mine = [{"total": "$5", "date": "1 May"}, {"total": "7", "date": ""}]
    right = [{"total": "5", "date": "2 May"}, {"total": "7", "date": "3 May"}]
    assert field_f1(mine, right) == pytest.approx(4 / 7)
    assert field_f1([{}], [{}]) == 1.0


def test_cider():
    texts = ["a red star on sand", "the blue ring is near the sea"]
    assert cider(texts, [[text] for text in texts]) == pytest.approx(1000.0)
    assert cider(texts, [["two green boats"], ["nothing else here at all"]]) == pytest.approx(0.0)


# ---- the runner ----

QUESTIONS = [
    {
        "id": 1,
        "image": "number.png",
        "question": " What number is printed in the picture?",
        "answers": ["6143"],
    },
    {
        "id": 2,
        "image": "number.png",
        "question": " What number is printed in the picture?",
        "answers": ["99"],
    },
]


@pytest.fixture
def questions(tmp_path):
    lines = [json.dumps({**row, "image": str(ROOT / "examples" / row["image"])}) for row in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "questions.jsonl"


def test_a_run_goes_on_where_it_stopped(questions, monkeypatch):
    out = questions.with_name("answers.jsonl")
    out.write_text('{"id": 1, "answer": "6143"}\n{"id": 2, "ans', encoding="utf-8")
    asked = []

    def batch_chat(self, tokenizer, queries, pictures, **arguments):
        asked.extend(queries)
        assert arguments["num_beams"] == 3 and arguments["hd_num"] == 36
        return [("7", [])] * len(queries)

    from internlm_xcomposer2 import InternLMXComposer2ForCausalLM

    monkeypatch.setattr(InternLMXComposer2ForCausalLM, "batch_chat", batch_chat)
    load = InternLMXComposer2ForCausalLM.from_pretrained
    monkeypatch.setattr(run.AutoModel, "from_pretrained", lambda name, **_: load(name))
    result = run.main(["WTQ", str(questions), "--out", str(out)])
    published = "<ImageHere>Answer the question using a single word or phrase."
    assert len(asked) == 1 and asked[0].startswith(published)
    assert result["score"] == 50.0 and result["samples"] == 2
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"id": 1, "answer": "6143"}, {"id": 2, "answer": "7"}]
    assert run.main(["WTQ", str(questions), "--out", str(out)]) == result and len(asked) == 1


@pytest.mark.slow
def test_nano_is_measured(questions, capsys):
    out = questions.with_name("answers.jsonl")
    result = run.main(["WTQ", str(questions), "--out", str(out), "--hd-num", "1", "--batch", "2"])
    assert result == json.loads(capsys.readouterr().out)
    answers = [json.loads(line)["answer"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 2 and answers[0] == answers[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 1: not JSON"), ('{"id": 1}', "lacks image, question, answers"), ("[]", "line 1 lacks id")],
)
def test_bad_rows_are_named(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        run.main(["WTQ", str(path), "--out", str(tmp_path / "a.jsonl")])
