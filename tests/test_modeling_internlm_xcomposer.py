"""The first generation's configuration, files and model, against the goldens of the published code."""

import copy
import json
import math

import pytest
import torch
from first_generation import (
    NUM_ROWS,
    expected_ids,
    first_tokenizer,
    golden,
    golden_file,
    needs_first_tokenizer,
    picture,
    published_buffers,
    published_fields,
    recipe_state_dict,
    tiny_first,
    write_first,
)
from helpers import read_json, write_published
from internlm_xcomposer2 import InternLMXComposerConfig, InternLMXComposerForCausalLM
from internlm_xcomposer2.chat_internlm_xcomposer import align_text, answer_labels
from internlm_xcomposer2.configuration_internlm_xcomposer import JOINED_BIAS, our_name, published_name
from internlm_xcomposer2.modeling_internlm_xcomposer import LowRankLinear, fold
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

VISION = ("visual_encoder", "ln_vision", "Qformer", "internlm_proj", "query_tokens", "flag_image_start")
DECODER_ON_DISK = {**dict.fromkeys((*VISION, "flag_image_end"), "cpu"), "internlm_model": "disk"}
CASES = ("single_small", "single_photo_zh", "text_none")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_first(tmp_path_factory.mktemp("first") / "checkpoint")


@pytest.fixture(scope="module")
def model(checkpoint) -> InternLMXComposerForCausalLM:
    """Low-rank weights folded. Shared: don't change it."""
    return load(checkpoint)


@pytest.fixture(scope="module")
def kept(checkpoint) -> InternLMXComposerForCausalLM:
    """Low-rank weights kept. Shared: don't change it."""
    return load(checkpoint, fold_low_rank=False)


def load(directory, **kwargs):
    loaded = InternLMXComposerForCausalLM.from_pretrained(directory, **{"dtype": "float32", **kwargs}).eval()
    if path := first_tokenizer():
        from internlm_xcomposer2 import InternLMXComposerTokenizer

        loaded.tokenizer = InternLMXComposerTokenizer(str(path))
    return loaded


def inputs_of(segments: list, images: list, model) -> dict:
    """The recorded prompt as ids, with the pixels of its pictures."""
    ids = torch.tensor([expected_ids(segments, model.config.image_token_id)])
    return {"input_ids": ids} | ({"pixel_values": pixels_of(model, *images)} if images else {})


def pixels_of(model, *paths) -> torch.Tensor:
    from PIL import Image

    return torch.stack([model.vis_processor(Image.open(path)) for path in paths])


# ---- configuration ----


@pytest.mark.parametrize(
    ("name", "vocabulary", "rank"),
    [
        ("internlm-xcomposer-7b", 103168, 256),
        ("internlm-xcomposer-vl-7b", 103170, 256),
        ("merged", 103168, None),
    ],
)
def test_full_size_checkpoints_are_recognised_by_their_tensors(name, vocabulary, rank):
    recorded, _ = golden("state_dict_fullsize")
    key = next(key for key in recorded if key.startswith(name))
    shapes = {name: tuple(entry[0]) for name, entry in recorded[key].items()}
    config = InternLMXComposerConfig().complete_from_shapes(shapes)
    sizes = config.vision_config, config.qformer_config, config.text_config
    assert [part.num_hidden_layers for part in sizes] == [39, 12, 32]
    assert [part.hidden_size for part in sizes] == [1408, 768, 4096]
    assert [part.num_attention_heads for part in sizes] == [16, 12, 32]
    assert config.text_config.vocab_size == vocabulary
    assert (config.internlm_lora or {}).get("lora_r") == rank
    with torch.device("meta"):
        model = InternLMXComposerForCausalLM(config)
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    named = {our_name(key): shape for key, shape in shapes.items() if "_bias" not in key}
    ignored = {key for key in named if key.endswith(("inv_freq", "position_ids"))}
    assert {key: shape for key, shape in ours.items() if not key.endswith(JOINED_BIAS)} == {
        key: shape for key, shape in named.items() if key not in ignored
    }
    if rank:
        # One more bias in each layer of the tower, that of the keys, and the rows that VL adds.
        expected = 8_797_872_000 + 39 * 1408 + 2 * (vocabulary - 103168) * 4096
        assert sum(math.prod(shape) for shape in ours.values()) == expected


