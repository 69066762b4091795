"""`ixc2 quantize`: the arithmetic, whole checkpoints in every layout on disk, memory, and refusals."""

import json
import sys

import pytest
import torch
from helpers import ROOT, tiny_model
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2Tokenizer
from internlm_xcomposer2.ixc2 import quantize as room
from internlm_xcomposer2.ixc2.main import main
from internlm_xcomposer2.ixc2.quantize import Settings, quantize, quantize_weight
from internlm_xcomposer2.packing_internlm_xcomposer2 import unpack_gptq
from internlm_xcomposer2.quantization_internlm_xcomposer2 import PackedLinear
from safetensors import safe_open
from safetensors.torch import load_file
from test_checkpoint import flat_config, logits_of, published_weights, write_published
from transformers import AutoModel, AutoTokenizer

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}


def unpacked(parts, settings):
    groups = parts["g_idx"].long()
    packed = parts["qweight"], parts["qzeros"], parts["scales"], groups
    return unpack_gptq(*packed, bits=settings.bits, zero_offset=1, dtype=torch.float32)


@pytest.fixture(scope="module")
def model():
    return tiny_model("2.5", task_adapters={"sft": 3, "dpo": 2, "web": 5}, **WIDE)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return write_published(folder, published_weights(model), flat_config(model))


# ---- one weight ----


@pytest.mark.parametrize(("bits", "method"), [(4, "hqq"), (4, "round"), (8, "round")])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_a_weight_changes_by_half_a_step_at_most(bits, group_size, method):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    settings = Settings(bits, group_size, method)
    parts = quantize_weight(weight.bfloat16(), settings)
    assert parts["scales"].dtype == torch.float16 and parts["qweight"].dtype == torch.int32
    step = parts["scales"].float().T.repeat_interleave(128 // len(parts["scales"]), dim=1)
    change = (unpacked(parts, settings) - weight.bfloat16().float()).abs()
    most = 0.51 if method == "round" else 2  # hqq cuts off a few of the largest values
    assert (change <= most * step).all()
    assert (change / step).square().mean().sqrt() < 0.32  # 1 / sqrt(12) is 0.29
    assert (parts["qzeros"] == (0x77777777 if bits == 4 else 0x7F7F7F7F)).all()


def test_hqq_changes_a_weight_less_than_rounding():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    errors = []
    for method in room.METHODS:
        settings = Settings(4, 64, method)
        errors.append((unpacked(quantize_weight(weight, settings), settings) - weight).square().mean())
    assert errors[0] < errors[1]


def test_a_weight_of_zeros_and_one_of_representable_values_are_exact():
    settings = Settings(4, -1, "round")
    assert not unpacked(quantize_weight(torch.zeros(16, 32), settings), settings).any()
    weight = torch.randint(-8, 8, (16, 32), generator=torch.Generator().manual_seed(0)).float() / 64
    weight[:, 0] = -8 / 64
    assert torch.equal(unpacked(quantize_weight(weight, settings), settings), weight)


# ---- whole checkpoints ----


@pytest.mark.parametrize(("kind", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 2)])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_file_format(tmp_path, model, kind, shards, bits):
    weights = published_weights(model)
    folder = write_published(tmp_path / "source", weights, flat_config(model), shards=shards, kind=kind)
    notes = quantize(folder, tmp_path / "target", bits=bits, max_shard_size="100KB")
    assert f"10 linears in {bits} bits" in notes[-1]
    files = sorted((tmp_path / "target").glob("*.safetensors"))
    assert len(files) > 1
    written = {name: value for file in files for name, value in load_file(file).items()}
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == written.keys()
    linears = [name for name in weights if room.LINEAR.search(name)]
    assert len(linears) == 10
    for name, value in weights.items():
        if name not in linears:
            assert torch.equal(written[name], value)
    assert sum(name.endswith(".linear.qweight") for name in written) == 10
    loaded = AutoModel.from_pretrained(tmp_path / "target", trust_remote_code=True, dtype="float32")
    settled = [module.settled for module in loaded.modules() if type(module).__name__ == "PackedLinear"]
    assert len(settled) == 10 and all(weight is not None and weight.bits == bits for weight in settled)
    expected = logits_of(model)
    assert (logits_of(loaded) - expected).std() < (0.3 if bits == 4 else 0.02) * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_computes_what_the_file_says(tmp_path, source, bits):
    quantize(source, tmp_path / "target", bits=bits)
    exact = InternLMXComposer2ForCausalLM.from_pretrained(
        tmp_path / "target", dtype="float32", dequantize=True
    )
    model = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "target", dtype="bfloat16")
    plain = InternLMXComposer2ForCausalLM.from_pretrained(
        tmp_path / "target", dtype="bfloat16", dequantize=True
    )
    expected = logits_of(exact)
    rounding = (logits_of(plain).float() - expected).std()
    assert (logits_of(model).float() - expected).std() < 1.5 * rounding
    for name, linear in model.named_modules():
        if isinstance(linear, PackedLinear):
            assert torch.equal(linear.weight, exact.get_submodule(name).weight)


