"""The model for lmms-eval and the tasks that need no download, without any harness."""

import csv
import importlib
import json
import math
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2Tokenizer
from internlm_xcomposer2.evaluation.asking import Asker, Sample, chat_arguments, options_of
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import preprocess_image
from PIL import Image

sys.path.insert(0, str(ROOT))

from evaluation.benchmarks import benchmark_of, settings_of  # noqa: E402
from evaluation.draw_task import draw  # noqa: E402

QUESTION, NUMBER = "What number is printed in the picture?", ROOT / "examples" / "number.png"


@pytest.fixture(scope="module")
def nano():
    return InternLMXComposer2ForCausalLM.from_pretrained(ROOT).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return InternLMXComposer2Tokenizer.from_pretrained(ROOT)


@pytest.fixture
def asked(nano, monkeypatch):
    """What `batch_chat` was called with, which answers " B. two" to everything."""
    calls = []

    def batch_chat(tokenizer, queries, media, **arguments):
        calls.append((queries, media, arguments))
        return [(" B. two", [])] * len(queries)

    monkeypatch.setattr(nano, "batch_chat", batch_chat)
    return calls


# ---- the table ----


@pytest.mark.parametrize(
    ("task", "benchmark"),
    [
        ("docvqa_val", "DocVQA"),
        ("mmbench_en_dev", "MMBench"),
        ("mvbench_action_count", "MVBench"),
        ("mme", "MME"),
        ("mmerealworld", None),
        ("ixc2_drawn", None),
    ],
)
def test_tasks_belong_to_benchmarks(task, benchmark):
    assert benchmark_of(task) == benchmark


def test_a_split_has_settings_of_its_own():
    assert [settings_of("DocVQA", "4khd", split).hd_num for split in (None, "test", "val")] == [65, 65, 55]


def test_pictures_are_marked_as_published():
    settings = settings_of("MMMU", "2.5")
    assert settings.marks(1) == "<ImageHere>"
    assert settings.marks(2) == "Image1: <ImageHere>; Image2: <ImageHere>;"
    assert settings_of("MMMU", "vl").marks(1) == ""


# ---- questions ----


@pytest.mark.parametrize(
    ("document", "options"),
    [
        ({"A": "one", "B": "two", "C": float("nan"), "D": None}, ["one", "two"]),
        ({"A": "one", "B": "two", "C": "nan"}, ["one", "two"]),
        ({"choice_a": "one", "choice_b": "two"}, ["one", "two"]),
        ({"option0": "one", "option1": "two"}, ["one", "two"]),
        ({"options": ["one", 2]}, ["one", "2"]),
        ({"candidates": ["one"]}, ["one"]),
        ({"question": "what?"}, []),
    ],
)
def test_options_are_found_in_whatever_fields(document, options):
    assert options_of(document) == options


def test_a_sample_is_asked_as_published(nano, tokenizer, asked):
    picture = Image.new("RGB", (900, 300), "red")
    document = {"question": "How many?", "hint": "count", "A": "one", "B": "two"}
    answers = Asker(nano, tokenizer).answers(
        [Sample("the task's own words", [picture], document, "mmbench_en_dev")]
    )
    assert answers == ["B"]
    ((queries, media, arguments),) = asked
    assert queries == ["<ImageHere>Question: How many?\nContext: count\nOptions: A. one B. two\n"]
    published = {"num_beams": 3, "max_new_tokens": 5, "hd_num": 36, "answer_prefix": "The answer is"}
    assert published.items() <= arguments.items() and not arguments["do_sample"]
    side = nano.config.img_size
    tiled = preprocess_image(media[0][0], layout="bottom", tile_size=side, hd_num=36)
    expected = preprocess_image(picture, layout="centred", tile_size=side, hd_num=36)
    assert torch.equal(tiled.pixel_values, expected.pixel_values) and tiled.grid == expected.grid


