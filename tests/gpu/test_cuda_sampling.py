"""Masks, penalties, draws and log-probabilities against numpy."""

from __future__ import annotations

import time

import cards
import numpy as np
import pytest
from oracles import sampling as oracle


def draw(
    logits: np.ndarray, rows: list[tuple[float, int, float, float]], **more: object
) -> np.ndarray:
    """Tokens for (temperature, top_k, top_p, min_p) per row; seeds and steps are row numbers."""
    from fastdeploy_lite.model_executor import ops

    count = len(logits)
    columns = list(zip(*rows, strict=True))
    out = cards.poisoned([count], "int32")
    ops.sample(
        cards.put(logits),
        cards.put(np.array(columns[0], np.float32)),
        cards.put(np.array(columns[1], np.int32)),
        cards.put(np.array(columns[2], np.float32)),
        cards.put(np.array(columns[3], np.float32)),
        cards.put(np.array(more.get("seeds", np.arange(count)), np.int64)),
        cards.put(np.array(more.get("steps", np.arange(count) * 3), np.int64)),
        cards.put(np.array(more.get("forced", [-1] * count), np.int32)),
        out,
    )
    return cards.get(out)


def random_logits(random: np.random.Generator, rows: int, vocab: int, levels: int) -> np.ndarray:
    """Normal logits; with `levels`, rounded so that many are equal."""
    logits = random.standard_normal((rows, vocab)).astype(np.float32) * 3
    return (np.round(logits * levels) / levels).astype(np.float32) if levels else logits


@pytest.mark.parametrize("vocab", [33, 1000, 8192, 103424])
@pytest.mark.parametrize("levels", [0, 2])
def test_draws_equal_the_oracle(vocab: int, levels: int) -> None:
    random = np.random.default_rng(vocab + levels)
    rows = [
        (1.0, 0, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 40, 0.9, 0.0),
        (1.0, 0, 1.0, 0.05),
        (1.0, 20, 0.5, 0.01),
        (1.0, 1, 1.0, 0.0),
        (0.0, 0, 1.0, 0.0),
        (1.0, 0, 0.0, 0.0),
        (1.0, vocab + 5, 0.999, 0.0),
    ] * 6
    logits = random_logits(random, len(rows), vocab, levels)
    found = draw(logits, rows)
    for r, (temperature, top_k, top_p, min_p) in enumerate(rows):
        greedy = temperature == 0 or top_k == 1 or top_p <= 1e-5
        expected = (
            int(logits[r].argmax())
            if greedy
            else oracle.draw(logits[r], top_k, top_p, min_p, r, 3 * r)
        )
        assert found[r] == expected, (r, rows[r])


def test_equal_logits_and_infinities() -> None:
    flat = np.zeros((1, 5000), np.float32)
    for top_k, seed in ((0, 1), (7, 2), (300, 3)):
        token = int(draw(flat, [(1.0, top_k, 1.0, 0.0)], seeds=[seed])[0])
        assert token == oracle.draw(flat[0], top_k, 1.0, 0.0, seed, 0)
    assert draw(flat, [(1.0, 0, 0.25, 0.0)], seeds=[9])[0] < 1250
    some = np.full((2, 200), -np.inf, np.float32)
    some[0, [5, 9]] = 0.0
    some[1, 7] = np.inf
    found = draw(some, [(1.0, 0, 0.9, 0.0)] * 2)
    assert found[0] in (5, 9) and found[1] == 7


def test_faults_and_forced_tokens() -> None:
    logits = np.zeros((4, 300), np.float32)
    logits[0, 17] = np.nan
    logits[1] = -np.inf
    logits[2, 4] = 1
    found = draw(logits, [(0.0, 0, 1.0, 0.0)] * 4, forced=[-1, -1, -1, 123])
    np.testing.assert_array_equal(found, [-1, -1, 4, 123])


def test_ties_go_to_the_lower_id() -> None:
    logits = np.zeros((1, 103424), np.float32)
    logits[0, [77, 90000, 102000]] = 5
    assert draw(logits, [(0.0, 0, 1.0, 0.0)])[0] == 77


@pytest.mark.parametrize("vocab", [40, 8192, 103424])
def test_process_logits(vocab: int) -> None:
    from fastdeploy_lite.model_executor import ops

    random = np.random.default_rng(vocab)
    count = 7
    logits = random_logits(random, count, vocab, 0)
    seen = np.where(random.random((9, vocab)) < 0.1, random.integers(0, 4, (9, vocab)), 0)
    seen = (seen | np.where(random.random((9, vocab)) < 0.1, 1 << 30, 0)).astype(np.int32)
    slots = random.permutation(9)[:count].astype(np.int32)
    parameters = {
        "repetition": np.array([1, 1.5, 1, 1, 1.2, 1, 1], np.float32),
        "frequency": np.array([0, 0, 0.7, 0, 0.2, 0, 0], np.float32),
        "presence": np.array([0, 0, 0, 0.4, 0.3, 0, 0], np.float32),
        "temperature": np.array([1, 0.7, 0, 1.3, 0.9, 1e-5, 1], np.float32),
    }
    edits = [
        {},
        {3: 2.5},
        {1: -np.inf, 2: 1.0},
        {},
        {int(i): 0.25 for i in range(20)},
        {},
        {0: 9.0},
    ]
    ids = np.array([token for row in edits for token in row] or [0], np.int32)
    values = np.array([value for row in edits for value in row.values()] or [0], np.float32)
    offsets = np.cumsum([0] + [len(row) for row in edits]).astype(np.int32)
    held = cards.put(logits)
    ops.process_logits(
        held,
        cards.put(slots),
        cards.put(seen),
        *(cards.put(value) for value in parameters.values()),
        cards.put(offsets),
        cards.put(ids),
        cards.put(values),
    )
    found = cards.get(held)
    for r in range(count):
        each = [float(value[r]) for value in parameters.values()]
        expected = oracle.process(logits[r], seen[slots[r]], *each, edits[r])
        finite = np.isfinite(expected)
        shift = 0.0
        if each[3] < 1e-3 and each[3] > 0:  # a tiny temperature moves the best logit to 0
            shift = float(expected[finite].max() - found[r][finite].max())
        atol = max(2e-5, 3e-7 * float(np.abs(expected[finite]).max()))
        np.testing.assert_allclose(found[r][finite] + shift, expected[finite], rtol=2e-5, atol=atol)
        assert np.isneginf(found[r][~finite]).all()


