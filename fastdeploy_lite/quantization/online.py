"""int8 and int4 weights made of bf16 ones while a checkpoint is loaded.

The numbers are those of `weight_only` and the bytes those of the files that `convert` writes, so
that a model quantised at every start equals one that was converted once. A matrix is worked on in
blocks of columns, which lie one after another in the file layout: each thread converts, quantises
and packs its own, and no float32 copy of the whole ever exists.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastdeploy_lite.formats.int8 import Int8
from fastdeploy_lite.formats.tiles import pack_int4, pack_int8, packed_shape
from fastdeploy_lite.quantization.weight_only import (
    COLUMNS_AT_ONCE,
    IntWeight,
    quantize_int4,
    quantize_int8,
)
from fastdeploy_lite.quantization_config import WeightKind
from fastdeploy_lite.utils.arrays import Array, bfloat16_to_float32

_FORMATS: dict[WeightKind, tuple[Callable[[Array], IntWeight], Callable[[Array], Array]]] = {
    "int8": (quantize_int8, pack_int8),
    "int4": (quantize_int4, pack_int4),
}
MOST_THREADS = 16
"""At 3 ns a weight and thread they take a minute for 300B; more would only hold more memory."""
SMALLEST_SHARED = 1 << 20
"""Weights of a matrix that is worth sharing: below, threads wait for each other's interpreter
(256 x 384: 0.4 ms alone, 1.0 ms on two; 1536 x 2560: 12.5 and 7.7 ms)."""


class OnlineQuantizer:
    """Quantises matrices one after another, large ones on several threads; a context manager."""

    def __init__(self, workers: int | None = None) -> None:
        """Args: workers: threads, default the usable CPUs up to 16; results do not depend on it."""
        self._threads = workers or min(MOST_THREADS, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(self._threads, "quantizer")

    def __enter__(self) -> OnlineQuantizer:
        """Nothing is started before it is needed."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self.close()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def quantize(self, kind: WeightKind, weight: Array) -> dict[str, Array]:
        """Quantise one dense matrix.

        Args:
            kind: what it becomes: int8 or int4.
            weight: uint16 (bf16 bits) or float32 [K, N], K a multiple of 64, N of 16.

        Returns:
            What `fill_weight` takes: `quant_weight` int8 in the file layout, `weight_scale` float32
            [N]. Beyond these and the input, less than K * N * 4 bytes of memory are used, as long
            as N is at least 64 a thread.

        Raises:
            ValueError: an element is not finite (its column is counted within its block), or the
                layout does not allow the size.
        """
        rows, columns = weight.shape
        packed = np.empty(packed_shape(kind, rows, columns), np.int8)
        scale = np.empty(columns, np.float32)
        threads = self._threads if weight.size >= SMALLEST_SHARED else 1
        step = _columns_at_once(columns, threads)
        per_row = columns // len(packed)  # columns that share a row of the nominal shape

        def work(start: int) -> None:
            stop = min(start + step, columns)
            block, scale[start:stop] = _quantize_and_pack(kind, weight[:, start:stop])
            packed[start // per_row : stop // per_row] = block

        run = self._pool.map if threads > 1 else map
        for _ in run(work, range(0, columns, step)):
            pass
        return {"quant_weight": packed, "weight_scale": scale}


def _columns_at_once(columns: int, threads: int) -> int:
    """Columns of a block: as the arithmetic likes them, fewer where threads would hold all."""
    unit = Int8.column_unit
    return max(unit, min(COLUMNS_AT_ONCE, columns // (4 * threads) // unit * unit))


def _quantize_and_pack(kind: WeightKind, block: Array) -> tuple[Array, Array]:
    quantize, pack = _FORMATS[kind]
    found = quantize(bfloat16_to_float32(block) if block.dtype == np.uint16 else block)
    return pack(found.quantized), found.scale
