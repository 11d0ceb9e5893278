"""The CCQ encoder: the five arrays of a checkpoint that decode nearest to a given matrix.

For one column and one code (code_scale, code_zp) the 256 bytes are 256 fixed points c of R^4, and
a group of 64 rows adds one scale s = local_scale * super_scale. The best byte for four weights x
is the argmin of |x - s c|^2, which the native op of `code_search` finds. Around this primitive:

1. a scale per group from the group's root mean square, its factor by trial per column;
2. local and super scales that represent those scales best;
3. the best code of a table for each column, by the realised error;
4. alternate: local scales by trial of the neighbours, super scale by least squares.

Everything runs in blocks of columns, shared among threads.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.formats import ccq
from fastdeploy_lite.quantization.ccq_codes import CODES
from fastdeploy_lite.quantization.code_search import code_books, search
from fastdeploy_lite.quantization.weight_only import check_finite, check_matrix
from fastdeploy_lite.utils.arrays import bfloat16_to_float32, float32_to_bfloat16

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastdeploy_lite.formats.ccq import ArrayF32, ArrayU8, CCQWeight

    ArrayF64: TypeAlias = npt.NDArray[np.float64]

VECTORS_PER_BLOCK = 16384
"""Groups of four weights that are searched at once: half a millisecond of work."""
VECTORS_PER_GROUP = ccq.GROUP_ROWS // ccq.WEIGHTS_PER_BYTE
SCALE_FACTORS = (0.048, 0.0555, 0.062, 0.069, 0.078)
"""Trial values of scale / root mean square: 0.062 is best for Gaussian, 0.070 for Laplace groups
with the codes of the table; the others serve foreign codes and other distributions."""
REFINEMENTS = 2
"""Rounds of step 4. Error on Gaussian [384, 256] after 0, 1, 2, 3 rounds: 0.0980, 0.0961, 0.0959,
0.0959; on heavy tails (Student t, 3 degrees) the third still gains 0.6 %."""
_METRIC = np.tile(np.eye(ccq.WEIGHTS_PER_BYTE, dtype=np.float32), (VECTORS_PER_GROUP, 1, 1))
MAX_MAGNITUDE = 2.0**126
"""Largest accepted |weight|: a codeword may overshoot by less than 2 and must stay finite."""
MIN_SUPER_SCALE = 2.0**-126
"""Smallest non-zero super scale: kernels may flush subnormal numbers to zero."""


@dataclass(slots=True)
class _Block:
    """Some columns, scaled by a power of two to a magnitude near 1, column-major.

    vectors float32 [n, R, 4]; energy float64 [n, G] = sum of squares per group of 64 rows.
    """

    vectors: ArrayF32
    energy: ArrayF64


@dataclass(slots=True)
class _Fit:
    """State of the search for one block: scales and, once chosen, codes (index into a table)."""

    local_scale: npt.NDArray[np.int64]  # [n, G], 0..15
    super_scale: ArrayF32  # [n], bfloat16 values
    code: npt.NDArray[np.int64]  # [n]


def encode(
    weight: npt.NDArray[Any],
    *,
    codes: Sequence[tuple[float, float]] | None = None,
    workers: int | None = None,
) -> CCQWeight:
    """Encode a real matrix ``[K, N]`` with small squared error; K must be a multiple of 128.

    codes: the (code_scale, code_zp) pairs among which every column chooses; a single pair fixes
    the code. None takes the first entries of the measured table: 64 for K <= 512, 32 for
    K <= 2048, else 16, since a choice among n codes gains with the noise of a short column.
    workers: threads, by default the CPUs this process may use; the result does not depend on it.

    All-zero columns and groups decode to exact zeros. Raises ValueError for a wrong shape, a
    NaN or infinity (naming its row and column) and magnitudes above 2**126, TypeError for
    something that is not a real floating-point matrix.
    """
    matrix = checked_matrix(weight)
    rows, columns = matrix.shape
    table = np.asarray(default_codes(rows) if codes is None else codes, dtype=np.float32)
    if table.ndim != 2 or table.shape[1] != 2 or len(table) == 0:
        raise ValueError(f"codes: found shape {list(table.shape)}, expected [number of codes, 2]")
    books = code_books(table)
    result = ccq.CCQWeight(
        packed=np.zeros((rows // ccq.WEIGHTS_PER_BYTE, columns), np.uint8),
        local_scale=np.zeros((rows // ccq.ROWS_PER_SCALE_BYTE, columns), np.uint8),
        super_scale=np.zeros(columns, np.float32),
        code_scale=np.full(columns, table[0, 0], np.float32),
        code_zp=np.full(columns, table[0, 1], np.float32),
    )
    step = max(1, VECTORS_PER_BLOCK * ccq.WEIGHTS_PER_BYTE // rows)
    slices = [slice(at, min(at + step, columns)) for at in range(0, columns, step)]
    threads = workers or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        for _ in pool.map(lambda part: _encode_block(matrix, part, table, books, result), slices):
            pass
    return result


def relative_error(weight: npt.NDArray[Any], encoded: CCQWeight) -> float:
    """Sum of squared differences over sum of squares, both in float64; 0 for a zero matrix."""
    reference = np.asarray(weight, dtype=np.float64)
    total = float((reference**2).sum())
    return float(((encoded.decode() - reference) ** 2).sum()) / total if total else 0.0


def round_to_bfloat16(values: npt.NDArray[Any]) -> ArrayF32:
    """Nearest bfloat16, ties to even, kept as float32."""
    return bfloat16_to_float32(float32_to_bfloat16(values))


def default_codes(rows: int) -> Sequence[tuple[float, float]]:
    return CODES[: 64 if rows <= 512 else 32 if rows <= 2048 else 16]


def checked_matrix(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    matrix = np.asarray(weight)
    check_matrix(matrix)
    if matrix.shape[0] % ccq.ROWS_PER_SCALE_BYTE:
        raise ValueError(
            f"weight: found K = {matrix.shape[0]} rows, expected a multiple of "
            f"{ccq.ROWS_PER_SCALE_BYTE} (two groups of {ccq.GROUP_ROWS} share a scale byte)"
        )
    check_finite(matrix, MAX_MAGNITUDE)
    return matrix


def _encode_block(
    matrix: npt.NDArray[Any],
    part: slice,
    table: ArrayF32,
    books: ArrayF32,
    result: CCQWeight,
) -> None:
    """Encode columns ``part`` of ``matrix`` into ``result``."""
    columns = np.ascontiguousarray(matrix[:, part].T, np.float64)
    peak = np.abs(columns).max(axis=1)
    # Scaling by a power of two is exact and keeps squares inside float32 for any input.
    exponent = np.where(peak > 0, np.frexp(peak)[1], 0)
    scaled = np.ldexp(columns, -exponent[:, None])
    block = _Block(
        vectors=scaled.astype(np.float32).reshape(len(scaled), -1, ccq.WEIGHTS_PER_BYTE),
        energy=np.square(scaled).reshape(len(scaled), -1, ccq.GROUP_ROWS).sum(axis=2),
    )
    floor = np.ldexp(MIN_SUPER_SCALE, -exponent)

    scale = _initial_scale(block, books)
    fit = _quantise_scale(block, scale, floor)
    _choose_code(block, fit, books)
    for _ in range(REFINEMENTS):
        chosen = _choose_local_scale(block, fit, books)
        _fit_super_scale(block, fit, chosen, floor, books)
    packed = _nearest(block, _group_scale(fit), books, fit.code)[0]

    result.packed[:, part] = packed.T
    result.local_scale[:, part] = ccq.pack_local_scale(fit.local_scale.T)
    # A column may have ended with all local scales zero: its super scale is then irrelevant.
    used = fit.local_scale.any(axis=1)
    result.super_scale[part] = np.where(used, np.ldexp(fit.super_scale, exponent), 0)
    result.code_scale[part] = table[fit.code, 0]
    result.code_zp[part] = table[fit.code, 1]


def _nearest(
    block: _Block, scale: npt.NDArray[Any], books: ArrayF32, code: npt.NDArray[np.int64]
) -> tuple[ArrayU8, ArrayF64]:
    """Best byte of each vector, uint8 [n, R], and the squared error of each group, [n, G].

    scale [n, G]; code [n] counts in books [codes, 4, 256]. A group is a column of the search.
    """
    count, groups = block.energy.shape
    rows = block.vectors.reshape(count * groups, ccq.GROUP_ROWS)
    used, own = np.unique(code, return_inverse=True)
    codes = np.repeat(own.astype(np.int32), groups)
    scales = scale.reshape(-1, 1).astype(np.float32)
    found = search(rows, rows, _METRIC, books[used], codes, scales)
    error = found.loss.reshape(count, groups).astype(np.float64)
    return found.packed.reshape(count, -1), error


def _initial_scale(block: _Block, books: ArrayF32) -> ArrayF64:
    """Unrounded scale per group [n, G]: root mean square times each column's best trial factor."""
    rms = np.sqrt(block.energy / ccq.GROUP_ROWS)
    first = np.zeros(len(rms), np.int64)
    errors = []
    for factor in SCALE_FACTORS:
        errors.append(_nearest(block, rms * factor, books, first)[1].sum(axis=1))
    best: ArrayF64 = rms * np.take(SCALE_FACTORS, np.argmin(errors, axis=0))[:, None]
    return best


