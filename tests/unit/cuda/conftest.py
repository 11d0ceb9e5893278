"""A card that is played in Python, and one that is main memory."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from card_in_memory import plugin
from fake_cuda import Card


@pytest.fixture
def card() -> Iterator[Card]:
    """CUDA without a card; not where the real module is at work."""
    if "fastdeploy_lite._ops_cuda" in sys.modules:
        pytest.skip("this process has loaded the real CUDA module")
    made = Card()
    yield made
    made.forget()


@pytest.fixture(scope="session")
def on_card_in_memory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a script of tests/card_in_memory, with its arguments; what it prints."""
    missing = plugin.missing()
    if missing is not None:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("plugin")
    plugin.build(folder)
    return functools.partial(_run, folder)


def _run(folder: Path, script: str, *arguments: str) -> str:
    return plugin.run(script, folder, *arguments)
