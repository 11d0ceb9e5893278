"""int8 and int4 under the activations' moments."""

from __future__ import annotations

import numpy as np
import pytest

from fastdeploy_lite.quantization import hessian, int_hessian
from fastdeploy_lite.quantization.weight_only import quantize_int4, quantize_int8


def moments_of(rows: int, tokens: int = 2048) -> np.ndarray:
    rng = np.random.default_rng(4)
    mix = np.linalg.qr(rng.standard_normal((rows, rows)))[0] * np.exp(rng.uniform(-2.3, 0, rows))
    x = (rng.standard_normal((tokens, rows)) @ mix.T).astype(np.float32)
    return hessian.blend(hessian.second_moment(x), tokens)


@pytest.mark.parametrize(("largest", "share"), [(7, 0.55), (127, 0.75)])
def test_products_err_less_than_with_rounding(largest: int, share: float) -> None:
    weight = np.random.default_rng(5).standard_normal((192, 48)).astype(np.float32)
    moments = moments_of(192)
    plain = (quantize_int4 if largest == 7 else quantize_int8)(weight)
    known = int_hessian.quantize(weight, moments, largest)

    def cost(decoded: np.ndarray) -> float:
        return float(hessian.loss(np.ascontiguousarray((decoded - weight).T), moments).sum())

    assert cost(known.dequantize()) < share * cost(plain.dequantize())
    assert np.abs(known.quantized).max() <= largest


def test_zero_columns_and_repeats() -> None:
    weight = np.random.default_rng(6).standard_normal((128, 16)).astype(np.float32)
    weight[:, 4] = 0
    first, second = (int_hessian.quantize(weight, moments_of(128), 7) for _ in range(2))
    np.testing.assert_array_equal(first.quantized, second.quantized)
    assert not first.dequantize()[:, 4].any()
    assert np.isfinite(first.dequantize()).all()


def test_wrong_moments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found shape \[4, 4\], expected \[128, 128\]"):
        int_hessian.quantize(np.zeros((128, 16), np.float32), np.eye(4, dtype=np.float32), 7)
