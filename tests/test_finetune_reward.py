"""Training the reward model: pairs in both forms, and losses that fall until the chosen answers win."""

import json
import random
import sys

import pytest
import torch
from finetune_helpers import SIZES, losses, write_base
from helpers import ROOT
from internlm_xcomposer2 import (
    InternLMXComposer2ForSequenceClassification,
    InternLMXComposer2Processor,
    InternLMXComposer2Tokenizer,
)
from internlm_xcomposer2.prompt_internlm_xcomposer2 import plan_conversation
from PIL import Image
from transformers import AutoModel

sys.path.insert(0, str(ROOT))

from finetune.check_data import main as check_data  # noqa: E402
from finetune.merge import merge  # noqa: E402
from finetune.preferences import PairCollator, PairDataset, read_pairs, read_preferences  # noqa: E402
from finetune.rows import RowFault  # noqa: E402
from finetune.train import parse_arguments, train  # noqa: E402
from finetune.train_reward import REWARD  # noqa: E402

pytestmark = pytest.mark.slow

MARK = "<ImageHere>"
COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "model", **SIZES, hd_num=1)


@pytest.fixture(scope="module")
def processor(base):
    return InternLMXComposer2Processor.from_pretrained(base)


def turns(question, answer, names=("role", "content"), roles=("user", "assistant")):
    return [dict(zip(names, pair, strict=True)) for pair in zip(roles, (question, answer), strict=True)]


