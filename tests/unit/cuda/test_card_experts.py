"""The experts' CUDA kernels, run on this processor, in many schedules."""

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
from cards import bf16_bits, error, widen
from experts import PLAIN, STREAM, TILES, Batch, Experts

SEEDS = int(os.environ.get("FD_LITE_CARD_SEEDS", "12"))
"""Schedules of each case; more find more."""
KINDS = ["int4", "int8", "ccq", "ccq_wide", "ccq_far"]
EXPERTS, TOP_K = 8, 3
HIDDEN, INNER = 640, 256  # two chunks of K, the second not full, and half of one


@pytest.fixture(scope="module")
def card() -> ModuleType:
    return build_kernels.build()


@pytest.fixture(scope="module")
def layers(card: ModuleType) -> dict[str, Experts]:
    card.schedule(0)
    return {kind: Experts.random(card, kind, EXPERTS, HIDDEN, INNER) for kind in KINDS}


def ragged(tokens: int, seed: int) -> Batch:
    """A crowded expert, for some tokens twice, and others without any."""
    batch = Batch.random(np.random.default_rng(seed), tokens, HIDDEN, EXPERTS, TOP_K)
    batch.ids[batch.ids >= EXPERTS - 2] = 1
    batch.ids[::3, 0] = 4
    return batch


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_decoded_exactly(
    card: ModuleType, layers: dict[str, Experts], kind: str
) -> None:
    weight = layers[kind].up
    for expert in (0, EXPERTS - 1):
        found = weight.decoded(expert, scaled=False)
        np.testing.assert_array_equal(found, weight.integers[expert])
        found = weight.decoded(expert, scaled=True)
        np.testing.assert_allclose(found, weight.matrices[expert], rtol=2e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 17, 64, 200])
def test_results_are_near_those_of_float64(
    card: ModuleType, layers: dict[str, Experts], kind: str, tokens: int
) -> None:
    layer, batch = layers[kind], ragged(tokens, tokens)
    expected = batch.expected(layer.up, layer.down)
    card.use_card(multiprocessors=6)
    card.schedule(tokens)
    assert layer.serves(batch, STREAM) == (tokens <= 17)
    for path in (STREAM, TILES, PLAIN):
        if layer.serves(batch, path):
            assert error(widen(layer.run(batch, path)), expected) < 2e-3, path


def rows_of_all_sorts() -> Batch:
    """Rows that any company is drawn from: among them some that must not touch their neighbours."""
    batch = Batch.random(np.random.default_rng(8), 24, HIDDEN, EXPERTS, TOP_K)
    batch.ids[::3, 0] = 4  # a crowded expert, for some tokens twice
    batch.x[3] = 0
    batch.x[5, 17] = bf16_bits(np.float32([np.nan]))[0]
    batch.x[7, 200] = bf16_bits(np.float32([np.inf]))[0]
    batch.x[9] = bf16_bits(widen(batch.x[9]) * np.float32(2.0**120))
    batch.x[10] = bf16_bits(widen(batch.x[10]) * np.float32(2.0**-120))
    return batch


def draw_card(card: ModuleType, random: np.random.Generator, layer: Experts, batch: Batch) -> int:
    """Choose a card, some with so little memory that blocks hold few rows at once; and a path."""
    paths = []
    while not paths:
        shared = int(random.choice([227, 227, 160, 130, 110, 90])) * 1024
        card.use_card(multiprocessors=int(random.integers(2, 10)), shared_bytes=shared)
        paths = [path for path in (STREAM, TILES, PLAIN) if layer.serves(batch, path)]
    likely = np.array([4 if path == STREAM else 1 for path in paths])
    return int(random.choice(paths, p=likely / likely.sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company_card_and_schedule(
    card: ModuleType, layers: dict[str, Experts], kind: str
) -> None:
    layer, pool = layers[kind], rows_of_all_sorts()
    card.use_card(multiprocessors=4)
    card.schedule(0)
    alone = np.concatenate([layer.run(pool.rows([row]), PLAIN) for row in range(len(pool.x))])
    assert np.isfinite(widen(alone)).all(axis=1).sum() == len(alone) - 3
    for seed in range(1, SEEDS + 1):
        random = np.random.default_rng(seed)
        tokens = int(random.choice([1, 2, 3, 5, 8, 9, 12, 16, 17, 24, 33, 120]))
        rows = random.integers(0, len(pool.x), tokens)
        batch = pool.rows(rows)
        path = draw_card(card, random, layer, batch)
        card.schedule(seed)
        found = layer.run(batch, path)
        np.testing.assert_array_equal(
            found, alone[rows], f"seed {seed}: {tokens} rows, path {path}"
        )


@pytest.mark.parametrize("kind", ["int8", "ccq"])
def test_lanes_that_arrive_for_themselves_change_nothing(
    card: ModuleType, layers: dict[str, Experts], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As racecheck wants them to; see warp_arrive()."""
    layer, batch = layers[kind], ragged(64, 5)
    for multiprocessors in (1, 3):
        card.use_card(multiprocessors=multiprocessors)
        card.schedule(0)
        expected = layer.run(batch, PLAIN)
        for seed in range(1, SEEDS // 4 + 1):
            for every_lane in "01":
                monkeypatch.setenv("FD_LITE_RACECHECK", every_lane)
                card.schedule(seed)
                np.testing.assert_array_equal(layer.run(batch, TILES), expected, f"seed {seed}")
