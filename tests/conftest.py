"""Fixtures: checkpoints of the golden families, written once per session in the published layout."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, published_tokenizer, tiny_model, write_checkpoint
from internlm_xcomposer2 import InternLMXComposer2ForCausalLM, InternLMXComposer2Tokenizer
from internlm_xcomposer2.processing_internlm_xcomposer2 import InternLMXComposer2Processor
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # more wait for each other at these sizes, and longer where other work runs


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """Family name -> directory of its checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    written: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in written:
            written[family] = write_checkpoint(folder / family, family)
        return written[family]

    return get


@pytest.fixture(scope="session")
def family_model(checkpoint) -> Callable[[str], InternLMXComposer2ForCausalLM]:
    """Family name -> its model in float32. Shared: don't change it."""
    loaded: dict[str, InternLMXComposer2ForCausalLM] = {}

    def get(family: str) -> InternLMXComposer2ForCausalLM:
        if family not in loaded:
            loaded[family] = InternLMXComposer2ForCausalLM.from_pretrained(
                checkpoint(family), dtype="float32"
            )
        return loaded[family]

    return get


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> InternLMXComposer2Tokenizer:
    """The tokenizer of the published checkpoints."""
    return InternLMXComposer2Tokenizer(str(published_tokenizer()))


@pytest.fixture
def tiny() -> Callable[..., InternLMXComposer2ForCausalLM]:
    """Configuration fields -> a random model of two layers."""
    return tiny_model


@pytest.fixture(scope="session")
def tokenizer() -> InternLMXComposer2Tokenizer:
    """The small vocabulary, decoded as it is; modules with another one have their own fixture."""
    return InternLMXComposer2Tokenizer(str(ROOT / "tokenizer.model"), clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def model() -> InternLMXComposer2ForCausalLM:
    """A random model of version 2.5 with two layers. Shared: don't change it."""
    return tiny_model("2.5")


@pytest.fixture(scope="session")
def processor(model, tokenizer) -> InternLMXComposer2Processor:
    """The processor of `model`, with the small vocabulary. Shared: don't change it."""
    return InternLMXComposer2Processor.for_config(model.config, tokenizer)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with a landscape and a portrait picture."""
    for name, size in (("wide.png", (130, 60)), ("tall.jpg", (40, 150))):
        pixels = np.random.RandomState(size[0]).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path
