"""The tower encodes each tile once: repetitions are found by content, and change no numbers."""

import pytest
import torch
from helpers import random_pictures, tiny_model
from internlm_xcomposer2.build_mlp import find_repetitions


@pytest.fixture
def counted(monkeypatch):
    """A model, and how many tiles went through its tower."""
    model, counts = tiny_model(), []
    forward = model.vit.vision_tower.forward
    monkeypatch.setattr(
        model.vit.vision_tower, "forward", lambda tiles: counts.append(len(tiles)) or forward(tiles)
    )
    return model, counts


def pictures_with_repetitions(model) -> tuple[torch.Tensor, torch.Tensor]:
    """The same picture twice with another one between, and a tile inside it that repeats."""
    pixels, _ = random_pictures(model, [(1, 2), (2, 1)])
    pixels[5] = pixels[4]
    return torch.cat([pixels, pixels[:3]]), torch.tensor([(1, 2), (2, 1), (1, 2)])


@torch.no_grad()
def test_identical_tiles_are_encoded_once(counted):
    model, counts = counted
    pixels, grids = pictures_with_repetitions(model)
    found = model.get_image_features(pixels, grids).pooler_output
    assert counts == [5]
    alone = [
        model.get_image_features(piece, grid[None]).pooler_output[0]
        for piece, grid in zip(pixels.split(3), grids, strict=True)
    ]
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert torch.equal(found[0], found[2])


def test_with_gradients_every_tile_is_encoded(counted):
    model, counts = counted
    pixels, grids = pictures_with_repetitions(model)
    model.get_image_features(pixels.requires_grad_(), grids).pooler_output[2].sum().backward()
    assert sum(counts) == 9
    assert pixels.grad[6:].abs().sum() > 0 and pixels.grad[:3].abs().sum() == 0


# ---- what clients do with it ----


@torch.no_grad()
def test_the_tower_returns_an_object_with_hidden_states_on_request():
    """As taggui calls it, for pictures of another size too."""
    model = tiny_model()
    vit, side = model.vit, model.vit.config.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    plain = vit.vision_tower(pixels)
    assert torch.is_tensor(plain) and plain.shape == (2, 1 + vit.num_patches, vit.hidden_size)
    outputs = vit.vision_tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    assert len(outputs.hidden_states) == vit.config.num_hidden_layers + 1
    for state in (outputs.last_hidden_state, outputs.hidden_states[-1]):
        torch.testing.assert_close(state, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(vit.feature_select(outputs), vit(pixels), rtol=0, atol=1e-5)
    larger = torch.nn.functional.interpolate(pixels, scale_factor=2)
    outputs = vit.vision_tower(larger, output_hidden_states=True, interpolate_pos_encoding=True)
    assert vit.feature_select(outputs).shape == (2, 4 * vit.num_patches, vit.hidden_size)
    assert vit.vision_tower(pixels, return_dict=True).hidden_states is None


@torch.no_grad()
def test_features_are_of_the_chosen_layer_and_kind():
    vit = tiny_model().vit
    side = vit.config.image_size
    outputs = vit.vision_tower(torch.ones(1, 3, side, side), output_hidden_states=True)
    vit.select_layer = -2
    assert torch.equal(vit.feature_select(outputs), outputs.hidden_states[-2][:, 1:])
    vit.select_feature = "cls_patch"
    assert torch.equal(vit.feature_select(outputs), outputs.hidden_states[-2])
    vit.select_feature = "mean"
    with pytest.raises(ValueError, match="'patch' or 'cls_patch', not 'mean'"):
        vit.feature_select(outputs)


def test_only_equal_tiles_are_repetitions():
    tiles = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert find_repetitions(tiles) is None
    tiles[2] = tiles[0]
    assert find_repetitions(tiles) == ([0, 1, 3], [0, 1, 0, 2])
    assert find_repetitions(tiles.half()) == ([0, 1, 3], [0, 1, 0, 2])
    tiles[2, 1, 0, 0] += 1  # where no sample is taken
    assert find_repetitions(tiles) is None
    assert find_repetitions(tiles.to("meta")) is None
