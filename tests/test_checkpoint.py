"""Checkpoints as they are on disk: formats, dtypes, devices, faults, and the way back."""

import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import (
    FAMILIES,
    ROOT,
    family_config,
    flat_config,
    logits_of,
    published_config,
    published_weights,
    recipe_state_dict,
    tiny_config,
    tiny_model,
    write_checkpoint,
    write_published,
)
from internlm_xcomposer2 import (
    InternLMXcomposer2Config,
    InternLMXComposer2ForCausalLM,
    InternLMXComposer2Tokenizer,
)
from internlm_xcomposer2.configuration_internlm_xcomposer2 import PUBLISHED_MODEL_TYPES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer


@pytest.mark.parametrize("version", ["2", "2-4khd", "2.5"])
@pytest.mark.parametrize(("kind", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 2)])
def test_every_format_of_the_published_layout(tmp_path, version, kind, shards):
    adapters = {"sft": 3, "dpo": 2, "web": 5} if version == "2.5" else {}
    ranks = {"plora_wqkv_rank": 2, "plora_wqkv_alpha": 4} if version == "2-4khd" else {}
    model = tiny_model(version, task_adapters=adapters, **ranks)
    weights = published_weights(model)
    weights = {name: value for name, value in weights.items() if "post_layernorm" not in name}
    tower = "vit.vision_tower.vision_model.embeddings"
    weights[f"{tower}.position_ids"] = torch.arange(17)[None]
    fields = flat_config(model)
    del fields["num_key_value_heads"]
    write_published(tmp_path, weights, fields, shards=shards, kind=kind)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert loaded.config.version == version and loaded.config.task_adapters == adapters
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_is_exact(family, checkpoint, family_model, tmp_path):
    model = family_model(family)
    model.save_pretrained(tmp_path)
    saved, original = load_file(tmp_path / "model.safetensors"), recipe_state_dict(family)
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_a_model_made_from_a_configuration_saves_published_names(tmp_path):
    model = tiny_model("2.5")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(published_weights(model)) and len(set(index.values())) > 1
    again = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(tmp_path, argument, dtype):
    tiny_model("2.5").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, **{argument: dtype})
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.dtype == dtype and logits_of(model).isfinite().all()


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_implementations_reach_tower_and_decoder(tmp_path, name):
    tiny_model("2.5").save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation=name)
    found = (model.config, model.model.config, model.vit.vision_tower.config)
    assert {config._attn_implementation for config in found} == {name}
    torch.testing.assert_close(logits_of(model), logits_of(tiny_model("2.5")), rtol=0, atol=1e-5)
    model.set_attn_implementation("eager" if name == "sdpa" else "sdpa")
    assert model.model.config._attn_implementation != name


