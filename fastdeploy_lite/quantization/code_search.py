"""The search for bytes, four rows of every column after another: the native op and its oracle.

A run of blocks of four rows is searched in order. For block b of a column, with target t, scale s
and a symmetric positive metric D_b, the byte whose codeword c minimises (t - s c)' D_b (t - s c) is
taken, the lowest among equals; its error then moves the targets of later blocks of the run:

    error       e_b  = weight_b - s c
    later rows  t_r += (e_b - before_b)' feedback[b, r]

With `before` None and the feedback of `hessian.elimination_terms` this is error feedback in the
manner of GPTQ and LDLQ; with the errors that stand and the feedback of `hessian.descent_terms` it
is one pass of coordinate descent. The loss is the exact change of the squared error that the run
makes. Every column may try several scales for the run; the one with the least loss is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.formats import ccq

if TYPE_CHECKING:
    from fastdeploy_lite.formats.ccq import ArrayF32, ArrayI32, ArrayU8


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a run chose: error [N, 4B], packed [N, B], choice [N] among the scales, loss [N]."""

    error: ArrayF32
    packed: ArrayU8
    choice: ArrayI32
    loss: ArrayF32


def code_books(table: ArrayF32) -> ArrayF32:
    """Codewords of (code_scale, code_zp) pairs [C, 2]: float32 [C, 4, 256]."""
    values = ccq.code_values(ccq.codebook(table[:, 0].copy(), table[:, 1].copy()))
    return np.ascontiguousarray(values.transpose(1, 2, 0), np.float32)


def search(
    target: ArrayF32,
    weight: ArrayF32,
    metric: ArrayF32,
    books: ArrayF32,
    code: ArrayI32,
    scales: ArrayF32,
    *,
    feedback: ArrayF32 | None = None,
    before: ArrayF32 | None = None,
) -> SearchResult:
    """Search one run on all threads of the native ops.

    Args:
        target, weight: [N, 4B], rows may be strided.
        metric: [B, 4, 4], symmetric.
        books: [C, 4, 256] of `code_books`.
        code: [N], which book a column uses.
        scales: [N, trials].
        feedback: [4B, 4B], only what lies right of each block is used; None moves no target.
        before: [N, 4B], the errors that stand; None for the first pass.

    The bits of the result depend on no instruction set and no number of threads. Raises ValueError
    for shapes that do not fit and for a code outside the books.
    """
    columns, rows = weight.shape
    found = SearchResult(
        np.empty((columns, rows), np.float32),
        np.empty((columns, rows // ccq.WEIGHTS_PER_BYTE), np.uint8),
        np.empty(columns, np.int32),
        np.empty(columns, np.float32),
    )
    given = [target, weight, before, metric, feedback, books, code, scales]
    kept = [a if i < 2 or a is None else np.ascontiguousarray(a) for i, a in enumerate(given)]
    results = (found.error, found.packed, found.choice, found.loss)
    arguments: Any = [_view(array) for array in (*kept, *results)]
    _ops_cpu.code_search(*arguments)
    return found


def search_reference(
    target: ArrayF32,
    weight: ArrayF32,
    metric: ArrayF32,
    books: ArrayF32,
    code: ArrayI32,
    scales: ArrayF32,
    *,
    feedback: ArrayF32 | None = None,
    before: ArrayF32 | None = None,
) -> SearchResult:
    """Do what `search` does in float64 numpy; the statement that kernels are tested against."""
    trials = [
        _one_trial(target, weight, metric, books[code], scales[:, i], feedback, before)
        for i in range(scales.shape[1])
    ]
    choice = np.argmin([loss for _, _, loss in trials], axis=0)

    def pick(part: int) -> npt.NDArray[Any]:
        return np.stack([trials[trial][part][n] for n, trial in enumerate(choice)])

    return SearchResult(
        pick(0).astype(np.float32),
        pick(1).astype(np.uint8),
        choice.astype(np.int32),
        pick(2).astype(np.float32),
    )


def _one_trial(
    target: ArrayF32,
    weight: ArrayF32,
    metric: ArrayF32,
    points: ArrayF32,
    scale: ArrayF32,
    feedback: ArrayF32 | None,
    before: ArrayF32 | None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """Errors, bytes and loss of all columns at one scale each; points [N, 4, 256]."""
    moved = target.astype(np.float64)
    wide = weight.astype(np.float64)
    error = np.empty_like(moved)
    packed = np.empty((len(moved), len(metric)), np.intp)
    loss = np.zeros(len(moved))
    scaled = points.astype(np.float64) * scale[:, None, None]
    for block, square in enumerate(metric.astype(np.float64)):
        rows = slice(4 * block, 4 * block + 4)
        off = moved[:, rows, None] - scaled
        squared = np.einsum("nic,ij,njc->nc", off, square, off)
        packed[:, block] = best = squared.argmin(axis=1)
        loss += np.take_along_axis(squared, best[:, None], 1)[:, 0]
        chosen = np.take_along_axis(scaled, best[:, None, None], 2)[:, :, 0]
        error[:, rows] = change = wide[:, rows] - chosen
        if before is not None:
            old = moved[:, rows] - wide[:, rows] + before[:, rows]
            loss -= np.einsum("ni,ij,nj->n", old, square, old)
            change = change - before[:, rows]
        if feedback is not None:
            moved[:, rows.stop :] += change @ feedback[rows, rows.stop :]
    return error, packed, loss


def _view(array: npt.NDArray[Any] | None) -> tuple[int, str, list[int], list[int]] | None:
    """What a native op takes of a numpy array."""
    if array is None:
        return None
    strides = [step // array.itemsize for step in array.strides]
    return (
        array.ctypes.data,
        _NAMES.get(array.dtype) or array.dtype.name,
        list(array.shape),
        strides,
    )


_NAMES = {np.dtype(name): name for name in ("float32", "int32", "uint8")}
"""numpy makes a dtype's name anew each time, which took a tenth of a search of small matrices."""
