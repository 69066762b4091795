"""`ixc2 inspect` and `ixc2 adopt` on checkpoints of the first generation, and their 4-bit weights."""

import json
import os
import subprocess
import sys

import pytest
import torch
from first_generation import needs_first_tokenizer, picture, published_fields, recipe_state_dict, write_first
from helpers import ROOT, read_json
from internlm_xcomposer2 import InternLMXComposerForCausalLM
from internlm_xcomposer2.ixc2.adopt import adopt
from internlm_xcomposer2.ixc2.main import main
from internlm_xcomposer2.ixc2.quantize import quantize
from internlm_xcomposer2.quantization_internlm_xcomposer2 import PackedLinear
from packers import pack_checkpoint
from safetensors.torch import load_file
from transformers import AutoModel

LOAD = """
import sys
from transformers import AutoModel, AutoProcessor, AutoTokenizer
source, image = sys.argv[1:]
model = AutoModel.from_pretrained(source, trust_remote_code=True, dtype="float32").eval()
model.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
assert "internlm_xcomposer2" not in sys.modules
print(processor.version, model.generate("Who?", image, num_beams=1, max_new_tokens=4))
"""


@pytest.mark.parametrize("lora", [True, False])
def test_inspect_describes_a_checkpoint(tmp_path, capsys, lora):
    write_first(tmp_path / "source", lora=lora)
    assert main(["inspect", str(tmp_path / "source"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["version"], report["missing"], report["unknown"]) == ("1.0", [], [])
    assert report["pictures"][0]["tokens"] == 66
    assert ("low-rank weights" in report["parameters"]) == lora
    assert "other" not in report["parameters"]
    main(["inspect", str(tmp_path / "source")])
    text = capsys.readouterr().out
    expected = "rank 8, alpha 12, on q, v, ffn" if lora else "none, or folded"
    assert f"low-rank weights: {expected}" in text


def test_inspect_lists_what_is_missing(tmp_path, capsys):
    weights = {k: v for k, v in recipe_state_dict().items() if k != "ln_vision.weight"}
    write_first(tmp_path / "source", state_dict=weights)
    main(["inspect", str(tmp_path / "source"), "--json"])
    assert json.loads(capsys.readouterr().out)["missing"] == ["ln_vision.weight (44)"]


@needs_first_tokenizer
def test_an_adopted_directory_answers_without_the_package(tmp_path):
    write_first(tmp_path / "source")
    adopt(tmp_path / "source", tmp_path / "target")
    config = read_json(tmp_path / "target" / "config.json")
    assert config["auto_map"]["AutoModel"] == "modeling_internlm_xcomposer.InternLMXComposerForCausalLM"
    assert config["internlm_lora"]["lora_alpha"] == 12
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    arguments = [sys.executable, "-c", LOAD, str(tmp_path / "target"), picture("inputs/small.png")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    model = InternLMXComposerForCausalLM.from_pretrained(tmp_path / "source", dtype="float32").eval()
    from internlm_xcomposer2 import InternLMXComposerTokenizer

    model.tokenizer = InternLMXComposerTokenizer.from_pretrained(tmp_path / "source")
    answer = model.generate("Who?", picture("inputs/small.png"), num_beams=1, max_new_tokens=4)
    assert done.stdout.strip() == f"1.0 {answer}".strip()


# ---- 4 bits ----


def packed_checkpoint(directory):
    """A merged checkpoint with packed decoder linears, as the published one, and the plain weights in it."""
    options = {"group_size": 32, "suffix": "", "symmetric": (".weight",)}
    weights, plain = pack_checkpoint(recipe_state_dict(lora=False), "gptq", **options)
    for name in [name for name in weights if ".mlp." in name and name.endswith(".scales")]:
        bias = name.replace(".scales", ".bias")
        weights[bias] = torch.zeros(weights[name].shape[1])  # some packers write it
    directory.mkdir()
    torch.save(weights, directory / "gptq_model-4bit-32g.bin")
    (directory / "config.json").write_text(json.dumps(published_fields(lora=False)))
    says = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "model_file_base_name": None}
    (directory / "quantize_config.json").write_text(json.dumps(says))
    return plain


def test_gptq_weights_stay_packed_and_give_the_numbers_of_what_they_unpack_to(tmp_path):
    plain = packed_checkpoint(tmp_path / "packed")
    write_first(tmp_path / "plain", lora=False, state_dict=plain)
    packed = InternLMXComposerForCausalLM.from_pretrained(tmp_path / "packed", dtype="float32").eval()
    expected = InternLMXComposerForCausalLM.from_pretrained(tmp_path / "plain", dtype="float32").eval()
    linears = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 2 * 7
    inputs = {"input_ids": torch.arange(1, 40)[None]}
    with torch.no_grad():
        wanted = expected(**inputs).logits
        torch.testing.assert_close(packed(**inputs).logits, wanted, rtol=0, atol=1e-3)
    assert torch.equal(packed(**inputs).logits.argmax(-1), wanted.argmax(-1))
    packed.save_pretrained(tmp_path / "saved")
    again = InternLMXComposerForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, packed(**inputs).logits, rtol=0, atol=1e-5)
    unpacked = packed.dequantize()
    name = "internlm_model.model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(unpacked.state_dict()[name], plain[name], rtol=0, atol=1e-6)
    bias = unpacked.state_dict()[name.replace("weight", "bias")]
    torch.testing.assert_close(bias, recipe_state_dict()[name.replace("weight", "bias")], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("bits", "spread"), [(4, 0.15), (8, 0.01)])
@pytest.mark.parametrize("lora", [True, False])
def test_quantised_checkpoints_hold_what_is_folded(tmp_path, capsys, bits, spread, lora):
    source, target = write_first(tmp_path / "source", lora=lora), tmp_path / "target"
    assert main(["quantize", str(source), str(target), "--bits", str(bits), "--group-size", "32"]) == 0
    assert f"14 linears in {bits} bits" in capsys.readouterr().out
    written = {
        name: value for file in target.glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert not any("lora_" in name for name in written)
    assert read_json(target / "config.json")["internlm_lora"] is None
    inputs = {"input_ids": torch.arange(1, 40)[None]}
    loaded = AutoModel.from_pretrained(target, trust_remote_code=True, dtype="float32").eval()
    linears = [module for module in loaded.modules() if type(module).__name__ == "PackedLinear"]
    assert len(linears) == 14 and {module.bits for module in linears} == {bits}
    folded = InternLMXComposerForCausalLM.from_pretrained(source, dtype="float32")
    plain = InternLMXComposerForCausalLM.from_pretrained(target, dtype="float32", dequantize=True).eval()
    weights = plain.state_dict()
    for name, weight in folded.state_dict().items():
        most = spread * weight.std() if ".layers." in name and name.endswith("_proj.weight") else 0
        assert (weights[name] - weight).square().mean().sqrt() <= most, name
    torch.testing.assert_close(loaded(**inputs).logits, plain(**inputs).logits, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="quantised already"):
        quantize(target, tmp_path / "again")


def test_bitsandbytes_quantises_what_is_folded(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    write_first(tmp_path / "source")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = InternLMXComposerForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["internlm_model.model.layers.0.self_attn.q_proj"] == "Linear4bit"
    assert kinds["internlm_model.lm_head"] == kinds["internlm_proj"] == "Linear"
    assert kinds["visual_encoder.encoder.layers.0.mlp.fc1"] == "Linear"


@pytest.mark.parametrize(
    "command", [["ask", str(ROOT / "examples" / "star.png"), "Who?"], ["page", "A page."]]
)
def test_commands_that_ask_say_that_they_ask_other_versions(tmp_path, capsys, command):
    write_first(tmp_path / "source")
    name, *arguments = command
    assert main([name, "--model", str(tmp_path / "source"), *arguments]) == 1
    assert "is of version 1.0, whose methods these commands don't know" in capsys.readouterr().err
