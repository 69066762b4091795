"""bitsandbytes and torchao on a CPU: what is quantised and what isn't, answers, and the way to disk."""

import copy
import json
import logging
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, random_pictures, tiny_model
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2Tokenizer
from internlm_xcomposer2 import quantization_internlm_xcomposer2 as quantization
from internlm_xcomposer2.build_mlp import PLoRA
from safetensors import safe_open
from transformers import AutoModel, TorchAoConfig

sys.path.insert(0, str(ROOT))

from benchmarks import memory_quantized  # noqa: E402
from tools.quantizations import QUANTIZATIONS, quantization_config  # noqa: E402

KINDS = tuple(QUANTIZATIONS)
SAVED = tuple(kind for kind in KINDS if kind != "torchao-int4")
# Relative to the logits' own spread; measured on these models, doubled.
CLOSE = {"int8": 0.2, "torchao-int8": 0.1}
CLOSE_IN_4_BITS = 0.6


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small model of 2.5 with task adapters, whose widths suit every quantiser, on disk."""
    folder = tmp_path_factory.mktemp("source")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    tiny_model("2.5", task_adapters={"sft": 4, "dpo": 4, "web": 8}, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def full(source):
    """The same model in float32."""
    return load(source, dtype="float32")


def load(folder, kind=None, dtype="bfloat16", **arguments):
    if kind is not None:
        arguments["quantization_config"] = quantization_config(kind)
    return InternLMXComposer2ForCausalLM.from_pretrained(folder, dtype=dtype, **arguments)


def inputs_of(model, with_picture=True):
    pixel_values, grids = random_pictures(model, [(1, 1)])
    places = [model.config.image_token_id if with_picture else 9] * model.num_image_tokens(1, 1)
    ids = torch.tensor([[1, *places, 60, 70, 80]])
    return {
        "input_ids": ids,
        **({"pixel_values": pixel_values, "image_grid_hw": grids} if with_picture else {}),
    }


@torch.no_grad()
def logits_of(model, with_picture=True, **arguments):
    return model(**inputs_of(model, with_picture), **arguments).logits.float()


def is_quantised(module):
    """Whether a linear holds anything but an ordinary floating-point weight."""
    plain = type(module.weight) is torch.nn.Parameter and module.weight.is_floating_point()
    return not (plain and isinstance(module, torch.nn.Linear))


# ---- what is quantised ----


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_plain_linears_of_the_decoder_are_quantised(source, full, kind):
    model = load(source, kind)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    base = {f"{name}.linear" for name, module in model.named_modules() if isinstance(module, PLoRA)}
    assert len(base) == 10
    modules = dict(model.named_modules())
    assert {name for name in linears | base if is_quantised(modules[name])} == base
    rest = {
        name: parameter for name, parameter in model.named_parameters() if name.rpartition(".")[0] not in base
    }
    assert {parameter.dtype for parameter in rest.values()} == {torch.bfloat16}
    weights = full.state_dict()
    assert all(torch.equal(parameter, weights[name].bfloat16()) for name, parameter in rest.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_stay_close_in_every_dtype_and_mode(source, full, kind, dtype):
    model = load(source, kind, dtype)
    limit = CLOSE.get(kind, CLOSE_IN_4_BITS)
    for arguments in ({}, {"with_picture": False}, {"infer_mode": "write"}, {"infer_mode": "web"}):
        expected = logits_of(full, **arguments)
        assert (logits_of(model, **arguments) - expected).std() < limit * expected.std()


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_mask_reaches_every_linear(source, kind):
    """Each low-rank branch adds to the quantised linear on image tokens, exactly, and nowhere else."""
    model = load(source, kind, "float32")
    for layer in model.model.layers:
        for linear in (layer.attention.wqkv, layer.attention.wo, layer.feed_forward.w2):
            x = torch.randn(1, 6, linear.in_features, generator=torch.Generator().manual_seed(0))
            mask = torch.tensor([[False, True, True, False, True, False]])
            with torch.no_grad():
                plain, added = linear.linear(x), linear.Plora_B(linear.Plora_A(x)) * linear.lora_scaling
                output = linear(x, mask)
            torch.testing.assert_close(output, plain + added * mask[..., None], rtol=0, atol=1e-6)
            assert added.abs().min() > 0
    inputs = inputs_of(model)
    with torch.no_grad():
        embeds, mask = model.embed_inputs(**inputs)
        with_mask = model(inputs_embeds=embeds, im_mask=mask).logits
        without = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(with_mask, logits_of(model), rtol=0, atol=1e-6)
    assert (with_mask - without).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_nano_answers(kind):
    """It names a shape and reads a number, with `trust_remote_code` and greedy decoding."""
    model = AutoModel.from_pretrained(
        ROOT, trust_remote_code=True, quantization_config=quantization_config(kind)
    )
    tokenizer = InternLMXComposer2Tokenizer(str(ROOT / "tokenizer.model"))
    for picture, question, answer in (
        ("star.png", "What shape is the object?", "star"),
        ("number.png", "What number is printed in the picture?", "6143"),
    ):
        response, _ = model.chat(tokenizer, question, ROOT / "examples" / picture, do_sample=False)
        assert response == answer


# ---- the caller's configuration ----


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao-int8"])
def test_the_callers_configuration_is_kept_and_not_changed(source, kind):
    field = "modules_to_not_convert" if kind.startswith("torchao") else "llm_int8_skip_modules"
    config = quantization_config(kind, **{field: ["model.layers.1"]})
    before = copy.deepcopy(config.to_dict())
    model = InternLMXComposer2ForCausalLM.from_pretrained(source, quantization_config=config)
    assert config.to_dict() == before
    first, second = model.model.layers
    assert is_quantised(first.attention.wqkv.linear) and not is_quantised(second.attention.wqkv.linear)
    named = getattr(model.config.quantization_config, field)
    assert named == ["model.layers.1", *quantization.FULL_PRECISION_MODULES]
    assert getattr(quantization.with_default_skips(model.config.quantization_config), field) == named


def test_a_dictionary_will_do(source):
    given = {"load_in_8bit": True}
    model = InternLMXComposer2ForCausalLM.from_pretrained(source, quantization_config=given)
    assert is_quantised(model.model.layers[0].feed_forward.w1.linear) and not is_quantised(model.output)
    assert given == {"load_in_8bit": True}
    with pytest.raises(ValueError, match="no `quant_method`"):
        InternLMXComposer2ForCausalLM.from_pretrained(source, quantization_config={"bits": 8})
    with pytest.raises(ValueError, match="Unknown quantization type, got int8"):
        InternLMXComposer2ForCausalLM.from_pretrained(source, quantization_config={"quant_method": "int8"})


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}])
def test_the_int4_layout_of_gpus_is_rejected_on_a_cpu(source, device_map):
    from torchao.quantization import Int4WeightOnlyConfig

    config = TorchAoConfig(Int4WeightOnlyConfig(group_size=32))
    with pytest.raises(ValueError, match="no layout for a CPU; use PrototypeInt4WeightOnlyConfig"):
        InternLMXComposer2ForCausalLM.from_pretrained(
            source, quantization_config=config, device_map=device_map
        )


def test_linears_that_do_not_fit_the_groups_are_named(source, caplog):
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    config = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    logger = logging.getLogger(quantization.__name__)
    logger.addHandler(caplog.handler)
    try:
        quantization.settle_quantized(load(source))
        assert not caplog.messages
        skipping = copy.deepcopy(config)
        skipping.modules_to_not_convert = ["model.layers.1"]
        InternLMXComposer2ForCausalLM.from_pretrained(source, quantization_config=skipping)
    finally:
        logger.removeHandler(caplog.handler)
    assert [message for message in caplog.messages if message.startswith("5 of 10 linears")]


def test_4_bits_in_widths_that_the_fused_kernel_does_not_support(tmp_path):
    """Widths of 32 are not a multiple of bitsandbytes' blocks of 64: those linears take the slower path."""
    tiny_model("2.5").save_pretrained(tmp_path)
    full, model = load(tmp_path, dtype="float32"), load(tmp_path, "nf4", "float32")
    expected = logits_of(full)
    assert (logits_of(model) - expected).std() < CLOSE_IN_4_BITS * expected.std()