def test_a_published_file_is_read_as_it_is(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    assert type(config) is InternLMXComposerConfig
    assert (config.hidden_size, config.pad_token_id, config.num_query_token) == (64, 2, 64)
    assert config.internlm_lora["lora_alpha"] == 12
    assert config.vision_config.num_hidden_layers == 3  # under its published name, `depth`
    assert config.qformer_config.encoder_hidden_size == 44
    again = InternLMXComposerConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intern_converted_llm": False}, "intern_converted_llm False isn't supported"),
        ({"num_attention_heads": 5}, "decoder is 64 wide, not a multiple of its 5"),
        ({"vision_config": {"embed_dim": 44, "num_heads": 5}}, "tower is 44 wide, not a multiple of its 5"),
        ({"internlm_lora": {"lora_r": 8}}, "internlm_lora lacks lora_alpha"),
        ({"internlm_lora": {"lora_r": 8, "lora_alpha": 8, "learn_param": ["x"]}}, "learn_param knows q, k"),
        ({"image_token_id": 200000}, "image_token_id 200000 is outside"),
    ],
)
def test_a_bad_field_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        InternLMXComposerConfig.from_dict(published_fields(**change))


def test_names_go_both_ways():
    for name in recipe_state_dict():
        if not name.endswith(("q_bias", "v_bias")):
            assert published_name(our_name(name)) == name
            assert our_name(our_name(name)) == our_name(name)


# ---- files ----


def test_buffers_are_ignored_and_everything_else_is_loaded(checkpoint):
    _, info = InternLMXComposerForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_missing_tensor_is_named(tmp_path):
    weights = {k: v for k, v in recipe_state_dict().items() if k != "flag_image_end"}
    write_first(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="1 missing: flag_image_end"):
        InternLMXComposerForCausalLM.from_pretrained(tmp_path)


def test_shards_of_mixed_types_load_in_one_type(tmp_path, model):
    weights = {
        key: value.half() if key.startswith("internlm_model") and "lora_" not in key else value
        for key, value in (recipe_state_dict() | published_buffers()).items()
    }
    write_published(tmp_path, weights, published_fields(), shards=2, kind="bin")
    mixed = load(tmp_path)
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.float32}
    for (name, ours), theirs in zip(mixed.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 if "proj.weight" in name else 0)


def test_folded_and_kept_weights_give_the_same(model, kept):
    assert model.config.internlm_lora is None
    assert kept.config.internlm_lora["lora_r"] == 8
    assert any(isinstance(module, LowRankLinear) for module in kept.modules())
    inputs = {"input_ids": torch.arange(1, 40)[None]}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, kept(**inputs).logits, rtol=0, atol=5e-5)


def test_folding_rounds_once():
    torch.manual_seed(0)
    weight, a, b = torch.randn(6, 5).bfloat16(), torch.randn(3, 5), torch.randn(6, 3)
    expected = (weight.double() + 1.5 * (b.double() @ a.double())).to(torch.bfloat16)
    assert torch.equal(fold(weight, a, b, 1.5), expected)


def test_kept_weights_are_saved_as_they_were(kept, tmp_path):
    kept.save_pretrained(tmp_path)
    saved, source = load_file(tmp_path / "model.safetensors"), recipe_state_dict()
    assert set(saved) == set(source)
    assert all(torch.equal(saved[name], source[name]) for name in source)
    assert read_json(tmp_path / "config.json")["internlm_lora"]["lora_alpha"] == 12