def test_flash_attention_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    tiny_model("2.5").save_pretrained(tmp_path)
    names = InternLMXComposer2ForCausalLM.__init__.__globals__["check_attention"].__globals__
    monkeypatch.setitem(names, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setitem(names, "is_kernels_available", lambda: False)
    with pytest.raises(ValueError, match="use .sdpa.*pip install flash-attn"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


DEVICE_MAPS = {
    "by hand": {"": "cpu"},
    "disk": {
        "vit": "cpu",
        "vision_proj": "disk",
        "plora_glb_GN": "cpu",
        "plora_sub_GN": "cpu",
        "model.tok_embeddings": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "output": "disk",
    },
    "auto": "auto",
}


@pytest.mark.parametrize("kind", DEVICE_MAPS)
def test_device_maps_give_the_same_logits(tmp_path, kind):
    reference = tiny_model("2.5")
    reference.save_pretrained(tmp_path / "model")
    kwargs = {"device_map": DEVICE_MAPS[kind], "offload_folder": tmp_path / "offload"}
    if kind == "auto":
        kwargs["max_memory"] = {"cpu": "120KB"}
    model = AutoModel.from_pretrained(tmp_path / "model", **kwargs)
    if kind != "by hand":
        assert "disk" in model.hf_device_map.values()
    torch.testing.assert_close(logits_of(model), logits_of(reference), rtol=0, atol=1e-6)
    prompt = torch.tensor([[1, 60, 70]])
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    assert torch.equal(model.generate(prompt, **settings), reference.generate(prompt, **settings))


@pytest.mark.parametrize("version", ["2", "2.5"])
def test_a_wholly_offloaded_model_answers(tmp_path, version):
    reference = tiny_model(version)
    reference.save_pretrained(tmp_path / "model")
    kwargs = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    model = AutoModel.from_pretrained(tmp_path / "model", **kwargs)
    assert model.device.type == "meta" and model.input_device.type == "cpu"
    tokenizer = InternLMXComposer2Tokenizer(str(ROOT / "tokenizer.model"))
    call = (tokenizer, "<ImageHere>what?", torch.rand(3, 60, 80))
    settings = {"do_sample": False, "max_new_tokens": 4}
    assert model.chat(*call, **settings) == reference.chat(*call, **settings)


def test_missing_and_unknown_tensors_are_listed(tmp_path):
    model = tiny_model("2.5")
    weights = published_weights(model)
    weights["head.weight"] = weights.pop("output.weight")[:1]
    write_published(tmp_path, weights, flat_config(model))
    with pytest.raises(ValueError, match=r"1 missing: output\.weight.*1 unexpected: head\.weight"):
        AutoModel.from_pretrained(tmp_path)


def test_a_tensor_of_another_shape_is_listed(tmp_path):
    model = tiny_model("2.5")
    weights = published_weights(model)
    weights["model.norm.weight"] = torch.ones(7)
    write_published(tmp_path, weights, flat_config(model))
    with pytest.raises(ValueError, match=r"1 of another shape: .*model\.norm\.weight"):
        AutoModel.from_pretrained(tmp_path)


def test_other_checkpoints_are_rejected(tmp_path):
    write_published(tmp_path, {"lm_head.weight": torch.ones(2, 2)}, published_config("2"))
    with pytest.raises(ValueError, match="not an InternLM-XComposer2 checkpoint: its 1 tensors lack"):
        AutoModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match="can't be read as a weight file"):
        AutoModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights in"):
        AutoModel.from_pretrained(tmp_path)


def test_a_lost_shard_is_named(tmp_path):
    model = tiny_model("2.5")
    write_published(tmp_path, published_weights(model), flat_config(model), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of its 3 shards: model-00002-of-00003"):
        AutoModel.from_pretrained(tmp_path)


TEXT_ONLY = {
    "configuration_internlm2.py": """
from transformers import PreTrainedConfig


class InternLM2Config(PreTrainedConfig):
    model_type = "internlm2"

    def __init__(self, width=6, **kwargs):
        self.width = width
        super().__init__(**kwargs)
""",
    "modeling_internlm2.py": """
from torch import nn
from transformers import PreTrainedModel

from .configuration_internlm2 import InternLM2Config


class InternLM2ForCausalLM(PreTrainedModel):
    config_class = InternLM2Config

    def __init__(self, config):
        super().__init__(config)
        self.only = nn.Linear(config.width, 2)
        self.post_init()
""",
    "tokenization_internlm2.py": """
from transformers import PreTrainedTokenizer


class InternLM2Tokenizer(PreTrainedTokenizer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    vocab_size = 3

    def get_vocab(self):
        return {"a": 0, "b": 1, "c": 2}
""",
}


def test_text_only_checkpoints_of_the_same_model_type_load_with_their_own_code(tmp_path):
    """Their configuration, model and tokenizer come with them, and load only with the caller's consent."""
    names = {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    }
    fields = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    auto_map = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    save_file({"only.weight": torch.ones(2, 6), "only.bias": torch.ones(2)}, tmp_path / "model.safetensors")
    for name, source in TEXT_ONLY.items():
        (tmp_path / name).write_text(source)
    loaded = [
        kind.from_pretrained(tmp_path, trust_remote_code=True)
        for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer)
    ]
    assert loaded[0].width == 6 and torch.equal(loaded[1].only.weight, torch.ones(2, 6))
    assert all(type(each).__module__.startswith("transformers_modules.") for each in loaded)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("model_type", PUBLISHED_MODEL_TYPES)
def test_published_files_are_read_by_this_code_whatever_they_call_themselves(tmp_path, model_type):
    model = tiny_model("2.5")
    fields = {**flat_config(model), "model_type": model_type}
    for given in (
        fields,
        {name: value for name, value in fields.items() if name != "architectures"},
        {**fields, "auto_map": {"AutoConfig": "configuration_internlm_xcomposer.InternLMXcomposer2Config"}},
    ):
        write_published(tmp_path, published_weights(model), given)
        for trust in ({}, {"trust_remote_code": True}):
            config, unused = AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, x=1, **trust)
            assert type(config) is InternLMXcomposer2Config and unused == {"x": 1}
        assert type(AutoModel.from_pretrained(tmp_path)) is InternLMXComposer2ForCausalLM


