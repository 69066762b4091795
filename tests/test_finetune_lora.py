"""LoRA: what gets it, merging, a quantised base, and the commands from data to a merged checkpoint."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from finetune_helpers import FAST, LORA, TASKS, losses, run, weights_of, write_base, write_rows
from helpers import ROOT, picture_inputs, tiny_model
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from finetune import train as training
from finetune.arguments import LORA_TARGETS, ModelArguments
from finetune.freezing import count_trained, freeze
from finetune.lora import add_lora, load_adapter, target_modules
from finetune.merge import merge
from finetune.saving import is_complete

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def adapter(base, rows, tmp_path_factory):
    """A LoRA adapter that changes what the model says, projector included."""
    output = tmp_path_factory.mktemp("adapter")
    run(base, rows, output, *LORA, *FAST, "--fix_sampler", "False")
    return output / "final"


def model_of(base):
    return InternLMXComposer2ForCausalLM.from_pretrained(base, dtype="float32")


@torch.no_grad()
def logits_of(model):
    return model(**picture_inputs(model, [(1, 2)])).logits


# ---- what gets it ----


def test_targets_are_accepted_under_their_published_names():
    plain = [f"{name}.linear" for name in LORA_TARGETS]
    assert target_modules(LORA_TARGETS) == target_modules(plain) == list(LORA_TARGETS)
    assert target_modules(["wqkv", "attention.wqkv", "w2"]) == ["attention.wqkv", "feed_forward.w2"]
    for names in (["output"], ["attention.wqkv.Plora_A"], []):
        with pytest.raises(ValueError, match="accepts attention.wqkv"):
            target_modules(names)


@pytest.mark.parametrize("fix_sampler", [True, False])
def test_lora_trains_nothing_that_is_merely_called_lora(fix_sampler):
    model = tiny_model("2.5", task_adapters=TASKS)
    arguments = ModelArguments("", use_lora=True, fix_sampler=fix_sampler, lora_r=2)
    assert arguments.train == "lora"
    freeze(model, arguments)
    wrapped = add_lora(model, arguments)
    trained = {name for name, weight in wrapped.named_parameters() if weight.requires_grad}
    lora = {name for name in trained if re.search(r"\.(wqkv|wo|w[123])\.lora_[AB]\.default\.", name)}
    assert len(lora) == 2 * 5 * 2
    assert {name for name in trained - lora if "vision_proj.modules_to_save" not in name} == set()
    assert len(trained - lora) == (0 if fix_sampler else 4)
    assert count_trained(wrapped)[0] == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def test_merging_is_exact_and_leaves_a_complete_checkpoint(base, adapter, tmp_path):
    wrapped = load_adapter(model_of(base), adapter)
    expected, before = logits_of(wrapped.base_model.model), logits_of(model_of(base))
    assert (expected - before).abs().max() > 0.1
    merge(adapter, tmp_path / "merged", dtype="float32")
    merged = model_of(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-5)
    base_names = load_file(base / "model.safetensors").keys()
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == base_names
    assert not list(tmp_path.glob("*.partial"))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card and "| lora_r | 4 |" in card and "peft" not in card


def test_an_adapter_on_the_plain_linears_merges_to_the_same(base, adapter, tmp_path):
    """Where earlier releases put it."""
    weights = load_file(adapter / "adapter_model.safetensors")
    names = {re.sub(r"\.layers\.\d+", "", name) for name in weights if "lora_" in name}
    assert names == {
        f"base_model.model.model.{name}.lora_{side}.weight" for name in LORA_TARGETS for side in "AB"
    }
    plain = shutil.copytree(adapter, tmp_path / "plain")
    config = json.loads((plain / "adapter_config.json").read_text())
    config["target_modules"] = [f"{name}.linear" for name in LORA_TARGETS]
    (plain / "adapter_config.json").write_text(json.dumps(config))
    renamed = {name.replace(".lora_", ".linear.lora_"): value for name, value in weights.items()}
    save_file(renamed, plain / "adapter_model.safetensors")
    one = load_adapter(model_of(base), adapter).merge_and_unload().state_dict()
    other = load_adapter(model_of(base), plain).merge_and_unload().state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- peft, without our command ----


def published_lora(**fields):
    """As in the published `finetune_lora.sh` and in the trainers of others."""
    peft = pytest.importorskip("peft")
    names = {"r": 4, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return peft, peft.LoraConfig(target_modules=list(LORA_TARGETS), **{**names, **fields})


def test_peft_accepts_the_published_names_and_trains_only_its_own_weights():
    peft, config = published_lora()
    model = tiny_model("2.5", task_adapters=TASKS)
    wrapped = peft.get_peft_model(model, config)
    trained = {name for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert trained == {
        f"base_model.model.model.layers.{layer}.{name}.lora_{side}.default.weight"
        for layer in range(2)
        for name in LORA_TARGETS
        for side in "AB"
    }


def test_what_peft_saves_has_the_published_names_and_loads(tmp_path):
    peft, config = published_lora()
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(tiny_model("2.5"), config).eval()
    expected = logits_of(wrapped)
    wrapped.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.attention.wqkv.lora_A.weight" in names
    plain = tiny_model("2.5")
    before = logits_of(plain)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    assert torch.equal(logits_of(loaded), expected) and not torch.allclose(before, expected, atol=0.01)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits_of(loaded), before, rtol=0, atol=1e-6)
    merged = loaded.merge_and_unload(safe_merge=True)
    assert type(merged) is type(plain) and merged.state_dict().keys() == tiny_model("2.5").state_dict().keys()
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-5)


def test_a_generated_answer_and_its_reuse_are_those_of_the_merged_weights(tmp_path):
    peft, config = published_lora()
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(tiny_model("2.5"), config).eval()
    inputs = picture_inputs(wrapped.base_model.model, [(1, 2)])
    answer = wrapped.generate(**inputs, max_new_tokens=8, do_sample=False)
    merged = wrapped.merge_and_unload()
    assert torch.equal(merged.generate(**inputs, max_new_tokens=8, do_sample=False), answer)


def test_merging_into_quantised_weights_is_rejected(base):
    peft, config = published_lora()
    model = InternLMXComposer2ForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    wrapped = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="without quantization_config and merge into that"):
        wrapped.merge_and_unload()


# ---- what is rejected ----


def test_what_cannot_be_merged_is_named(base, adapter, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        merge(tmp_path, tmp_path / "out")
    with pytest.raises(FileExistsError, match="already exists"):
        merge(adapter, tmp_path)
    smaller = write_base(tmp_path / "smaller", hidden_size=32)
    with pytest.raises(ValueError, match="doesn't fit this model"):
        merge(adapter, tmp_path / "out", base=str(smaller))
    broken = shutil.copytree(adapter, tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "lora_A" in name))
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 are missing"):
        merge(broken, tmp_path / "out")
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="pass it with --base"):
        merge(broken, tmp_path / "out")
    monkeypatch.setattr("finetune.saving.describe_checkpoint", lambda _: pytest.fail("no room"))
    with pytest.raises(BaseException, match="no room"):
        merge(adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"smaller", "broken"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", "x"),
        ("lora_alpha", []),
        ("target_modules", 5),
        ("modules_to_save", {"a": 1}),
        ("base_model_name_or_path", 5),
        ("task_type", []),
        ("rank_pattern", 7),
    ],
)
def test_a_doctored_adapter_is_named_before_its_base_is_loaded(adapter, tmp_path, monkeypatch, field, value):
    loaded = lambda *_, **__: pytest.fail("the base was loaded")  # noqa: E731
    monkeypatch.setattr(InternLMXComposer2ForCausalLM, "from_pretrained", loaded)
    shutil.copytree(adapter, tmp_path / "doctored")
    path = tmp_path / "doctored" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=f"adapter_config.json: {field} must be"):
        merge(tmp_path / "doctored", tmp_path / "out", base="anything")


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from finetune import merge, saving
saving.describe_checkpoint = lambda *_: os._exit(9)
merge.merge(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_a_merge_goes_on_by_itself_after_a_kill(adapter, tmp_path):
    command = [sys.executable, "-c", KILLED, str(ROOT), str(adapter), str(tmp_path / "out")]
    killed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert killed.returncode == 9, killed.stderr[-2000:]
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    merge(adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and is_complete(tmp_path / "out")


def test_a_quantised_base_trains_an_adapter_for_the_unquantised_one(base, rows, tmp_path):
    flags = (*LORA, *FAST, "--quantize", "nf4", "--fix_sampler", "False")
    trainer = run(base, rows, tmp_path, *flags, "--bf16", "True", "--max_steps", "8")
    found = losses(trainer)
    assert sum(found[4:]) < sum(found[:4])
    types = {
        weight.requires_grad: weight.dtype
        for weight in trainer.model.parameters()
        if weight.is_floating_point()
    }
    assert types == {True: torch.float32, False: torch.bfloat16}
    linear = trainer.model.base_model.model.model.layers[0].feed_forward.w1.base_layer.linear
    assert linear.weight.dtype == torch.uint8 and linear.weight.quant_type == "nf4"
    merge(tmp_path / "final", tmp_path / "merged", dtype="float32")
    before, after = weights_of(base), weights_of(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if name.endswith(".linear.weight") or name.startswith("vision_proj")}
    assert changed == expected


def test_a_missing_peft_is_named(base, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(training, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ImportError, match=r"pip install '.\[finetune\]'"):
        run(base, rows, tmp_path, *LORA)


# ---- the commands ----

COMMANDS = """
import runpy, sys
for module, *arguments in {calls!r}:
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")
"""
FRESH = """
import sys, torch
from transformers import AutoModel, AutoTokenizer
assert "internlm_xcomposer2" not in sys.modules
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print("type", type(model).__module__.split(".")[0], model.dtype)
print("answer", model.chat(tokenizer, "What shape is the object?", sys.argv[2], do_sample=False)[0])
"""


def test_nano_learns_an_answer_with_the_commands(tmp_path):
    """From data to a merged checkpoint that loads without this package."""
    picture = str(ROOT / "examples" / "star.png")
    turns = [
        {"from": "user", "value": "What shape is the object?"},
        {"from": "assistant", "value": "circle"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns, "image": picture}] * 4))
    flags = "--train lora --lora_r 8 --lora_alpha 16 --learning_rate 0.01 --max_steps 8 --use_cpu True"
    data = ["--model_name_or_path", str(ROOT), "--data_path", str(tmp_path / "rows.json")]
    calls = [
        ["finetune.train", *data, *flags.split(), "--output_dir", str(tmp_path / "run")],
        ["finetune.merge", str(tmp_path / "run" / "final"), str(tmp_path / "merged")],
    ]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS.format(calls=calls)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "written to" in done.stdout and "weights (" in done.stdout
    fresh = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, str(tmp_path / "merged"), picture],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "home"), "PATH": "", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert fresh.returncode == 0, fresh.stderr[-3000:]
    assert "type transformers_modules torch.float32" in fresh.stdout
    assert "answer circle\n" in fresh.stdout
