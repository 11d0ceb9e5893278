"""int8 and int4: equality with Paddle's operator, error bounds, refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_lite.checkpoint.tensor import bfloat16_to_float32, float32_to_bfloat16
from fastdeploy_lite.formats.tiles import pack_int4, pack_int8
from fastdeploy_lite.quantization import weight_only

FORMATS = [
    ("weight_only_int8", weight_only.quantize_int8, pack_int8, 127),
    ("weight_only_int4", weight_only.quantize_int4, pack_int4, 7),
]
NAMES = ("algorithm", "quantize", "pack", "largest")


def bfloat16_matrix(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random bfloat16 values; some columns hold few distinct magnitudes, so that ties occur."""
    weight = rng.standard_normal((rows, columns)) * np.exp(rng.uniform(-12, 4, columns))
    lattice = rng.integers(-254, 255, (rows, columns)) * 2.0 ** rng.integers(-12, 0, columns)
    weight = np.where(rng.random(columns) < 0.5, weight, lattice)
    return bfloat16_to_float32(float32_to_bfloat16(weight))


@pytest.mark.parametrize(NAMES, FORMATS)
@pytest.mark.parametrize("seed", range(12))
def test_files_equal_those_of_paddle(
    algorithm: str, quantize: Callable, pack: Callable, largest: int, seed: int
) -> None:
    paddle = pytest.importorskip("paddle")
    from paddle.nn.quant import weight_quantize

    rng = np.random.default_rng(seed)
    weight = bfloat16_matrix(rng, 64 * int(rng.integers(1, 6)), 16 * int(rng.integers(1, 8)))
    tensor = paddle.to_tensor(weight, place=paddle.CPUPlace()).astype("bfloat16")
    expected, expected_scale = weight_quantize(tensor, algo=algorithm, arch=80)
    found = quantize(weight)
    np.testing.assert_array_equal(found.scale, expected_scale.astype("float32").numpy())
    np.testing.assert_array_equal(pack(found.quantized), expected.numpy())
    assert np.abs(found.quantized).max() == largest


@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 70), columns=st.integers(1, 20))
def test_error_is_at_most_half_a_step(bits: int, seed: int, rows: int, columns: int) -> None:
    quantize, largest = {8: (weight_only.quantize_int8, 127), 4: (weight_only.quantize_int4, 7)}[
        bits
    ]
    weight = bfloat16_matrix(np.random.default_rng(seed), rows, columns)
    found = quantize(weight)
    error = np.abs(found.dequantize().astype(np.float64) - weight)
    # The bfloat16 scale may be up to 2**-9 too small, and the largest value is then clipped.
    assert (error <= found.scale * (0.5 + largest * 2.0**-8) + 1e-38).all()


def test_many_column_blocks_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = bfloat16_matrix(np.random.default_rng(0), 130, 50)
    whole = weight_only.quantize_int8(weight)
    monkeypatch.setattr(weight_only, "COLUMNS_AT_ONCE", 16)
    blocks = weight_only.quantize_int8(weight)
    np.testing.assert_array_equal(whole.quantized, blocks.quantized)
    np.testing.assert_array_equal(whole.scale, blocks.scale)


def test_an_element_is_named_in_whichever_block_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only, "COLUMNS_AT_ONCE", 2)
    weight = np.ones((4, 5))
    weight[3, 3] = 1e39
    with pytest.raises(ValueError, match=r"weight\[3, 3\]: found 1e\+39, expected a finite number"):
        weight_only.quantize_int8(weight)


@pytest.mark.parametrize(("quantize", "largest"), [f[1::2] for f in FORMATS])
def test_every_tie_and_its_neighbours_round_exactly(quantize: Callable, largest: int) -> None:
    """A ratio just below n + 1/2 goes down, the tie itself away from zero: float32 must not err."""
    ties = np.arange(largest, dtype=np.float32) + np.float32(0.5)
    below, above = np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))
    column = np.concatenate([[np.float32(largest)], below, ties, above])
    found = quantize(np.stack([column, -column], axis=1))
    n = np.arange(largest)
    expected = np.concatenate([[largest], n, n + 1, n + 1])
    assert found.scale.tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(found.quantized, np.stack([expected, -expected], axis=1))


def test_rounding_is_half_away_from_zero() -> None:
    weight = np.array([[127.0], [0.5], [-0.5], [1.5], [-2.5], [0.49999997]], np.float32)
    found = weight_only.quantize_int8(weight)
    assert found.scale.tolist() == [1.0]
    assert found.quantized[:, 0].tolist() == [127, 1, -1, 2, -3, 0]


def test_columns_without_a_scale_are_zero() -> None:
    weight = np.zeros((64, 2), np.float32)
    weight[3, 1] = 1e-44
    found = weight_only.quantize_int4(weight)
    assert not found.scale.any()
    assert not found.quantized.any()


@pytest.mark.parametrize(
    ("weight", "error", "text"),
    [
        (np.array([[1.0, np.nan]]), ValueError, "weight[0, 1]: found nan"),
        (np.array([[1.0], [-np.inf]]), ValueError, "weight[1, 0]: found -inf"),
        (np.zeros(3), ValueError, "found shape [3]"),
        (np.zeros((0, 3)), ValueError, "found shape [0, 3]"),
        (np.zeros((3, 3), np.uint16), TypeError, "found dtype uint16"),
    ],
)
def test_refusals(weight: np.ndarray, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        weight_only.quantize_int8(weight)
    assert text in str(caught.value)
