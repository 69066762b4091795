"""The tower encodes each tile once: repetitions are found by content, and change no number."""

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


def test_only_equal_tiles_are_repetitions():
    tiles = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert find_repetitions(tiles) is None
    tiles[2] = tiles[0]
    assert find_repetitions(tiles) == ([0, 1, 3], [0, 1, 0, 2])
    assert find_repetitions(tiles.half()) == ([0, 1, 3], [0, 1, 0, 2])
    tiles[2, 1, 0, 0] += 1  # where no sample is taken
    assert find_repetitions(tiles) is None
    assert find_repetitions(tiles.to("meta")) is None