# ---- saving and loading ----


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize(("dtype", "used"), [("float32", True), ("bfloat16", False)])
def test_saving_and_loading_is_exact(source, tmp_path, kind, dtype, used):
    """Before and after a first forward, which repacks 4-bit weights on some CPUs; and once more."""
    model = load(source, kind, dtype)
    before = logits_of(model) if used else None
    model.save_pretrained(tmp_path / "once", max_shard_size="100KB")
    expected = logits_of(model)
    assert before is None or torch.equal(before, expected)
    again = InternLMXComposer2ForCausalLM.from_pretrained(tmp_path / "once")
    assert again.dtype == getattr(torch, dtype)
    assert torch.equal(logits_of(again), expected)
    again.save_pretrained(tmp_path / "twice")
    twice = AutoModel.from_pretrained(tmp_path / "twice", quantization_config=None)
    assert torch.equal(logits_of(twice), expected)
    assert torch.equal(logits_of(twice, infer_mode="web"), logits_of(model, infer_mode="web"))


def test_an_unsavable_model_is_rejected_before_anything_is_written(source, tmp_path):
    model = load(source, "torchao-int4")
    expected = logits_of(model)
    with pytest.raises(ValueError, match="can't be saved .*Int4OpaqueTensor.*quantise it each time"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert torch.equal(logits_of(model), expected)


def test_a_failed_save_leaves_the_model_as_it_was(source, tmp_path):
    model = load(source, "torchao-int8")
    quantizer = model.hf_quantizer
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path / "file" / "model")
    assert model.hf_quantizer is quantizer


