"""A card that is played in Python."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from fake_cuda import Card


@pytest.fixture
def card() -> Iterator[Card]:
    """CUDA without a card; not where the real module is at work."""
    if "fastdeploy_lite._ops_cuda" in sys.modules:
        pytest.skip("this process has loaded the real CUDA module")
    made = Card()
    yield made
    made.forget()
