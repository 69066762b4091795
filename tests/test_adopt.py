"""Published checkpoints turned into directories that load: every layout, twice, converted, and rejected."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    FAMILIES,
    ROOT,
    VERSION_OF_FAMILY,
    content_of,
    logits_of,
    published_config,
    published_source,
    published_weights,
    read_json,
    recipe_state_dict,
    tiny_model,
    write_published,
)
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from internlm_xcomposer2.ixc2 import adopt as adopting
from internlm_xcomposer2.ixc2 import convert as converting
from internlm_xcomposer2.ixc2 import small_files as describing
from internlm_xcomposer2.ixc2.adopt import adopt
from internlm_xcomposer2.ixc2.examine import quantisation_of
from internlm_xcomposer2.ixc2.main import default_target, main
from packers import pack_checkpoint
from PIL import Image
from transformers import AutoModel, AutoProcessor

# ---- the families ----

# Format, shards, model type and whether the weights are converted, one of each somewhere.
LAYOUTS = {
    "2": ("bin", 2, "internlm2", True),
    "vl": ("bin", 1, "internlm", False),
    "4khd": ("bin", 2, "internlmxcomposer2", False),
    "2d5": ("safetensors", 3, "internlmxcomposer2", False),
    "2d5-ol": ("safetensors", 1, "internlm2", False),
}

FRESH = """
import sys, json, torch
from pathlib import Path
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
logits = {}
for directory in map(Path, sys.argv[2:]):
    assert AutoTokenizer.from_pretrained(directory, trust_remote_code=True)("a").input_ids[0] == 1
    model = AutoModel.from_pretrained(directory, trust_remote_code=True, dtype="float32").eval()
    assert "transformers_modules" in type(model).__module__, type(model)
    assert model.generation_config.eos_token_id == [2, 92542]
    count = model.num_image_tokens(1, 1)
    tiles = 2 if model.config.is_tiled else 1
    pixels = torch.linspace(-1, 1, tiles * 3 * model.config.img_size**2)
    pixels = pixels.view(tiles, 3, model.config.img_size, model.config.img_size)
    ids = torch.tensor([[1, *[model.config.image_token_id] * count, 60, 70, 80]])
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels, image_grid_hw=torch.tensor([[1, 1]]))
    logits[directory.name] = output.logits[:, -3:].clone()
