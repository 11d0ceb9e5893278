"""The encoders of 2-bit weights on the card against those of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from encoder_cases import assert_same, random_matrix

from fastdeploy_lite.formats.ccq import CCQWeight, to_stored_order
from fastdeploy_lite.quantization import card as cards
from fastdeploy_lite.quantization import ccq_hessian, ccq_search, hessian
from fastdeploy_lite.quantization.card import Card
from fastdeploy_lite.quantization.products import HOST
from fastdeploy_lite.utils.arrays import bfloat16_to_float32, float32_to_bfloat16


@pytest.fixture(scope="module")
def encoder() -> Card:
    found, reason = cards.find("nvidia")
    assert found is not None, reason
    return found


@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "adversarial"])
@pytest.mark.parametrize("shape", [(128, 6), (384, 37), (1536, 300), (2560, 129), (8192, 9)])
def test_data_free_arrays_are_those_of_the_cpu(
    encoder: Card, shape: tuple[int, int], kind: str
) -> None:
    bits = float32_to_bfloat16(random_matrix(*shape, kind))
    found = encoder.encode(bits, row_order="permuted")
    stored = to_stored_order(bfloat16_to_float32(bits), "permuted")
    assert_same(found.weight, ccq_search.encode(stored))
    assert_same(encoder.encode(bits, row_order="permuted").weight, found.weight)


@pytest.mark.parametrize("tokens", [0, 7, 3000])
@pytest.mark.parametrize("kind", ["gaussian", "heavy tails"])
@pytest.mark.parametrize("shape", [(128, 5), (640, 65), (1536, 33)])
def test_search_under_moments(
    encoder: Card, shape: tuple[int, int], kind: str, tokens: int
) -> None:
    matrix = random_matrix(*shape, kind)
    x = np.random.default_rng(tokens).standard_normal((tokens, shape[0]), np.float32)
    own = encoder.second_moment(x)
    np.testing.assert_allclose(own, hessian.second_moment(x), atol=0.02)
    moments = hessian.blend(own, tokens)
    found = encoder.encode_hessian(matrix, moments)
    assert_same(encoder.encode_hessian(matrix, moments).weight, found.weight)
    expected = ccq_hessian.encode(matrix, moments)

    def lost(encoded: CCQWeight) -> float:
        error = encoded.decode() - matrix
        return float(hessian.loss(np.ascontiguousarray(error.T), moments).sum())

    # Sums of products in another order: a byte may differ now and then, and what follows it.
    assert (found.weight.packed == expected.packed).mean() > 0.9
    assert lost(found.weight) == pytest.approx(lost(expected), rel=2e-3)


@pytest.mark.parametrize("shape", [(1, 4, 4), (1000, 2560, 3072), (130, 36, 132)])
def test_products(encoder: Card, shape: tuple[int, int, int]) -> None:
    rows, depth, columns = shape
    random = np.random.default_rng(sum(shape))
    left = random.standard_normal((rows, depth), np.float32)
    right = random.standard_normal((depth, columns), np.float32)
    np.testing.assert_allclose(encoder.multiply(left, right), left @ right, atol=2e-3)


@pytest.mark.parametrize("columns", [5, 64, 700])
def test_products_of_calibration(encoder: Card, columns: int) -> None:
    random = np.random.default_rng(columns)
    x = random.standard_normal((900, 640), np.float32)
    y = random.standard_normal((900, columns), np.float32)
    moments = HOST.second_moment(x)
    cross = HOST.cross_moment(x, y)
    np.testing.assert_allclose(encoder.cross_moment(x, y), cross, atol=2e-3)
    expected = HOST.ridge(moments, cross, 0.02)
    np.testing.assert_allclose(encoder.ridge(moments, cross, 0.02), expected, atol=1e-5)
    errors = [random.standard_normal((640, columns), np.float32) for _ in range(2)]
    expected_losses = HOST.losses(errors, moments)
    assert encoder.losses(errors, moments) == pytest.approx(expected_losses, rel=1e-5)
    weight = random.uniform(0, 1, 900).astype(np.float32)
    up_gate = random.standard_normal((640, 512), np.float32) / 20
    down = random.standard_normal((256, 640), np.float32)
    inner = HOST.activations(x, up_gate, weight)
    np.testing.assert_allclose(encoder.activations(x, up_gate, weight), inner, atol=1e-4)
    np.testing.assert_allclose(encoder.outputs(x, up_gate, weight, down), inner @ down, atol=1e-2)
    np.testing.assert_allclose(
        encoder.blend(moments, 900, moments, 50), hessian.blend(moments, 900, moments, 50),
        rtol=1e-6,
    )  # fmt: skip
