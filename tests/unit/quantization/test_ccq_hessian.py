"""The encoder that knows the activations: what it gains, hard inputs, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from fastdeploy_lite.formats import ccq
from fastdeploy_lite.quantization import ccq_hessian, ccq_search, hessian
from fastdeploy_lite.quantization.ccq_codes import CODES


def correlated(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Activations [T, K] whose principal axes differ a hundredfold in energy."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((rows, rows)))[0]
    spread = np.exp(rng.uniform(-2.3, 0, rows))
    return ((rng.standard_normal((tokens, rows)) * spread) @ axes).astype(np.float32)


def gaussian(rows: int, columns: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * 0.02


def cost(weight: np.ndarray, encoded: ccq.CCQWeight, x: np.ndarray) -> float:
    """Squared error of the products over their square."""
    off = x @ (encoded.decode() - weight)
    return float(np.square(off).sum() / np.square(x @ weight).sum())


def test_products_err_less_than_with_the_data_free_encoder_on_fresh_inputs() -> None:
    x, weight = correlated(256, 4096), gaussian(256, 48)
    moments = hessian.blend(hessian.second_moment(x[:3072]), 3072)
    known = ccq_hessian.encode(weight, moments)
    assert cost(weight, known, x[3072:]) < 0.65 * cost(weight, ccq_search.encode(weight), x[3072:])


def test_each_step_gains() -> None:
    x, weight = correlated(256, 4096), gaussian(256, 32)
    moments = hessian.blend(hessian.second_moment(x), len(x))
    errors = [
        hessian.loss(
            np.ascontiguousarray(
                (ccq_hessian.encode(weight, moments, **steps).decode() - weight).T
            ),
            moments,
        ).sum()
        for steps in (
            {"candidates": 1, "descents": 0},
            {"candidates": 1, "descents": 2},
            {"candidates": 3, "descents": 2},
        )
    ]
    assert errors[0] > 1.02 * errors[1] > 1.02 * errors[2]


def test_without_correlation_it_equals_the_data_free_encoder_in_error() -> None:
    weight = gaussian(384, 64)
    encoded = ccq_hessian.encode(weight, np.eye(384, dtype=np.float32))
    data_free = ccq_search.relative_error(weight, ccq_search.encode(weight))
    assert ccq_search.relative_error(weight, encoded) < 1.01 * data_free


def test_result_is_a_valid_weight_and_repeats() -> None:
    x, weight = correlated(128, 512), gaussian(128, 16)
    moments = hessian.blend(hessian.second_moment(x), 512)
    first, second = (ccq_hessian.encode(weight, moments) for _ in range(2))
    for name in ("packed", "local_scale", "super_scale", "code_scale", "code_zp"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.shape == (128, 16)
    assert (ccq_search.round_to_bfloat16(first.super_scale) == first.super_scale).all()


def test_zero_columns_and_groups_stay_zero_and_sizes_do_not_matter() -> None:
    x, weight = correlated(256, 1024), gaussian(256, 16)
    weight[:, 3] = 0
    weight[:, 5] *= 1e-30
    weight[:, 6] *= 1e30
    moments = hessian.blend(hessian.second_moment(x), 1024)
    decoded = ccq_hessian.encode(weight, moments).decode().astype(np.float64)
    assert not decoded[:, 3].any()
    wide = weight.astype(np.float64)
    keep = np.arange(16) != 3
    relative = np.square(decoded - wide).sum(0)[keep] / np.square(wide).sum(0)[keep]
    assert relative.max() < 0.25  # 0.10 if the moments were those of noise


@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
def test_experts_with_few_tokens_fall_back_to_the_layer(tokens: int) -> None:
    """Rank-deficient moments are no obstacle, and cost no more than ignoring them."""
    x, weight = correlated(256, 4096), gaussian(256, 24)
    pooled = hessian.second_moment(x)
    own = hessian.second_moment(x[:tokens])
    blended = ccq_hessian.encode(weight, hessian.blend(own, tokens, pooled, len(x)))
    alone = ccq_hessian.encode(weight, hessian.blend(own, tokens))
    fresh = correlated(256, 6000)[4096:]
    assert cost(weight, blended, fresh) < 0.9 * cost(weight, alone, fresh)


def test_inputs_that_are_never_seen_do_not_matter() -> None:
    """Dead inputs (all-zero activations) leave the moments positive definite."""
    x = correlated(128, 512)
    x[:, 10:20] = 0
    moments = hessian.blend(hessian.second_moment(x), 512)
    encoded = ccq_hessian.encode(gaussian(128, 8), moments)
    assert np.isfinite(encoded.decode()).all()


def test_one_fixed_code_is_used_everywhere() -> None:
    x = correlated(128, 512)
    moments = hessian.blend(hessian.second_moment(x), 512)
    encoded = ccq_hessian.encode(gaussian(128, 8), moments, codes=CODES[2:3])
    assert (encoded.code_scale == np.float32(CODES[2][0])).all()


def test_wrong_moments_are_refused() -> None:
    weight = gaussian(128, 8)
    with pytest.raises(ValueError, match=r"hessian: found shape \[64, 64\], expected \[128, 128\]"):
        ccq_hessian.encode(weight, np.eye(64, dtype=np.float32))
    with pytest.raises(ValueError, match="not positive definite"):
        ccq_hessian.encode(weight, -np.eye(128, dtype=np.float32))
    with pytest.raises(ValueError, match="not finite"):
        hessian.blend(np.full((4, 4), np.nan, np.float32), 10)
