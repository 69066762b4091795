"""The cache that grows in place returns what transformers' own does, and moves nothing it need not."""

import copy

import pytest
import torch
from helpers import prompt_with_pictures, random_pictures, tiny_model
from internlm_xcomposer2.cache_internlm_xcomposer2 import LEAST_SPARE, GrowingCache, GrowingLayer
from transformers import DynamicCache


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def states(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of (rows, 2, tokens, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, 2, tokens, 3, generator=generator) for _ in range(2))


def both(model) -> tuple[GrowingCache, DynamicCache]:
    return GrowingCache(model.config), DynamicCache(config=model.config.text_config)


def assert_same(ours: GrowingCache, theirs: DynamicCache) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)


def extend(cache, rows: int, tokens: int, seed: int) -> None:
    for index in range(len(cache.layers)):
        cache.update(*states(rows, tokens, seed + index), index)


# What may happen to a cache between two updates; each from outside and in any order.
CHANGES = {
    "nothing": lambda cache: None,
    "crop": lambda cache: cache.crop(-2),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "replace": lambda cache: [setattr(layer, "keys", layer.keys.flip(0)) for layer in cache.layers],
    "reset": lambda cache: cache.reset(),
    "copy": lambda cache: copy.deepcopy(cache),
}


@pytest.mark.parametrize("first", CHANGES)
@pytest.mark.parametrize("second", CHANGES)
def test_every_change_gives_the_same_as_in_the_library(model, first, second):
    caches = both(model)
    for cache in caches:
        extend(cache, 2, 5, seed=0)
    for number, change in enumerate((first, second)):
        caches = tuple(CHANGES[change](cache) if change == "copy" else cache for cache in caches)
        for cache in caches:
            rows = cache.layers[0].keys.shape[0]
            if change != "copy" and not (change in ("select", "reorder") and rows != 2):
                CHANGES[change](cache)
            held = cache.layers[0].keys
            extend(cache, 2 if held is None else held.shape[0], 1, seed=10 * number + 7)
        assert_same(*caches)
    for cache in caches:
        extend(cache, cache.layers[0].keys.shape[0], 2 * LEAST_SPARE, seed=30)
    assert_same(*caches)


def test_a_step_writes_only_its_own_token(model):
    cache = GrowingCache(model.config)
    extend(cache, 1, 300, seed=0)
    places = [layer.keys.data_ptr() for layer in cache.layers]
    for step in range(LEAST_SPARE):
        before = cache.layers[0].keys._version
        extend(cache, 1, 1, seed=step)
        assert cache.layers[0].keys._version - before == 1
    assert [layer.keys.data_ptr() for layer in cache.layers] == places
    extend(cache, 1, 300, seed=1)
    assert cache.layers[0].keys.data_ptr() != places[0]


def test_a_copy_is_independent(model):
    cache = GrowingCache(model.config)
    extend(cache, 1, 5, seed=0)
    other = copy.deepcopy(cache)
    before = cache.layers[0].keys.clone()
    other.crop(-3)
    extend(other, 1, 4, seed=9)
    assert torch.equal(cache.layers[0].keys, before)


def test_beams_leave_their_prompt_in_place():
    """Shown by corrupting what need not move: if it were copied, each row would hold another's."""
    layer = GrowingLayer()
    layer.update(*states(1, 6, seed=0))
    layer.batch_repeat_interleave(3)
    layer.update(*states(3, 2, seed=1))
    place, tails = layer.keys.data_ptr(), layer.keys[:, :, 6:].clone()
    layer.keys[:, :, :6] = torch.arange(3.0)[:, None, None, None]
    order = torch.tensor([2, 0, 0])
    layer.reorder_cache(order, among_alike=True)
    assert layer.keys.data_ptr() == place
    assert torch.equal(layer.keys[:, 0, 0, 0], torch.arange(3.0))
    assert torch.equal(layer.keys[:, :, 6:], tails[order])


