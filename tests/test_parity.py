"""The numbers that the original code gave for random tiny checkpoints of every family."""

import pytest
import torch
from helpers import (
    FAMILIES,
    FULL_SIZES,
    VERSION_OF_FAMILY,
    call_of,
    family_config,
    full_size_config,
    full_size_shapes,
    golden_case,
    golden_cases,
    needs_published_tokenizer,
)
from internlm_xcomposer2 import InternLMXcomposer2Config, InternLMXComposer2ForCausalLM
from internlm_xcomposer2.configuration_internlm_xcomposer2 import our_name, published_name
from internlm_xcomposer2.image_processing_internlm_xcomposer2 import as_visuals, prepare_visuals

CASES = [(family, case) for family in FAMILIES for case in golden_cases(family)]
GREEDY_TOKENS = 32


def inputs_of(model, case: dict) -> dict:
    """`forward`'s inputs for a case, put together from its recorded segments: no tokenizer needed."""
    if not case["segments"]:
        return {"input_ids": torch.tensor([case["input_ids"]])}
    ids: list[int] = []
    for segment in case["segments"]:
        is_text = segment[0] == "text"
        ids += segment[1] if is_text else [model.config.image_token_id] * segment[2]
    inputs = {"input_ids": torch.tensor([ids])}
    if case["images"]:
        visuals = as_visuals(call_of(case)["image"], model.config)
        hd_num = case["call"].get("hd_num") or model.default_hd_num(len(visuals))
        inputs["pixel_values"], inputs["image_grid_hw"] = prepare_visuals(visuals, model.config, hd_num)
    return inputs


@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), CASES)
def test_prefill(family, name, family_model):
    model, (case, tensors) = family_model(family), golden_case(family, name)
    inputs = inputs_of(model, case)
    assert inputs["input_ids"].shape[1] == case["n_tokens"]
    embeds, mask = model.embed_inputs(**inputs)
    if case["images"]:
        assert torch.equal(mask[0], tensors["im_mask"].bool().flatten())
        assert inputs["image_grid_hw"].tolist() == [image.get("grid") or [1, 1] for image in case["images"]]
        features = embeds[mask].split([image["n_tokens"] for image in case["images"]])
        for k, found in enumerate(features):
            rows, key = slice(None), f"img{k}_embeds"
            if key not in tensors:
                rows, key = tensors[f"img{k}_rows"], f"img{k}_embeds_at_rows"
            torch.testing.assert_close(found[rows], tensors[key].view(-1, found.shape[-1]), rtol=0, atol=2e-5)
    mode = case["call"].get("infer_mode", "base")
    outputs = model(**inputs, infer_mode=mode, output_hidden_states=True)
    logits, positions = outputs.logits[0], tensors["logit_positions"]
    assert torch.equal(logits.argmax(-1), tensors["argmax_all"].flatten())
    close = {"rtol": 0, "atol": 2e-4}
    torch.testing.assert_close(logits[-1], tensors["logits_last"].flatten(), **close)
    found = logits[positions][:, tensors["logit_vocab"]]
    torch.testing.assert_close(found, tensors["logits_sub"].view_as(found), **close)
    found = outputs.hidden_states[-1][0, positions]
    torch.testing.assert_close(found, tensors["hidden_at_positions"].view_as(found), **close)


@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), CASES)
def test_generation(family, name, family_model):
    model, (case, _) = family_model(family), golden_case(family, name)
    inputs = inputs_of(model, case)
    mode = case["call"].get("infer_mode", "base")
    if case["segments"]:
        embeds, mask = model.embed_inputs(**inputs)
        inputs = {"inputs_embeds": embeds, "im_mask": mask}
    for golden in case["generations"]:
        settings = {key: golden[key] for key in ("num_beams", "repetition_penalty")}
        found = model.generate(
            **inputs,
            infer_mode=mode,
            max_new_tokens=GREEDY_TOKENS,
            do_sample=False,
            eos_token_id=[2, 92542],
            pad_token_id=2,
            return_dict_in_generate=True,
            output_scores=True,
            **settings,
        )
        num_before = 1 if case["segments"] else case["n_tokens"]
        assert found.sequences[0, num_before:].tolist() == golden["new_tokens"], settings
        if "sequences_scores" in golden:
            assert found.sequences_scores.tolist() == pytest.approx(golden["sequences_scores"], abs=1e-4)


@needs_published_tokenizer
@pytest.mark.parametrize(("family", "name"), CASES)
def test_chat(family, name, family_model, published):
    model, (case, _) = family_model(family), golden_case(family, name)
    golden = case["generations"][0]
    response, history = model.chat(
        published,
        **call_of(case),
        do_sample=False,
        num_beams=golden["num_beams"],
        repetition_penalty=golden["repetition_penalty"],
        max_new_tokens=GREEDY_TOKENS,
    )
    assert response == golden["response"]
    assert [list(turn) for turn in history] == golden["history_out"]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_come_from_the_weights(family):
    golden = family_config(family)
    config = InternLMXcomposer2Config(**golden["config"]).complete_from_shapes(golden["state_dict_shapes"])
    assert config.version == VERSION_OF_FAMILY[family]
    with torch.device("meta"):
        model = InternLMXComposer2ForCausalLM(config)
    shapes = {name.replace(".linear.", "."): list(p.shape) for name, p in model.state_dict().items()}
    assert shapes == golden["state_dict_shapes"]


@pytest.mark.parametrize("name", FULL_SIZES)
def test_full_size_models_have_the_published_keys(name):
    """Both ways: a file's names as ours, and ours as a file's, with the same shapes."""
    shapes, config = full_size_shapes(name), full_size_config(name)
    assert config.vision_config.num_attention_heads == 16
    assert shapes["vision_proj.0.weight"][1] == config.projector_input_size
    with torch.device("meta"):
        model = InternLMXComposer2ForCausalLM(config)
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    renamed = {our_name(key): shape for key, shape in shapes.items()}
    assert len(renamed) == len(shapes)
    missing = {key for key in ours if key not in renamed}
    assert all("post_layernorm" in key for key in missing)
    assert {key: shape for key, shape in ours.items() if key in renamed} == renamed
    written = {published_name(key): shape for key, shape in ours.items() if key not in missing}
    assert written == shapes
