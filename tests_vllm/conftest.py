"""Fixtures: random checkpoints of every layout, written as published."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import LAYOUTS, ROOT
from helpers import TINY_TOWER, flat_config, published_weights, tiny_model, write_published

# vLLM's attention on CPUs has heads of 32 at least.
WIDE = {"hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 2048}


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Callable[..., Path]:
    """A layout -> a directory with a random checkpoint, its `config.json` as flat as published."""

    def write(layout: str, changes: Callable[[dict], dict] = dict) -> Path:
        version, side = LAYOUTS[layout]
        adapters = {"sft": 4, "dpo": 4, "web": 8} if version == "2.5" else {}
        ranks = {"plora_wqkv_rank": 2, "plora_wqkv_alpha": 4} if version == "2-4khd" else {}
        tower = {**TINY_TOWER, "hidden_size": 64, "image_size": side}
        model = tiny_model(version, vision_config=tower, task_adapters=adapters, **WIDE, **ranks)
        folder = tmp_path_factory.mktemp(layout)
        write_published(folder, changes(published_weights(model)), flat_config(model))
        shutil.copy(ROOT / "tokenizer.model", folder)
        return folder

    return write
