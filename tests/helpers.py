"""Shared by the tests: where goldens lie, and weights made from their recipe."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def golden_directory() -> Path:
    """The full set of goldens if `IXC2_GOLDEN` names one, else the part that lies in the repository."""
    return Path(os.environ.get("IXC2_GOLDEN") or HERE / "golden")


def published_tokenizer() -> Path | None:
    """The sentencepiece model of the published checkpoints, if `IXC2_TOKENIZER` names it."""
    path = os.environ.get("IXC2_TOKENIZER")
    return Path(path) if path else None


needs_published_tokenizer = pytest.mark.skipif(
    published_tokenizer() is None,
    reason="set IXC2_TOKENIZER to the tokenizer.model of a published checkpoint",
)