def test_what_the_table_lacks_is_asked_as_the_task_says(nano, tokenizer, asked):
    wanted = {"max_new_tokens": 7, "temperature": 0, "until": ["."]}
    samples = [Sample(f"{n}?", [Image.new("RGB", (9, 9))] * n, {}, "other", wanted) for n in (1, 2, 1)]
    assert Asker(nano, tokenizer, batch_size=2, hd_num=1).answers(samples) == ["B"] * 3
    assert [queries for queries, _, _ in asked] == [
        ["1?", "Image1 <ImageHere>; Image2 <ImageHere>; 2?"],
        ["1?"],
    ]
    assert asked[0][2] == {**chat_arguments(wanted), "hd_num": 1}
    published = Asker(nano, tokenizer, published=False)
    published.answers([Sample("q", (), {}, "docvqa_val")])
    assert asked[-1][0] == ["q"]


def test_options_in_the_question_and_videos_keep_the_tasks_words(nano, tokenizer, asked):
    asker = Asker(nano, tokenizer)
    asker.answers([Sample("Which? A: x, B: y", (), {"question": "Which?"}, "mmstar")])
    assert asked[-1][0] == ["Which? A: x, B: y"]
    asker.answers([Sample("Which way?\nA. up", ["a.mp4"], {"question": "Which way?"}, "videomme")])
    assert asked[-1][0] == ["Here are some frames of a video. Which way?\nA. up"]
    assert asked[-1][2]["num_frames"] == 64


def test_sampling_only_with_a_temperature():
    assert not chat_arguments({"temperature": 0, "top_p": 0.9})["do_sample"]
    hot = chat_arguments({"temperature": 0.7, "top_p": 0.9})
    assert hot["do_sample"] and (hot["temperature"], hot["top_p"]) == (0.7, 0.9)


def test_unknown_benchmarks_are_refused(nano, tokenizer):
    with pytest.raises(ValueError, match="unknown benchmark 'Chess'"):
        Asker(nano, tokenizer, benchmark="Chess")


# ---- answers of the model ----


def test_nano_is_asked_and_answers(nano, tokenizer):
    picture = Image.open(NUMBER).convert("RGB")
    samples = [Sample(QUESTION, [picture], {}, "x"), Sample("Who are you?", (), {}, "x")]
    together = Asker(nano, tokenizer, batch_size=2, hd_num=1).answers(samples)
    assert together == Asker(nano, tokenizer, hd_num=1).answers(samples) and together[0] == "6143"


