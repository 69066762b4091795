"""The private parts of libraries that the package uses: each entry of the table in `docs/compatibility.md`.

If one of these fails, the library has moved what the entry of that name describes; the table says where it is
used and what for.
"""

import inspect
import io
import json
import re
import struct
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from first_generation import tiny_first
from helpers import ROOT, tiny_model
from internlm_xcomposer2 import InternLMXcomposer2Config, InternLMXComposer2ForCausalLM
from internlm_xcomposer2.access_internlm_xcomposer2 import SERVER_MODULES
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    TorchAoConfig,
    Trainer,
)

ENTRIES = {}


def entry(name: str):
    """Register a function as the test of an entry of the table."""

    def add(test):
        ENTRIES[name] = test
        return test

    return add


def entries_of_table() -> list[str]:
    """The first column of the table."""
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    section = text.split("## What of the libraries is not public", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| `([^|]+)` \|", section, re.MULTILINE)


@pytest.mark.parametrize("name", entries_of_table())
def test_the_library_still_has(name, request):
    test = ENTRIES[name]
    test(**{wanted: request.getfixturevalue(wanted) for wanted in inspect.signature(test).parameters})


def test_each_entry_has_a_test():
    assert sorted(ENTRIES) == sorted(entries_of_table())


def parameters_of(function) -> list[str]:
    return list(inspect.signature(function).parameters)


# ---- transformers ----


@entry("modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
def _():
    from transformers.models.auto import modeling_auto
    from transformers.pipelines import image_text_to_text

    name = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
    table = getattr(modeling_auto, name)
    assert table[InternLMXcomposer2Config.model_type] == "InternLMXComposer2ForCausalLM"
    assert getattr(image_text_to_text, name) is table


@entry("AutoConfig.from_pretrained")
def _(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise LookupError("asked")

    (tmp_path / "config.json").write_text('{"model_type": "internlm2"}')
    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(LookupError, match="asked"):
        AutoModel.from_pretrained(tmp_path)


@entry("image_processing_auto.AutoImageProcessor")
def _():
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    assert "image_processor_classes" in parameters_of(AutoImageProcessor.register)
    processor = AutoImageProcessor.from_pretrained(ROOT)
    assert type(processor).__name__ == "InternLMXComposer2ImageProcessor"


@entry("conversion_mapping, core_model_loading")
def _(tmp_path):
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

    assert parameters_of(ConversionOps.convert)[1:4] == ["input_dict", "source_patterns", "target_patterns"]
    assert parameters_of(WeightRenaming)[:2] == ["source_patterns", "target_patterns"]
    assert {"source_patterns", "target_patterns", "operations"} <= set(parameters_of(WeightConverter))
    assert "overwrite" in parameters_of(register_checkpoint_conversion_mapping)
    model = tiny_first(internlm_lora={"lora_r": 2, "lora_alpha": 4})
    low_rank = [name for name in model.state_dict() if name.endswith("low_rank_B.weight")]
    for name in low_rank:
        torch.nn.init.normal_(model.get_parameter(name))
    model.save_pretrained(tmp_path)
    folded = type(model).from_pretrained(
        tmp_path
    )  # an operation sees what the file has, and the configuration
    ids = torch.arange(290, 300)[None]
    with torch.no_grad():
        torch.testing.assert_close(folded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    folded.save_pretrained(tmp_path / "again")  # one without low-rank weights
    again = type(model).from_pretrained(tmp_path / "again")
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in folded.state_dict().items())


@entry("Blip2VisionModel.post_layernorm")
def _():
    from transformers import Blip2VisionConfig, Blip2VisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = Blip2VisionModel(Blip2VisionConfig(**sizes, image_size=28)).eval()
    pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    normed, norm = tower(pixels).last_hidden_state, tower.post_layernorm
    tower.post_layernorm = nn.Identity()
    torch.testing.assert_close(norm(tower(pixels).last_hidden_state), normed, rtol=0, atol=1e-6)


@entry("initialization")
def _():
    from transformers import initialization

    loaded, new = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    loaded._is_hf_initialized = True
    for weight in (loaded, new):
        initialization.zeros_(weight)
    assert loaded.all() and not new.any()


@entry("PreTrainedModel's hooks")
def _():
    named = (
        *("_init_weights", "_no_split_modules", "_skip_keys_device_placement", "_tp_plan"),
        *("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"),
        *("_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn", "_supports_attention_backend"),
        *("_can_compile_fullgraph", "_can_set_attn_implementation"),
    )
    assert [name for name in named if not hasattr(PreTrainedModel, name)] == []


@entry("config._attn_implementation")
def _():
    config = PreTrainedConfig()
    config._attn_implementation = "eager"
    assert config._attn_implementation == "eager"
    assert PreTrainedConfig(attn_implementation="eager")._attn_implementation == "eager"


@entry("modeling_clip.CLIPEncoder, CLIPVisionEmbeddings")
def _():
    from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPPreTrainedModel, CLIPVisionEmbeddings

    config = tiny_model("2.5").config.vision_config
    embeds = CLIPVisionEmbeddings(config)(
        torch.zeros(1, 3, config.image_size, config.image_size), interpolate_pos_encoding=False
    )
    encoder = CLIPEncoder(config)
    assert encoder(inputs_embeds=embeds).last_hidden_state.shape == embeds.shape
    assert len(encoder.layers) == config.num_hidden_layers
    assert issubclass(CLIPPreTrainedModel, PreTrainedModel)


@entry("modeling_rope_utils.ROPE_INIT_FUNCTIONS")
def _():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert parameters_of(ROPE_INIT_FUNCTIONS["dynamic"])[:3] == ["config", "device", "seq_len"]


@entry("prepare_inputs_for_generation's is_first_iteration, next_sequence_length")
def _(monkeypatch):
    model, seen = tiny_model("2.5"), []
    prepare = GenerationMixin.prepare_inputs_for_generation
    assert {"is_first_iteration", "next_sequence_length"} <= set(parameters_of(prepare))

    def spy(self, *args, **kwargs):
        seen.append((bool(kwargs.get("is_first_iteration")), kwargs.get("next_sequence_length")))
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", spy)
    model.generate(torch.tensor([[1, 50, 51]]), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert [is_first for is_first, _ in seen] == [True, False] and seen[1][1] == 1


@entry("ProcessorMixin._merge_kwargs")
def _():
    from transformers.processing_utils import ProcessorMixin

    assert parameters_of(ProcessorMixin._merge_kwargs)[1] == "ModelProcessorKwargs"


@entry("processing_utils.MultiModalData, _get_num_multimodal_tokens")
def _():
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
    from transformers.processing_utils import MultiModalData

    data = MultiModalData(num_image_tokens=[3], num_image_patches=[1])
    assert data["num_image_tokens"] == [3] and "num_video_tokens" not in data
    assert "image_sizes" in parameters_of(Qwen2VLProcessor._get_num_multimodal_tokens)


@entry("dynamic_module_utils.get_relative_import_files")
def _():
    from transformers.dynamic_module_utils import get_relative_import_files

    found = {path.rsplit("/", 1)[-1] for path in get_relative_import_files(ROOT / "modeling_internlm2.py")}
    assert {"build_mlp.py", "configuration_internlm_xcomposer2.py"} <= found


@entry("PreTrainedTokenizer's hooks")
def _():
    from transformers import PreTrainedTokenizer

    for name in ("_tokenize", "_convert_token_to_id", "_convert_id_to_token"):
        with pytest.raises(NotImplementedError):
            getattr(PreTrainedTokenizer, name)(None, 0)


@entry("tokenizer._tokenizer")
def _():
    # Read, not imported: a process that has the server's module reads files for its operator only.
    utils = Path(transformers.__file__).parent / "cli" / "serving" / "utils.py"
    assert "._tokenizer" in utils.read_text(encoding="utf-8")


@entry("model._weight_conversions")
def _():
    model = InternLMXComposer2ForCausalLM.from_pretrained(ROOT)
    patterns = [pattern for entry in model._weight_conversions for pattern in entry.source_patterns]
    assert any("wqkv" in pattern for pattern in patterns)


@entry("Trainer._get_train_sampler, _prepare_inputs")
def _():
    assert parameters_of(Trainer._get_train_sampler) == ["self", "train_dataset"]
    assert parameters_of(Trainer._prepare_inputs) == ["self", "inputs"]


@entry("CompileConfig._compile_all_devices")
def _():
    from transformers import CompileConfig

    assert CompileConfig()._compile_all_devices is None


@entry("transformers.cli.serving.server")
def _():
    folder = Path(transformers.__file__).parent
    assert folder.joinpath(*SERVER_MODULES[0].split(".")[1:]).with_suffix(".py").is_file()
    assert "from .serving.server import" in (folder / "cli" / "serve.py").read_text(encoding="utf-8")


# ---- the standard library, Pillow ----


@entry("AbstractHTTPHandler.do_open")
def _():
    assert parameters_of(urllib.request.AbstractHTTPHandler.do_open)[:3] == ["self", "http_class", "req"]


@entry("ImageFile.tile's codecs ppm, ppm_plain, bmp_rle")
def _():
    run_length = bytearray(b"BM" + bytes(8) + (54 + 1024).to_bytes(4, "little") + (40).to_bytes(4, "little"))
    run_length += struct.pack("<iiHHI20x", 2, 2, 1, 8, 1) + bytes(1024) + b"\2\0\0\0\2\0\0\1"
    contents = b"P3 2 2 255 " + b"0 " * 12, b"P6 2 2 7 " + bytes(12), bytes(run_length)
    opened = [Image.open(io.BytesIO(content)) for content in contents]
    assert [image.tile[0][0] for image in opened] == ["ppm_plain", "ppm", "bmp_rle"]


# ---- torch ----


@entry("Tensor._version")
def _():
    weight = torch.zeros(2)
    before = weight._version
    weight.add_(1)
    assert weight._version == before + 1


@entry("Module._apply")
def _():
    class Doubling(nn.Linear):
        def _apply(self, function, recurse=True):
            return super()._apply(lambda tensor: 2 * function(tensor), recurse)

    for convert in (nn.Module.half, nn.Module.cpu, lambda module: module.to(torch.bfloat16)):
        linear = Doubling(4, 4)
        before = linear.weight.detach().clone()
        assert torch.equal(convert(linear).weight, 2 * before.to(linear.weight.dtype))


@entry("mkldnn._linear_pointwise")
@torch.no_grad()
def _():
    x, weight, bias = torch.randn(3, 64), torch.randn(32, 64), torch.randn(32)
    for given in (None, bias):
        product = torch.ops.mkldnn._linear_pointwise(x, weight, given, "none", [], "")
        torch.testing.assert_close(product, nn.functional.linear(x, weight, given), rtol=0, atol=1e-4)


@entry("aten._weight_int4pack_mm_for_cpu, _convert_weight_to_int4pack_for_cpu")
def _():
    values = torch.randint(0, 16, (64, 128), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    assert packed.dtype == torch.uint8 and packed.numel() == 64 * 64
    scales, zeros = torch.rand(4, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    x = torch.randn(3, 128).bfloat16()
    both = torch.stack([scales, zeros], dim=-1)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, both)
    weight = (values - 8).float().unflatten(1, (4, 32)) * scales.T[..., None] + zeros.T[..., None]
    exact = x.float() @ weight.flatten(1).T
    torch.testing.assert_close(product.float(), exact, rtol=0.01, atol=0.01)


@entry("aten._weight_int8pack_mm")
def _():
    codes = torch.randint(-128, 128, (64, 32), dtype=torch.int8)
    x, scales = torch.randn(3, 32).bfloat16(), torch.rand(64).bfloat16()
    product = torch.ops.aten._weight_int8pack_mm(x, codes, scales)
    exact = x.float() @ (codes.float() * scales.float()[:, None]).T
    torch.testing.assert_close(product.float(), exact, rtol=0.02, atol=0.5)


@entry("aten._weight_int4pack_mm, _convert_weight_to_int4pack")
def _():
    """Their shapes: no GPU has run them here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        pairs = torch.zeros(64, 128, dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        assert packed.dtype == torch.int32 and tuple(packed.shape) == (8, 2, 32, 4)
        both = torch.zeros(2, 64, 2, dtype=torch.bfloat16, device="cuda")
        x = torch.zeros(3, 256, dtype=torch.bfloat16, device="cuda")
        assert tuple(torch.ops.aten._weight_int4pack_mm(x, packed, 128, both).shape) == (3, 64)


# ---- peft ----


@entry("LoraModel._create_new_module, LoraConfig._register_custom_module")
def _():
    from peft import LoraConfig
    from peft.tuners.lora import Linear, LoraModel

    class Linears(nn.Linear):
        pass

    config = LoraConfig()
    config._register_custom_module({Linears: Linear})
    assert parameters_of(LoraModel._create_new_module)[:3] == ["lora_config", "adapter_name", "target"]
    layer = LoraModel._create_new_module(config, "one", Linears(4, 4), lora_alpha=1, r=2)
    assert type(layer) is Linear


@entry("LoraModel._mark_only_adapters_as_trainable")
def _():
    from peft.tuners.lora import LoraModel

    assert parameters_of(LoraModel._mark_only_adapters_as_trainable) == ["self", "model"]


# ---- bitsandbytes and torchao ----


@entry("Linear4bit.support_avx512bf16_for_cpu, QuantState.packing_format_for_cpu, original_nested")
def _():
    from bitsandbytes import functional
    from bitsandbytes import nn as linears

    assert linears.Linear4bit(64, 64).support_avx512bf16_for_cpu in (True, False)
    _, state = functional.quantize_4bit(torch.randn(32, 64), quant_type="nf4", compress_statistics=True)
    _, packed = functional._convert_weight_packed_for_cpu(torch.zeros(1024, 1, dtype=torch.uint8), state)
    assert packed.packing_format_for_cpu and packed.original_nested
    assert packed.absmax.shape == (1, 32)


@entry("HfQuantizer.get_state_dict_and_metadata")
def _():
    from torchao.quantization import Int8WeightOnlyConfig

    model = InternLMXComposer2ForCausalLM.from_pretrained(
        ROOT, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    _, metadata = model.hf_quantizer.get_state_dict_and_metadata(model)
    name = next(name for name in json.loads(metadata["tensor_names"]) if ".wqkv.linear" in name)
    assert json.loads(metadata[name])["_type"] not in ("Tensor", None)
