"""`ixc2 inspect` and `ixc2 adopt` on checkpoints of the first generation, and their 4-bit weights."""

import json
import os
import subprocess
import sys

import pytest
import torch
from first_generation import needs_first_tokenizer, picture, published_fields, recipe_state_dict, write_first
from helpers import read_json
from internlm_xcomposer2 import InternLMXComposerForCausalLM
from internlm_xcomposer2.ixc2.adopt import adopt
from internlm_xcomposer2.ixc2.main import main
from internlm_xcomposer2.quantization_internlm_xcomposer2 import PackedLinear

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


def pack(weight: torch.Tensor, group_size: int = 32) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight (out, in) in GPTQ's first format, 4 bits, and what it unpacks to."""
    outputs, inputs = weight.shape
    groups = weight.view(outputs, -1, group_size)
    scales = (groups.abs().amax(-1) / 7).half().float().clamp(min=1e-4).half().float()
    integers = (groups / scales[..., None]).round().clamp(-8, 7) + 8
    plain = ((integers - 8) * scales[..., None]).view(outputs, inputs)
    codes = integers.view(outputs, inputs).T.to(torch.int64)  # (in, out)
    shifts = torch.arange(0, 32, 4)
    words = (codes.view(inputs // 8, 8, outputs) << shifts[None, :, None]).sum(1)
    zeros = torch.full((inputs // group_size, outputs // 8), 0x77777777, dtype=torch.int64)
    return {
        "qweight": _int32(words),
        "qzeros": _int32(zeros),
        "scales": scales.T.contiguous().half(),
        "g_idx": (torch.arange(inputs) // group_size).int(),
    }, plain


def _int32(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).int()


def packed_checkpoint(directory):
    """A merged checkpoint with packed decoder linears, as the published one, and the plain weights in it."""
    weights, plain = dict(recipe_state_dict(lora=False)), {}
    for name in [name for name in weights if ".layers." in name and name.endswith("_proj.weight")]:
        linear = name.removesuffix(".weight")
        parts, plain[name] = pack(weights.pop(name))
        weights |= {f"{linear}.{part}": value for part, value in parts.items()}
        if ".mlp." in name:  # some packers write a bias of zeros
            weights[f"{linear}.bias"] = torch.zeros(len(plain[name]))
    directory.mkdir()
    torch.save(weights, directory / "gptq_model-4bit-32g.bin")
    (directory / "config.json").write_text(json.dumps(published_fields(lora=False)))
    says = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "model_file_base_name": None}
    (directory / "quantize_config.json").write_text(json.dumps(says))
    return plain


def test_gptq_weights_stay_packed_and_give_the_numbers_of_what_they_unpack_to(tmp_path):
    plain = packed_checkpoint(tmp_path / "packed")
    write_first(tmp_path / "plain", lora=False, state_dict={**recipe_state_dict(lora=False), **plain})
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
