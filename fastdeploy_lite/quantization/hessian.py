"""Second moments of what enters a linear, and the terms that a search takes from them.

An error E = W - Q [K, N] of a linear costs the sum over tokens of |x' E|^2, that is tr(E' H E) with
H = sum of x x' over the tokens that reach it. A routed expert sees only its own tokens, each of
which counts as much as the router weighs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.formats.ccq import GROUP_ROWS, WEIGHTS_PER_BYTE

if TYPE_CHECKING:
    from fastdeploy_lite.formats.ccq import ArrayF32

BLOCKS_PER_GROUP = GROUP_ROWS // WEIGHTS_PER_BYTE
DAMPING = 0.01
"""Share of the mean diagonal that is added to it: on the demo, 0.002 and 0.05 lose 0.015 nats."""
PRIOR_TOKENS_PER_ROW = 0.25
"""Weight of the layer's pooled moments, in tokens for every input: an expert with K/4 tokens of its
own is told half by them, half by what all experts of the layer see."""


def second_moment(x: ArrayF32, weight: ArrayF32 | None = None) -> ArrayF32:
    """Sum of x x' over tokens [T, K], each counted weight^2 times: float32 [K, K], symmetric."""
    scaled = x if weight is None else x * weight[:, None]
    with np.errstate(over="ignore", invalid="ignore"):  # `blend` refuses what is not finite
        moment: ArrayF32 = scaled.T @ scaled
    return moment


def blend(
    moment: ArrayF32, tokens: int, pooled: ArrayF32 | None = None, pooled_tokens: int = 0
) -> ArrayF32:
    """Positive definite moments of one expert, whatever it has seen: float32 [K, K], mean 1.

    With few tokens the pooled moments of all experts of the layer come in (a weighted mean of the
    two, per token); with neither it is the identity, and the search is data-free. Raises ValueError
    for moments that are not finite.
    """
    size = len(moment)
    mixed = np.zeros((size, size))
    total = 0.0
    prior = PRIOR_TOKENS_PER_ROW * size
    for part, count, share in ((moment, tokens, tokens), (pooled, pooled_tokens, prior)):
        if part is not None and count > 0:
            mixed += part.astype(np.float64) * (share / count)
            total += share
    mean = float(np.trace(mixed)) / size
    if not np.isfinite(mean):
        raise ValueError("moments of the activations are not finite")
    if total == 0 or mean <= 0:
        return np.eye(size, dtype=np.float32)
    mixed /= mean
    mixed[np.diag_indices(size)] += DAMPING
    return mixed.astype(np.float32)


def elimination_terms(hessian: ArrayF32) -> tuple[ArrayF32, ArrayF32]:
    """Metric [K/4, 4, 4] and feedback [K, K] of a search from the first row to the last.

    H = U D U' with U unit block upper triangular and D block diagonal (blocks of four rows), so
    tr(E' H E) is the sum over blocks b of |e_b + sum over a < b of U_ab' e_a|^2 in the metric D_b:
    each block sees errors of blocks before it alone. Raises ValueError unless H is positive
    definite.
    """
    size = len(hessian)
    try:
        lower = np.linalg.cholesky(hessian[::-1, ::-1].astype(np.float64))
    except np.linalg.LinAlgError:
        raise ValueError("moments of the activations are not positive definite") from None
    upper = lower[::-1, ::-1]
    diagonal = _diagonal_blocks(upper)
    metric = diagonal @ diagonal.transpose(0, 2, 1)
    return metric.astype(np.float32), _unit_blocks(upper, np.linalg.inv(diagonal), size)


@dataclass(frozen=True, slots=True)
class DescentTerms:
    """What coordinate descent over blocks of four rows needs of H, a group of 64 rows at a time.

    The best value of a block, all others given, is its weight plus what the errors of the others
    add through the feedback H_ab inv(H_bb). Errors e of the whole column come in by e H.
    """

    metric: ArrayF32
    """[K/4, 4, 4], the diagonal blocks."""
    inverse: ArrayF32
    """[K/4, 4, 4], their inverses."""
    feedback: ArrayF32
    """[K/64, 64, 64], inside the groups, the diagonal blocks zero."""

    def drift(self, group: int, product: ArrayF32, error: ArrayF32) -> ArrayF32:
        """What the errors of all other blocks add to the targets of a group, [N, 64].

        product: [N, K], errors of whole columns times H. error: [N, 64], those of the group.
        """
        rows = slice(group * GROUP_ROWS, (group + 1) * GROUP_ROWS)
        blocks = slice(rows.start // WEIGHTS_PER_BYTE, rows.stop // WEIGHTS_PER_BYTE)
        part = product[:, rows].reshape(len(error), -1, 1, WEIGHTS_PER_BYTE)
        found: ArrayF32 = np.matmul(part, self.inverse[blocks]).reshape(error.shape)
        return found - error  # a block's own error comes back as it is


def descent_terms(hessian: ArrayF32) -> DescentTerms:
    """Terms of coordinate descent under a positive definite H [K, K], K a multiple of 64."""
    wide = hessian.astype(np.float64)
    metric = _diagonal_blocks(wide)
    inverse = np.linalg.inv(metric)
    count = BLOCKS_PER_GROUP
    feedback = [
        _unit_blocks(wide[rows, rows], inverse[at : at + count], GROUP_ROWS)
        for at, rows in (
            (start // WEIGHTS_PER_BYTE, slice(start, start + GROUP_ROWS))
            for start in range(0, len(hessian), GROUP_ROWS)
        )
    ]
    return DescentTerms(metric.astype(np.float32), inverse.astype(np.float32), np.stack(feedback))


def loss(error: ArrayF32, hessian: ArrayF32) -> npt.NDArray[np.float64]:
    """e' H e of every column of an error [N, K]: float64 [N]."""
    total: npt.NDArray[np.float64] = np.einsum("nk,nk->n", error @ hessian, error, dtype=np.float64)
    return total


def _diagonal_blocks(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    count = len(matrix) // WEIGHTS_PER_BYTE
    blocks = matrix.reshape(count, WEIGHTS_PER_BYTE, count, WEIGHTS_PER_BYTE)
    at = np.arange(count)
    diagonal: npt.NDArray[np.float64] = blocks[at, :, at].copy()
    return diagonal


def _unit_blocks(
    matrix: npt.NDArray[np.float64], inverse: npt.NDArray[np.floating], size: int
) -> ArrayF32:
    """Columns of each block times the block's inverse, the diagonal blocks left zero."""
    count = size // WEIGHTS_PER_BYTE
    columns = matrix.reshape(size, count, WEIGHTS_PER_BYTE).transpose(1, 0, 2)
    product = np.matmul(columns, inverse).transpose(1, 0, 2)
    result: ArrayF32 = product.astype(np.float32).reshape(size, size)
    result.reshape(count, WEIGHTS_PER_BYTE, count, WEIGHTS_PER_BYTE)[
        np.arange(count), :, np.arange(count)
    ] = 0
    return result