torch.save(logits, sys.argv[1])
assert "internlm_xcomposer2" not in sys.modules
"""


def logits_here(model) -> torch.Tensor:
    """What the fresh process computes, with a model of this one."""
    tiles = 2 if model.config.is_tiled else 1
    side = model.config.img_size
    pixels = torch.linspace(-1, 1, tiles * 3 * side**2).view(tiles, 3, side, side)
    ids = [1, *[model.config.image_token_id] * model.num_image_tokens(1, 1), 60, 70, 80]
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor([ids]), pixel_values=pixels, image_grid_hw=torch.tensor([[1, 1]])
        )
    return output.logits[:, -3:]


@pytest.mark.slow
def test_every_family_loads_in_a_fresh_process(tmp_path, family_model):
    for family, (kind, shards, model_type, convert) in LAYOUTS.items():
        weights = recipe_state_dict(family)
        weights = {name: value for name, value in weights.items() if "post_layernorm" not in name}
        source = tmp_path / "sources" / family
        fields = {**published_config(family), "model_type": model_type}
        write_published(source, weights, fields, kind=kind, shards=shards)
        shutil.copy(ROOT / "tokenizer.model", source)
        before = content_of(source)
        adoption = adopt(source, tmp_path / family, convert_bin=convert)
        assert content_of(source) == before
        assert adoption.findings.config.version == VERSION_OF_FAMILY[family]
        fields = read_json(tmp_path / family / "config.json")
        assert fields["version"] == VERSION_OF_FAMILY[family]
        assert fields["model_type"] == "internlmxcomposer2" and "attn_implementation" not in fields
        assert (fields["video_memory_size"] is not None) == (family == "2d5-ol")
    targets = [str(tmp_path / family) for family in FAMILIES]
    command = [sys.executable, "-I", "-c", FRESH, str(tmp_path / "logits.pt"), *targets]
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "PATH": "",
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for family, found in torch.load(tmp_path / "logits.pt").items():
        torch.testing.assert_close(found, logits_here(family_model(family)), rtol=0, atol=1e-6)


# ---- what is written ----


def test_the_directory_holds_what_a_user_needs_and_links_the_weights(tmp_path):
    published_source(tmp_path / "source")
    (tmp_path / "source" / "LICENSE.txt").write_text("licence")
    adoption = adopt(tmp_path / "source", tmp_path / "target")
    names = set(os.listdir(tmp_path / "target"))
    assert names == {*adoption.written, adopting.MARKER} and "LICENSE.txt" in names
    assert {"config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model"} <= names
    assert {"modeling_internlm_xcomposer2.py", "build_mlp.py", "ixc_utils.py"} <= names
    scripts = {"cli", "adopt", "inspect", "convert", "fetch", "description"}
    assert not names & {f"{name}_internlm_xcomposer2.py" for name in scripts}
    weights = tmp_path / "target" / "model.safetensors"
    assert weights.samefile(tmp_path / "source" / "model.safetensors")
    adopt(tmp_path / "source", tmp_path / "copied", copy=True)
    assert not (tmp_path / "copied" / "model.safetensors").samefile(weights)


TRANSFORMS_SEEN = """
import sys
from transformers.dynamic_module_utils import get_class_from_dynamic_module as get
for name in ("Image_transform", "HD_transform", "Video_transform"):
    try:
        print(get(f"ixc_utils.{name}", sys.argv[1], trust_remote_code=True).__name__)
    except Exception:
        print("none")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "seen"),
    [
        ("2", ["none", "none", "Video_transform"]),
        ("2-4khd", ["none", "HD_transform", "Video_transform"]),
        ("2.5", ["Image_transform", "HD_transform", "Video_transform"]),
    ],
)
def test_a_loader_that_detects_versions_by_transforms_sees_the_published_ones(tmp_path, version, seen):
    """As LMDeploy's does. The model itself doesn't miss what is left out."""
    published_source(tmp_path / "source", version)
    adopt(tmp_path / "source", tmp_path / "target")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", TRANSFORMS_SEEN, str(tmp_path / "target")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
    )
    assert run.stdout.split() == seen, run.stderr[-2000:]


@pytest.mark.parametrize("refused", [["link"], ["link", "symlink"]])
def test_without_links_of_one_kind_the_next_kind_is_used(tmp_path, monkeypatch, refused):
    published_source(tmp_path / "source")

    def refuse(*_):
        raise OSError("not on this file system")

    for name in refused:
        monkeypatch.setattr(adopting.os, name, refuse)
    adopt(tmp_path / "source", tmp_path / "target")
    weights = tmp_path / "target" / "model.safetensors"
    assert weights.is_symlink() == ("symlink" not in refused)
    assert weights.read_bytes() == (tmp_path / "source" / "model.safetensors").read_bytes()


def test_the_package_carries_every_file_that_an_adopted_directory_copies():
    patterns = (ROOT / "pyproject.toml").read_text().split("internlm_xcomposer2 = [")[1].split("]")[0]
    carried = {path.name for pattern in patterns.split('"')[1::2] for path in ROOT.glob(pattern)}
    named = {"tokenizer_config.json", *describing._PROCESSOR_FILES}
    assert {name for name in named if (ROOT / name).is_file()} <= carried


def test_the_checkpoints_own_settings_survive(tmp_path):
    published_source(tmp_path / "source", changes={"use_cache": False, "max_length": 1234})
    for name, fields in {
        "generation_config.json": {"eos_token_id": 2, "max_length": 1600, "temperature": 0.5},
        "tokenizer_config.json": {"tokenizer_class": "Old", "padding_side": "left", "auto_map": {}},
    }.items():
        (tmp_path / "source" / name).write_text(json.dumps(fields))
    adoption = adopt(tmp_path / "source", tmp_path / "target")
    assert not adoption.notes
    config = read_json(tmp_path / "target" / "config.json")
    assert config["max_length"] == 1234 and config["text_config"]["use_cache"] is False
    generation = read_json(tmp_path / "target" / "generation_config.json")
    assert generation == {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [2, 5], "temperature": 0.5}
    tokenizer = read_json(tmp_path / "target" / "tokenizer_config.json")
    assert tokenizer["padding_side"] == "left" and tokenizer["tokenizer_class"].startswith("InternLM")
    assert "tokenization_internlm_xcomposer2" in tokenizer["auto_map"]["AutoTokenizer"][0]


