"""Random checkpoints of every layout as published, and other models beside them, in one process."""

import json
from pathlib import Path

import pytest
from engines import (
    LAYOUT_QUESTIONS,
    LAYOUTS,
    answers_of,
    answers_of_chat,
    differing,
    engine,
    messages_of,
    num_cached,
    prompt_of,
    sampling,
)
from internlm_xcomposer2.ixc2.adopt import adopt
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from ixc2_vllm.penalty import PENALTY


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_of_a_published_checkpoint(layout, published):
    path, version = published(layout), LAYOUTS[layout][0]
    asked = LAYOUT_QUESTIONS
    expected = answers_of_chat(path, asked)
    penalised = answers_of_chat(path, asked, repetition_penalty=1.2)
    assert len({tuple(answer.ids) for answer in expected}) > 1  # the questions matter
    with engine(path) as llm:
        cold = []
        for question in asked:
            options = {"hd_num": question.hd_num} if question.hd_num else {}
            messages = messages_of(question)
            cold += llm.chat(messages, sampling(), use_tqdm=False, mm_processor_kwargs=options)
        assert not differing(asked, answers_of(cold), expected)
        prompts = [prompt_of(question, version) for question in asked]
        warm = llm.generate(prompts, sampling(), use_tqdm=False)
        assert not differing(asked, answers_of(warm), expected)
        assert num_cached(warm) > 0
        settings = sampling(extra_args={PENALTY: 1.2})
        outputs = llm.generate(prompts, settings, use_tqdm=False)
        assert not differing(asked, answers_of(outputs), penalised)


def test_without_partial_lora_the_answers_differ(published):
    def without(weights: dict) -> dict:
        return {name: value * 0 if "Plora_B" in name else value for name, value in weights.items()}

    about_pictures = [question for question in LAYOUT_QUESTIONS if question.images]
    expected = answers_of_chat(published("2d5"), about_pictures)
    with engine(published("2d5", without)) as llm:
        outputs = llm.generate(
            [prompt_of(question) for question in about_pictures], sampling(), use_tqdm=False
        )
    assert len(differing(about_pictures, answers_of(outputs), expected)) == len(about_pictures)


def test_an_adopted_checkpoint_as_remote_code(published, tmp_path):
    path = adopt(published("4khd"), tmp_path / "adopted").target
    asked = LAYOUT_QUESTIONS[:4]
    expected = answers_of_chat(path, asked)
    with engine(path, config_format="auto", trust_remote_code=True) as llm:
        prompts = [prompt_of(question, "2-4khd") for question in asked]
        outputs = llm.generate(prompts, sampling(), use_tqdm=False)
    assert not differing(asked, answers_of(outputs), expected)


TEXT_ONLY_CONFIG = """\
from transformers import PretrainedConfig


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"
"""


def text_only_checkpoint(folder: Path, ours: Path) -> Path:
    """The plain decoder of `ours` as an InternLM2, which has a model type of our published files too."""
    sizes = {"vocab_size": 640, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    fields = {
        **sizes,
        **heads,
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "hidden_act": "silu",
        "bias": False,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 1_000_000,
        "tie_word_embeddings": False,
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    }
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "configuration_internlm2.py").write_text(TEXT_ONLY_CONFIG)
    weights = load_file(ours / "model.safetensors")
    wanted = ("model.", "output.")
    text = {name: each for name, each in weights.items() if name.startswith(wanted) and "Plora" not in name}
    save_file(text, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_text_only_internlm2_is_left_alone(published, tmp_path):
    """After one of ours in the same process, it is vLLM's own class, and computes what it should."""
    ours = published("2")
    path = text_only_checkpoint(tmp_path, ours)
    ids = [1, 60, 70, 80, 90]
    with engine(ours) as llm:
        assert llm.llm_engine.model_config.architecture == "InternLMXComposer2ForCausalLM"
        (expected,) = llm.generate([{"prompt_token_ids": ids}], sampling(ignore_eos=True), use_tqdm=False)
    options = {"config_format": "auto", "trust_remote_code": True, "limit_mm_per_prompt": {}}
    with engine(path, skip_tokenizer_init=True, **options) as llm:
        config = llm.llm_engine.model_config
        assert config.architecture == "InternLM2ForCausalLM"
        assert not config.is_multimodal_model and config.tokenizer_mode in ("auto", "hf")
        assert isinstance(config.hf_config, PretrainedConfig) and not hasattr(config.hf_config, "version")
        assert not config.logits_processors
        settings = sampling(ignore_eos=True, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
