"""The decoder by itself: against LlamaModel, with caches, padding, adapters and gradients."""

import pytest
import torch
from einops import rearrange
from helpers import tiny_config, tiny_model
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM
from internlm_xcomposer2.build_mlp import PLoRA, image_row_indices
from internlm_xcomposer2.modeling_internlm2 import InternLM2RotaryEmbedding
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    StaticCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def llama_with_same_weights(decoder) -> LlamaModel:
    """A LlamaModel with the plain linears of `decoder`, `wqkv` unpacked."""
    config = decoder.config
    fields = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps rope_parameters"
    )
    llama = LlamaModel(LlamaConfig(**{name: getattr(config, name) for name in fields.split()})).eval()
    weights = {"embed_tokens.weight": decoder.tok_embeddings.weight, "norm.weight": decoder.norm.weight}
    groups = config.num_attention_heads // config.num_key_value_heads
    for i, layer in enumerate(decoder.layers):
        packed = layer.attention.wqkv.weight
        packed = rearrange(packed, "(g r d) i -> g r d i", r=groups + 2, d=config.head_dim)
        weights |= {
            f"layers.{i}.self_attn.q_proj.weight": packed[:, :-2].flatten(0, 2),
            f"layers.{i}.self_attn.k_proj.weight": packed[:, -2].flatten(0, 1),
            f"layers.{i}.self_attn.v_proj.weight": packed[:, -1].flatten(0, 1),
            f"layers.{i}.self_attn.o_proj.weight": layer.attention.wo.weight,
            f"layers.{i}.mlp.gate_proj.weight": layer.feed_forward.w1.weight,
            f"layers.{i}.mlp.up_proj.weight": layer.feed_forward.w3.weight,
            f"layers.{i}.mlp.down_proj.weight": layer.feed_forward.w2.weight,
            f"layers.{i}.input_layernorm.weight": layer.attention_norm.weight,
            f"layers.{i}.post_attention_layernorm.weight": layer.ffn_norm.weight,
        }
    llama.load_state_dict(weights)
    return llama


@pytest.fixture(scope="module")
def decoder():
    return tiny_model(task_adapters={"sft": 3, "dpo": 2, "web": 5}).model


@pytest.fixture
def ids():
    return torch.randint(7, 600, (2, 17), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("length", [17, 70])
@pytest.mark.parametrize("scaling", [None, {"type": "dynamic", "factor": 2.0}])
def test_without_pictures_the_decoder_is_llama(scaling, length):
    model = tiny_model(rope_scaling=scaling, max_position_embeddings=48).model
    llama = llama_with_same_weights(model)
    ids = torch.randint(7, 600, (2, length), generator=torch.Generator().manual_seed(1))
    expected = llama(ids).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [10, 48, 49, 100])
def test_dynamic_frequencies_match_the_library(length):
    config = tiny_config(
        rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=48
    ).text_config
    expected, scale = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=length)
    found, found_scale = InternLM2RotaryEmbedding(config).frequencies(torch.tensor([length, 5]))
    torch.testing.assert_close(found[0], expected)
    assert torch.equal(found[1], InternLM2RotaryEmbedding(config).frequencies(torch.tensor([1]))[0][0])
    assert found_scale == scale


def test_the_rotary_base_can_be_set():
    """Engines write back what they read."""
    config = tiny_config(rope_scaling={"type": "dynamic", "factor": 2.0})
    text = config.text_config
    text.rope_theta = text.rope_theta
    assert text.rope_theta == 1_000_000 and text.rope_parameters["rope_type"] == "dynamic"
    text.rope_theta = 10_000
    assert config.rope_theta == 10_000 and text.rope_parameters["factor"] == 2.0
    set_later = InternLM2RotaryEmbedding(text).frequencies(torch.tensor([5]))[0]
    named = tiny_config(rope_theta=10_000, rope_scaling={"type": "dynamic", "factor": 2.0}).text_config
    assert torch.equal(set_later, InternLM2RotaryEmbedding(named).frequencies(torch.tensor([5]))[0])
    assert type(text)(**text.to_dict()).rope_theta == 10_000


