"""The oracle of the digits' product against exact rational arithmetic, one rounding at a time."""

from __future__ import annotations

from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from oracles import digit_product as oracle

LARGEST_FLOAT32 = Fraction(2) ** 128 - Fraction(2) ** 104
floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def nearest_float32(exact: Fraction) -> np.float32:
    """The float32 nearest to a number, ties to even; of zero the positive one."""
    if exact == 0:
        return np.float32(0)
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(exact / unit) * unit
    if abs(rounded) > LARGEST_FLOAT32:
        return np.float32(np.inf if rounded > 0 else -np.inf)
    return np.float32(float(rounded))


def exact_product(
    x: np.ndarray, fields: np.ndarray, local_scale: np.ndarray, column_scale: np.float32
) -> np.float32:
    """One row [K] times one column [K], as the interface of the kernel states it."""
    chains = [np.float32(0)] * 4
    for group, scale in enumerate(local_scale):
        rows = slice(group * 64, (group + 1) * 64)
        top = max(abs(float(v)) for v in x[rows])
        exponent = int(np.float32(top).view(np.int32) >> 23) - 127
        unit = Fraction(2) ** (min(12 - exponent, 124) if exponent > -127 else 0)
        total = 0
        for k, (value, field) in enumerate(zip(x[rows], fields[rows], strict=True)):
            steps = 4 if k % 4 < 2 else 1
            digits = min(round(Fraction(float(value)) * unit * steps), 32639)
            high, low = (digits + 128) >> 8, digits - 256 * ((digits + 128) >> 8)
            assert -128 <= high <= 127 and -128 <= low <= 127
            total += (int(field) - 32) * (4 // steps) * digits
        assert abs(total) < 1 << 27
        wide = Fraction(float(nearest_float32(Fraction(total))))
        unit = int(scale) / (4 * unit)
        before = Fraction(float(chains[group % 4]))
        chains[group % 4] = nearest_float32(unit * wide + before)
    return ((chains[0] + chains[1]) + (chains[2] + chains[3])) * column_scale


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 values cut to what bf16 can hold."""
    return (np.asarray(values, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def check(x: np.ndarray, seed: int, columns: int = 3) -> None:
    random = np.random.default_rng(seed)
    rows = x.shape[1]
    fields = random.integers(0, 64, (rows, columns), np.uint8)
    local_scale = random.integers(0, 16, (-(-rows // 64), columns), np.uint8)
    column_scale = random.uniform(-2, 2, columns).astype(np.float32)
    found = oracle.digit_product(x, fields, local_scale, column_scale)
    assert found.dtype == np.float32
    for t, n in np.ndindex(found.shape):
        expected = exact_product(x[t], fields[:, n], local_scale[:, n], column_scale[n])
        assert found[t, n].tobytes() == expected.tobytes(), (t, n, found[t, n], expected)


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(floats32, floats32, floats32)
@hypothesis.example(2.0**-24, 1.0 + 2.0**-23, 1.0)  # just above a tie
@hypothesis.example(2.0**-24, 1.0, 1.0)  # a tie
@hypothesis.example(2.0**-24 + 2.0**-47, 1.0, 1.0)
@hypothesis.example(-(2.0**-60), 2.0**-60, 1.0 + 2.0**-23)
@hypothesis.example(2.0**127, 2.0, -(2.0**127))
def test_a_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    found = oracle.fused_multiply_add(*(np.float32([v]) for v in (a, b, c)))[0]
    assert found == nearest_float32(Fraction(a) * Fraction(b) + Fraction(c))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_fused_multiply_add_is_not_rounded_to_float64_before(sign: int) -> None:
    """2**-70 below a tie is lost by a float64, and the tie would go the other way."""
    a, b = np.float32([2.0**-12 + 2.0**-35]), np.float32([2.0**-12 - 2.0**-35])
    odd = np.float32([1 + 2.0**-23])
    twice = (a.astype(np.float64) * b + odd).astype(np.float32)
    assert oracle.fused_multiply_add(sign * a, b, sign * odd) == sign * odd
    assert twice != odd


@pytest.mark.parametrize("rows", [64, 100, 128, 500, 640])
@pytest.mark.parametrize("kind", ["even", "heavy"])
def test_every_rounding_is_that_of_the_interface(rows: int, kind: str) -> None:
    random = np.random.default_rng(rows)
    x = random.standard_normal((3, rows))
    if kind == "heavy":
        x *= np.exp2(random.integers(-20, 20, x.shape))
    check(bf16(x), rows)


@pytest.mark.parametrize("exponent", [-140, -133, -127, -126, -125, -113, -112, -111, 0, 110])
def test_groups_of_every_size_of_exponent(exponent: int) -> None:
    """Among them denormal ones, which are zero, and the smallest unit, 2**-124."""
    x = np.random.default_rng(5).uniform(-1.99, 1.99, (2, 320))
    x[:, 64:128] = 0
    check(bf16(np.ldexp(x, exponent)), 6)


def test_denormal_groups_are_zero_and_a_small_normal_one_is_not() -> None:
    x = np.zeros((2, 128), np.float32)
    x[0, 5] = 2.0**-127
    x[1, 5] = 2.0**-126
    integers, reciprocal = oracle.activation_digits(x)
    assert reciprocal[:, 0].tolist() == [1, 2.0**124]
    assert integers[:, 0, 5].tolist() == [0, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_value_is_cut_by_one_where_two_bytes_end(sign: int) -> None:
    """1.1111111 in binary times 2**14 is 32640, one more than fits; -32640 does fit."""
    x = np.full((1, 64), sign * 255 / 128, np.float32)
    integers = oracle.activation_digits(x)[0][0, 0]
    expected = [32639, 32639, 8160, 8160] if sign > 0 else [-32640, -32640, -8160, -8160]
    assert integers.tolist() == expected * 16
    check(x, 1)


def test_a_group_of_one_sign_has_a_sum_past_24_bits_which_is_rounded() -> None:
    x = bf16(np.random.default_rng(4).uniform(0, 2, (4, 200)))
    fields = np.full((200, 1), 63, np.uint8)
    local_scale, one = np.full((4, 1), 15, np.uint8), np.ones(1, np.float32)
    integers = oracle.activation_digits(x)[0]
    sums = ((integers * (4 / oracle.STEPS)).sum(axis=2) * 31).astype(np.int64)
    assert (sums.astype(np.float32).astype(np.int64) != sums).any()
    found = oracle.digit_product(x, fields, local_scale, one)
    for t, row in enumerate(x):
        assert found[t, 0] == exact_product(row, fields[:, 0], local_scale[:, 0], one[0])


def test_sums_that_leave_float32_are_infinite() -> None:
    x, fields = np.full((1, 512), 2.0**120, np.float32), np.full((512, 2), 63, np.uint8)
    scale = np.full((8, 2), 15, np.uint8)
    found = oracle.digit_product(x, fields, scale, np.float32([1, -1]))
    assert found.tolist() == [[np.inf, -np.inf]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_makes_its_row_nan_and_no_other(value: float) -> None:
    random = np.random.default_rng(0)
    x = bf16(random.standard_normal((3, 192)))
    fields, scale = np.full((192, 2), 32, np.uint8), np.zeros((3, 2), np.uint8)
    x[1, 70] = value
    found = oracle.digit_product(x, fields, scale, np.ones(2, np.float32))
    assert np.isnan(found).all(axis=1).tolist() == [False, True, False]
    assert (found[[0, 2]] == 0).all()


def test_integers_of_small_range_are_exact() -> None:
    """Values within a factor of 32 of their group's largest lose nothing."""
    random = np.random.default_rng(3)
    x = random.integers(-128, 129, (4, 640)) * 2.0 ** random.integers(0, 4, (4, 640))
    fields = random.integers(0, 64, (640, 8), np.uint8)
    scale = random.integers(0, 16, (10, 8), np.uint8)
    found = oracle.digit_product(x.astype(np.float32), fields, scale, np.ones(8, np.float32))
    weights = (fields - 32.0) * scale.repeat(64, axis=0)
    np.testing.assert_allclose(found, x @ weights, atol=32 * 2.0**-24 * np.abs(x @ weights).max())


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_rows_do_not_touch_each_other_and_a_power_of_two_goes_through(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows, columns = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 9))
    x = random.standard_normal((5, rows)) * np.exp2(random.integers(-9, 9, (5, rows)))
    x = bf16(x)
    fields = random.integers(0, 64, (rows, columns), np.uint8)
    scale = random.integers(0, 16, (-(-rows // 64), columns), np.uint8)
    ones = np.ones(columns, np.float32)
    together = oracle.digit_product(x, fields, scale, ones)
    alone = [oracle.digit_product(x[t : t + 1], fields, scale, ones)[0] for t in range(5)]
    np.testing.assert_array_equal(together, alone)
    shift = np.float32(2.0 ** data.draw(st.integers(-60, 60)))
    np.testing.assert_array_equal(
        oracle.digit_product(x * shift, fields, scale, ones), together * shift
    )