def _quantise_scale(
    block: _Block,
    scale: ArrayF64,
    floor: ArrayF64,
) -> _Fit:
    """Super scale and local scales nearest to ``scale`` [n, G], errors weighted by energy.

    Tries super scales that put the largest group at 8, 8.25 ... 15: with few groups a smaller
    maximum may happen to fit the ratios better.
    """
    peak = scale.max(axis=1)
    best_error: ArrayF64 = np.full(len(scale), np.inf)
    best_super: ArrayF32 = np.ones(len(scale), np.float32)
    best_local = np.zeros(scale.shape, np.int64)
    safe = np.where(scale > 0, scale, 1)
    for top in np.arange(15, 7.75, -0.25):
        super_scale = _valid_super_scale(peak / top, floor)
        local = np.rint(scale / super_scale[:, None]).clip(0, ccq.MAX_LOCAL_SCALE)
        deviation = (local * super_scale[:, None] / safe - 1) ** 2
        error = (block.energy * deviation).sum(axis=1)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_super = np.where(better, super_scale, best_super)
        best_local = np.where(better[:, None], local, best_local).astype(np.int64)
    return _Fit(best_local, best_super, np.zeros(len(scale), np.int64))


def _valid_super_scale(values: npt.NDArray[Any], floor: ArrayF64) -> ArrayF32:
    """bfloat16 values of at least ``floor`` (which is a power of two): never 0 nor subnormal."""
    return round_to_bfloat16(np.maximum(values, floor))