def test_a_quantised_checkpoint_is_saved_and_read_again(tmp_path, source):
    quantize(source, tmp_path / "first", bits=8)
    model = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "first", dtype="float32")
    model.save_pretrained(tmp_path / "second")
    again = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "second", dtype="float32")
    assert torch.equal(logits_of(again), logits_of(model))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first if "linear" in name)


def test_the_command_writes_nano_in_4_bits(tmp_path, capsys):
    """It answers as before, in every type and with `trust_remote_code` alone."""
    assert main(["quantize", str(ROOT), str(tmp_path / "nano"), "--bits", "4"]) == 0
    assert "30 linears in 4 bits" in capsys.readouterr().out
    tokenizer = InternLMXComposer2Tokenizer(str(ROOT / "tokenizer.model"))
    for dtype in ("float32", "bfloat16", "float16"):
        model = AutoModel.from_pretrained(tmp_path / "nano", trust_remote_code=True, dtype=dtype)
        plain = AutoModel.from_pretrained(
            tmp_path / "nano", trust_remote_code=True, dtype=dtype, dequantize=True
        )
        for picture, question, answer in (
            ("star.png", "What shape is the object?", "star"),
            ("ring.jpg", "What colour is it?", None),
            ("number.png", "What number is printed in the picture?", "6143"),
        ):
            given = tokenizer, question, ROOT / "examples" / picture
            response, _ = model.chat(*given, do_sample=False)
            assert response == plain.chat(*given, do_sample=False)[0]
            assert answer in (None, response)
    assert AutoTokenizer.from_pretrained(tmp_path / "nano", trust_remote_code=True).vocab_size == 640


def test_memory_is_bounded_by_one_file(tmp_path, source, monkeypatch):
    """No more tensors are held than go into one file."""
    sizes = []
    save = room.save_file
    monkeypatch.setattr(
        room, "save_file", lambda tensors, *args, **kw: sizes.append(tensors) or save(tensors, *args, **kw)
    )
    quantize(source, tmp_path / "target", max_shard_size="60KB")
    assert len(sizes) > 5
    for tensors in sizes:
        assert sum(value.nbytes for value in tensors.values()) < 60_000 or len(tensors) in (1, 4)


# ---- settings and refusals ----


def test_the_default_group_size_fits_the_widths(tmp_path, source):
    quantize(source, tmp_path / "target")
    fields = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    assert fields == json.loads((tmp_path / "target" / "quantize_config.json").read_text())
    assert (fields["quant_method"], fields["bits"], fields["group_size"]) == ("gptq", 4, 64)
    with safe_open(tmp_path / "target" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("model.layers.0.feed_forward.w2.linear.scales").get_shape() == [2, 64]


def test_what_is_rejected(tmp_path, source, capsys, monkeypatch):
    for arguments, message in (
        ({"bits": 3}, "3 bits can't be written; choose 4 or 8"),
        ({"method": "awq"}, "no method 'awq'; choose hqq or round"),
        ({"method": "hqq", "bits": 8}, "scales of 4 bits, not 8; choose --method round"),
        ({"group_size": 48}, "64 inputs, which are not groups of 48; choose --group-size"),
        ({"group_size": 0}, "not groups of 0"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(source, tmp_path / "target", **arguments)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="already exists; choose another"):
        quantize(source, tmp_path / "full")
    quantize(source, tmp_path / "once")
    with pytest.raises(ValueError, match="is quantised already; quantise the original"):
        quantize(tmp_path / "once", tmp_path / "twice")
    assert main(["quantize", str(tmp_path / "nowhere"), str(tmp_path / "target")]) == 1
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match="pip install torchao"):
        quantize(source, tmp_path / "target", method="hqq")
    assert "by round" in quantize(source, tmp_path / "target")[-1]


def test_a_failure_leaves_nothing_behind(tmp_path, source, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(room, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        quantize(source, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []
