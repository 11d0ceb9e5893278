"""What the card in memory finds: kernels that break a rule, and none that keeps it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "card_in_memory"))
import build_kernels

SEEDS = range(1, 101)
RULES = (
    "a block's barrier",
    "a warp's barrier",
    "a barrier before memory is used again",
    "the wait for a bulk copy",
    "readers before the next copy",
    "the wait for a group of copies",
    "a release",
    "a warp's barrier before a release",
    "all words of a message",
    "arrivals at a phase",
    "lanes together",
    "the wait for products",
    "products' registers",
    "products' memory",
    "the fence before products",
)


@pytest.fixture(scope="module")
def card() -> ModuleType:
    return build_kernels.build()


def test_every_rule_is_tried(card: ModuleType) -> None:
    assert sorted(RULES) == card.rules()


@pytest.mark.parametrize("rule", RULES)
def test_keeping_it_is_right_in_every_schedule(card: ModuleType, rule: str) -> None:
    for seed in (0, *SEEDS):
        card.schedule(seed)
        assert card.right(rule, kept=True), seed


@pytest.mark.parametrize("rule", RULES)
def test_breaking_it_shows_in_some(card: ModuleType, rule: str) -> None:
    shown = 0
    for seed in SEEDS:
        card.schedule(seed)
        try:
            shown += not card.right(rule, kept=False)
        except RuntimeError as error:
            assert str(error), seed
            shown += 1
    print(rule, shown)
    assert shown > 0