def test_many_edits_take_linear_time() -> None:
    """100,000 biases and bans of one row, every third id three times, in milliseconds."""
    from fastdeploy_lite.model_executor import ops

    random, vocab, rows = np.random.default_rng(4), 103424, 4
    ids = np.sort(np.append(np.arange(0, vocab, 2), np.repeat(np.arange(0, vocab, 3), 3)))
    ids = ids[:100_000].astype(np.int32)
    values = random.standard_normal(len(ids)).astype(np.float32)
    values[random.random(len(ids)) < 0.3] = -np.inf
    values[random.random(len(ids)) < 0.01] = np.inf
    logits = random_logits(random, rows, vocab, 0)
    expected = logits.copy()
    for i, value in zip(ids.tolist(), values, strict=True):
        banned = np.isneginf(expected[2, i]) or np.isneginf(value)
        expected[2, i] = -np.inf if banned else np.float32(expected[2, i] + value)
    neutral = {"repetition": 1.0, "frequency": 0.0, "presence": 0.0, "temperature": 1.0}
    held = cards.put(logits)
    arguments = (
        cards.put(np.arange(rows, dtype=np.int32)),
        None,
        *(cards.put(np.full(rows, value, np.float32)) for value in neutral.values()),
        cards.put(np.array([0, 0, 0, len(ids), len(ids)], np.int32)),
        cards.put(ids),
        cards.put(values),
    )
    ops.process_logits(held, *arguments)
    np.testing.assert_array_equal(cards.get(held), expected)
    started = time.perf_counter()
    for _ in range(10):
        ops.process_logits(held, *arguments)
    cards.get(held)
    assert (time.perf_counter() - started) / 10 < 0.02


def test_mask_and_occurrences() -> None:
    from fastdeploy_lite.model_executor import ops

    random = np.random.default_rng(2)
    vocab, masks = 1003, 3
    words = random.integers(-(2**31), 2**31, (masks, -(-vocab // 32)), np.int64).astype(np.int32)
    rows = np.array([2, -1, 0, 2], np.int32)
    logits = random_logits(random, 4, vocab, 0)
    held = cards.put(logits)
    ops.mask_logits(held, cards.put(words), cards.put(rows))
    allowed = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :vocab].astype(bool)
    for r, mask in enumerate(rows):
        expected = logits[r] if mask < 0 else np.where(allowed[mask], logits[r], -np.inf)
        np.testing.assert_array_equal(cards.get(held)[r], expected)

    table = cards.put(np.zeros((5, vocab), np.int32))
    slots, ids = np.array([1, 1, 4, 1], np.int32), np.array([7, 7, 1000, 8], np.int32)
    ops.update_occurrences(table, cards.put(slots), cards.put(ids), prompt=False)
    ops.update_occurrences(table, cards.put(slots[:1]), cards.put(ids[:1]), prompt=True)
    expected = np.zeros((5, vocab), np.int32)
    expected[1, 7], expected[4, 1000], expected[1, 8] = 2 | 1 << 30, 1, 1
    np.testing.assert_array_equal(cards.get(table), expected)


@pytest.mark.parametrize("vocab", [50, 8192, 103424])
@pytest.mark.parametrize("k", [0, 1, 20, 1024, 3000])
@pytest.mark.parametrize("levels", [0, 2])
def test_token_logprobs(vocab: int, k: int, levels: int) -> None:
    from fastdeploy_lite.model_executor import ops

    k = min(k, vocab)
    random = np.random.default_rng(vocab + k)
    logits = random_logits(random, 3, vocab, levels)
    logits[1, ::7] = -np.inf
    tokens = random.integers(0, vocab, 3).astype(np.int32)
    outputs = (
        cards.poisoned([3], "float32"),
        cards.poisoned([3], "int32"),
        cards.poisoned([3, k], "int32") if k else cards.put(np.zeros((3, 0), np.int32)),
        cards.poisoned([3, k], "float32") if k else cards.put(np.zeros((3, 0), np.float32)),
    )
    ops.token_logprobs(cards.put(logits), cards.put(tokens), k, *outputs)
    logprob, rank, ids, values = (cards.get(tensor) for tensor in outputs)
    for r in range(3):
        expected = np.maximum(oracle.log_softmax(logits[r]), np.finfo(np.float32).min)
        order = np.argsort(-logits[r].astype(np.float64), kind="stable")
        np.testing.assert_allclose(logprob[r], expected[tokens[r]], rtol=1e-6)
        assert rank[r] == 1 + int(np.flatnonzero(order == tokens[r])[0])
        np.testing.assert_array_equal(ids[r], order[:k])
        np.testing.assert_allclose(values[r], expected[order[:k]], rtol=1e-6)