def test_files_hold_quantised_weights_under_their_own_names(source, tmp_path):
    for kind, parts in (("int8", {"weight", "SCB", "weight_format"}), ("torchao-int8", {"_weight_qdata"})):
        load(source, kind).save_pretrained(tmp_path / kind)
        with safe_open(tmp_path / kind / "model.safetensors", framework="pt") as file:
            names = set(file.keys())
            metadata = file.metadata()
        linear = "model.layers.0.feed_forward.w1.linear"
        assert {f"{linear}.{part}" for part in parts} <= names
        assert "model.layers.0.feed_forward.w1.Plora_A.weight" in names
        if kind == "torchao-int8":
            assert len(json.loads(metadata["tensor_names"])) == 10


def test_metadata_of_a_model_without_a_quantised_weight_is_rejected():
    plain = {"tensor_names": '["output.weight"]', "output.weight": '{"_type": "Tensor"}'}
    quantizer = SimpleNamespace(get_state_dict_and_metadata=lambda model: ({}, plain))
    with pytest.raises(ValueError, match="none of this model's weights are quantised"):
        quantization.check_savable(SimpleNamespace(hf_quantizer=quantizer))


def test_a_state_dict_does_not_disturb_a_4_bit_model(source):
    model = load(source, "nf4-double")
    expected = logits_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()
    assert torch.equal(logits_of(model), expected)


# ---- the benchmark ----


def test_the_benchmark_measures_a_model_of_the_requested_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["memory_quantized.py", "--hidden", "128", "--layers", "1"])
    arguments = memory_quantized.parse_arguments()
    memory_quantized.write_random_model(tmp_path, arguments)
    plain, int8 = (memory_quantized.measure(tmp_path, name, arguments) for name in ("none", "torchao-int8"))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    assert plain["weights"] == sum(sizes.values())
    linears = [name for name in sizes if name.endswith(("wqkv.weight", "wo.weight"))]
    linears += [name for name in sizes if name.endswith(("w1.weight", "w2.weight", "w3.weight"))]
    halved = sum(sizes[name] for name in linears) // 2
    assert len(linears) == 5 and halved * 0.9 < plain["weights"] - int8["weights"] < halved
    assert plain["peak"] >= plain["peak_loading"] and plain["imports"] > 0
    assert memory_quantized.forked(max, 3, 5) == 5
