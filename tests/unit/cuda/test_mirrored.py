"""The card's test of every bit of a product is one: what is rounded otherwise shows."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "gpu"))
import mirrored
from oracles import digit_product as oracle

HIDDEN, INNER, TOKENS = 2560 + 128, 1536, 4


def outputs() -> np.ndarray:
    """[2, rows, columns]: those whose sums cancel, and the others."""
    random = np.random.default_rng(1)
    layer = mirrored.mirrored_layer("ccq", random, 1, HIDDEN, INNER)
    x = mirrored.mirrored_rows(random, TOKENS, HIDDEN)
    ids, shares = np.zeros((TOKENS, 1), np.int32), np.ones((TOKENS, 1), np.float32)
    out = layer.outputs(x, ids, shares)
    return np.stack([out[:, ::2], out[:, 1::2]])


def unfused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a * b).astype(np.float32) + c


def of_other_chains(
    x: np.ndarray, fields: np.ndarray, local_scale: np.ndarray, column_scale: np.ndarray
) -> np.ndarray:
    """The oracle's sum of the groups in another order: the first one, the middle one and so on."""
    order = np.arange(len(local_scale)).reshape(2, -1).T.reshape(-1)
    rows = (order[:, None] * oracle.GROUP + np.arange(oracle.GROUP)).reshape(-1)
    return oracle.digit_product(x[:, rows], fields[rows], local_scale[order], column_scale)


@pytest.fixture(scope="module")
def right() -> np.ndarray:
    return outputs()


def test_few_sums_are_exact(right: np.ndarray) -> None:
    assert np.isfinite(right).all()
    assert (right[0] != 0).mean() > 0.8
    assert np.abs(right[0]).mean() < 1e-4 * np.abs(right[1]).mean()


@pytest.mark.parametrize(
    ("name", "wrong", "share"),
    [("fused_multiply_add", unfused, 0.01), ("LARGEST", 32640, 0.01)],
)
def test_another_rounding_shows(
    name: str, wrong: object, share: float, right: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, name, wrong)
    assert (outputs()[0] != right[0]).mean() > share


def test_another_order_shows_where_sums_cancel_and_hardly_anywhere_else(
    right: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrored, "digit_product", of_other_chains)
    differs = (outputs() != right).mean(axis=(1, 2))
    assert differs[0] > 0.5
    assert differs[1] < 0.01