def test_configuration_takes_flat_and_nested_fields():
    flat = InternLMXcomposer2Config(**family_config("vl")["config"])
    assert (flat.version, flat.img_size, flat.max_length, flat.hidden_size) == ("2", 490, 4096, 64)
    nested = InternLMXcomposer2Config(**flat.to_dict())
    assert nested.to_dict() == flat.to_dict()
    nested.use_cache = False
    assert nested.text_config.use_cache is False and flat.text_config.use_cache is True
    assert flat.get_text_config() is flat.text_config and flat != flat.get_text_config()
    assert InternLMXcomposer2Config(version="2.5").task_adapters == {"sft": 256, "dpo": 256, "web": 512}
    khd = InternLMXcomposer2Config(version="2-4khd")
    assert (khd.plora_wqkv_rank, khd.plora_wqkv_alpha, khd.plora_rank, khd.hd_num) == (8, 16, 256, 25)


def test_the_callers_settings_survive_loading(tmp_path):
    tiny_model("2.5").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.use_cache, config.max_length = False, 77
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert model.config.use_cache is False and model.max_length == 77
    generated = model.generate(torch.tensor([[1, 60]]), max_new_tokens=2, do_sample=False)
    assert generated.shape[1] <= 4


def test_generation_stops_at_the_end_of_a_turn(checkpoint):
    model = AutoModel.from_pretrained(checkpoint("2"))
    assert model.generation_config.eos_token_id == [2, 92542]
    assert model.generation_config.max_length is None


def test_generation_stops_even_if_the_configuration_names_no_end(tmp_path):
    model = tiny_model("2.5")
    fields = flat_config(model)
    del fields["eos_token_id"]
    write_published(tmp_path, published_weights(model), fields)
    assert AutoModel.from_pretrained(tmp_path).generation_config.eos_token_id == [2, 5]


REMOTE = """
import socket, sys
import torch
real = socket.socket.connect
def refuse(self, address):
    if self.family != socket.AF_UNIX:
        raise AssertionError(f"reached for the network: {address}")
    return real(self, address)
socket.socket.connect = refuse
socket.getaddrinfo = lambda *a, **k: (_ for _ in ()).throw(AssertionError("resolved a name"))
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
source, target = sys.argv[1:]
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
model = AutoModel.from_pretrained(source, trust_remote_code=True, torch_dtype=torch.float32)
assert "transformers_modules" in type(model).__module__, type(model)
assert "internlm_xcomposer2" not in sys.modules
causal = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
assert type(causal).__name__ == type(model).__name__
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
picture = torch.rand(3, 60, 80)
answer, history = model.chat(tokenizer, "Is it there?", picture, max_new_tokens=3, do_sample=False)
assert history == [("Is it there?", answer)]
model.save_pretrained(target)
again = AutoModel.from_pretrained(target, trust_remote_code=True)
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
print("answered:", answer)
"""


