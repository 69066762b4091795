"""GPTQ and AWQ checkpoints: the arithmetic, whole models in every layout on disk, and damaged files."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import (
    FAMILIES,
    VERSION_OF_FAMILY,
    published_config,
    random_pictures,
    recipe_state_dict,
    tiny_config,
    tiny_model,
)
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from internlm_xcomposer2 import packing_internlm_xcomposer2 as packing
from internlm_xcomposer2 import quantization_internlm_xcomposer2 as quantization
from internlm_xcomposer2.packing_internlm_xcomposer2 import packing_of, unpacked_shapes
from internlm_xcomposer2.quantization_internlm_xcomposer2 import PackedLinear
from packers import awq_parts, dequantise, gptq_parts, groups_of, pack_checkpoint
from safetensors.torch import load_file
from test_checkpoint import flat_config, logits_of, published_weights, write_published
from transformers import AutoModel, BitsAndBytesConfig, GenerationConfig

GPTQ_FIELDS = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
AWQ_FIELDS = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 16, "zero_point": True}


WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}  # the 4-bit kernels take these


SETTLED = """
import torch
from internlm_xcomposer2.checkpoint_internlm_xcomposer2 import TensorHeader
from internlm_xcomposer2.kernels_internlm_xcomposer2 import int4_layout
from internlm_xcomposer2.packing_internlm_xcomposer2 import Packing
from internlm_xcomposer2.quantization_internlm_xcomposer2 import PackedLinear, settle_linears

def resident():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))