def test_likelihoods_are_those_of_forward(nano, tokenizer):
    """The answer that nano gives is the likeliest, and its value is the negative sum of the loss."""
    sample = Sample(QUESTION, [Image.open(NUMBER).convert("RGB")])
    words = [" 6143", "6142", "a red star"]
    alone = Asker(nano, tokenizer, hd_num=1).likelihoods([(sample, word) for word in words])
    batched = Asker(nano, tokenizer, hd_num=1, batch_size=3).likelihoods([(sample, word) for word in words])
    for one, other in zip(alone, batched, strict=True):
        assert one.total == pytest.approx(other.total, abs=1e-3) and one[1:] == other[1:]
    assert [one.is_greedy for one in alone] == [True, False, False]
    assert alone[0].total > max(one.total for one in alone[1:])
    inputs = nano.prepare_chat(tokenizer, QUESTION, NUMBER, 1)
    answer = tokenizer("6142", add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    labels = ids.clone()
    labels[:, : -answer.shape[1]] = -100
    pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_hw")}
    with torch.no_grad():
        loss = nano(input_ids=ids, labels=labels, **pictures).loss.item()
    assert alone[1].num_tokens == answer.shape[1]
    assert -alone[1].total / alone[1].num_tokens == pytest.approx(loss, rel=1e-4)
    with pytest.raises(ValueError, match="is empty"):
        Asker(nano, tokenizer).likelihoods([(sample, "  ")])


# ---- lmms-eval ----


@dataclass
class Request:
    """What lmms-eval hands to a model."""

    args: tuple


@dataclass
class Result:
    """Its `GenerationResult`, which passes anything on."""

    text: object


class Model:
    """Its base class for models."""

    def __init__(self) -> None:
        self.task_dict = {}

    @property
    def rank(self) -> int:
        return self._rank


@dataclass
class Manifest:
    """Its `ModelManifest`."""

    model_id: str
    simple_class_path: str


@pytest.fixture
def lmms(monkeypatch):
    """`evaluation.lmms` on stand-ins for the three names that it imports of lmms-eval."""
    names = {
        "lmms_eval.api.model": {"lmms": Model},
        "lmms_eval.api.instance": {"GenerationResult": Result},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models", *names):
        module = types.ModuleType(name)
        vars(module).update(names.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("internlm_xcomposer2.evaluation.lmms")
    sys.modules.pop("internlm_xcomposer2.evaluation.lmms")


def test_requests_of_lmms_eval(lmms):
    model = lmms.InternLMXComposer2(str(ROOT), device="cpu", batch_size="2", hd_num=1)
    assert (model.rank, model._world_size) == (0, 1)
    documents = [{"picture": "number.png", "answer": "6143"}, {"picture": "number.png", "answer": "red"}]
    model.task_dict = {"t": {"test": documents}}

    def look(document):
        return [Image.open(ROOT / "examples" / document["picture"]).convert("RGB")]

    asked = [Request((QUESTION, {"max_new_tokens": 8}, look, at, "t", "test")) for at in (0, 1)]
    assert model.generate_until(asked) == ["6143", "6143"]
    compared = [Request((QUESTION, " 6143", look, 0, "t", "test"))]
    compared.append(Request((QUESTION, lambda document: document["answer"], look, 1, "t", "test")))
    (right, greedy), (wrong, not_greedy) = (result.text for result in model.loglikelihood(compared))
    assert 0 <= right < wrong and greedy and not not_greedy and math.isfinite(wrong)


def test_rounds_of_lmms_eval(lmms):
    """The task sees the answers so far, and says what comes next and when it ends."""
    model = lmms.InternLMXComposer2(str(ROOT), device="cpu", hd_num=1)
    model.task_dict = {"t": {"test": [{"picture": NUMBER}]}}
    seen = []

    def look(document):
        return [Image.open(document["picture"]).convert("RGB")]

    def following(document, previous_output, round_idx, previous_round_info):
        seen.append((list(previous_output), round_idx, previous_round_info))
        return look(document), "Read the number in this image.", round_idx == 2, previous_output, "known"

    request = Request((QUESTION, {"max_new_tokens": 8}, look, following, 0, "t", "test"))
    assert model.generate_until_multi_round([request]) == [["6143", "6143"]]
    assert seen == [(["6143"], 1, None), (["6143", "6143"], 2, "known")]


def test_settings_of_lmms_eval_are_checked(lmms):
    with pytest.raises(ValueError, match="published or task, not 'best'"):
        lmms.InternLMXComposer2(str(ROOT), settings="best")
    found = lmms.manifest()
    module, _, name = found.simple_class_path.rpartition(".")
    assert found.model_id == "ixc2" and getattr(sys.modules[module], name) is lmms.InternLMXComposer2


# ---- the drawn task ----


def test_the_drawn_task_is_whole_and_reproducible(tmp_path):
    draw(tmp_path / "a", 6)
    draw(tmp_path / "b", 6)
    rows = [json.loads(line) for line in (tmp_path / "a/rows/test.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["shape", "colour", "count"] * 2
    for row in rows:
        assert row["answer"] in row["options"] and len(set(row["options"])) == 4
        path = Path(row["path"])
        assert path.read_bytes() == (tmp_path / "b/pictures" / path.name).read_bytes()
    csv.field_size_limit(sys.maxsize)
    for name in ("ixc2_drawn_choice", "ixc2_drawn_openended"):
        with (tmp_path / f"a/vlmevalkit/{name}.tsv").open(encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file, delimiter="\t"))
        assert len(table) == 6 and {"index", "image", "question", "answer"} <= set(table[0])
        if "A" in table[0]:
            assert all(one[one["answer"]] == row["answer"] for one, row in zip(table, rows, strict=True))
    for code in (tmp_path / "a/lmms_eval/utils.py", tmp_path / "a/lighteval/task.py"):
        compile(code.read_text(encoding="utf-8"), str(code), "exec")
    for config in ("adapter", "server"):
        assert json.loads((tmp_path / f"a/vlmevalkit/{config}.json").read_text())["data"]
    with pytest.raises(FileExistsError, match="choose another folder"):
        draw(tmp_path / "a", 6)
