"""Products with gradients of their own against Paddle's plain operators and their gradients."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fastdeploy_lite.calibration.gradients import (
    QUERIES_AT_ONCE,
    Divergence,
    RotaryAttention,
    ScaledProduct,
    log_softmax,
)
from fastdeploy_lite.model_executor.layers.rotary import cos_sin_table

RANDOM = np.random.default_rng(3)


def draw(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def parameters(*arrays: np.ndarray) -> list[paddle.Tensor]:
    return [paddle.to_tensor(array, stop_gradient=False) for array in arrays]


def compare(found: paddle.Tensor, plain: paddle.Tensor, pairs: list, rtol: float) -> None:
    """Values, and gradients under one random direction."""
    np.testing.assert_allclose(found.numpy(), plain.numpy(), rtol=rtol, atol=rtol)
    direction = paddle.to_tensor(RANDOM.standard_normal(found.shape).astype(np.float32))
    paddle.autograd.backward([found, plain], [direction, direction])
    for own, theirs in pairs:
        expected = theirs.grad.numpy()
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(own.grad.numpy(), expected, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)])
def test_scaled_product(shape: tuple[int, ...]) -> None:
    x, gain, weight = draw(*shape), 0.3 * draw(16), draw(24, 16)
    own, theirs = parameters(x, gain), parameters(x, gain)
    plain = paddle.matmul(theirs[0], paddle.to_tensor(weight)) * (1 + theirs[1])
    compare(ScaledProduct.apply(*own, weight), plain, [*zip(own, theirs, strict=True)], 1e-5)


def plain_attention(
    both: paddle.Tensor, heads: int, shared: int, cos: np.ndarray, sin: np.ndarray
) -> paddle.Tensor:
    """Every pair of tokens, keys and values repeated for each query head."""
    batch, length, _ = both.shape
    size = 2 * cos.shape[1]
    parts = both.reshape([batch, length, -1, size]).transpose([0, 2, 1, 3])

    def turned(x: paddle.Tensor) -> paddle.Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        c, s = paddle.to_tensor(cos), paddle.to_tensor(sin)
        return paddle.stack([even * c - odd * s, odd * c + even * s], -1).reshape(x.shape)

    query, key = turned(parts[:, :heads]), turned(parts[:, heads : heads + shared])
    key, value = (
        x.repeat_interleave(heads // shared, axis=1) for x in (key, parts[:, heads + shared :])
    )
    score = paddle.matmul(query, key, transpose_y=True) * size**-0.5
    score = score + paddle.triu(paddle.full([length, length], -1e30), 1)
    found = paddle.matmul(paddle.nn.functional.softmax(score, -1), value)
    return found.transpose([0, 2, 1, 3]).reshape([batch, length, heads * size])


@pytest.mark.parametrize(
    ("heads", "shared", "length"), [(4, 2, 9), (3, 1, QUERIES_AT_ONCE + 5), (2, 2, 1)]
)
def test_rotary_attention(heads: int, shared: int, length: int) -> None:
    size = 8
    both = draw(2, length, (heads + 2 * shared) * size)
    cos, sin = np.split(cos_sin_table(length, size, 10000.0), 2, axis=1)
    (own,), (theirs,) = parameters(both), parameters(both)
    found = RotaryAttention.apply(own, heads, shared, cos + np.complex64(1j) * sin)
    compare(found, plain_attention(theirs, heads, shared, cos, sin), [(own, theirs)], 2e-5)


def test_divergence() -> None:
    x, wanted, head = draw(6, 16), draw(6, 16), draw(16, 40)
    (own,), (theirs,) = parameters(x), parameters(x)
    target, found = (
        paddle.nn.functional.log_softmax(paddle.matmul(rows, paddle.to_tensor(head)), -1)
        for rows in (paddle.to_tensor(wanted), theirs)
    )
    plain = (target.exp() * (target - found)).sum()
    compare(Divergence.apply(own, wanted, head), plain, [(own, theirs)], 1e-5)


def test_divergence_from_itself_is_nothing() -> None:
    wanted, head = draw(6, 16), draw(16, 40)
    (own,) = parameters(wanted)
    loss = Divergence.apply(own, wanted, head)
    loss.backward()
    assert float(loss) == 0.0
    assert not own.grad.numpy().any()


def test_log_softmax_of_large_logits() -> None:
    found = log_softmax(np.array([[1e4, 1e4, -1e4]], np.float32))
    np.testing.assert_allclose(found, [[-np.log(2), -np.log(2), -2e4]], rtol=1e-4)
