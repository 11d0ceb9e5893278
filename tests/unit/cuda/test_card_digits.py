"""The kernel that sums products with 2-bit weights in digits, run on this processor."""

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
import mirrored
from cards import bf16_bits, widen
from experts import DIGITS, Batch, CheckpointWeight, Experts

SEEDS = int(os.environ.get("FD_LITE_CARD_SEEDS", "12"))
"""Schedules of each case; more find more."""
FEW = 16
EXPERTS, TOP_K, HIDDEN, INNER = 3, 2, 1152, 1024
"""Some groups of K more than a chain of sums has in one chunk, so that sums are rounded."""


@pytest.fixture(scope="module")
def card() -> ModuleType:
    return build_kernels.build()


def crowded(random: np.random.Generator, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts, for every third token twice the same one, and their shares."""
    ids = np.argsort(random.random((tokens, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    ids[::3] = 1
    return ids, random.dirichlet(np.ones(TOP_K), tokens).astype(np.float32)


def draw_card(card: ModuleType, random: np.random.Generator, layer: Experts, batch: Batch) -> None:
    """Choose a card that can serve the batch, some with memory for few rows at once."""
    for _ in range(1000):
        shared = int(random.choice([227, 227, 160, 110, 90, 70])) * 1024
        card.use_card(multiprocessors=int(random.integers(2, 10)), shared_bytes=shared)
        if layer.serves(batch, DIGITS):
            return
    pytest.fail(f"no card serves {len(batch.x)} tokens")


def test_every_bit_is_the_oracles(card: ModuleType) -> None:
    """Columns that the fast decoder serves, and some that it does not."""
    random = np.random.default_rng(5)
    arrays = mirrored.mirrored_layer("ccq", random, EXPERTS, HIDDEN, INNER)
    card.schedule(0)
    up, down = (CheckpointWeight(card, each) for each in (arrays.up, arrays.down))
    assert 0 < up.unproven < EXPERTS * INNER
    layer = Experts(card, up, down)
    for tokens in (1, 2, 3, 4, 5, 7, 8, 9, 13, FEW):
        x = mirrored.mirrored_rows(random, tokens, HIDDEN)
        batch = Batch(bf16_bits(x), *crowded(random, tokens))
        draw_card(card, random, layer, batch)
        card.schedule(tokens)
        wanted = bf16_bits(arrays.outputs(x, batch.ids, batch.shares))
        np.testing.assert_array_equal(layer.run(batch, DIGITS), wanted, f"{tokens} tokens")


def rows_of_all_sorts() -> Batch:
    """Rows that any company is drawn from: among them some that must not touch their neighbours."""
    random = np.random.default_rng(8)
    ids, shares = crowded(random, 24)
    batch = Batch(bf16_bits(random.standard_normal((24, 640))), ids, shares)
    batch.x[3] = 0
    batch.x[5, 17] = bf16_bits(np.float32([np.nan]))[0]
    batch.x[7, 200] = bf16_bits(np.float32([np.inf]))[0]
    for row, exponent in ((9, 120), (10, -120), (11, -130)):
        batch.x[row] = bf16_bits(widen(batch.x[row]) * np.float32(2.0**exponent))
    return batch


@pytest.mark.parametrize("kind", ["ccq", "ccq_wide", "ccq_far"])
def test_a_row_has_the_same_bits_in_any_company_card_and_schedule(
    card: ModuleType, kind: str
) -> None:
    card.schedule(0)
    layer, pool = Experts.random(card, kind, EXPERTS, 640, 256), rows_of_all_sorts()
    card.use_card(multiprocessors=4)
    alone = np.concatenate([layer.run(pool.rows([row]), DIGITS) for row in range(len(pool.x))])
    assert np.isnan(widen(alone[[5, 7]])).all()
    assert np.isfinite(widen(alone)).all(axis=1).sum() == len(alone) - 3
    for seed in range(1, SEEDS + 1):
        random = np.random.default_rng(seed)
        tokens = int(random.integers(1, FEW + 1))
        rows = random.integers(0, len(pool.x), tokens)
        batch = pool.rows(rows)
        draw_card(card, random, layer, batch)
        card.schedule(seed)
        found = layer.run(batch, DIGITS)
        np.testing.assert_array_equal(found, alone[rows], f"seed {seed}: {tokens} rows")
