"""The encoders' CUDA kernels, run on this processor, against the encoders of the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from encoder_cases import assert_same, random_matrix

from fastdeploy_lite.formats.ccq import CCQWeight, to_stored_order
from fastdeploy_lite.quantization import card as cards
from fastdeploy_lite.quantization import ccq_hessian, ccq_search, hessian
from fastdeploy_lite.quantization.card import Card
from fastdeploy_lite.quantization.ccq_codes import CODES
from fastdeploy_lite.quantization.products import HostProducts
from fastdeploy_lite.utils.arrays import bfloat16_to_float32, float32_to_bfloat16
from fastdeploy_lite.utils.errors import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "card_in_memory"))
import build_kernels


@pytest.fixture(scope="module")
def card() -> Card:
    return Card(build_kernels.build())


@pytest.mark.parametrize(
    ("rows", "columns", "kind"),
    [(128, 3, "gaussian"), (256, 5, "heavy tails"), (640, 6, "adversarial")],
)
def test_data_free_arrays_are_those_of_the_cpu(
    card: Card, rows: int, columns: int, kind: str
) -> None:
    matrix, codes = random_matrix(rows, columns, kind), CODES[:3]
    found = card.encode(matrix, codes=codes)
    expected = ccq_search.encode(matrix, codes=codes)
    assert_same(found.weight, expected)
    wide = matrix.astype(np.float64)
    assert found.energy == pytest.approx(np.square(wide).sum(), rel=1e-12)
    assert found.error == pytest.approx(np.square(expected.decode() - wide).sum(), rel=1e-6)


def test_bfloat16_in_permuted_order_with_one_code(card: Card) -> None:
    bits = float32_to_bfloat16(random_matrix(128, 2, "gaussian"))
    found = card.encode(bits, codes=CODES[:1], row_order="permuted")
    stored = to_stored_order(bfloat16_to_float32(bits), "permuted")
    assert_same(found.weight, ccq_search.encode(stored, codes=CODES[:1]))


@pytest.mark.parametrize("order", ["natural", "permuted"])
@pytest.mark.parametrize("tokens", [0, 7, 400])
def test_search_under_moments_finds_what_the_cpu_finds(card: Card, order: str, tokens: int) -> None:
    matrix = random_matrix(128, 3, "heavy tails")
    x = np.random.default_rng(tokens).standard_normal((tokens, 128), np.float32)
    moments = hessian.blend(card.second_moment(x), tokens)
    found = card.encode_hessian(matrix, moments, codes=CODES[:3], row_order=order)
    stored = to_stored_order(to_stored_order(moments, order).T, order)
    expected = ccq_hessian.encode(to_stored_order(matrix, order), stored, codes=CODES[:3])

    def lost(encoded: CCQWeight) -> float:
        error = encoded.decode() - to_stored_order(matrix, order)
        return float(hessian.loss(np.ascontiguousarray(error.T), stored).sum())

    # Sums of products in another order: a byte may differ now and then.
    assert (found.weight.packed == expected.packed).mean() > 0.95
    assert lost(found.weight) == pytest.approx(lost(expected), rel=0.01)


def test_terms_of_moments_that_are_not_positive_definite_are_refused(card: Card) -> None:
    moments = np.eye(128, dtype=np.float32)
    moments[70, 70] = -1
    with pytest.raises(ValueError, match="not positive definite"):
        card.encode_hessian(random_matrix(128, 2, "gaussian"), moments)


@pytest.mark.parametrize("shape", [(1, 4, 4), (130, 36, 132), (5, 12, 3)])
def test_products(card: Card, shape: tuple[int, int, int]) -> None:
    random = np.random.default_rng(sum(shape))
    rows, depth, columns = shape
    left = random.standard_normal((rows, depth), np.float32)
    right = random.standard_normal((depth, columns), np.float32)
    np.testing.assert_allclose(card.multiply(left, right), left @ right, atol=1e-5)
    weight = random.uniform(0, 1, rows).astype(np.float32)
    expected = hessian.second_moment(left, weight)
    np.testing.assert_allclose(card.second_moment(left, weight), expected, atol=1e-4)


@pytest.mark.parametrize("columns", [5, 64, 70])
def test_products_of_calibration(card: Card, columns: int) -> None:
    """Each is what numpy gives, sums in another order."""
    random = np.random.default_rng(columns)
    host = HostProducts()
    x = random.standard_normal((40, 128), np.float32)
    y = random.standard_normal((40, columns), np.float32)
    moments = host.second_moment(x)
    cross = host.cross_moment(x, y)
    np.testing.assert_allclose(card.cross_moment(x, y), cross, atol=1e-4)
    expected = host.ridge(moments, cross, 0.02)
    np.testing.assert_allclose(card.ridge(moments, cross, 0.02), expected, atol=1e-4)
    assert not card.ridge(np.zeros_like(moments), cross, 0.02).any()
    errors = [random.standard_normal((128, columns), np.float32) for _ in range(2)]
    expected_losses = host.losses(errors, moments)
    assert card.losses(errors, moments) == pytest.approx(expected_losses, rel=1e-5)
    weight = random.uniform(0, 1, 40).astype(np.float32)
    up_gate = random.standard_normal((128, 256), np.float32)
    down = random.standard_normal((128, 64), np.float32)
    inner = host.activations(x, up_gate, weight)
    np.testing.assert_allclose(card.activations(x, up_gate, weight), inner, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(
        card.outputs(x, up_gate, weight, down), inner @ down, rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize("tokens", [0, 40, 1000])
@pytest.mark.parametrize("pooled_tokens", [0, 60])
def test_blended_moments(card: Card, tokens: int, pooled_tokens: int) -> None:
    random = np.random.default_rng(tokens)
    own, pooled = (
        hessian.second_moment(random.standard_normal((count, 64), np.float32))
        for count in (tokens, pooled_tokens)
    )
    arguments = own, tokens, pooled, pooled_tokens
    np.testing.assert_allclose(card.blend(*arguments), hessian.blend(*arguments), rtol=1e-6)


def test_moments_that_are_not_finite_are_named(card: Card) -> None:
    with pytest.raises(ValueError, match="not finite"):
        card.blend(np.full((64, 64), np.nan, np.float32), 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, 2.0**127])
def test_values_that_cannot_be_held_are_named(card: Card, value: float) -> None:
    matrix = random_matrix(128, 2, "gaussian")
    matrix[77, 1] = value
    with pytest.raises(ValueError, match=r"weight\[77, 1\]: found"):
        card.encode(matrix, codes=CODES[:1])


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (np.zeros((64, 3), np.float32), ValueError, "expected a multiple of 128"),
        (np.zeros((128, 3), np.float64), TypeError, "found dtype float64"),
        (np.zeros((128, 0), np.float32), ValueError, "expected \\[K, N\\]"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(
    card: Card, matrix: np.ndarray, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        card.encode(matrix)


def test_without_a_card_the_cpu_is_taken_and_nvidia_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("FD_LITE_DEVICE", raising=False)
    assert cards.find("auto") == (None, "no NVIDIA card is present")
    with pytest.raises(ConfigError, match="--device nvidia: no NVIDIA card is present"):
        cards.find("nvidia")
    monkeypatch.setenv("FD_LITE_DEVICE", "cpu")
    assert cards.find("auto") == (None, "FD_LITE_DEVICE=cpu")
