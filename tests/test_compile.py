"""A decoding step is one graph, with a static cache and with the growing one."""

import pytest
import torch
from helpers import prompt_with_pictures, random_pictures, tiny_model
from transformers import CompileConfig, StaticCache


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["static", "growing"])
def test_a_step_of_the_decoder_is_one_graph(kind):
    decoder = tiny_model(num_hidden_layers=1).model
    ids = torch.randint(7, 600, (1, 12), generator=torch.Generator().manual_seed(0))
    cache = StaticCache(config=decoder.config, max_cache_len=16) if kind == "static" else None
    mask = torch.zeros(1, 10)
    mask[:, 2:7] = 1
    cache = decoder(ids[:, :10], im_mask=mask, past_key_values=cache).past_key_values
    step = torch.compile(decoder.forward, fullgraph=True, backend="eager")
    expected = decoder(ids, im_mask=torch.nn.functional.pad(mask, (0, 2))).last_hidden_state
    for index in (10, 11):
        found = step(
            ids[:, index : index + 1], past_key_values=cache, position_ids=torch.tensor([[index]])
        ).last_hidden_state
        torch.testing.assert_close(found, expected[:, index : index + 1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_generation_with_a_static_cache_compiles_to_whole_graphs():
    """Python runs the graphs, which proves that they are whole without paying for a compiler."""
    model = tiny_model(num_hidden_layers=1)
    pixels, grids = random_pictures(model, [(1, 2)])
    ids = torch.tensor([prompt_with_pictures(model, [(1, 2)])])
    arguments = {"pixel_values": pixels, "image_grid_hw": grids, "max_new_tokens": 5}
    expected = model.generate(ids, **arguments)
    settings = CompileConfig(fullgraph=True, backend="eager", mode=None)
    settings._compile_all_devices = True  # by default generate compiles for accelerators only
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = model.generate(ids, **arguments, cache_implementation="static", compile_config=settings)
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
