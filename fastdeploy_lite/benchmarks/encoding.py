"""The 2-bit encoders timed on matrices of random weights, and how far off they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.formats.ccq import CCQWeight
from fastdeploy_lite.quantization import ccq_hessian, ccq_search, hessian

ArrayF32: TypeAlias = npt.NDArray[np.float32]
METHODS = ("data-free", "hessian")
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, int]], ArrayF32]] = {
    "gaussian": lambda random, shape: random.standard_normal(shape, np.float32),
    "student-t": lambda random, shape: random.standard_t(5, shape).astype(np.float32),
}
"""student-t: of 5 degrees of freedom, tails as of trained weights."""


@dataclass(frozen=True)
class Row:
    """One encoder on one matrix; times are milliseconds for a million weights.

    Attributes:
        method: of METHODS.
        ms, low_ms, high_ms: the median, the fastest and the slowest round.
        cpu_ms: processor time of the fastest round, all threads.
        error: squared error over squared weights, scales included.
        product_error: the same of the products with inputs of the moments that were given.
    """

    method: str
    ms: float
    low_ms: float
    high_ms: float
    cpu_ms: float
    error: float
    product_error: float


def measure(
    method: str, rows: int, columns: int, distribution: str, rounds: int, seed: int = 0
) -> Row:
    """Encode a matrix [rows, columns] `rounds` times.

    For `hessian`, the factorisation of the moments is part of the time. They are those of 2 tokens
    an input, sizes of inputs log-normal with deviation 0.5.
    """
    random = np.random.default_rng(seed)
    weight = DISTRIBUTIONS[distribution](random, (rows, columns))
    moments = _moments(random, rows)

    def encode() -> CCQWeight:
        if method == "data-free":
            return ccq_search.encode(weight, workers=_ops_cpu.num_threads())
        return ccq_hessian.encode(weight, moments)

    times = [_timed(encode) for _ in range(rounds)]
    scale = 1e3 / (weight.size / 1e6)
    wall = [scale * seconds for _, seconds, _ in times]
    encoded = times[0][0]
    error = np.ascontiguousarray((encoded.decode() - weight).T)
    before = hessian.loss(np.ascontiguousarray(weight.T), moments).sum()
    return Row(
        method,
        statistics.median(wall),
        min(wall),
        max(wall),
        scale * min(cpu for _, _, cpu in times),
        ccq_search.relative_error(weight, encoded),
        float(hessian.loss(error, moments).sum() / before),
    )


def _moments(random: np.random.Generator, rows: int) -> ArrayF32:
    sizes = np.exp(0.5 * random.standard_normal(rows)).astype(np.float32)
    x = random.standard_normal((2 * rows, rows), np.float32) * sizes
    return hessian.blend(hessian.second_moment(x), len(x))


def _timed(encode: Callable[[], CCQWeight]) -> tuple[CCQWeight, float, float]:
    """What was encoded, seconds by the clock and of all processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = encode()
    return found, time.perf_counter() - wall, time.process_time() - cpu
