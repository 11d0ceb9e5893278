"""Products of a decoder layer by numpy, with gradients of their own.

Paddle's matrix products on a CPU come from a library that takes 2.5 times as long as numpy's on AMD
processors, and its attention keeps every pair of tokens, also those that lie in the future. Arrays
pass between the two without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.model_executor.backend import paddle

ArrayF32 = npt.NDArray[np.float32]
_Real = TypeVar("_Real", np.float32, np.float64)
QUERIES_AT_ONCE = 256
"""Of attention: they read keys up to the last of them, so fewer waste less on the future."""


def host(tensor: Any) -> ArrayF32:
    """The values of a tensor on the CPU, its own memory."""
    values: Any = np.from_dlpack(tensor.detach())
    return np.asarray(values, np.float32)


def tensor_of(array: ArrayF32) -> Any:
    """A tensor in an array's own memory."""
    return paddle.utils.dlpack.from_dlpack(array)


class ScaledProduct(paddle.autograd.PyLayer):  # type: ignore[misc]
    """x W diag(1 + g) of x [..., K], g [N] and the constant W [K, N]."""

    @staticmethod
    def forward(ctx: Any, x: Any, gain: Any, weight: ArrayF32) -> Any:
        """The product [..., N]."""
        ctx.weight, ctx.scale = weight, 1 + host(gain)
        product = np.matmul(host(x), weight)
        product *= ctx.scale
        ctx.product = product
        return tensor_of(product)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> tuple[Any, Any]:
        """By x and by g."""
        given = host(gradient)
        rows = (given * ctx.product).reshape(-1, len(ctx.scale))
        by_gain = rows.sum(axis=0) / ctx.scale
        return tensor_of(np.matmul(given * ctx.scale, ctx.weight.T)), tensor_of(by_gain)


class RotaryAttention(paddle.autograd.PyLayer):  # type: ignore[misc]
    """Causal attention of heads that lie side by side: queries, then keys, then values."""

    @staticmethod
    def forward(ctx: Any, both: Any, heads: int, shared: int, turns: npt.NDArray[Any]) -> Any:
        """What the heads answer, [B, T, H D].

        Args:
            ctx: keeps what the way back needs.
            both: [B, T, (H + 2 S) D]; each of S keys and values serves H / S neighbouring queries.
            heads, shared: H and S.
            turns: complex64 [T, D / 2], what each pair of a query's or key's values is turned by.
        """
        parts = _split(host(both), heads + 2 * shared)
        query, key = _turned(parts[:, :heads], turns), _turned(parts[:, heads:-shared], turns)
        value = np.ascontiguousarray(parts[:, -shared:])
        grouped = query.reshape(len(query), shared, heads // shared, *query.shape[2:])
        answer = np.empty_like(grouped)
        weights = []
        for rows, past in _blocks(query.shape[2]):
            part = grouped[:, :, :, rows]
            score = _flat(part) @ key[:, :, past].swapaxes(2, 3)
            found = _masked_softmax(score, part.shape, rows, past)
            answer[:, :, :, rows] = (found @ value[:, :, past]).reshape(part.shape)
            weights.append(found)
        ctx.kept = grouped, key, value, answer, weights, turns
        return tensor_of(_joined(answer.reshape(query.shape)))

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        """By queries, keys and values, [B, T, (H + 2 S) D]."""
        query, key, value, answer, weights, turns = ctx.kept
        batch, shared, group, length, size = query.shape
        given = _split(host(gradient), shared * group).reshape(query.shape)
        by_query, by_key, by_value = map(np.empty_like, (query, key, value))
        by_key[:], by_value[:] = 0, 0
        inner = (given * answer).sum(-1)
        for (rows, past), weight in zip(_blocks(length), weights, strict=True):
            part = _flat(given[:, :, :, rows])
            by_value[:, :, past] += weight.swapaxes(2, 3) @ part
            score = part @ value[:, :, past].swapaxes(2, 3)
            score -= inner[:, :, :, rows].reshape(batch, shared, -1, 1)
            score *= weight
            score *= np.float32(size**-0.5)
            found = score @ key[:, :, past]
            by_query[:, :, :, rows] = found.reshape(batch, shared, group, -1, size)
            by_key[:, :, past] += score.swapaxes(2, 3) @ _flat(query[:, :, :, rows])
        back = turns.conj()
        by_query = _turned(by_query.reshape(batch, shared * group, length, size), back)
        return tensor_of(
            _joined(np.concatenate([by_query, _turned(by_key, back), by_value], axis=1))
        )


class Divergence(paddle.autograd.PyLayer):  # type: ignore[misc]
    """Kullback-Leibler from one next-token distribution to another, summed over tokens."""

    @staticmethod
    def forward(ctx: Any, x: Any, wanted: ArrayF32, head: ArrayF32) -> Any:
        """Nats, a scalar.

        Args:
            ctx: keeps what the way back needs.
            x: [T, H], what enters the head.
            wanted: [T, H], what enters it in the model to be like.
            head: [H, V].
        """
        target, found = (log_softmax(rows @ head) for rows in (wanted, host(x)))
        probability = np.exp(target)
        target -= found
        nats = np.vdot(probability, target)
        np.exp(found, out=found)
        found -= probability
        ctx.kept = found, head
        return tensor_of(np.array(nats, np.float32))

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        """By x, [T, H]."""
        slope, head = ctx.kept
        return tensor_of((slope @ head.T) * np.float32(gradient))


def log_softmax(logits: npt.NDArray[_Real]) -> npt.NDArray[_Real]:
    """Over the last axis of [T, V], in place."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Queries, and the tokens that the last of them sees."""
    for start in range(0, length, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, length)
        yield slice(start, stop), slice(0, stop)


def _masked_softmax(
    score: ArrayF32, grouped: tuple[int, ...], rows: slice, past: slice
) -> ArrayF32:
    """Weights of queries `rows` for tokens `past`, in place of their scores [B, S, G R, P].

    grouped: (B, S, G, R, D), the shape of the queries.
    """
    *_, count, size = grouped
    score *= np.float32(size**-0.5)
    every = score.reshape(*grouped[:-1], past.stop)
    future = np.triu_indices(count, 1)
    every[..., future[0], rows.start + future[1]] = -np.inf
    score -= score.max(axis=-1, keepdims=True)
    np.exp(score, out=score)
    score /= score.sum(axis=-1, keepdims=True)
    return score


def _split(x: ArrayF32, heads: int) -> ArrayF32:
    """[B, T, heads D] as a view [B, heads, T, D]."""
    found: ArrayF32 = x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    return found


def _joined(x: ArrayF32) -> ArrayF32:
    """[B, heads, T, D] as [B, T, heads D]."""
    batch, _, length, _ = x.shape
    found: ArrayF32 = np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(batch, length, -1)
    return found


def _flat(x: ArrayF32) -> ArrayF32:
    """[B, S, G, R, D] as [B, S, G R, D]."""
    batch, shared, group, count, size = x.shape
    found: ArrayF32 = np.ascontiguousarray(x).reshape(batch, shared, group * count, size)
    return found


def _turned(x: ArrayF32, turns: npt.NDArray[Any]) -> ArrayF32:
    """Neighbouring pairs of x [B, heads, T, D] turned by their positions' complex numbers."""
    pairs: npt.NDArray[np.complex64] = np.ascontiguousarray(x).view(np.complex64) * turns
    return pairs.view(np.float32)
