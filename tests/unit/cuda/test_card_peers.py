"""Sums between cards that read each other's memory, run on this processor in many schedules."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "gpu"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "card_in_memory"))
import build_kernels
from cards import bf16_bits, widen

SEEDS = int(os.environ.get("FD_LITE_CARD_SEEDS", "12"))
THREADS, BLOCKS = 32, 3
SUMS = [1, 96, 40, 7, 200, 33, 96, 1, 64]
"""Vectors of eight numbers: fewer than a block's threads, and more than all have."""


@pytest.fixture(scope="module")
def card() -> ModuleType:
    return build_kernels.build()


def numbers_of(ranks: int, seed: int) -> np.ndarray:
    """Bits [ranks, sums, numbers]; ranks differ in size, so that the order of a sum shows."""
    random = np.random.default_rng(seed)
    drawn = random.standard_normal((ranks, len(SUMS), 8 * max(SUMS)), np.float32)
    drawn *= np.float32(10.0) ** random.integers(-2, 3, (ranks, 1, 1)).astype(np.float32)
    drawn[:, :, :2] = -0.0
    drawn[0, :, 3] = np.inf
    return np.ascontiguousarray(bf16_bits(drawn))


def expected(numbers: np.ndarray) -> np.ndarray:
    """One rounding at the end, in the order of the ranks; what lies behind a sum stays."""
    terms = widen(numbers)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    wanted = numbers.copy()
    for i, vectors in enumerate(SUMS):
        wanted[:, i, : 8 * vectors] = bf16_bits(total[i, : 8 * vectors])
    return wanted


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("most_sent", [0, 40, 1000], ids=["fetched", "both", "sent"])
def test_every_rank_adds_in_the_order_of_the_ranks_in_every_schedule(
    card: ModuleType, most_sent: int, ranks: int
) -> None:
    for seed in range(SEEDS):
        numbers = numbers_of(ranks, seed)
        wanted = expected(numbers)
        card.schedule(seed)
        card.sum_peers(numbers.ctypes.data, max(SUMS), ranks, SUMS, most_sent, BLOCKS, THREADS)
        np.testing.assert_array_equal(numbers, wanted, f"seed {seed}")
