"""The CCQ encoder: error bounds, invariances, hard inputs, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_lite.quantization import ccq, ccq_search
from fastdeploy_lite.quantization.ccq_codes import CODES


def gaussian(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def fields(encoded: ccq.CCQWeight) -> list[np.ndarray]:
    names = ("packed", "local_scale", "super_scale", "code_scale", "code_zp")
    return [getattr(encoded, name) for name in names]


def assert_equal(first: ccq.CCQWeight, second: ccq.CCQWeight) -> None:
    for a, b in zip(fields(first), fields(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_large_gaussian_matrix_is_well_below_the_bound() -> None:
    """The product promises 0.112 (Lloyd-Max at 2 bits has 0.1175); the encoder reaches 0.1026."""
    weight = gaussian(4096, 1024) * 0.02
    encoded = ccq.encode(weight)
    assert ccq_search.relative_error(weight, encoded) < 0.1035
    assert encoded.bits_per_weight == pytest.approx(2 + 4 / 64 + 80 / 4096)


@pytest.mark.parametrize(
    ("name", "bound"), [("gaussian", 0.0975), ("laplace", 0.145), ("uniform", 0.066)]
)
def test_error_by_distribution(name: str, bound: float) -> None:
    rng = np.random.default_rng(3)
    draw = {"gaussian": rng.standard_normal, "laplace": rng.laplace, "uniform": rng.uniform}[name]
    weight = draw(size=(384, 64)) if name != "uniform" else draw(-1, 1, (384, 64))
    assert ccq_search.relative_error(weight, ccq.encode(weight)) < bound


def test_group_and_column_scales_are_followed() -> None:
    """Columns and 64-row groups of very different size cost no more than equal ones."""
    weight = gaussian(512, 48)
    weight *= np.exp(np.random.default_rng(1).uniform(-8, 8, 48)).astype(np.float32)
    groups = np.repeat(np.random.default_rng(2).uniform(0.5, 1, (8, 48)), 64, axis=0)
    weight = (weight * groups).astype(np.float32)
    encoded = ccq.encode(weight)
    per_column = ((encoded.decode() - weight) ** 2).sum(0) / (weight**2).sum(0)
    assert per_column.mean() < 0.103
    assert per_column.max() < 0.13


def test_outliers_do_not_spoil_other_groups() -> None:
    weight = gaussian(256, 32)
    weight[7] *= 12
    encoded = ccq.encode(weight)
    rest = slice(64, None)
    error = ((encoded.decode() - weight)[rest] ** 2).sum() / (weight[rest] ** 2).sum()
    assert error < 0.15


def test_searched_codes_beat_one_shared_code_and_the_trap() -> None:
    weight = gaussian(384, 48)
    searched = ccq_search.relative_error(weight, ccq.encode(weight))
    shared = ccq_search.relative_error(weight, ccq.encode(weight, codes=CODES[:1]))
    trap = ccq_search.relative_error(weight, ccq.encode(weight, codes=[(128.0, 0.0)]))
    assert searched < 0.95 * shared
    assert shared < 0.108
    assert trap > 0.5, "code_scale = 128 leaves the last field constant"


def test_fixed_codes_are_kept() -> None:
    encoded = ccq.encode(gaussian(128, 5), codes=[(128.5, 0.25)])
    assert (encoded.code_scale == np.float32(128.5)).all()
    assert (encoded.code_zp == np.float32(0.25)).all()


def test_bytes_are_the_nearest_codewords() -> None:
    weight = gaussian(128, 6, seed=9)
    encoded = ccq.encode(weight)
    table = ccq.codebook(encoded.code_scale, encoded.code_zp)
    points = ccq.code_values(table).astype(np.float64)  # [256, N, 4]
    local = ccq.unpack_local_scale(encoded.local_scale).astype(np.float64)
    scale = np.repeat(local * encoded.super_scale, 16, axis=0)  # [K/4, N]
    vectors = weight.reshape(32, 4, 6).transpose(0, 2, 1)[:, None]
    error = ((vectors - scale[:, None, :, None] * points) ** 2).sum(axis=3)  # [K/4, 256, N]
    taken = np.take_along_axis(error, encoded.packed[:, None].astype(int), axis=1)[:, 0]
    assert (taken <= error.min(axis=1) * (1 + 1e-5)).all()


def test_result_does_not_depend_on_threads_or_neighbouring_columns() -> None:
    weight = gaussian(384, 70)
    whole = ccq_search.encode(weight, workers=1)
    assert_equal(whole, ccq_search.encode(weight, workers=3))
    order = np.random.default_rng(4).permutation(70)
    permuted = ccq.encode(weight[:, order])
    for a, b in zip(fields(whole), fields(permuted), strict=True):
        np.testing.assert_array_equal(a[..., order], b)


@settings(max_examples=25, deadline=None)
@given(exponent=st.integers(-90, 110), seed=st.integers(0, 2**32 - 1))
def test_powers_of_two_change_nothing_but_the_super_scale(exponent: int, seed: int) -> None:
    weight = gaussian(128, 3, seed)
    plain, scaled = ccq.encode(weight), ccq.encode(np.ldexp(weight, exponent))
    np.testing.assert_array_equal(scaled.packed, plain.packed)
    np.testing.assert_array_equal(scaled.local_scale, plain.local_scale)
    np.testing.assert_array_equal(scaled.super_scale, np.ldexp(plain.super_scale, exponent))


@settings(max_examples=25, deadline=None)
@given(
    columns=st.integers(1, 40),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0, 6),
)
def test_any_finite_matrix_encodes_to_valid_arrays(
    columns: int, blocks: int, seed: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((128 * blocks, columns))
    weight *= np.exp(spread * rng.standard_normal(weight.shape))
    weight[rng.random(weight.shape) < 0.2] = 0
    encoded = ccq.encode(weight)
    assert encoded.shape == weight.shape
    np.testing.assert_array_equal(
        encoded.super_scale, ccq_search.round_to_bfloat16(encoded.super_scale)
    )
    assert ccq_search.relative_error(weight, encoded) < 1


def test_zero_columns_and_groups_decode_to_zero() -> None:
    weight = gaussian(256, 4)
    weight[:, 1] = 0
    weight[64:128, 2] = 0
    decoded = ccq.encode(weight).decode()
    assert not decoded[:, 1].any()
    assert not decoded[64:128, 2].any()
    assert decoded[:64, 2].any()
    assert not ccq.encode(np.zeros((128, 2))).decode().any()


@pytest.mark.parametrize("magnitude", [1e-36, 1e-30, 1e30, 2.0**123])
def test_extreme_magnitudes(magnitude: float) -> None:
    weight = (gaussian(128, 8) * magnitude).astype(np.float32)
    encoded = ccq.encode(weight)
    assert np.isfinite(encoded.decode()).all()
    assert ccq_search.relative_error(weight, encoded) < 0.115
    assert (np.abs(encoded.super_scale) >= 2.0**-126).all()


def test_weights_below_the_smallest_scale_still_encode() -> None:
    weight = (gaussian(128, 2) * 1e-42).astype(np.float32)
    encoded = ccq.encode(weight)
    assert np.isfinite(encoded.decode()).all()
    assert np.abs(encoded.decode()).max() < 1e-36


def test_table_of_codes_stays_inside_int16() -> None:
    """Decoders that convert to a 16-bit integer saturate outside it."""
    table = np.array(CODES, dtype=np.float32)
    codes = ccq.codebook(table[:, 0].copy(), table[:, 1].copy())
    assert codes.min() >= -(2**15)
    assert codes.max() < 2**15
    assert len({tuple(pair) for pair in table.tolist()}) == len(CODES) == 64


def with_value(value: float) -> np.ndarray:
    weight = gaussian(128, 3)
    weight[5, 2] = value
    return weight


@pytest.mark.parametrize(
    ("weight", "codes", "error", "text"),
    [
        (with_value(np.nan), None, ValueError, "weight[5, 2]: found nan"),
        (with_value(-np.inf), None, ValueError, "weight[5, 2]: found -inf"),
        (with_value(1e38), None, ValueError, "magnitude at most 8.507e+37"),
        (np.zeros((192, 4)), None, ValueError, "found K = 192 rows, expected a multiple of 128"),
        (np.zeros((128, 0)), None, ValueError, "found shape [128, 0]"),
        (np.zeros(128), None, ValueError, "found shape [128]"),
        (np.zeros((128, 2), np.int8), None, TypeError, "found dtype int8"),
        (np.zeros((128, 2)), [], ValueError, "codes: found shape [0]"),
        (np.zeros((128, 2)), [(np.nan, 0.0)], ValueError, "code_scale[0]: found nan"),
    ],
)
def test_refusals_name_the_place(
    weight: np.ndarray, codes: list | None, error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        ccq.encode(weight, codes=codes)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_round_to_bfloat16_is_to_nearest_even() -> None:
    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8)], np.float32)
    expected = [1, 1 + 2**-6, 1 + 2**-7, -1]
    assert ccq_search.round_to_bfloat16(halves).tolist() == expected
