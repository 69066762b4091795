"""Fixtures: random checkpoints of every layout, written as published."""

from collections.abc import Callable
from pathlib import Path

import pytest
from engines import write_layout


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Callable[..., Path]:
    """A layout, and what to change of its weights -> the directory of a random checkpoint."""

    def write(layout: str, changes: Callable[[dict], dict] = dict) -> Path:
        return write_layout(layout, tmp_path_factory.mktemp(layout), changes)

    return write