def _group_scale(fit: _Fit, delta: int = 0) -> ArrayF32:
    """Scale of every group, float32 [n, G], with ``delta`` added to the local scales."""
    local = (fit.local_scale + delta).clip(0, ccq.MAX_LOCAL_SCALE).astype(np.float32)
    scale: ArrayF32 = local * fit.super_scale[:, None]
    return scale


def _choose_code(block: _Block, fit: _Fit, books: ArrayF32) -> None:
    """Give each column the code of the table with the least error at the present scales."""
    if len(books) > 1:
        scale = _group_scale(fit)
        errors = [
            _nearest(block, scale, books, np.full_like(fit.code, code))[1].sum(axis=1)
            for code in range(len(books))
        ]
        fit.code = np.argmin(errors, axis=0)


def _choose_local_scale(block: _Block, fit: _Fit, books: ArrayF32) -> ArrayU8:
    """Move each local scale by -1, 0 or +1, whichever errs least; the bytes then, [n, R]."""
    trials = []
    for delta in (0, -1, 1):
        packed, error = _nearest(block, _group_scale(fit, delta), books, fit.code)
        trials.append((error, packed))
    pick = np.argmin([error for error, _ in trials], axis=0)
    delta_of = np.array([0, -1, 1])
    fit.local_scale = (fit.local_scale + delta_of[pick]).clip(0, ccq.MAX_LOCAL_SCALE)
    per_vector = np.repeat(pick, VECTORS_PER_GROUP, axis=1)
    return np.choose(per_vector, [packed for _, packed in trials])


def _fit_super_scale(
    block: _Block, fit: _Fit, packed: ArrayU8, floor: ArrayF64, books: ArrayF32
) -> None:
    """Least-squares super scale for the bytes ``packed`` [n, R] and the local scales."""
    points = books[fit.code[:, None], :, packed]  # [n, R, 4]
    local = np.repeat(fit.local_scale, VECTORS_PER_GROUP, axis=1).astype(np.float64)
    # In an order that is no library's: a card adds up the same numbers.
    product = points * block.vectors
    inner = (product[..., 0] + product[..., 1]) + (product[..., 2] + product[..., 3])
    cross = (inner * local).sum(axis=1)
    square = (np.square(points, dtype=np.float64).sum(axis=2) * local**2).sum(axis=1)
    ratio = np.divide(cross, square, out=np.zeros_like(cross), where=square > 0)
    fit.super_scale = np.where(ratio > 0, _valid_super_scale(ratio, floor), fit.super_scale).astype(
        np.float32
    )