def write_pairs(directory, num_pairs=12):
    """Pairs in which the polite answer is chosen, every second one about a picture."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (60, 50), colour).save(directory / f"{name}.png")
    draw = random.Random(0)
    pairs = []
    for number in range(num_pairs):
        word = draw.choice(["one", "two", "three"])
        pair = {"prompt": f"say {word}", "chosen": f"{word}, please", "rejected": f"no {word}"}
        if number % 2:
            parts = [{"type": "image"}, {"type": "text", "text": f"say {word}"}]
            pair |= {
                "prompt": [{"role": "user", "content": parts}],
                "images": [f"{draw.choice(list(COLOURS))}.png"],
            }
        pairs.append(pair)
    path = directory / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    return path


def train_reward(base, pairs, output, *flags):
    named = ("--model_name_or_path", str(base), "--data_path", str(pairs), "--output_dir", str(output))
    always = ("--use_cpu", "True", "--logging_steps", "1", "--report_to", "none", "--save_strategy", "no")
    size = ("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "5")
    return train(*parse_arguments([*named, *always, *size, *flags]), REWARD)


# ---- data ----


def test_both_forms_of_a_pair_are_read(tmp_path):
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    published = {
        "id": 0,
        "conversations_a": turns(" Q ", "good", ("from", "value"), ("human", "bot")),
        "conversations_b": turns("Q", "bad", ("from", "value"), ("human", "bot")),
        "image": "./a.png",
        "turn": 1,
        "language": "English",
        "model_a": "x",
        "model_b": "y",
    }
    (tmp_path / "published.json").write_text(json.dumps([published]))
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
    modern = [
        {"chosen": turns("<ImageHere>Q", "good"), "rejected": turns("<ImageHere>Q", "bad"), "image": "a.png"},
        {
            "prompt": [question],
            "chosen": turns("", "good")[1:],
            "rejected": turns("", "bad")[1:],
            "images": ["a.png"],
        },
        {"prompt": [question], "chosen": "good", "rejected": "bad", "images": ["a.png"]},
    ]
    (tmp_path / "modern.jsonl").write_text("\n".join(map(json.dumps, modern)))
    first = read_pairs(tmp_path / "published.json")[0]
    assert not first.chosen.faults and [turn.text for turn in first.chosen.turns] == ["Q", "good"]
    assert [turn.text for turn in first.rejected.turns] == ["Q", "bad"]
    assert first.chosen.media == first.rejected.media and first.chosen.media[0].endswith("a.png")
    for pair in read_pairs(tmp_path / "modern.jsonl"):
        assert not pair.chosen.faults and not pair.rejected.faults
        assert [turn.text for turn in pair.chosen.turns] == ["<ImageHere>Q", "good"]
        assert [turn.text for turn in pair.rejected.turns] == ["<ImageHere>Q", "bad"]
        assert len(pair.chosen.media) == len(pair.rejected.media) == 1
    (tmp_path / "data.txt").write_text("published.json 0.003\nmodern.jsonl 0.002\n")
    assert len(read_preferences([tmp_path / "data.txt"])) == 5


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ({"messages": turns("q", "a")}, "a pair must have chosen and rejected, or conversations_a"),
        ({"chosen": turns("q", "a")}, "rejected: "),
        (
            {"chosen": turns("q", "a"), "rejected": turns("q", "")},
            "rejected: turn 1, the assistant's, is empty",
        ),
        ({"chosen": turns("q", "a"), "rejected": turns("q", "b")[:1]}, "rejected: the last turn, 0"),
        ({"chosen": turns("q", "a"), "rejected": turns("q", "b"), "score": 3}, "unknown keys score"),
        ({"chosen": "a", "rejected": "b"}, "turn 0 is the assistant's but should be the user's"),
        ({"chosen": turns(f"{MARK}q", "a"), "rejected": turns(MARK, "b"), "image": "no.png"}, "no.png"),
        (["chosen"], "a row must be an object"),
    ],
)
def test_faulty_pairs_are_named_with_file_and_row(tmp_path, processor, pair, words):
    good = {"chosen": turns("q", "a"), "rejected": turns("q", "b")}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [good, pair])))
    dataset = PairDataset(read_pairs(tmp_path / "pairs.jsonl"), processor)
    assert set(dataset[0]) == {"chosen", "rejected"}
    for read in (lambda: dataset[1], lambda: dataset.lengths):
        with pytest.raises(RowFault, match=rf"pairs\.jsonl, row 1 \(line 2\), .*{words}"):
            read()


def test_the_checker_names_the_faulty_side_of_a_pair(tmp_path, base, capsys):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    lines = [good, {**good, "rejected": ""}, {**good, "chosen": "word " * 90}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["--model", str(base), str(tmp_path / "pairs.jsonl"), "--max-length", "60", "--pairs"]
    assert check_data(command) == 1
    printed = capsys.readouterr().out
    assert "row 1 (line 2), rejected: turn 1, the assistant's, is empty" in printed
    assert "row 2 (line 3), chosen: " in printed and printed.count("FAULT") == 2
    with pytest.raises(SystemExit, match="can't be cut"):
        check_data([*command, "--too-long", "cut"])


def test_rows_are_written_as_they_are_scored(tmp_path, processor, base):
    """With a marked picture, with an unmarked one, which only the published form has, and with none."""
    model = InternLMXComposer2ForSequenceClassification.from_pretrained(base, dtype="float32", adapters=())
    model.tokenizer = processor.tokenizer
    pairs = read_pairs(write_pairs(tmp_path, 2))
    unmarked = [turns(" what? ", text, ("from", "value"), ("human", "bot")) for text in ("red ", "blue")]
    entry = {"conversations_a": unmarked[0], "conversations_b": unmarked[1], "image": "red.png"}
    (tmp_path / "published.json").write_text(json.dumps([entry]))
    pairs += read_pairs(tmp_path / "published.json")
    dataset = PairDataset(pairs, processor)
    batch = PairCollator(processor.tokenizer.pad_token_id)([dataset[index] for index in range(3)])
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "image_grid_hw"}
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    messages = [[{"role": turn.role, "content": turn.text} for turn in row.turns] for row in rows]
    plans = [
        plan_conversation(model.config, processor.tokenizer, conversation, list(row.media))
        for conversation, row in zip(messages, rows, strict=True)
    ]
    items = [item for index in range(3) for item in dataset[index].values()]
    assert [item["input_ids"].tolist() for item in items] == [plan.ids for plan in plans]
    assert dataset.lengths == [max(len(plan.ids) for plan in plans[i : i + 2]) for i in (0, 2, 4)]
    with torch.no_grad():
        scores = model(**batch).logits[:, 0].tolist()
    assert scores == pytest.approx(model.get_scores(messages, [list(row.media) for row in rows]), abs=1e-5)


# ---- training ----


def test_training_lowers_the_loss_until_chosen_answers_score_higher(tmp_path, base):
    pairs, held_back = write_pairs(tmp_path / "a", 16), write_pairs(tmp_path / "b", 10)
    flags = ("--max_steps", "16", "--learning_rate", "3e-3", "--lr_scheduler_type", "constant")
    trainer = train_reward(
        base, pairs, tmp_path / "out", *flags, "--eval_data", str(held_back), "--eval_strategy", "steps",
        "--eval_steps", "16", "--fix_vit", "False",
    )  # fmt: skip
    curve = losses(trainer)
    assert sum(curve[:2]) / 2 > 0.4 and sum(curve[-3:]) / 3 < 0.1
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluation["eval_accuracy"] == 1.0 and evaluation["eval_loss"] < 0.2
    assert evaluation["eval_margin"] > 1
    assert [entry["accuracy"] for entry in trainer.state.log_history if "loss" in entry][-1] == 1.0
    final = tmp_path / "out/final"
    card = (final / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "| eval_accuracy |" in card
    model = AutoModel.from_pretrained(final, dtype="float32")
    assert type(model) is InternLMXComposer2ForSequenceClassification
    assert model.config.auto_map["AutoModel"].endswith("ForSequenceClassification")
    model.tokenizer = InternLMXComposer2Tokenizer.from_pretrained(final)
    answers = [turns("say two", "two, please"), turns("say two", "no two")]
    assert model.rank(answers) == [0, 1] and model.compare(answers[0], [], answers[1], [])
    blue = [str(tmp_path / "a/blue.png")]
    assert model.rank(answers[::-1], [blue, blue]) == [1, 0]
    further = train_reward(final, pairs, tmp_path / "more", "--max_steps", "1").model
    torch.testing.assert_close(further.score.weight, model.score.weight, rtol=0, atol=1e-4)


def test_accumulated_batches_count_as_one(tmp_path, base):
    pairs = write_pairs(tmp_path, 4)
    flags = ("--max_steps", "2", "--seed", "3", "--data_seed", "3", "--max_grad_norm", "0")
    whole = train_reward(base, pairs, tmp_path / "whole", *flags)
    split = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")
    parts = train_reward(base, pairs, tmp_path / "parts", *flags, *split)
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-5)


def test_lora_trains_the_head_too_and_merges(tmp_path, base):
    pairs = write_pairs(tmp_path, 8)
    flags = ("--train", "lora", "--lora_r", "4", "--learning_rate", "3e-3", "--max_steps", "3")
    trainer = train_reward(base, pairs, tmp_path / "out", *flags)
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert (
        all(".lora_" in name or ".score.modules_to_save" in name for name in trained) and len(trained) == 11
    )
    trainer.model.eval()
    tuned = trainer.model.base_model.model
    merged = merge(tmp_path / "out/final", tmp_path / "merged")
    assert type(merged) is InternLMXComposer2ForSequenceClassification
    again = AutoModel.from_pretrained(tmp_path / "merged", dtype="float32")
    for model in (tuned, again):
        model.tokenizer = InternLMXComposer2Tokenizer.from_pretrained(base)
    rows = [turns("say two", "two"), turns("say one", "no")]
    assert again.get_scores(rows) == pytest.approx(tuned.get_scores(rows), abs=1e-5)


def test_what_a_reward_model_cannot_do_is_rejected(tmp_path, base):
    pairs = write_pairs(tmp_path, 4)
    with pytest.raises(ValueError, match="can't be cut off"):
        train_reward(base, pairs, tmp_path / "out", "--too_long", "cut", "--max_steps", "1")
    with pytest.raises(ValueError, match="rows can't be packed"):
        train_reward(base, pairs, tmp_path / "out", "--packing", "True", "--max_steps", "1")
    with pytest.raises(RowFault, match="max_length is 20"):
        train_reward(base, pairs, tmp_path / "out", "--max_length", "20", "--max_steps", "1")
    assert not (tmp_path / "out/final").exists()