@pytest.mark.parametrize("version", ["2", "2-4khd", "2.5"])
def test_the_processor_is_the_checkpoints_own(tmp_path, version):
    """Not the package's, whose files it is written from: same prompts and pixels as `chat`."""
    model = published_source(tmp_path / "source", version)
    adopt(tmp_path / "source", tmp_path / "target")
    processor = AutoProcessor.from_pretrained(tmp_path / "target", trust_remote_code=True)
    picture = Image.effect_noise((90, 200), 60).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    expected = model.prepare_chat(processor.tokenizer, "<ImageHere>What?", [picture], None, [], "")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    template = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
    assert (tmp_path / "target" / "chat_template.jinja").read_text(encoding="utf-8") == template


# ---- published files that say little ----


@pytest.mark.parametrize("model_type", ["internlmxcomposer2", "internlm2", "internlm", "unheard-of", ...])
def test_any_model_type(tmp_path, model_type):
    model = published_source(tmp_path / "source", changes={"model_type": model_type})
    adopt(tmp_path / "source", tmp_path / "target")
    assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path / "target")), logits_of(model))


def test_without_a_configuration_everything_but_the_heads_is_in_the_weights(tmp_path, capsys):
    wide = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    tower = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 96, "num_hidden_layers": 1}
    tower |= {"image_size": 112, "patch_size": 14}
    adapters = {"sft": 3, "web": 5}
    model = tiny_model("2.5", **wide, vision_config=tower, task_adapters=adapters, image_token_id=None)
    write_published(tmp_path / "source", published_weights(model), {}, kind="bin")
    (tmp_path / "source" / "config.json").unlink()
    with pytest.raises(OSError, match=f"ixc2 adopt {tmp_path / 'source'}$"):
        InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "source")
    notes = " ".join(adopt(tmp_path / "source", tmp_path / "target").notes)
    assert "no config.json" in notes and "assumed 2 attention heads of width 128" in notes
    assert "no tokenizer.model" in notes and "no generation_config.json" in notes
    loaded = AutoModel.from_pretrained(tmp_path / "target")
    assert loaded.config.task_adapters == adapters and loaded.config.num_key_value_heads == 1
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-6)


def test_an_unknown_number_of_heads_is_asked_for(tmp_path):
    model = published_source(
        tmp_path / "source", changes={"num_attention_heads": ..., "num_key_value_heads": ...}
    )
    line = f"ixc2 adopt {tmp_path / 'source'} --num-attention-heads N"
    with pytest.raises(ValueError, match=f"{line}$"):
        AutoModel.from_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=f"{line}$"):
        adopt(tmp_path / "source", tmp_path / "target")
    arguments = ["adopt", str(tmp_path / "source"), str(tmp_path / "target"), "--num-attention-heads", "4"]
    assert main(arguments) == 0
    assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path / "target")), logits_of(model))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_without_an_index_get_one(tmp_path, kind):
    model = published_source(tmp_path / "source", shards=3, kind=kind)
    (index,) = (tmp_path / "source").glob("*.index.json")
    recorded = read_json(index)["weight_map"]
    index.unlink()
    with pytest.raises(FileNotFoundError, match=f"no index.*ixc2 adopt {tmp_path / 'source'}$"):
        AutoModel.from_pretrained(tmp_path / "source")
    assert "no shard index" in adopt(tmp_path / "source", tmp_path / "target").notes
    assert read_json(tmp_path / "target" / index.name)["weight_map"] == recorded
    assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path / "target")), logits_of(model))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_weights_keep_their_names_and_their_quantiser(tmp_path, method):
    quantiser = {"quant_method": method, "bits": 4, "group_size": 16}
    silent = {"intermediate_size": ..., "num_key_value_heads": ..., "quantization_config": quantiser}
    weights, plain = pack_checkpoint(published_weights(tiny_model("2.5")), method)
    published_source(tmp_path / "source", changes=silent, weights=weights, shards=2)
    (tmp_path / "source" / "quantize_config.json").write_text("{}")
    findings = adopt(tmp_path / "source", tmp_path / "target").findings
    assert quantisation_of(findings) == {"method": method, "bits": 4, "group_size": 16, "num_linears": 10}
    fields = read_json(tmp_path / "target" / "config.json")
    assert fields["quantization_config"] == quantiser
    assert fields["text_config"]["intermediate_size"] == 64
    assert fields["text_config"]["num_key_value_heads"] == 2
    assert (tmp_path / "target" / "quantize_config.json").is_file()
    published_source(tmp_path / "plain", weights=plain)
    adopted = AutoModel.from_pretrained(tmp_path / "target", trust_remote_code=True, dtype="float32")
    unpacked = AutoModel.from_pretrained(tmp_path / "plain", trust_remote_code=True, dtype="float32")
    assert torch.equal(logits_of(adopted), logits_of(unpacked))