def test_beams_of_two_prompts_follow_only_their_own(model):
    caches = both(model)
    for cache in caches:
        extend(cache, 2, 5, seed=0)
        cache.batch_repeat_interleave(2)
        for step, order in enumerate(([1, 0, 2, 2], [0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 3, 2])):
            extend(cache, 4, 1, seed=step)
            cache.reorder_cache(torch.tensor(order))
            extend(cache, 4, 1, seed=step + 20)
    assert_same(*caches)


def test_a_different_number_of_rows_is_rejected():
    layer = GrowingLayer()
    layer.update(*states(3, 2, seed=0))
    with pytest.raises(ValueError, match="holds 3 rows, but got 1"):
        layer.update(*states(1, 1, seed=0))
    assert layer.get_seq_length() == 2


def test_a_cache_from_inference_mode_can_be_continued_outside():
    layer, plain = GrowingLayer(), GrowingLayer()
    with torch.inference_mode():
        layer.update(*states(1, 4, seed=0))
    plain.update(*states(1, 4, seed=0))
    for cache in (layer, plain):
        cache.update(*states(1, 1, seed=1))
    assert torch.equal(layer.keys, plain.keys)


def test_gradients_go_through_it(model):
    cache = GrowingCache(model.config)
    embeds = torch.randn(1, 4, model.config.hidden_size, requires_grad=True)
    model.model(inputs_embeds=embeds, past_key_values=cache)
    model.model(inputs_embeds=embeds[:, :1], past_key_values=cache).last_hidden_state.sum().backward()
    assert embeds.grad[0, 3].abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 2, "cache_implementation": "static"},
    ],
)
def test_generate_gives_the_same_with_it(model, settings):
    pixels, grids = random_pictures(model, [(1, 2)])
    ids = torch.tensor([prompt_with_pictures(model, [(1, 2)])])
    arguments = {"pixel_values": pixels, "image_grid_hw": grids, "max_new_tokens": 12, **settings}
    results = []
    for given in ({}, {"past_key_values": DynamicCache(config=model.config.text_config)}):
        torch.manual_seed(0)
        if "cache_implementation" in settings:
            given = given and {"cache_implementation": "dynamic"}
        results.append(model.generate(ids, **{**arguments, **given}))
    assert torch.equal(*results)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_may_have_either_name_without_a_warning(model, name, recwarn, caplog):
    ids = torch.tensor([[1, 8, 9, 10]])
    expected = model(ids).logits[:, -1]
    for callee in (model, model.model):
        given = GrowingCache(model.config)
        callee(ids[:, :3], **{name: given}, use_cache=True)
        assert given.get_seq_length() == 3
    found = model(ids[:, 3:], **{name: given}).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    given = GrowingCache(model.config)
    arguments = {"max_new_tokens": 3, "do_sample": False}
    answer = model.generate(ids, **{name: given}, **arguments)
    assert torch.equal(answer, model.generate(ids, **arguments)) and given.get_seq_length() == 6
    assert not [str(warning.message) for warning in recwarn if name in str(warning.message)]
    assert not [record for record in caplog.records if name in record.message]


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_two_caches_at_once_are_rejected(model, method):
    one, other = GrowingCache(model.config), GrowingCache(model.config)
    with pytest.raises(ValueError, match="cache and past_key_values"):
        getattr(model, method)(torch.tensor([[1, 8]]), cache=one, past_key_values=other)


@torch.no_grad()
def test_generate_uses_it_unless_told_otherwise(model):
    ids = torch.tensor([[1, 8, 9]])
    arguments = {"max_new_tokens": 2, "return_dict_in_generate": True}
    assert isinstance(model.generate(ids, **arguments).past_key_values, GrowingCache)
    for name in ("static", "dynamic", "offloaded"):
        if name == "offloaded" and not torch.cuda.is_available():
            continue
        found = model.generate(ids, cache_implementation=name, **arguments).past_key_values
        assert not isinstance(found, GrowingCache)
    given = DynamicCache(config=model.config.text_config)
    assert model.generate(ids, past_key_values=given, **arguments).past_key_values is given
    assert model.generate(ids, use_cache=False, **arguments).past_key_values is None