@torch.no_grad()
@pytest.mark.parametrize("copies", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_long_prompt_is_rotated_for_its_whole_length(copies):
    """In one pass: if all but the last token came first, they would be rotated for one position less."""
    model = tiny_model("2.5", rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=32)
    ids = torch.randint(7, 600, (1, 60), generator=torch.Generator().manual_seed(1))
    lengths = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (
            lengths.append((args[0] if args else kwargs["inputs_embeds"]).shape[1])
            if kwargs.get("inputs_embeds") is not None
            else lengths.append((args[0] if args else kwargs["input_ids"]).shape[1])
        ),
        with_kwargs=True,
    )
    torch.manual_seed(0)
    model.generate(ids, max_new_tokens=2, min_new_tokens=2, **copies)
    assert lengths == [60, 1]
    expected = model(ids).logits[0, -1]
    outputs = model.generate(
        ids,
        max_new_tokens=1,
        output_logits=True,
        return_dict_in_generate=True,
        **{**copies, "do_sample": False, "num_return_sequences": 1},
    )
    torch.testing.assert_close(outputs.logits[0][0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_long_prompt_does_not_change_later_short_ones():
    model = tiny_model(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=32).model
    short, middle, long = (torch.arange(7, 7 + n)[None] for n in (20, 40, 90))
    before = [model(ids).last_hidden_state for ids in (short, middle)]
    model(long)
    for ids, expected in zip((short, middle), before, strict=True):
        assert torch.equal(model(ids).last_hidden_state, expected)


@torch.no_grad()
def test_a_long_row_does_not_change_a_short_one_beside_it():
    model = tiny_model(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=32).model
    ids = torch.randint(7, 600, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 60)
    mask[1, :40] = 0
    alone = model(ids[1:, 40:]).last_hidden_state
    batch = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(batch[1:, 40:], alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_equals_uncached(decoder, ids, kind):
    cache = DynamicCache(config=decoder.config)
    if kind == "static":
        cache = StaticCache(config=decoder.config, max_cache_len=24)
    full = decoder(ids).last_hidden_state
    pieces = [
        decoder(piece, past_key_values=cache).last_hidden_state for piece in ids.split([9, 1, 1, 6], dim=1)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask_type", [torch.long, torch.bool])
def test_padding_changes_nothing(decoder, ids, side, mask_type):
    alone = decoder(ids[1:, :11]).last_hidden_state
    pad = torch.full((1, 6), 2)
    row = torch.cat([pad, ids[1:, :11]] if side == "left" else [ids[1:, :11], pad], dim=1)
    mask = torch.ones(2, 17, dtype=mask_type)
    keep = slice(6, None) if side == "left" else slice(0, 11)
    mask[1] = 0
    mask[1, keep] = 1
    batch = decoder(torch.cat([ids[:1], row]), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(batch[1:, keep], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_attention_implementations_agree(decoder, ids):
    results = {}
    for name in ("eager", "sdpa"):
        model = tiny_model(task_adapters={"sft": 3, "dpo": 2, "web": 5}, attn_implementation=name).model
        assert model.config._attn_implementation == name
        results[name] = model(ids).last_hidden_state
    torch.testing.assert_close(results["eager"], results["sdpa"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_attention_goes_through_the_interface_of_the_library(ids):
    calls = []

    def counted(module, query, key, value, mask, **kwargs):
        calls.append((type(module).__name__, kwargs["scaling"]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    AttentionInterface.register("counted", counted)
    AttentionMaskInterface.register("counted", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = tiny_model()
    expected = model.model(ids).last_hidden_state
    model.set_attn_implementation("counted")
    assert torch.equal(model.model(ids).last_hidden_state, expected)
    assert calls == [("InternLM2Attention", 8**-0.5)] * 2
    model.vit.encode_tiles(torch.zeros(1, 3, 56, 56))
    assert [name for name, _ in calls[2:]] == ["CLIPAttention"] * 2


@torch.no_grad()
def test_hidden_states_and_attentions(ids):
    model = tiny_model(attn_implementation="eager").model
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3 and torch.equal(
        outputs.hidden_states[-1], outputs.last_hidden_state
    )
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 4, 17, 17)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 4, 17))
    assert model(ids).hidden_states is None and model(ids).attentions is None


@torch.no_grad()
def test_low_rank_weights_act_on_image_tokens_only():
    torch.manual_seed(0)
    layer = PLoRA(8, 6, lora_r=4, lora_alpha=8).eval()
    x, mask = torch.randn(2, 5, 8), torch.zeros(2, 5)
    mask[0, 1:3] = 1
    plain = layer.linear(x)
    delta = 2.0 * layer.Plora_B(layer.Plora_A(x))
    expected = torch.where(mask[..., None].bool(), plain + delta, plain)
    for kind in (torch.float32, torch.long, torch.bool):
        torch.testing.assert_close(layer(x, mask.to(kind)), expected)
    assert torch.equal(layer(x), plain) and torch.equal(layer(x, torch.zeros(2, 5)), plain)


@torch.no_grad()
def test_new_low_rank_weights_change_nothing_yet(ids):
    config = tiny_config(task_adapters={"web": 5})
    model = InternLMXComposer2ForCausalLM(config).eval().model
    mask = torch.ones(2, 17)
    assert torch.equal(model(ids, im_mask=mask, infer_mode="web")[0], model(ids)[0])
    assert model.layers[0].attention.wqkv.Plora_A.weight.std() > 0


@torch.no_grad()
def test_task_adapters_act_on_all_tokens_at_every_step(decoder, ids):
    full = decoder(ids, infer_mode="write").last_hidden_state
    assert (full - decoder(ids).last_hidden_state).abs().amin(-1).gt(0).all()
    cache = DynamicCache(config=decoder.config)
    kwargs = {"past_key_values": cache, "infer_mode": "write"}
    pieces = [decoder(piece, **kwargs).last_hidden_state for piece in ids.split([16, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=1e-5)
    layer = decoder.layers[0].feed_forward.w1
    x = torch.randn(1, 3, 32)
    both = layer(x) + layer.lora_sft_B(layer.lora_sft_A(x)) + layer.lora_dpo_B(layer.lora_dpo_A(x))
    torch.testing.assert_close(layer(x, infer_mode="write"), both)


def test_gradient_checkpointing_gives_the_same_gradients(ids):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(plora_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        mask = torch.zeros(2, 17)
        mask[:, 3:6] = 1
        embeds = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeds, im_mask=mask, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_positions_stay_in_float32_whatever_the_dtype():
    rotary = tiny_model().half().model.rotary_emb
    cos, sin = rotary(torch.tensor([[1000]]))
    assert cos.dtype == sin.dtype == torch.float32
    expected = tiny_model().model.rotary_emb(torch.tensor([[1000]]))
    assert torch.equal(cos, expected[0]) and torch.equal(sin, expected[1])


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({}, "exactly one"),
        ({"input_ids": torch.ones(1, 3).long(), "infer_mode": "paint"}, "'paint'.*base, write, web"),
        ({"input_ids": torch.ones(1, 3).long(), "im_mask": torch.ones(1, 2)}, r"\(1, 2\).*\(1, 3\)"),
    ],
)
def test_wrong_inputs_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        tiny_model().model(**kwargs)


def test_a_mode_without_its_adapters_is_rejected():
    with pytest.raises(ValueError, match="'web' needs the adapters web.*has none"):
        tiny_model().model(torch.ones(1, 3).long(), infer_mode="web")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 5},
        {"num_key_value_heads": 3},
        {"num_hidden_layers": 0},
        {"rope_scaling": {"type": "dynamic"}},
        {"rope_scaling": {"type": "bogus", "factor": 2.0}},
        {"task_adapters": {"web": 0}},
        {"version": "3"},
        {"hd_num": 0},
        {"image_token_id": 9999},
    ],
)
def test_invalid_sizes_are_rejected(fields):
    with pytest.raises(ValueError):
        tiny_config(**fields)


# ---- image rows ----

MASKS = {
    "one range": [slice(3, 9)],
    "to the end": [slice(3, 17)],
    "from the start": [slice(0, 5)],
    "all": [slice(0, 17)],
    "one token": [slice(7, 8)],
    "two ranges": [slice(1, 4), slice(8, 12)],
}


@pytest.mark.parametrize("mode", ["base", "write"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("batch", [1, 2])
def test_in_place_products_equal_those_with_gradients(decoder, ids, name, mode, batch):
    """With gradients, rows are gathered and nothing is written in place; without, little is copied."""
    mask = torch.zeros(batch, 17)
    for span in MASKS[name]:
        mask[:, span] = 1
    inputs = {"inputs_embeds": decoder.tok_embeddings(ids[:batch]).detach(), "infer_mode": mode}
    expected = decoder(**inputs, im_mask=mask).last_hidden_state
    assert expected.requires_grad
    with torch.no_grad():
        found = decoder(**inputs, im_mask=mask).last_hidden_state
        plain = decoder(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, plain)


def test_image_rows_are_one_range_where_they_can_be():
    mask = torch.zeros(2, 6)
    assert image_row_indices(None, "cpu") is None and image_row_indices(mask, "cpu") is None
    mask[0, 4:] = mask[1, :3] = 1
    assert image_row_indices(mask, "cpu").tolist() == [4, 5, 6, 7, 8]
    with torch.no_grad():
        assert image_row_indices(mask, "cpu") == slice(4, 9)
        mask[1, 5] = 1
        assert image_row_indices(mask.long(), "cpu").tolist() == [4, 5, 6, 7, 8, 11]


@torch.no_grad()
@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([2, 3, 4])])
def test_inputs_are_never_written_to(rows):
    layer = PLoRA(8, 8, lora_r=4, lora_alpha=8, adapters={"web": 3}).eval()
    torch.nn.init.normal_(layer.Plora_B.weight), torch.nn.init.normal_(layer.lora_web_B.weight)
    x = torch.randn(1, 6, 8)
    before = x.clone()
    layer(x, image_rows=rows, infer_mode="web")
    assert torch.equal(x, before)


@torch.no_grad()
@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([2, 3, 4])])
def test_replaced_factors_still_act(rows):
    """A quantiser may replace any linear with its own class."""

    class Other(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.inner = linear

        def forward(self, x):
            return self.inner(x)

    layer = PLoRA(8, 6, lora_r=4, lora_alpha=8, adapters={"web": 3}).eval()
    torch.nn.init.normal_(layer.Plora_B.weight), torch.nn.init.normal_(layer.lora_web_B.weight)
    x = torch.randn(1, 6, 8)
    expected = layer(x, image_rows=rows, infer_mode="web")
    for name in ("linear", "Plora_A", "Plora_B", "lora_web_A", "lora_web_B"):
        setattr(layer, name, Other(getattr(layer, name)))
        torch.testing.assert_close(layer(x, image_rows=rows, infer_mode="web"), expected)


@torch.no_grad()
@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([2, 3, 4])])
def test_factors_of_another_type_still_act(rows):
    layer = PLoRA(8, 6, lora_r=4, adapters={"web": 3}).eval()
    torch.nn.init.normal_(layer.Plora_B.weight), torch.nn.init.normal_(layer.lora_web_B.weight)
    x = torch.randn(1, 6, 8)
    expected = layer(x, image_rows=rows, infer_mode="web")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x, image_rows=rows, infer_mode="web")
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
