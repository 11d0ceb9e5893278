"""The arithmetics that the study of accuracy compares do what their descriptions say."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from oracles import card_arithmetics as cards

K, N = 192, 8


def draw(seed: int, rows: int = 6) -> tuple[np.ndarray, cards.Weight]:
    random = np.random.default_rng(seed)
    bits = random.standard_normal((rows, K)).astype(np.float32).view(np.uint32) & 0xFFFF0000
    weight = cards.Weight(
        random.integers(0, 64, (K, N), np.uint8),
        random.integers(0, 16, (K // 64, N), np.uint8),
        np.float32(2.0 ** random.integers(-9, 0, N)),
    )
    return bits.view(np.float32), weight


@pytest.mark.parametrize(
    ("name", "bound"),
    [("float16", 1e-6), ("digits", 4e-4), ("row digits", 4e-4), ("3 row digits", 2e-6)],
)
def test_products_are_near_the_exact_one(name: str, bound: float) -> None:
    x, weight = draw(1)
    wanted = cards.exact(x, weight)
    error = np.abs(cards.PRODUCTS[name](x, weight) - wanted).max() / wanted.std()
    assert 0 < error < bound


@pytest.mark.parametrize("times", [2.0**-100, 1.0, 2.0**90])
@pytest.mark.parametrize("name", list(cards.PRODUCTS))
def test_a_power_of_two_goes_through(name: str, times: float) -> None:
    x, weight = draw(2)
    product = cards.PRODUCTS[name]
    found = product(x * np.float32(times), weight)
    np.testing.assert_array_equal(found / times, product(x, weight))


def test_one_step_is_the_exact_sum_cut_to_float32() -> None:
    x, weight = draw(3)
    x[:, 4:] = 0  # of a byte whose halves are two steps
    integers = weight.integers()
    for t, n in np.ndindex(len(x), N):
        later, earlier = (
            sum(Fraction(float(x[t, k])) * Fraction(integers[k, n]) for k in rows)
            for rows in ((2, 3), (0, 1))
        )
        cut = Fraction(float(cards.toward_zero(np.float64([float(later)]))[0]))
        total = cards.toward_zero(np.float64([float(cut + earlier)]))[0]
        assert cards.float16_chain(x, weight)[t, n] == total * weight.column_scale[n]


def test_cutting_is_toward_zero() -> None:
    values = np.float64([1 + 2.0**-23 + 2.0**-24, -1 - 2.0**-24 - 2.0**-40, 0, 0.5, 1 - 2.0**-30])
    expected = [1 + 2.0**-23, -1, 0, 0.5, 1 - 2.0**-24]
    np.testing.assert_array_equal(cards.toward_zero(values), expected)


def test_one_unit_a_row_loses_what_one_a_group_keeps() -> None:
    x, weight = draw(4)
    x[:, 0] = 2.0**10
    weight.local_scale[0] = 0
    wanted = cards.exact(x, weight)
    errors = [
        np.abs(cards.PRODUCTS[name](x, weight) - wanted).max() for name in ("digits", "row digits")
    ]
    assert errors[0] < errors[1] / 50