# ---- running twice ----


def test_a_second_run_finds_everything_in_place(tmp_path, capsys):
    published_source(tmp_path / "source", kind="bin", shards=2)
    command = ["adopt", str(tmp_path / "source"), str(tmp_path / "target"), "--convert"]
    assert main(command) == 0
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "target").iterdir()}
    assert f"wrote {len(times) - 1} files" in capsys.readouterr().out  # the record is not counted
    assert main(command) == 0 and "everything is in place" in capsys.readouterr().out
    assert main(command[:3]) == 0  # converted weights stay
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "target").iterdir()} == times


def test_a_second_run_completes_and_leaves_changes_alone(tmp_path):
    published_source(tmp_path / "source", kind="bin", shards=2)
    target = tmp_path / "target"
    adopt(tmp_path / "source", target, convert_bin=True)
    before = content_of(target)
    shard = target / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    (target / "config.json").unlink()
    (target / "generation_config.json").write_text("{}")
    adoption = adopt(tmp_path / "source", target, convert_bin=True)
    assert set(adoption.written) == {shard.name, "config.json"}
    assert adoption.kept == ("generation_config.json",)
    changed = {"generation_config.json", adopting.MARKER}
    after = content_of(target)
    assert {name: digest for name, digest in after.items() if name not in changed} == {
        name: digest for name, digest in before.items() if name not in changed
    }
    assert adopt(tmp_path / "source", target).kept == ("generation_config.json",)
    (target / "generation_config.json").unlink()
    assert adopt(tmp_path / "source", target).written == ("generation_config.json",)
    assert content_of(target).keys() == before.keys()


def test_a_later_conversion_replaces_the_links(tmp_path):
    model = published_source(tmp_path / "source", kind="bin", shards=2)
    before = content_of(tmp_path / "source")
    adopt(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target" / "pytorch_model.bin.index.json").is_file()
    adoption = adopt(tmp_path / "source", tmp_path / "target", convert_bin=True)
    assert "pytorch_model.bin.index.json" in adoption.removed
    assert not list((tmp_path / "target").glob("pytorch_model*"))
    assert content_of(tmp_path / "source") == before
    assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path / "target")), logits_of(model))


# ---- what is rejected ----


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


FAULTS = {
    "no weights": ({}, lambda s, t: (s / "model.safetensors").unlink(), "no weights in"),
    "no directory": ({}, lambda s, t: shutil.rmtree(s), "is not a directory"),
    "lost shard": (
        {"shards": 3},
        lambda s, t: (s / "model-00002-of-00003.safetensors").unlink(),
        "lacks 1 of its 3 shards: model-00002-of-00003",
    ),
    "cut safetensors": ({}, lambda s, t: _truncate(s / "model.safetensors"), "read as a weight file"),
    "cut bin": ({"kind": "bin"}, lambda s, t: _truncate(s / "pytorch_model.bin"), "read as a weight file"),
    "broken index": (
        {"shards": 2},
        lambda s, t: (s / "model.safetensors.index.json").write_text("{}"),
        "can't be read as a shard index",
    ),
    "index of another": (
        {"shards": 2},
        lambda s, t: _name_in_index(s / "model.safetensors.index.json"),
        "names 1 tensors that are in no shard: lost.weight",
    ),
    "broken config": ({}, lambda s, t: (s / "config.json").write_text("{"), "is not JSON.*ixc2 adopt"),
    "another model": (
        {"weights": {"lm_head.weight": torch.ones(2, 2)}},
        lambda s, t: None,
        "not an InternLM-XComposer2 checkpoint: its 1 tensors lack",
    ),
    "another vocabulary": (
        {},
        lambda s, t: (s / "tokenizer.model").write_bytes(b"nothing"),
        "tokenizer.model",
    ),
    "full target": ({}, lambda s, t: _fill(t), "holds files that were not adopted; empty it"),
    "file as target": ({}, lambda s, t: t.write_text("x"), "is a file; choose another"),
    "a folder in the way": (
        {},
        lambda s, t: (t.with_name("target.partial") / "mine").mkdir(parents=True),
        "target.partial holds other files; move it away",
    ),
}