@pytest.mark.slow
def test_remote_code_beside_a_checkpoint_without_network(tmp_path):
    source = tmp_path / "checkpoint"
    model = tiny_model("2.5")
    fields = {**flat_config(model), "auto_map": published_config("2")["auto_map"]}
    write_published(source, published_weights(model), fields)
    for path in [*ROOT.glob("*.py"), ROOT / "tokenizer.model", ROOT / "tokenizer_config.json"]:
        if path.name != "__init__.py":
            shutil.copy(path, source)
    command = [sys.executable, "-I", "-c", REMOTE, str(source), str(tmp_path / "saved")]
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "answered:" in result.stdout


def test_an_unknown_version_is_rejected():
    with pytest.raises(ValueError, match="unknown version '3'.*2, 2-4khd, 2.5"):
        tiny_config("3")


def test_a_written_checkpoint_is_what_loading_reads(tmp_path, family_model):
    directory = write_checkpoint(tmp_path / "2", "2", model_type="internlmxcomposer2")
    config = AutoConfig.from_pretrained(directory)
    assert type(config) is InternLMXcomposer2Config and config.version == "2"


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_type_of_the_file_can_be_requested(name):
    for kind in (InternLMXComposer2ForCausalLM, AutoModel):
        model = kind.from_pretrained(ROOT, **{name: "auto"})
        assert model.dtype == model.config.dtype == torch.float32


# ---- task adapters ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modes", "names"),
    [(None, {"sft", "dpo", "web"}), (("web",), {"web"}), (["write"], {"sft", "dpo"}), ((), set())],
)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_only_the_requested_adapters_are_loaded(tmp_path, caplog, monkeypatch, kind, modes, names):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    write_published(tmp_path, recipe_state_dict("2d5"), published_config("2d5"), kind=kind)
    whole = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path)
    model, info = InternLMXComposer2ForCausalLM.from_pretrained(
        tmp_path, adapters=modes, output_loading_info=True
    )
    kept = {name: p for name, p in whole.named_parameters() if adapter_of(name) in {None, *names}}
    found = dict(model.named_parameters())
    assert found.keys() == kept.keys() and all(torch.equal(found[name], kept[name]) for name in found)
    assert set(model.config.task_adapters) == names and not info["unexpected_keys"]
    assert not any(record.levelname in ("WARNING", "ERROR") for record in caplog.records)
    assert torch.equal(logits_of(model), logits_of(whole))
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert set(saved["text_config"]["task_adapters"]) == names and "_skipped_adapters" not in saved
    again = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again), logits_of(whole))


def adapter_of(name: str) -> str | None:
    """`web` of `...lora_web_A.weight`."""
    return name.split(".lora_")[1].split("_")[0] if ".lora_" in name else None


def test_a_mode_that_was_not_loaded_names_the_argument(checkpoint):
    model = AutoModel.from_pretrained(checkpoint("2d5"), adapters=("web",))
    ids = torch.tensor([[1, 8, 9]])
    with torch.no_grad():
        model(ids, infer_mode="web")
        with pytest.raises(ValueError, match="'write' needs the adapters sft, dpo.*adapters"):
            model(ids, infer_mode="write")


@pytest.mark.parametrize(
    ("adapters", "kind", "words"),
    [
        (("sft",), ValueError, "'sft'; adapters accepts write and web"),
        (("base",), ValueError, "'base'; adapters accepts write and web"),
        ("web", TypeError, "sequence of modes.*'web'"),
        ((1,), TypeError, "sequence of modes"),
    ],
)
def test_wrong_adapters_are_named(checkpoint, adapters, kind, words):
    with pytest.raises(kind, match=words):
        InternLMXComposer2ForCausalLM.from_pretrained(checkpoint("2d5"), adapters=adapters)


def test_adapters_that_a_checkpoint_lacks_are_named(checkpoint):
    with pytest.raises(ValueError, match="web.*this checkpoint has none"):
        InternLMXComposer2ForCausalLM.from_pretrained(checkpoint("vl"), adapters=("web",))