def test_folded_weights_are_saved_under_published_names_and_come_back(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == {name for name in recipe_state_dict() if "lora_" not in name}
    again = AutoModel.from_pretrained(tmp_path, dtype="float32")
    for ours, theirs in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_trainers_checkpoint_is_accepted_by_load_state_dict(model):
    weights = {name: value for name, value in recipe_state_dict().items() if "lora_" not in name}
    other = InternLMXComposerForCausalLM(model.config)
    other.load_state_dict(weights)
    bias = other.visual_encoder.encoder.layers[0].self_attn.qkv.bias
    assert torch.equal(bias[:44], weights["visual_encoder.blocks.0.attn.q_bias"])
    assert not bias[44:88].any()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, DECODER_ON_DISK])
def test_device_maps_give_the_same_logits(model, checkpoint, device_map, tmp_path):
    placed = load(checkpoint, device_map=device_map, offload_folder=tmp_path)
    inputs = inputs_of(
        [["text", [1, 5]], ["image", 0, 66], ["text", [7]]], [picture("inputs/small.png")], model
    )
    with torch.no_grad():
        torch.testing.assert_close(placed(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("folds", [True, False])
def test_half_precision_stays_close(model, checkpoint, dtype, folds):
    half = load(checkpoint, dtype=dtype, fold_low_rank=folds)
    inputs = inputs_of(
        [["text", [1, 5]], ["image", 0, 66], ["text", [7]]], [picture("inputs/small.png")], model
    )
    with torch.no_grad():
        ours, theirs = half(**inputs).logits[:, -1].float(), model(**inputs).logits[:, -1]
    assert torch.nn.functional.cosine_similarity(ours, theirs).item() > (
        0.999 if dtype == "float16" else 0.99
    )


# ---- numbers of the published code ----


def test_the_parts_of_the_picture_path_equal_the_published_ones(model):
    _, tensors = golden("single_small")
    with torch.no_grad():
        patches = model.visual_encoder(pixels_of(model, picture("inputs/small.png"))).last_hidden_state
        normed = model.ln_vision(patches)
        summary = model.Qformer(
            query_embeds=model.query_tokens, encoder_hidden_states=normed
        ).last_hidden_state
    for name, ours in (("vit", patches), ("ln_vision", normed), ("qformer", summary)):
        torch.testing.assert_close(ours[0], tensors[f"img0_{name}"], rtol=0, atol=2e-5)


def test_pixels_equal_the_published_ones():
    recorded, _ = golden("preprocess")
    from hashlib import sha256

    from internlm_xcomposer2.image_processing_internlm_xcomposer2 import VisProcessor
    from PIL import Image

    for name, facts in recorded["files"].items():
        pixels = VisProcessor(224)(Image.open(picture(f"inputs/{name}")))
        assert sha256(pixels.numpy().tobytes()).hexdigest() == facts["sha256"]


@pytest.mark.parametrize("name", ["mmbench_style", *CASES])
@pytest.mark.parametrize("which", ["model", "kept"])
def test_embeddings_and_logits_equal_the_published_ones(name, which, request):
    tested = request.getfixturevalue(which)
    case, tensors = golden(name)
    path = picture((case["call"].get("images") or [case["call"].get("image")])[0])
    inputs = inputs_of(case["segments"], [path] if path else [], tested)
    assert inputs["input_ids"].shape[1] == case["n_tokens"]
    with torch.no_grad():
        outputs = tested(**inputs, output_hidden_states=True)
        if path:
            embeds = tested.encode_img(path)[0]
            assert embeds.shape[0] == NUM_ROWS
            torch.testing.assert_close(embeds, tensors["img0_embeds"], rtol=0, atol=2e-5)
    logits = outputs.logits[0]
    assert torch.equal(logits.argmax(-1), tensors["argmax_all"])
    kept = logits[tensors["logit_positions"]][:, tensors["logit_vocab"]]
    torch.testing.assert_close(kept, tensors["logits_sub"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["mmbench_style", *CASES])
def test_ids_and_pictures_generate_the_published_tokens(model, name):
    case, _ = golden(name)
    path = picture((case["call"].get("images") or [case["call"].get("image")])[0])
    inputs = inputs_of(case["segments"], [path] if path else [], model)
    for expected in case["generations"]:
        settings = {name: expected[name] for name in ("num_beams", "repetition_penalty")}
        embeds, _ = model.embed_inputs(**inputs)
        tokens = model.internlm_model.generate(
            inputs_embeds=embeds, max_length=33, do_sample=False, **settings
        )
        assert tokens[0].tolist() == [1, *expected["new_tokens"]]


def swap_flags(model) -> None:
    start, end = model.flag_image_start, model.flag_image_end
    model.flag_image_start, model.flag_image_end = end, start


def set_tower_norms(model) -> None:
    for module in model.visual_encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5


def set_queries_norms(model) -> None:
    for module in model.Qformer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5


def skip_last_block(model) -> None:
    del model.visual_encoder.encoder.layers[-1]


def drop_bias(linear: str):
    def change(model) -> None:
        for layer in model.internlm_model.model.layers:
            layer.self_attn.get_submodule(linear).bias.zero_()

    return change


def scale_low_rank(scale: float):
    def change(model) -> None:
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                module.scale = scale

    return change


SLIPS = {
    "reference": lambda model: None,
    "ln_vision eps 1e-6 instead of 1e-5": lambda model: setattr(model.ln_vision, "eps", 1e-6),
    "tower norms eps 1e-5 instead of 1e-6": set_tower_norms,
    "q-former norms eps 1e-5 instead of 1e-12": set_queries_norms,
    "tower last block skipped": skip_last_block,
    "flags swapped": swap_flags,
    "low-rank off": scale_low_rank(0.0),
    "low-rank scale 1 instead of alpha/r": scale_low_rank(1.0),
    **{f"{name} bias left out": drop_bias(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
}


@torch.no_grad()
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_moves_the_numbers_as_recorded(kept, slip):
    """So each of these details is as in the published code, which the reference is."""
    expected = golden("sensitivity")[0][slip]
    case, tensors = golden("single_small")
    changed = copy.deepcopy(kept)
    SLIPS[slip](changed)
    path = picture(case["call"]["image"])
    moved = (changed.encode_img(path)[0] - tensors["img0_embeds"]).abs().max().item()
    assert moved == pytest.approx(expected["img_embeds_max"], rel=0.05, abs=1e-5)
    inputs = inputs_of(case["segments"], [path], kept)
    logits = [tested(**inputs).logits[0, -1] for tested in (changed, kept)]
    moved = (logits[0] - logits[1]).abs().max().item()
    assert moved == pytest.approx(expected["logits_last_max"], rel=0.05, abs=2e-5)
    assert bool(logits[0].argmax() == logits[1].argmax()) == expected["argmax_same"]


def test_weights_without_low_rank_ones_give_their_own_numbers(tmp_path):
    case, tensors = golden("no_lora_text")
    merged = load(write_first(tmp_path, lora=False))
    with torch.no_grad():
        logits = merged(**inputs_of(case["segments"], [], merged)).logits[0]
    kept = logits[tensors["logit_positions"]][:, tensors["logit_vocab"]]
    torch.testing.assert_close(kept, tensors["logits_sub"], rtol=0, atol=2e-4)


def test_a_batch_padded_on_the_left_gives_each_row_its_own_logits():
    model = tiny_first()
    rows = [list(range(301, 309)), list(range(303, 307))]
    batch, mask = torch.tensor([rows[0], [0] * 4 + rows[1]]), torch.tensor([[1] * 8, [0] * 4 + [1] * 4])
    with torch.no_grad():
        together = model(input_ids=batch, attention_mask=mask).logits
        alone = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    torch.testing.assert_close(together[0], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(together[1, 4:], alone[1], rtol=0, atol=1e-5)


def test_steps_with_a_cache_give_the_logits_of_one_pass():
    model, ids = tiny_first(), torch.arange(310, 330)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :12], use_cache=True)
        cache = first.get("cache", first.get("past_key_values"))
        second = model(input_ids=ids[:, 12:], cache=cache, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=1e-5)


def test_pictures_and_prompt_must_match():
    model = tiny_first()
    ids = torch.full((1, 8), model.config.image_token_id)
    with pytest.raises(ValueError, match="reserves 8 image tokens but 2 pictures give 16"):
        model(input_ids=ids, pixel_values=torch.zeros(2, 3, 56, 56))
    with pytest.raises(ValueError, match="no pixel_values were given"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=r"this checkpoint reads \(tiles, 3, 56, 56\)"):
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="infer_mode 'web' needs the adapters web"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), infer_mode="web")


# ---- training ----


@needs_first_tokenizer
@pytest.mark.parametrize("name", ["train_image", "train_text"])
def test_the_published_trainers_batches_give_the_published_losses(checkpoint, name):
    case, tensors = golden(name)
    trained = load(checkpoint, fold_low_rank=False)
    images = [picture(path) for path in case["images"] or []]
    samples = {"text_input": case["text_input"]} | ({"image": pixels_of(trained, *images)} if images else {})
    outputs = trained(samples=samples)
    assert outputs.loss.item() == pytest.approx(case["loss"], abs=2e-5)
    positions, vocabulary = tensors["logit_positions"], tensors["logit_vocab"]
    kept = outputs.logits[:, positions][:, :, vocabulary]
    torch.testing.assert_close(kept, tensors["logits_sub"], rtol=0, atol=2e-4)
    _, _, labels = trained.embed_samples(samples)
    assert torch.equal(labels, tensors["labels"])
    outputs.loss.backward()
    norms = {
        published_name(n): p.grad.norm().item() for n, p in trained.named_parameters() if p.grad is not None
    }
    expected = {key: norm for key, norm in case["grad_norms"].items() if norm is not None}
    for key, norm in expected.items():
        if not key.endswith(("q_bias", "v_bias")):  # they are joined here
            assert norms[key] == pytest.approx(norm, rel=2e-3, abs=1e-5), key
    assert any("lora_A" in key for key in expected)


def test_conversations_are_marked_as_published():
    case, _ = golden("train_text")
    assert [align_text(text) for text in case["text_input"]] == case["aligned"]


def test_labels_of_a_conversation_that_was_cut():
    question, answer, eos = 7, 8, 2
    ids = [3, 7, 0, 0, 4, 5, 8, 3, 7, 0, 0, 6, 8, 2, 2]
    skip = -100
    labels = [skip, skip, skip, skip, 4, 5, 8, skip, skip, skip, skip, 6, 8, 2, skip]
    assert answer_labels(ids, question, answer, eos, 2) == labels
    assert answer_labels(ids[:8], question, answer, eos, 2) == [*labels[:7], skip]


def test_a_batch_without_pictures_reaches_the_trained_vision_parts():
    model = tiny_first().train()
    ids = torch.arange(301, 309)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_new_low_rank_weights_change_nothing():
    lora = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    config = tiny_first(internlm_lora=lora).config
    fresh = InternLMXComposerForCausalLM(config)
    linears = [module for module in fresh.modules() if isinstance(module, LowRankLinear)]
    assert len(linears) == 2 * 4
    assert not any(linear.low_rank_B.weight.any() for linear in linears)
    assert all(linear.low_rank_A.weight.any() for linear in linears)


# ---- where the classes are found ----


def test_the_auto_classes_find_the_model(checkpoint):
    for auto in (AutoModel, AutoModelForCausalLM):
        assert type(auto.from_pretrained(checkpoint)) is InternLMXComposerForCausalLM


def test_every_golden_case_is_tested():
    names = {path.stem for path in golden_file("").glob("*.json")}
    known = {"config", "mmbench_style", *CASES, "no_lora_text", "train_image", "train_text"}
    known |= {"preprocess", "sensitivity", "state_dict_fullsize", "tokenizer", "two_turns", "compose"}
    known |= {"three_turns_two_images", "stop_eoa", "batch_left_pad", "sharecaptioner_batch"}
    assert names <= known
    json.dumps(sorted(names))