def _name_in_index(index: Path) -> None:
    content = read_json(index)
    content["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))


def _fill(target: Path) -> None:
    target.mkdir()
    (target / "mine.txt").write_text("mine")


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_nothing_is_written(tmp_path, fault, capsys):
    kwargs, spoil, message = FAULTS[fault]
    source, target = tmp_path / "source", tmp_path / "target"
    published_source(source, **kwargs)
    spoil(source, target)
    before = content_of(tmp_path), sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=message):
        adopt(source, target, convert_bin=True)
    assert (content_of(tmp_path), sorted(tmp_path.iterdir())) == before
    assert main(["adopt", str(source), str(target)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("ixc2: ") and not captured.out


def test_source_and_target_must_be_separate(tmp_path):
    source = tmp_path / "a" / "source"
    published_source(source)
    (tmp_path / "link").symlink_to(source)
    for target in (source, source / "inner", tmp_path / "a", tmp_path / "link", tmp_path / "link" / "inner"):
        with pytest.raises(ValueError, match="inside the other; choose another target"):
            adopt(source, target)


def test_a_target_adopted_from_elsewhere_is_left_alone(tmp_path):
    for name in ("one", "two"):
        published_source(tmp_path / name)
    adopt(tmp_path / "one", tmp_path / "target")
    before = content_of(tmp_path)
    with pytest.raises(FileExistsError, match="was adopted from .*one, not from .*two"):
        adopt(tmp_path / "two", tmp_path / "target")
    assert content_of(tmp_path) == before


def test_a_damaged_record_is_named(tmp_path):
    published_source(tmp_path / "source")
    adopt(tmp_path / "source", tmp_path / "target")
    (tmp_path / "target" / adopting.MARKER).write_text("{}")
    with pytest.raises(FileExistsError, match="is damaged; delete"):
        adopt(tmp_path / "source", tmp_path / "target")


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch, again):
    published_source(tmp_path / "source", kind="bin", shards=2)
    target = tmp_path / "target"
    if again:
        adopt(tmp_path / "source", target)
    before = content_of(tmp_path)
    save = converting.save_file

    def fail_at_the_second(tensors, path, **kwargs):
        if "00002" in path.name:
            raise OSError("disk full")
        save(tensors, path, **kwargs)

    monkeypatch.setattr(converting, "save_file", fail_at_the_second)
    with pytest.raises(OSError, match="disk full"):
        adopt(tmp_path / "source", target, convert_bin=True)
    assert content_of(tmp_path) == before and target.exists() == again


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    published_source(tmp_path / "source", kind="bin")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(adopting.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    adopt(tmp_path / "source", tmp_path / "linked")  # links need no room
    with pytest.raises(OSError, match=r"needs 0\.00 GB and .* has 0\.00 GB free; make room"):
        adopt(tmp_path / "source", tmp_path / "target", convert_bin=True)
    assert not (tmp_path / "target").exists()


def test_a_given_tokenizer_replaces_a_missing_one(tmp_path):
    published_source(tmp_path / "source", tokenizer=False)
    with pytest.raises(FileNotFoundError, match="--tokenizer needs a tokenizer.model"):
        adopt(tmp_path / "source", tmp_path / "target", tokenizer=tmp_path / "none")
    adopt(tmp_path / "source", tmp_path / "target", tokenizer=ROOT / "tokenizer.model")
    adopt(tmp_path / "source", tmp_path / "target")  # this must not remove it again
    assert (tmp_path / "target" / "tokenizer.model").read_bytes() == (ROOT / "tokenizer.model").read_bytes()


def test_the_default_target_is_named_after_the_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        default_target("internlm/internlm-xcomposer2d5-7b", "") == tmp_path / "internlm-xcomposer2d5-7b-ixc2"
    )
    assert default_target("owner/ol", "base") == tmp_path / "ol-base-ixc2"
    published_source(tmp_path / "in" / "source")
    assert main(["adopt", "in/source"]) == 0 and (tmp_path / "source-ixc2" / "config.json").is_file()
