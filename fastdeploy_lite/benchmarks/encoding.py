"""The 2-bit encoders timed on matrices of random weights, and how far off they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.formats.ccq import CCQWeight
from fastdeploy_lite.quantization import ccq_hessian, ccq_search, hessian
from fastdeploy_lite.quantization.card import Card

ArrayF32: TypeAlias = npt.NDArray[np.float32]
METHODS = ("data-free", "hessian")
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, int]], ArrayF32]] = {
    "gaussian": lambda random, shape: random.standard_normal(shape, np.float32),
    "student-t": lambda random, shape: random.standard_t(5, shape).astype(np.float32),
}
"""student-t: of 5 degrees of freedom, tails as of trained weights."""


@dataclass(frozen=True)
class Experts:
    """Routed experts of a model: shapes [K, N] of up_gate and down, and how many there are."""

    shapes: tuple[tuple[int, int], ...]
    count: int

    def seconds(self, rows: Sequence[Row]) -> float:
        """Time for all of them when each shape takes what its row says."""
        millions = (self.count * k * n / 1e6 for k, n in self.shapes)
        return sum(m * row.ms for m, row in zip(millions, rows, strict=True)) / 1e3


MODELS = {
    "21b": Experts(((2560, 3072), (1536, 2560)), 27 * 64),
    "300b": Experts(((8192, 7168), (3584, 8192)), 51 * 64),
}


@dataclass(frozen=True)
class Row:
    """One encoder on one matrix; times are milliseconds for a million weights.

    Attributes:
        shape: [K, N] of the matrix.
        method: of METHODS.
        ms, low_ms, high_ms: the median, the fastest and the slowest round.
        cpu_ms: processor time of the fastest round, all threads.
        error: squared error over squared weights, scales included.
        product_error: the same of the products with inputs of the moments that were given.
    """

    shape: tuple[int, int]
    method: str
    ms: float
    low_ms: float
    high_ms: float
    cpu_ms: float
    error: float
    product_error: float


def measure(
    method: str,
    rows: int,
    columns: int,
    distribution: str,
    rounds: int,
    seed: int = 0,
    card: Card | None = None,
) -> Row:
    """Encode a matrix [rows, columns] `rounds` times.

    With a card, copies to it and back are part of the time. For `hessian`, the factorisation of the
    moments is. They are those of 2 tokens an input, sizes of inputs log-normal with deviation 0.5.
    """
    random = np.random.default_rng(seed)
    weight = DISTRIBUTIONS[distribution](random, (rows, columns))
    moments = _moments(random, rows, card)

    def encode() -> CCQWeight:
        if card is not None:
            found = (
                card.encode(weight)
                if method == "data-free"
                else card.encode_hessian(weight, moments)
            )
            return found.weight
        if method == "data-free":
            return ccq_search.encode(weight, workers=_ops_cpu.num_threads())
        return ccq_hessian.encode(weight, moments)

    if card is not None:
        encode()  # the first call allocates
    times = [_timed(encode) for _ in range(rounds)]
    scale = 1e3 / (weight.size / 1e6)
    wall = [scale * seconds for _, seconds, _ in times]
    encoded = times[0][0]
    error = np.ascontiguousarray((encoded.decode() - weight).T)
    before = hessian.loss(np.ascontiguousarray(weight.T), moments).sum()
    return Row(
        (rows, columns),
        method,
        statistics.median(wall),
        min(wall),
        max(wall),
        scale * min(cpu for _, _, cpu in times),
        ccq_search.relative_error(weight, encoded),
        float(hessian.loss(error, moments).sum() / before),
    )


def _moments(random: np.random.Generator, rows: int, card: Card | None) -> ArrayF32:
    sizes = np.exp(0.5 * random.standard_normal(rows)).astype(np.float32)
    x = random.standard_normal((2 * rows, rows), np.float32) * sizes
    moments = hessian.second_moment(x) if card is None else card.second_moment(x)
    return hessian.blend(moments, len(x))


def _timed(encode: Callable[[], CCQWeight]) -> tuple[CCQWeight, float, float]:
    """What was encoded, seconds by the clock and of all processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = encode()
    return found, time.perf_counter() - wall, time.process_time() - cpu
