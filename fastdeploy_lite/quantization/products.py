"""The large products of calibration, on the CPU; `card.Card` has the same methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.quantization import hessian

ArrayF32 = npt.NDArray[np.float32]


class Products(Protocol):
    """Where products of whole matrices are taken; all arrays are the host's, float32."""

    workers: int
    """Experts under way at once: the host's part of one covers the card's of others."""

    def multiply(self, left: ArrayF32, right: ArrayF32) -> ArrayF32:
        """left [M, K] times right [K, N]."""

    def second_moment(self, x: ArrayF32, weight: ArrayF32 | None = None) -> ArrayF32:
        """See `hessian.second_moment`."""

    def cross_moment(self, x: ArrayF32, y: ArrayF32) -> ArrayF32:
        """x' y of x [T, K] and y [T, N]."""

    def blend(
        self, moment: ArrayF32, tokens: int, pooled: ArrayF32 | None = None, pooled_tokens: int = 0
    ) -> ArrayF32:
        """See `hessian.blend`."""

    def losses(self, errors: Sequence[ArrayF32], moments: ArrayF32) -> list[float]:
        """Sums of e' H e over the columns of errors [K, N]."""

    def ridge(self, moments: ArrayF32, cross: ArrayF32, share: float) -> ArrayF32:
        """(M + share mean(M) 1)^-1 cross; zero where nothing was seen."""

    def activations(self, x: ArrayF32, up_gate: ArrayF32, weight: ArrayF32) -> ArrayF32:
        """swiglu(x up_gate) [T, I], rows times weight [T]."""

    def outputs(self, x: ArrayF32, up_gate: ArrayF32, weight: ArrayF32, down: ArrayF32) -> ArrayF32:
        """`activations` times down."""


class HostProducts:
    """Products by numpy."""

    workers = 1

    def multiply(self, left: ArrayF32, right: ArrayF32) -> ArrayF32:
        """See `Products`, here and below."""
        return np.asarray(left @ right)

    def second_moment(self, x: ArrayF32, weight: ArrayF32 | None = None) -> ArrayF32:
        """`hessian.second_moment`."""
        return hessian.second_moment(x, weight)

    def cross_moment(self, x: ArrayF32, y: ArrayF32) -> ArrayF32:
        """x' y."""
        return np.asarray(x.T @ y)

    def blend(
        self, moment: ArrayF32, tokens: int, pooled: ArrayF32 | None = None, pooled_tokens: int = 0
    ) -> ArrayF32:
        """`hessian.blend`."""
        return hessian.blend(moment, tokens, pooled, pooled_tokens)

    def losses(self, errors: Sequence[ArrayF32], moments: ArrayF32) -> list[float]:
        """Sums of `hessian.loss`."""
        columns = (np.ascontiguousarray(error.T) for error in errors)
        return [float(hessian.loss(error, moments).sum()) for error in columns]

    def ridge(self, moments: ArrayF32, cross: ArrayF32, share: float) -> ArrayF32:
        """Least squares, regularised."""
        mean = float(np.trace(moments, dtype=np.float64)) / len(moments)
        if mean <= 0:
            return np.zeros_like(cross)
        damped = moments.astype(np.float64)
        damped[np.diag_indices(len(damped))] += share * mean
        solved: Any = np.linalg.solve(damped, cross.astype(np.float64))
        return np.asarray(solved, np.float32)

    def activations(self, x: ArrayF32, up_gate: ArrayF32, weight: ArrayF32) -> ArrayF32:
        """What enters down_proj."""
        return swiglu(x @ up_gate) * weight[:, None]

    def outputs(self, x: ArrayF32, up_gate: ArrayF32, weight: ArrayF32, down: ArrayF32) -> ArrayF32:
        """What an expert answers."""
        return np.asarray(self.activations(x, up_gate, weight) @ down)


HOST = HostProducts()


def swiglu(both: ArrayF32) -> ArrayF32:
    """silu(gate) * up of [T, 2 I], the gate first."""
    half = both.shape[1] // 2
    gate = both[:, :half]
    with np.errstate(over="ignore"):  # e^-x of a very negative gate: the quotient is then 0
        result: ArrayF32 = gate / (1 + np.exp(-gate)) * both[:, half:]
    return result
