"""int8 and int4 weights that know the activations: clipped scales and error feedback (GPTQ).

The files are those of `weight_only`: q in -qmax..qmax and one bfloat16 scale a column; only which
numbers stand in them differs. A column is quantised from its first row to its last; the error of a
row moves the targets of later rows as the moments H of the inputs say, so that the least of
(w - s q)' H (w - s q) is approached. The scale comes from a search over clipped ranges, then from
least squares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.quantization import hessian as moments
from fastdeploy_lite.quantization.ccq_search import round_to_bfloat16
from fastdeploy_lite.quantization.weight_only import IntWeight, check_finite, check_matrix

if TYPE_CHECKING:
    from fastdeploy_lite.formats.ccq import ArrayF32

RANGES = tuple(np.arange(1.0, 0.44, -0.05))
"""Shares of the largest magnitude that the range may end at. Gaussian int4: 0.7 is best."""
ROUNDS = 2
"""Eliminations, the scale solved by least squares after each but the last."""
ROWS_AT_ONCE = 64
COLUMNS_AT_ONCE = 1024
"""Columns do not depend on each other: bounds what is held beside the moments."""


def quantize(weight: npt.NDArray[np.floating], hessian: ArrayF32, largest: int) -> IntWeight:
    """Quantise a finite matrix [K, N] to -largest..largest for inputs of moments `hessian`.

    Args:
        weight: [K, N].
        hessian: float32 [K, K], symmetric and positive definite (see `hessian.blend`).
        largest: 127 or 7.

    Deterministic. Raises ValueError for moments that do not fit or are not positive definite and
    for values that are not finite, TypeError for a wrong dtype.
    """
    matrix = np.asarray(weight)
    check_matrix(matrix)
    check_finite(matrix)
    rows, count = matrix.shape
    if hessian.shape != (rows, rows):
        raise ValueError(f"hessian: found shape {list(hessian.shape)}, expected {[rows, rows]}")
    diagonal, feedback = scalar_terms(hessian)
    found = IntWeight(np.empty((rows, count), np.int8), np.empty(count, np.float32))
    for start in range(0, count, COLUMNS_AT_ONCE):
        part = slice(start, start + COLUMNS_AT_ONCE)
        columns = np.ascontiguousarray(matrix[:, part].T, np.float32)
        scale = _clipped_scale(columns, diagonal, largest)
        for round_ in range(ROUNDS):
            values = _eliminate(columns, scale, feedback, largest)
            if round_ + 1 < ROUNDS:
                scale = _solved_scale(columns, values, hessian, scale)
        found.quantized[:, part], found.scale[part] = values.T, scale
    return found


def scalar_terms(hessian: ArrayF32) -> tuple[ArrayF32, ArrayF32]:
    """What `hessian.elimination_terms` says for blocks of one row: metric [K], feedback [K, K]."""
    try:
        lower = np.linalg.cholesky(hessian[::-1, ::-1].astype(np.float64))
    except np.linalg.LinAlgError:
        raise ValueError("moments of the activations are not positive definite") from None
    upper = lower[::-1, ::-1]
    diagonal = np.diagonal(upper).copy()
    upper /= diagonal  # in place: of a wide linear it is gigabytes
    np.fill_diagonal(upper, 0)
    return np.square(diagonal).astype(np.float32), np.ascontiguousarray(upper, np.float32)


def _clipped_scale(columns: ArrayF32, metric: ArrayF32, largest: int) -> ArrayF32:
    """Scale [N] whose range, clipped or not, errs least without feedback."""
    peak = np.abs(columns).max(axis=1)
    least = np.full(len(columns), np.inf)
    scale = np.zeros(len(columns), np.float32)
    for share in RANGES:
        trial = round_to_bfloat16(peak * np.float32(share) / largest)
        error = columns - _rounded(columns, trial, largest) * trial[:, None]
        cost = np.square(error, dtype=np.float64) @ metric
        better = cost < least
        least, scale = np.where(better, cost, least), np.where(better, trial, scale)
    return scale.astype(np.float32)


def _rounded(values: ArrayF32, scale: ArrayF32, largest: int) -> ArrayF32:
    safe = np.where(scale > 0, scale, np.float32(np.inf))
    result: ArrayF32 = np.rint(values / safe[:, None]).clip(-largest, largest)
    return result


def _eliminate(columns: ArrayF32, scale: ArrayF32, feedback: ArrayF32, largest: int) -> ArrayF32:
    """Integers [N, K] as float32, errors fed forward."""
    target = columns.copy()
    rows = columns.shape[1]
    values = np.empty_like(columns)
    error = np.empty_like(columns)
    for start in range(0, rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, rows)
        for row in range(start, stop):
            values[:, row] = _rounded(target[:, row : row + 1], scale, largest)[:, 0]
            error[:, row] = columns[:, row] - values[:, row] * scale
            target[:, row + 1 : stop] += np.outer(error[:, row], feedback[row, row + 1 : stop])
        target[:, stop:] += error[:, start:stop] @ feedback[start:stop, stop:]
    return values


def _solved_scale(
    columns: ArrayF32, values: ArrayF32, hessian: ArrayF32, scale: ArrayF32
) -> ArrayF32:
    product = values @ hessian
    cross = np.einsum("nk,nk->n", product, columns, dtype=np.float64)
    square = moments.loss(values, hessian)
    ratio = np.divide(cross, square, out=np.zeros_like(cross), where=square > 0)
    return np.where(ratio > 0, round_to_bfloat16(ratio), scale).astype(np.float32)
