"""The engine over a card whose work waits until somebody waits for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_of_lone_requests_whatever_else_runs(
    on_card_in_memory: Callable[..., str], seed: int
) -> None:
    assert on_card_in_memory("engine_on_card.py", "--seed", str(seed)).split()[-1] == "equal"
