"""What the plugin uses of vLLM that isn't public: each entry of its table in `docs/compatibility.md`."""

import dataclasses
import inspect
import re

import pytest
import torch
from engines import ROOT
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.renderers.base import BaseRenderer
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry

from ixc2_vllm.model import NAMES


def parameters_of(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def settings_by_architecture():
    assert all(issubclass(each, VerifyAndUpdateConfig) for each in MODELS_CONFIG_MAP.values())
    hooks = (
        VerifyAndUpdateConfig.verify_and_update_model_config,
        VerifyAndUpdateConfig.verify_and_update_config,
    )
    assert [parameters_of(hook) for hook in hooks] == [["model_config"], ["vllm_config"]]
    assert isinstance(VllmConfig.use_v2_model_runner, property)


def registries():
    assert RENDERER_REGISTRY.renderers["hf"][1] and TokenizerRegistry.tokenizers["hf"][1]


def whole_prompts():
    assert parameters_of(BaseRenderer._tokenize_prompt) == ["self", "prompt", "params"]
    assert parameters_of(BaseRenderer._build_tokens_prompt)[:2] == ["token_ids", "prompt"]


def frames_without_metadata():
    frames = [[0]]
    assert MultiModalDataParser()._get_video_with_metadata((frames, None)) == (frames, None)


def hooks_of_processors():
    hooks = {
        "apply": ["self", "inputs", "timing_ctx"],
        "_call_hf_processor": ["self", "hf_data", "hf_kwargs"],
        "_get_mm_fields_config": ["self", "hf_inputs", "hf_processor_mm_kwargs"],
        "_get_prompt_updates": ["self", "mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"],
    }
    for name, parameters in hooks.items():
        assert parameters_of(getattr(BaseMultiModalProcessor, name)) == parameters, name


def shards():
    (name, weight), *_ = NAMES.apply([("model.layers.0.feed_forward.w3.weight", torch.zeros(1))])
    assert (name, weight.shard_id) == ("model.layers.0.feed_forward.gate_up_proj.weight", 1)


def named_length():
    assert "original_max_model_len" in inspect.getsource(ModelConfig)
    assert "max_model_len" in {field.name for field in dataclasses.fields(ModelConfig)}


ENTRIES = {
    "MODELS_CONFIG_MAP": settings_by_architecture,
    "RENDERER_REGISTRY, TokenizerRegistry": registries,
    "BaseRenderer._tokenize_prompt, _build_tokens_prompt": whole_prompts,
    "MultiModalDataParser._get_video_with_metadata": frames_without_metadata,
    "BaseMultiModalProcessor's hooks": hooks_of_processors,
    "weight.shard_id": shards,
    "ModelConfig.original_max_model_len": named_length,
}


@pytest.mark.parametrize("name", ENTRIES)
def test_vllm_still_has(name):
    ENTRIES[name]()


def test_each_entry_of_the_table_has_a_test():
    text = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    section = text.split("## What of vLLM is not public", 1)[1].split("\n## ", 1)[0]
    assert re.findall(r"^\| `([^|]+)` \|", section, re.MULTILINE) == list(ENTRIES)
