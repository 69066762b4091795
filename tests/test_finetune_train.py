"""What trains and what doesn't, losses, resuming, evaluation, the card, and what is rejected."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from finetune_helpers import (
    ALWAYS,
    FAST,
    LORA,
    TASKS,
    losses,
    parse_arguments,
    run,
    weights_of,
    write_base,
    write_rows,
)
from helpers import ROOT, picture_inputs, tiny_model
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from safetensors.torch import load_file
from transformers import Trainer

from finetune import train as training
from finetune.arguments import ModelArguments
from finetune.card import Facts, card_text
from finetune.freezing import freeze, part_of, trained_parts
from finetune.saving import is_complete

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


# ---- what trains ----


def test_every_weight_belongs_to_a_part():
    model = tiny_model("2.5", task_adapters=TASKS, video_memory_size=8)
    parts = {}
    for name, _ in model.named_parameters():
        parts.setdefault(part_of(name), set()).add(name)
    assert parts.keys() == {
        "unused",
        "tower",
        "projector",
        "plora",
        "decoder",
        "task:sft",
        "task:dpo",
        "task:web",
    }
    assert {"plora_glb_GN", "plora_sub_GN", "vision_proj.0.weight"} <= parts["projector"]
    assert {"model.tok_embeddings.weight", "output.weight"} <= parts["decoder"]
    assert len(parts["plora"]) == 20 and all("Plora_" in name for name in parts["plora"])
    assert len(parts["unused"]) == 6


WAYS = {
    (): {"decoder", "plora", "projector"},
    ("--fix_vit", "False"): {"decoder", "plora", "projector", "tower"},
    ("--fix_sampler", "True"): {"decoder", "plora"},
    ("--train", "plora", "--fix_sampler", "False"): {"plora", "projector"},
    ("--train", "adapter", "--infer_mode", "write"): {"task:sft", "task:dpo"},
}


@pytest.mark.parametrize("flags", WAYS, ids=" ".join)
def test_exactly_the_requested_parts_change(base, rows, tmp_path, flags):
    trainer = run(base, rows, tmp_path, *flags, *FAST, "--max_steps", "2")
    before, after = weights_of(base), weights_of(tmp_path / "final")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {part_of(name) for name in changed} == WAYS[flags]
    trained = {name for name in before if part_of(name) in WAYS[flags]}
    assert changed == trained
    assert all(torch.isfinite(value).all() for value in after.values())
    assert trainer.num_trained == sum(before[name].numel() for name in trained)


def test_a_batch_without_pictures_gives_every_trained_weight_a_gradient_of_zero():
    model = tiny_model("2.5").train()
    freeze(model, ModelArguments("", fix_vit=False))
    ids = torch.tensor([[1, 50, 51, 52]])
    with_blank = model(input_ids=ids, labels=ids).loss
    with_blank.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, name
        if part_of(name) in ("tower", "projector", "plora"):
            assert weight.grad is None or not weight.grad.any(), name
    assert torch.equal(with_blank, model.eval()(input_ids=ids, labels=ids).loss)


def test_the_blank_picture_is_seen_only_in_training():
    model = tiny_model("2.5")
    calls = []
    model.vit.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[1, 50, 51, 52]])

    def num_calls(**arguments):
        calls.clear()
        model(input_ids=ids, **arguments)
        return len(calls)

    model.train()
    assert num_calls(labels=ids) == 1 and num_calls() == 0
    with torch.no_grad():
        assert num_calls(labels=ids) == 0
    model.vit.requires_grad_(False)
    assert num_calls(labels=ids) == 1  # the projector trains
    freeze(model, ModelArguments("", train="plora"))
    assert num_calls(labels=ids) == 0
    model.eval()
    assert num_calls(labels=ids) == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing_changes_neither_loss_nor_gradients(frozen):
    models = [tiny_model("2.5", plora_dropout=0.0).train() for _ in range(2)]
    inputs = picture_inputs(models[0], [(1, 2), (2, 1)])
    models[1].gradient_checkpointing_enable()
    depths = []
    models[1].vit.last_layer.register_forward_hook(lambda *_: depths.append(torch.is_grad_enabled()))
    for model in models:
        freeze(model, ModelArguments("", fix_vit=frozen))
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
    pairs = zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    for (name, one), other in pairs:
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-6)
    assert depths[0] == (not frozen)  # a frozen tower isn't run for gradients
    assert (
        models[1].model.layers[0].gradient_checkpointing and models[1].vit.last_layer.gradient_checkpointing
    )


# ---- losses ----


def test_two_rows_at_once_and_one_after_the_other_are_the_same_step(base, rows, tmp_path):
    flags = (*FAST, "--fix_vit", "False", "--max_steps", "3")
    together = run(base, rows, tmp_path / "a", *flags, "--per_device_train_batch_size", "2")
    apart = run(base, rows, tmp_path / "b", *flags, "--gradient_accumulation_steps", "2")
    assert losses(apart) == pytest.approx(losses(together), abs=1e-4)
    assert len(losses(apart)) == 3 and losses(apart)[-1] < losses(apart)[0]
    one, other = weights_of(tmp_path / "a" / "final"), weights_of(tmp_path / "b" / "final")
    # Adam divides small gradients by their size, so that rounding shows where they nearly vanish.
    differing = sum((one[name] - other[name]).abs().gt(1e-4).sum() for name in one)
    assert differing < 0.01 * sum(value.numel() for value in one.values())


def test_bf16_computes_in_bfloat16_and_keeps_the_weights(base, rows, tmp_path):
    plain = run(base, rows, tmp_path / "a", *FAST, "--max_steps", "2")
    half = run(base, rows, tmp_path / "b", *FAST, "--max_steps", "2", "--bf16", "True")
    assert losses(half) == pytest.approx(losses(plain), rel=0.02) and losses(half) != losses(plain)
    assert {weight.dtype for weight in half.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("flags", [("--fix_vit", "False"), LORA, (*LORA, "--quantize", "nf4")], ids=" ".join)
def test_resuming_continues_with_the_same_losses(rows, tmp_path, flags):
    """With dropout, whose random state is resumed too."""
    base = write_base(tmp_path / "base", plora_dropout=0.1)
    flags = (*flags, *FAST, "--save_steps", "2", "--gradient_checkpointing", "True")
    whole = run(base, rows, tmp_path / "a", *flags)
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    (tmp_path / "b" / "checkpoint-3").mkdir()  # of a save that was interrupted
    with pytest.raises(FileExistsError, match="holds checkpoint-3 of another run.*resume_from_checkpoint"):
        run(base, rows, tmp_path / "b", *flags)
    resumed = run(base, rows, tmp_path / "b", *flags, "--resume_from_checkpoint", "True")
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6) and len(losses(whole)) == 4
    one, other = (dict(trainer.model.named_parameters()) for trainer in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    names = [path.name for path in (tmp_path / "a" / "final").glob("*.safetensors")]
    for name in names:
        one, other = (load_file(tmp_path / run / "final" / name) for run in "ab")
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_state_dict_is_loaded_under_published_names_too(base):
    """A trainer reads its checkpoints back with `load_state_dict`."""
    model = InternLMXComposer2ForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    published = load_file(base / "model.safetensors")
    lacking = published.pop("model.layers.0.attention.wo.weight")
    assert model.load_state_dict(published, strict=False) == (
        ["model.layers.0.attention.wo.linear.weight"],
        [],
    )
    published["model.layers.0.attention.wo.weight"] = lacking
    model.load_state_dict(published)
    assert all(
        torch.equal(value, weight)
        for value, weight in zip(weights_of(base).values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny_model("2.5").load_state_dict(published)


# ---- along the way ----


def test_it_evaluates_stops_early_and_keeps_the_best(base, rows, tmp_path):
    wild = ("--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--max_steps", "9")
    flags = ("--eval_data", str(rows), "--save_strategy", "steps", "--save_steps", "1")
    stop = ("--early_stopping_patience", "2", "--report_to", "tensorboard")
    trainer = run(base, rows, tmp_path, *wild, *flags, *stop)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = evaluated.index(min(evaluated)) + 1
    assert trainer.state.global_step == best + 2 < 9
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    kept, final = weights_of(tmp_path / f"checkpoint-{best}"), weights_of(tmp_path / "final")
    assert all(torch.equal(kept[name], final[name]) for name in kept)
    assert list((tmp_path / "runs").rglob("events.out.tfevents*"))
    assert not list(tmp_path.glob("*.partial"))
    fields = json.loads((tmp_path / "final" / "config.json").read_text())
    assert fields["text_config"]["use_cache"] and fields["dtype"] == "float32"
    card = (tmp_path / "final" / "README.md").read_text()
    for line in (
        f"base_model: {base}",
        f"- `{rows}`: 8 rows",
        f"- `{rows}`: 8 rows, for evaluation",
        "| learning_rate | 0.5 |",
        "| train | full |",
        f"| {best} | {losses(trainer)[best - 1]:.4f} | {min(evaluated):.4f} |",
    ):
        assert line in card


def test_long_histories_are_thinned_out_in_the_card():
    history = [{"step": step, "loss": 1 / step} for step in range(1, 101)]
    text = card_text(Facts("base", True, {"a.json": 3}, {}, 1, 100, {"seed": 4}, history))
    lines = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(lines) == 20 and lines[0] == "| 1 | 1.0000 |" and lines[-1] == "| 100 | 0.0100 |"
    assert "1 of 100 weights (1.00 %)" in text and "eval_loss" not in text and "library_name: peft" in text


def test_the_tower_has_its_own_learning_rate(base, rows, tmp_path):
    flags = (
        "--fix_vit",
        "False",
        "--vit_learning_rate",
        "1e-4",
        "--learning_rate",
        "1e-3",
        "--max_steps",
        "1",
    )
    trainer = run(base, rows, tmp_path, *flags, "--lr_scheduler_type", "constant")
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    seen = {}
    for group in trainer.optimizer.param_groups:
        for weight in group["params"]:
            part = part_of(names[id(weight)])
            seen.setdefault((part == "tower", group["lr"]), set()).add(group["weight_decay"])
    assert seen == {(True, 1e-4): {0.0, 0.1}, (False, 1e-3): {0.0, 0.1}}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == sum(
        weight.requires_grad for weight in trainer.model.parameters()
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_says_what_needs_less(base, rows, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Trainer, "training_step", fail)
    flags = ("--per_device_train_batch_size", "4", "--train_sampling_strategy", "sequential")
    with pytest.raises(RuntimeError, match="out of memory in a training step") as caught:
        run(base, rows, tmp_path, *flags)
    assert caught.value.__cause__ is error
    for words in (
        "batch_size 1 with --gradient_accumulation_steps 4 (now 4 and 1)",
        "--gradient_checkpointing True",
        "--bf16 True",
        r"--max_length \(this batch is 4 x \d+ tokens\)",
        r"--hd_num \(this batch has \d+ tiles\)",
        "--train lora, with --quantize nf4",
        "fsdp2.yaml",
    ):
        assert re.search(words if "\\" in words else re.escape(words), str(caught.value)), words


def test_rows_of_similar_length_come_together(base, rows, tmp_path):
    flags = ("--train_sampling_strategy", "group_by_length", "--per_device_train_batch_size", "4")
    trainer = run(base, rows, tmp_path, *flags, "--max_steps", "1")
    order = list(trainer._get_train_sampler())
    lengths = [trainer.train_dataset.lengths[index] for index in order]
    assert sorted(order) == list(range(8)) and lengths[:4] == sorted(lengths[:4], reverse=True)


def test_packed_rows_are_the_same_step_as_a_batch(base, rows, tmp_path):
    flags = (*FAST, "--max_steps", "2")
    batch = run(base, rows, tmp_path / "a", *flags, "--per_device_train_batch_size", "8")
    packed = run(base, rows, tmp_path / "b", *flags, "--packing", "True", "--max_length", "1000")
    assert len(packed.train_dataset) == 1
    assert losses(packed) == pytest.approx(losses(batch), abs=1e-4)
    assert "| packing | True |" in (tmp_path / "b" / "final" / "README.md").read_text()


# ---- what is rejected ----

REFUSED = {
    ("--train", "lora", "--fix_vit", "False"): "aren't part of the saved adapter",
    ("--train", "plora", "--use_lora", "True"): "--use_lora True means --train lora, not --train plora",
    ("--quantize", "nf4"): "needs --train lora",
    ("--train", "adapter"): "needs --infer_mode write or web",
    ("--train", "some"): "--train must be one of full, plora, adapter, lora, not 'some'",
    ("--infer_mode", "some"): "--infer_mode must be one of base, write, web",
    ("--dtype", "float16"): "can't be trained",
    ("--vit_learning_rate", "1e-5"): "needs --fix_vit False",
    ("--early_stopping_patience", "2"): "needs --eval_data",
    ("--eval_data", "ROWS", "--early_stopping_patience", "0"): "at least 1, not 0",
    ("--eval_strategy", "steps", "--eval_steps", "1"): "needs --eval_data",
    ("--eval_data", "nowhere.json"): "nowhere.json is not a file",
    ("--label_smoothing_factor", "0.1"): "isn't supported",
    ("--max_length", "0"): "--max_length must be a positive number, not 0",
    ("--train", "lora", "--lora_r", "0"): "--lora_r must be a positive number, not 0",
    ("--train", "lora", "--lora_dropout", "1"): "less than 1, not 1",
    ("--train", "lora", "--lora_target_modules", "output"): "accepts attention.wqkv",
    ("--layout", "some"): "--layout must be one of",
    ("--resume_from_checkpoint", "True"): "holds no checkpoint to resume from",
    ("--resume_from_checkpoint", "nowhere"): "nowhere holds no checkpoint",
}


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_nonsense_is_rejected_before_the_model_is_loaded(base, rows, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(
        InternLMXComposer2ForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    with pytest.raises((ValueError, FileNotFoundError), match=REFUSED[flags]):
        run(base, rows, tmp_path / "out", *[str(rows) if flag == "ROWS" else flag for flag in flags])
    assert not (tmp_path / "out").exists()


def test_a_missing_tensorboard_is_named(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.arguments.is_tensorboard_available", lambda: False)
    with pytest.raises(ImportError, match=r"\[finetune\]"):
        run(base, rows, tmp_path / "out", "--report_to", "tensorboard")


def test_a_finished_model_is_not_overwritten(base, rows, tmp_path):
    shutil.copytree(base, tmp_path / "final")
    with pytest.raises(FileExistsError, match="holds a finished model"):
        run(base, rows, tmp_path)


@pytest.mark.parametrize("lost", ["README.md", "config.json", "model.safetensors", None])
def test_a_model_that_is_not_complete_is_moved_aside_and_not_taken_for_finished(base, rows, tmp_path, lost):
    """As a copy that was interrupted leaves it; without a name, the weights are cut."""
    shutil.copytree(base, tmp_path / "final")
    path = tmp_path / "final" / (lost or "model.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2]) if lost is None else path.unlink()
    left = sorted(os.listdir(tmp_path / "final"))
    run(base, rows, tmp_path, *LORA)
    assert sorted(os.listdir(tmp_path / "final.unfinished-1")) == left
    assert is_complete(tmp_path / "final")
    with pytest.raises(FileExistsError, match="holds a finished model"):
        run(base, rows, tmp_path, *LORA)


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from finetune import saving, train
from finetune.trainer import FinetuneTrainer

place, run = sys.argv[2], sys.argv[3:]
def die(*_, **__):
    os._exit(9)
if place == "weights":
    save = FinetuneTrainer.save_model
    def save_model(self, output_dir=None, **kwargs):
        save(self, output_dir, **kwargs)
        die() if "final" in str(output_dir) else None
    FinetuneTrainer.save_model = save_model
elif place == "files":
    saving.describe_checkpoint = die
else:
    rename = Path.rename
    Path.rename = lambda self, target: die() if Path(target).name == "final" else rename(self, target)
train.train(*train.parse_arguments(run))
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["weights", "files", "rename"])
def test_a_run_that_is_killed_while_it_saves_its_model_can_be_continued(base, rows, tmp_path, place):
    out = tmp_path / "out"
    flags = ["--model_name_or_path", str(base), "--data_path", str(rows), "--output_dir", str(out)]
    flags += [*ALWAYS, *FAST, "--save_steps", "2", "--save_only_model", "False"]
    command = [sys.executable, "-c", KILLED, str(ROOT), place, *flags]
    killed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert killed.returncode == 9, killed.stderr[-2000:]
    assert not (out / "final").exists()
    run(base, rows, out, *FAST, "--save_steps", "2", "--resume_from_checkpoint", "True")
    assert is_complete(out / "final") and not list(out.glob("final.*"))


def test_a_mode_that_the_checkpoint_lacks_is_rejected(rows, tmp_path):
    write_base(tmp_path / "base", task_adapters={})
    for flags in (("--train", "adapter", "--infer_mode", "web"), (*LORA, "--infer_mode", "web")):
        with pytest.raises(ValueError, match="adapter|web"):
            run(tmp_path / "base", rows, tmp_path / "out", *flags)


def test_bad_rows_are_named_before_the_model_is_loaded(base, rows, tmp_path, monkeypatch):
    entries = json.loads(rows.read_text())
    entries[3]["image"] = "nowhere.png"
    bad = rows.with_name("bad.json")
    bad.write_text(json.dumps(entries))
    monkeypatch.setattr(training, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=r"bad.json, row 3.*nowhere.png"):
        run(base, bad, tmp_path)
    bad.write_text("[]")
    with pytest.raises(ValueError, match="no rows"):
        run(base, bad, tmp_path)


def test_arguments_come_from_a_file_too(base, rows, tmp_path):
    fields = {"model_name_or_path": str(base), "data_path": [str(rows)], "use_lora": True, "use_cpu": True}
    (tmp_path / "run.json").write_text(json.dumps(fields))
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    for name in ("run.json", "run.yaml"):
        model, data, settings = parse_arguments([str(tmp_path / name)])
        assert model.train == "lora" and model.fix_vit and model.fix_sampler
        assert data.data_path == [str(rows)] and settings.report_to == ["tensorboard"]
        assert trained_parts(model) == set()
