"""Experts in main memory computed layer after layer, without the card between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.model_executor import ops

ROUNDS = 5


@dataclass(frozen=True)
class HostLayer:
    """One layer's experts, and who asks for them.

    Attributes:
        up_gate, down: as for ops.fused_moe, in main memory.
        ids: int32 [T, k].
    """

    up_gate: ops.PackedWeight
    down: ops.PackedWeight
    ids: npt.NDArray[np.int32]


def passes(layers: Sequence[HostLayer], threads: int, workspace: Any) -> list[float]:
    """Return the seconds of some passes over all layers, from bfloat16 to bfloat16.

    Args:
        layers: at least one, all of the same T and H.
        threads: of the CPU, for these passes alone.
        workspace: scratch memory of the CPU.
    """
    calls = _bound(layers, workspace)
    before = _ops_cpu.num_threads()
    _ops_cpu.set_num_threads(threads)
    try:
        return [_seconds(calls) for _ in range(1 + ROUNDS)][1:]  # the first one warms up
    finally:
        _ops_cpu.set_num_threads(before)


def _bound(layers: Sequence[HostLayer], workspace: Any) -> list[Callable[[], None]]:
    tokens, top_k = layers[0].ids.shape
    x = np.random.default_rng(0).standard_normal((tokens, layers[0].up_gate.in_features))
    bits = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    shares = np.full((tokens, top_k), 1 / top_k, np.float32)
    out = np.empty_like(bits)
    return [
        ops.BoundExperts(bits, each.ids, shares, each.up_gate, each.down, out, workspace)
        for each in layers
    ]


def _seconds(calls: Sequence[Callable[[], None]]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started


def thread_counts(threads: int) -> list[int]:
    """Return that number, its half, its quarter and 1, without repetition."""
    return sorted({threads, max(1, threads // 2), max(1, threads // 4), 1}, reverse=True)
