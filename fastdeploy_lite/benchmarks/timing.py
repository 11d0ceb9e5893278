"""Seconds of queued work: on a card as one graph, so that launching costs nothing that counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

ROUNDS = 7


def random_bf16(count: int, seed: int = 0) -> npt.NDArray[np.uint16]:
    """Bits of `count` normal numbers, cut to bfloat16.

    Numbers of no pattern: a card that multiplies constants draws less power and runs faster.
    """
    values = np.random.default_rng(seed).standard_normal(count, np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def graph_seconds(
    work: Callable[[], Any], rounds: int = ROUNDS, ready: Callable[[], Any] = lambda: None
) -> list[float]:
    """Seconds of `work` on the current card.

    Args:
        work: queues ops; run once before it is recorded, so that buffers exist.
        rounds: launches timed, each on an idle card.
        ready: called before each, where several cards start together.

    Returns:
        One time a round.
    """
    from fastdeploy_lite import _ops_cuda  # noqa: PLC0415
    from fastdeploy_lite.model_executor.ops import cuda_runtime  # noqa: PLC0415

    work()
    capture, stream = int(_ops_cuda.create_stream()), cuda_runtime.stream()
    _ops_cuda.synchronize(stream)
    _ops_cuda.begin_capture(capture)
    with cuda_runtime.use_stream(capture):
        work()
    graph = int(_ops_cuda.end_capture(capture, False))
    times = []
    for _ in range(rounds + 1):
        _ops_cuda.synchronize(stream)
        ready()
        started = time.perf_counter()
        _ops_cuda.launch_graph(graph, stream)
        _ops_cuda.synchronize(stream)
        times.append(time.perf_counter() - started)
    _ops_cuda.destroy_graph(graph)
    return times[1:]


def call_seconds(work: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Seconds of `work` on the CPU.

    Args:
        work: done when it returns; run once before.
        rounds: calls timed.

    Returns:
        One time a round.
    """
    work()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times
