"""An engine over a card in memory that ran the steps of guesses before its first request."""

from __future__ import annotations

from collections.abc import Callable


def test_all_graphs_of_guesses_are_captured_at_the_start(
    on_card_in_memory: Callable[..., str],
) -> None:
    assert on_card_in_memory("rehearsed.py").splitlines()[-4:] == [
        "plain 1 2 4 8",
        "checking 2 4 6 8 12 16 24 32 48 64",
        "captured 14",
        "later 0",
    ]