int4_layout("cpu")
packing, before = Packing("gptq", 4, 128, 0, ()), resident()
model = torch.nn.ModuleDict({f"w{i}": PackedLinear(2048, 2048, packing, num_groups=16) for i in range(40)})
settle_linears(model, {f"w{i}.qweight": TensorHeader((256, 2048), torch.int32) for i in range(40)})
size = sum(buffer.nbytes for buffer in model.buffers())
assert all(linear.settled is not None for linear in model.values())
print(size, resident() - before)
"""


def packed_of(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def unpack(parts, fields=None, dtype=torch.float32):
    """One linear, unpacked by the package."""
    shapes = shapes_of({f"model.w.linear.{name}": value for name, value in parts.items()})
    packing = packing_of(shapes, {"quantization_config": fields})
    (size,) = unpacked_shapes(shapes, packing).values()
    options = {"num_groups": len(parts["scales"]), "has_index": "g_idx" in parts}
    linear = PackedLinear(size[1], size[0], packing, **options)
    linear.load_state_dict(parts)
    weight = linear.unpack(dtype)
    assert tuple(weight.shape) == size
    x = torch.randn(2, size[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, weight))
    return weight


def random_numbers(outputs, inputs, groups, bits, seed=0):
    rng = np.random.RandomState(seed)
    integers = rng.randint(0, 2**bits, size=(inputs, outputs))
    zeros = rng.randint(0, 2**bits, size=(groups.max() + 1, outputs))
    scales = rng.uniform(0.001, 0.1, size=zeros.shape).astype(np.float16)
    return integers, zeros, scales


# ---- arithmetic ----


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 24, 256, -1])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("second_format", [False, True])
def test_gptq(bits, group_size, act_order, second_format):
    groups = groups_of(64, group_size, act_order)
    integers, zeros, scales = random_numbers(48, 64, groups, bits)
    if not second_format:
        zeros = np.maximum(zeros, 1)
    fields = {"bits": bits, "group_size": group_size, "quant_method": "gptq"}
    if second_format:
        fields["checkpoint_format"] = "gptq_v2"
    expected = dequantise(integers, zeros, scales, groups)
    for with_index in {True, act_order}:
        parts = gptq_parts(
            integers, zeros, scales, groups, bits, second_format=second_format, with_index=with_index
        )
        assert torch.equal(unpack(parts, fields), expected)
        assert torch.equal(unpack(parts, fields, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("group_size", [32, 24, 256, -1])
def test_awq(group_size):
    groups = groups_of(64, group_size)
    numbers = random_numbers(40, 64, groups, 4)
    fields = {"w_bit": 4, "q_group_size": group_size, "quant_method": "awq", "version": "GEMM"}
    assert torch.equal(unpack(awq_parts(*numbers), fields), dequantise(*numbers, groups))


def test_one_word_by_hand():
    """Nibbles 1 to 8, the lowest first: inputs of an output in GPTQ, shuffled outputs of an input in AWQ."""
    word, scale = torch.tensor([[0x7654321 + (8 << 28) - (1 << 32)]], dtype=torch.int32), torch.ones
    zeros = torch.full((1, 1), 0x11111111, dtype=torch.int32)
    gptq = {
        "qweight": word.expand(1, 8),
        "qzeros": zeros,
        "scales": scale(1, 8).half(),
        "g_idx": torch.zeros(8).int(),
    }
    assert unpack(gptq)[0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6]  # less 1 + 1
    awq = {"qweight": word, "qzeros": zeros, "scales": scale(1, 8).half()}
    assert unpack(awq)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]  # less 1


def test_large_weights_are_unpacked_in_pieces(monkeypatch):
    groups = groups_of(96, 32, act_order=True)
    numbers = random_numbers(64, 96, groups, 4)
    numbers = numbers[0], np.maximum(numbers[1], 1), numbers[2]
    parts = gptq_parts(*numbers, groups, 4)
    whole = unpack(parts), unpack(awq_parts(*numbers))
    monkeypatch.setattr(packing, "VALUES_AT_ONCE", 1500)
    assert torch.equal(unpack(parts), whole[0]) and torch.equal(unpack(awq_parts(*numbers)), whole[1])


# ---- whole models ----


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_families_equal_plain_ones(tmp_path, family):
    """Version 2 as GPTQ with activation order, 2.5 as AWQ: the logits are those of the packed values."""
    method = "awq" if VERSION_OF_FAMILY[family] == "2.5" else "gptq"
    packed, plain = pack_checkpoint(recipe_state_dict(family), method, act_order=method == "gptq")
    fields = {"quantization_config": AWQ_FIELDS if method == "awq" else GPTQ_FIELDS | {"desc_act": True}}
    config = published_config(family)
    write_published(tmp_path / "packed", packed, {**config, **fields})
    write_published(tmp_path / "plain", plain, config)
    model = AutoModel.from_pretrained(tmp_path / "packed", dtype="float32")
    expected = AutoModel.from_pretrained(tmp_path / "plain", dtype="float32")
    assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")
    assert torch.equal(logits_of(model), logits_of(expected))
    original = logits_of(
        AutoModel.from_pretrained(write_published(tmp_path, recipe_state_dict(family), config))
    )
    assert not torch.equal(logits_of(model), original)


def expected_logits(plain, fields):
    model = InternLMXComposer2ForCausalLM.from_pretrained(
        None,
        config=InternLMXComposer2ForCausalLM.config_class.from_dict(fields),
        state_dict=plain,
        dtype="float32",
    )
    return logits_of(model)


@pytest.fixture(scope="module")
def tiny_packed():
    """A tiny model of 2.5 with adapters, packed: the checkpoint, its configuration and the right logits."""
    model = tiny_model("2.5", task_adapters={"sft": 3, "dpo": 2, "web": 5})
    packed, plain = pack_checkpoint(published_weights(model), "gptq")
    return packed, flat_config(model), expected_logits(plain, flat_config(model))


@pytest.mark.parametrize(("kind", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 2)])
def test_every_file_format(tmp_path, tiny_packed, kind, shards):
    packed, fields, expected = tiny_packed
    write_published(tmp_path, packed, fields, shards=shards, kind=kind)
    GenerationConfig(max_new_tokens=7).save_pretrained(tmp_path)
    model, info = AutoModel.from_pretrained(tmp_path, dtype="float32", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.task_adapters == {"sft": 3, "dpo": 2, "web": 5}
    assert model.generation_config.max_new_tokens == 7 and model.name_or_path == str(tmp_path)
    assert torch.equal(logits_of(model), expected)
    web = model(torch.tensor([[1, 50, 60]]), infer_mode="web").logits
    assert not torch.equal(web, model(torch.tensor([[1, 50, 60]])).logits)


@pytest.mark.parametrize("base", ["gptq_model-4bit-16g", "named"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_names_of_the_packer(tmp_path, tiny_packed, base, kind):
    """`quantize_config.json` next to weights under its own names, and nothing in the configuration."""
    packed, fields, expected = tiny_packed
    write_published(tmp_path, packed, fields, kind=kind)
    written = tmp_path / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    written.rename(tmp_path / f"{base}.{kind}")
    says = {"bits": 4, "group_size": 16, "desc_act": False, "sym": True}
    says |= {"model_file_base_name": "named"} if base == "named" else {}
    (tmp_path / "quantize_config.json").write_text(json.dumps(says))
    model = AutoModel.from_pretrained(tmp_path, dtype="float32")
    assert torch.equal(logits_of(model), expected)
    (tmp_path / "quantize_config.json").write_text(json.dumps({**says, "group_size": 8}))
    with pytest.raises((ValueError, FileNotFoundError), match="not groups of 8|no weights"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".linear"])
def test_awq_names(tmp_path, suffix):
    model = tiny_model("2.5")
    packed, plain = pack_checkpoint(published_weights(model), "awq", suffix=suffix)
    write_published(tmp_path, packed, {**flat_config(model), "quantization_config": AWQ_FIELDS})
    loaded = AutoModel.from_pretrained(tmp_path, dtype="float32")
    assert torch.equal(logits_of(loaded), expected_logits(plain, flat_config(model)))


def test_a_state_dict(tiny_packed):
    packed, fields, expected = tiny_packed
    before = {name: value.clone() for name, value in packed.items()}
    config = InternLMXComposer2ForCausalLM.config_class.from_dict(
        {**fields, "quantization_config": GPTQ_FIELDS}
    )
    model = InternLMXComposer2ForCausalLM.from_pretrained(
        None, config=config, state_dict=packed, dtype="float32"
    )
    assert torch.equal(logits_of(model), expected)
    assert config.quantization_config == GPTQ_FIELDS
    assert packed.keys() == before.keys() and all(torch.equal(packed[name], before[name]) for name in packed)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("suffix", ["", ".linear"])
@pytest.mark.parametrize("act_order", [False, True])
def test_saving_writes_the_packed_weights_as_they_were_read(tmp_path, method, suffix, act_order):
    model = tiny_model("2.5", **WIDE)
    options = {"group_size": 32, "suffix": suffix, "act_order": act_order and method == "gptq"}
    packed, _ = pack_checkpoint(published_weights(model), method, **options)
    write_published(tmp_path / "packed", packed, flat_config(model))
    loaded = AutoModel.from_pretrained(tmp_path / "packed", dtype="float32")
    assert all(module.settled is not None for module in packed_of(loaded))
    loaded.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, value in packed.items():
        linear, _, part = name.rpartition(".")
        if part in packing.FILE_TENSORS:
            assert torch.equal(saved[f"{linear.removesuffix('.linear')}.linear.{part}"], value)
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (fields["quant_method"], fields["bits"], fields["group_size"]) == (method, 4, 32)
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again), logits_of(loaded))
    assert all(module.settled is not None for module in packed_of(again))


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("suffix", ["", ".linear"])
@pytest.mark.parametrize("later", [False, True])
def test_dequantized_weights_are_saved_as_a_plain_published_checkpoint(tmp_path, method, suffix, later):
    model = tiny_model("2.5", **WIDE)
    published = published_weights(model)
    packed, plain = pack_checkpoint(published, method, group_size=32, suffix=suffix)
    write_published(tmp_path / "packed", packed, flat_config(model))
    loaded = AutoModel.from_pretrained(tmp_path / "packed", dtype="float32", dequantize=not later)
    loaded = loaded.dequantize() if later else loaded
    assert not packed_of(loaded)
    loaded.save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == published.keys()
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = AutoModel.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits_of(again), expected_logits(plain, flat_config(model)))
    with pytest.raises(ValueError, match="first quantize"):
        again.dequantize()


def test_dtypes(tmp_path, tiny_packed):
    packed, fields, _ = tiny_packed
    halves = {name: value.half() if value.is_floating_point() else value for name, value in packed.items()}
    write_published(tmp_path, halves, {**fields, "torch_dtype": "bfloat16"})
    for arguments, dtype in (
        ({}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": torch.float32}, torch.float32),
    ):
        model = AutoModel.from_pretrained(tmp_path, **arguments)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    write_published(tmp_path, halves, fields)
    assert AutoModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16


def test_disk_offload(tmp_path, tiny_packed):
    packed, fields, expected = tiny_packed
    write_published(tmp_path / "packed", packed, fields)
    places = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    model = AutoModel.from_pretrained(tmp_path / "packed", dtype="float32", **places)
    assert model.device.type == "meta"
    assert torch.equal(logits_of(model), expected)


def test_biases_of_zeros_are_dropped_and_others_are_not(tmp_path, tiny_packed):
    packed, fields, expected = tiny_packed
    name = "model.layers.0.attention.wo.linear.bias"
    write_published(tmp_path, {**packed, name: torch.zeros(32)}, fields)
    model = AutoModel.from_pretrained(tmp_path, dtype="float32")
    assert torch.equal(logits_of(model), expected)
    write_published(tmp_path, {**packed, name: torch.ones(32)}, fields)
    with pytest.raises(ValueError, match=r"1 unexpected: model\.layers\.0\.attention\.wo\.linear\.bias"):
        AutoModel.from_pretrained(tmp_path)


def count_unpacked(monkeypatch):
    """The address of every weight as it is unpacked."""
    unpack_gptq, addresses = quantization.unpack_gptq, []

    def counting(*args, **kwargs):
        array = unpack_gptq(*args, **kwargs).numpy().copy()
        addresses.append(array.ctypes.data)
        return torch.from_numpy(array)

    monkeypatch.setattr(quantization, "unpack_gptq", counting)
    return addresses


def test_each_weight_is_unpacked_once_and_not_copied(tmp_path, tiny_packed, monkeypatch):
    packed, fields, _ = tiny_packed
    write_published(tmp_path, packed, fields)
    addresses = count_unpacked(monkeypatch)
    model = AutoModel.from_pretrained(tmp_path, dtype="float32", dequantize=True)
    linears = [module for name, module in model.named_modules() if name.endswith(".linear")]
    assert len(addresses) == 10
    assert {linear.weight.data_ptr() for linear in linears} == set(addresses)


def test_quantising_again_is_rejected(tmp_path, tiny_packed):
    packed, fields, _ = tiny_packed
    write_published(tmp_path, packed, {**fields, "quantization_config": GPTQ_FIELDS})
    with pytest.raises(ValueError, match="already have 4 bits, by gptq; leave quantization_config out"):
        AutoModel.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


# ---- packed in memory ----


@pytest.fixture(scope="module", params=["gptq", "gptq, any order", "awq"])
def wide_packed(request, tmp_path_factory):
    """A model of 2.5 that the 4-bit kernels take, packed: its directory, and its twin with plain weights."""
    method, _, act_order = request.param.partition(", ")
    model = tiny_model("2.5", task_adapters={"sft": 3, "dpo": 2, "web": 5}, **WIDE)
    packed, plain = pack_checkpoint(
        published_weights(model), method, group_size=32, act_order=bool(act_order)
    )
    folder = tmp_path_factory.mktemp("packed")
    config = InternLMXComposer2ForCausalLM.config_class.from_dict(flat_config(model))
    write_published(folder, packed, flat_config(model))
    twin = InternLMXComposer2ForCausalLM.from_pretrained(
        None, config=config, state_dict=plain, dtype="float32"
    )
    return folder, twin


def decode_logits(model, dtype=None):
    """Logits of some ids, read one at a time, as in a decoding step."""
    cache, logits = None, []
    for token in (1, 50, 60, 70, 80, 90):
        output = model(torch.tensor([[token]]), cache=cache, use_cache=True)
        cache = output.get("cache", output.get("past_key_values"))
        logits.append(output.logits)
    return torch.cat(logits, dim=1).float()


@torch.no_grad()
def test_packed_weights_stay_packed_and_give_the_numbers_of_plain_ones(wide_packed):
    folder, twin = wide_packed
    model = AutoModel.from_pretrained(folder, dtype="float32")
    linears = packed_of(model)
    assert len(linears) == 10 and all(linear.settled.codes.dtype == torch.uint8 for linear in linears)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    held = sum(buffer.nbytes for linear in linears for buffer in linear.buffers())
    assert held < 0.4 * sum(2 * linear.in_features * linear.out_features for linear in linears)
    assert torch.equal(logits_of(model), logits_of(twin))
    torch.testing.assert_close(decode_logits(model), decode_logits(twin), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_4_bit_kernel_rounds_no_more_than_its_type(wide_packed, dtype):
    """Decoding with the kernel is as near to float32 as decoding with plain weights of the same type."""
    folder, twin = wide_packed
    exact = decode_logits(twin)
    plain = AutoModel.from_pretrained(folder, dtype=dtype, dequantize=True)
    model = AutoModel.from_pretrained(folder, dtype=dtype)
    rounding = (decode_logits(plain.bfloat16()) - exact).std()
    assert (decode_logits(model) - exact).std() < 1.5 * rounding < 0.1 * exact.std()
    assert torch.equal(decode_logits(model).argmax(-1), exact.argmax(-1))


@torch.no_grad()
def test_casting_a_model_leaves_packed_weights_alone(wide_packed):
    folder, _ = wide_packed
    model = AutoModel.from_pretrained(folder, dtype="float32")
    expected = {name: value.clone() for linear in packed_of(model) for name, value in linear.named_buffers()}
    logits = logits_of(model)
    model.half().to(torch.bfloat16).double().float()
    found = {name: value for linear in packed_of(model) for name, value in linear.named_buffers()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (logits_of(model) - logits).abs().max() < 0.1  # the rest went through half types
    model = AutoModel.from_pretrained(folder, dtype="bfloat16")
    expected = logits_of(model)
    assert torch.equal(logits_of(copy.deepcopy(model)), expected)
    assert packed_of(model.to("meta"))[0].settled.codes.device.type == "meta"


@torch.no_grad()
def test_a_packed_model_loads_a_state_dict(wide_packed):
    folder, _ = wide_packed
    model, other = (AutoModel.from_pretrained(folder, dtype="float32") for _ in range(2))
    expected = logits_of(model)
    for linear in packed_of(other):
        linear.settled.scales.mul_(2)
        linear.settled.scales_and_zeros.mul_(2)
    assert not torch.equal(logits_of(other), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other), expected)
    assert all(linear.settled is not None for linear in packed_of(other))


def test_gradients_pass_through_packed_weights(wide_packed):
    folder, twin = wide_packed
    model = AutoModel.from_pretrained(folder, dtype="float32")
    name = "model.layers.0.attention.wqkv.Plora_A.weight"
    gradients = []
    for each in (model, twin):
        each.zero_grad()
        weight = each.get_parameter(name)
        each(**picture_inputs(each)).logits.square().mean().backward()
        gradients.append(weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_image_mask_reaches_every_packed_linear(wide_packed):
    folder, _ = wide_packed
    model = AutoModel.from_pretrained(folder, dtype="float32")
    for layer in model.model.layers:
        for linear in (
            layer.attention.wqkv,
            layer.attention.wo,
            layer.feed_forward.w1,
            layer.feed_forward.w2,
        ):
            x = torch.randn(1, 6, linear.in_features, generator=torch.Generator().manual_seed(0))
            mask = torch.tensor([[False, True, True, False, True, False]])
            added = linear.Plora_B(linear.Plora_A(x)) * linear.lora_scaling
            expected = linear.linear(x) + added * mask[..., None]
            torch.testing.assert_close(linear(x, mask), expected, rtol=0, atol=1e-6)
            assert added.abs().min() > 0


def picture_inputs(model):
    pixel_values, grids = random_pictures(model, [(1, 1)])
    places = [model.config.image_token_id] * model.num_image_tokens(1, 1)
    ids = torch.tensor([[1, *places, 60, 70, 80]])
    return {"input_ids": ids, "pixel_values": pixel_values, "image_grid_hw": grids}


# ---- what a checkpoint says, and damaged ones ----


def test_packing_of_the_published_layouts():
    gptq = {
        "model.layers.0.attention.wqkv.linear.qweight": (512, 6144),
        "model.layers.0.attention.wqkv.linear.qzeros": (32, 768),
        "model.layers.0.attention.wqkv.linear.scales": (32, 6144),
        "model.layers.0.attention.wqkv.linear.g_idx": (4096,),
        "model.layers.0.attention.wqkv.Plora_A.weight": (256, 4096),
    }
    packing = packing_of(gptq)
    assert (packing.method, packing.bits, packing.group_size, packing.zero_offset) == ("gptq", 4, None, 1)
    plain = unpacked_shapes(gptq, packing)
    assert plain["model.layers.0.attention.wqkv.weight"] == (6144, 4096) and len(plain) == 2
    awq = {
        "model.layers.0.feed_forward.w2.qweight": (14336, 512),
        "model.layers.0.feed_forward.w2.qzeros": (112, 512),
        "model.layers.0.feed_forward.w2.scales": (112, 4096),
    }
    packing = packing_of(awq, tiny_config(quantization_config={**AWQ_FIELDS, "group_size": 128}))
    assert (packing.method, packing.bits, packing.group_size, packing.zero_offset) == ("awq", 4, 128, 0)
    assert unpacked_shapes(awq, packing) == {"model.layers.0.feed_forward.w2.weight": (4096, 14336)}
    assert packing_of({"model.norm.weight": (8,)}, tiny_config()) is None


def test_damaged_checkpoints_are_rejected_with_their_names(tmp_path, tiny_packed):
    packed, fields, _ = tiny_packed
    linear = "model.layers.1.feed_forward.w2.linear"
    lost = {
        name: value for name, value in packed.items() if name not in (f"{linear}.scales", f"{linear}.qzeros")
    }
    short = {**packed, f"{linear}.qweight": packed[f"{linear}.qweight"][:-1]}
    narrow = {**packed, f"{linear}.scales": packed[f"{linear}.scales"][:, :-8].clone()}
    flat = {**packed, f"{linear}.scales": packed[f"{linear}.scales"].flatten()}
    floats = {**packed, f"{linear}.qweight": packed[f"{linear}.qweight"].float()}
    beyond = {**packed, f"{linear}.g_idx": packed[f"{linear}.g_idx"] + 1}
    for damaged, match in (
        (lost, rf"2 tensors are missing: {linear}\.qzeros, {linear}\.scales"),
        (short, rf"1 packed weights are damaged: {linear}\.g_idx is \(64,\)"),
        (narrow, rf"damaged: {linear}\.qweight is \(8, 32\), but scales \(4, 24\) require \(8, 24\)"),
        (flat, rf"damaged: {linear}\.scales is \(128,\)"),
        (floats, rf"1 packed tensors are not 32-bit integers: {linear}\.qweight"),
        (beyond, rf"{linear}\.g_idx names groups 1 to 4, but there are 4"),
    ):
        write_published(tmp_path, damaged, fields)
        with pytest.raises(ValueError, match=match):
            AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"bits": 8}, r"says gptq with 8 bits, but the shapes of .* are those of gptq with 4"),
        ({"quant_method": "awq"}, "says awq with 4 bits, but .* those of gptq with 4"),
        ({"quant_method": "exl2"}, "says exl2 with 4 bits"),
        ({"checkpoint_format": "marlin"}, "gptq in the marlin layout can't be unpacked"),
        ({"group_size": 64}, "in 2 groups, which are not groups of 64"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, tiny_packed, fields, match):
    packed, config, _ = tiny_packed
    write_published(tmp_path, packed, {**config, "quantization_config": {**GPTQ_FIELDS, **fields}})
    with pytest.raises(ValueError, match=match):
        AutoModel.from_pretrained(tmp_path)


def test_layouts_that_cannot_be_unpacked():
    three = {"w.qweight": (12, 64), "w.qzeros": (4, 6), "w.scales": (4, 64), "w.g_idx": (128,)}
    with pytest.raises(ValueError, match="gptq with 3 bits can't be unpacked, only with 2 or 4 or 8"):
        packing_of(three)
    gemv = {"w.qweight": (64, 16), "w.qzeros": (64, 1), "w.scales": (64, 8)}
    with pytest.raises(ValueError, match="fit neither GPTQ nor AWQ"):
        packing_of(gemv, {"quant_method": "awq", "version": "gemv"})
    with pytest.raises(ValueError, match="awq in the gemv layout"):
        packing_of(
            {"w.qweight": (32, 4), "w.qzeros": (1, 4), "w.scales": (1, 32)},
            {"quantization_config": {"quant_method": "awq", "version": "GEMV"}},
        )
    uneven = {"w.qweight": (100, 4), "w.qzeros": (3, 4), "w.scales": (3, 32)}
    with pytest.raises(ValueError, match="100 inputs in 3 groups; name the group_size"):
        packing_of(uneven)


def test_gptq_for_transformers_itself_is_left_to_it(tmp_path, tiny_packed):
    """A caller who names that quantiser gets its errors, and its packages are not installed here."""
    packed, fields, _ = tiny_packed
    write_published(tmp_path, packed, {**fields, "quantization_config": GPTQ_FIELDS})
    with pytest.raises((ImportError, RuntimeError), match="optimum|gptqmodel"):
        AutoModel.from_pretrained(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells how much memory is resident")
def test_what_unpacking_took_is_given_back():
    result = subprocess.run([sys.executable, "-c", SETTLED], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    size, grown = map(int, result.stdout.split())
    assert 0.9 * size < grown < 1.25 * size
