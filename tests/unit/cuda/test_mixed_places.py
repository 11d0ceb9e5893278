"""Paddle's place `nvidia:0` over a card that is main memory, beside main memory itself."""

from __future__ import annotations

from collections.abc import Callable


def test_experts_stay_in_main_memory_while_the_card_is_current(
    on_card_in_memory: Callable[..., str],
) -> None:
    assert on_card_in_memory("mixed_places.py").split()[-1] == "equal"
