"""What a machine can do at most: bytes a second of its memory, floating-point work a second.

A share of a data sheet's number would compare a kernel with another machine; these are measured on
the device in hand, just before the kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.backend import paddle

COPY_BYTES = 4 << 30
READ_BYTES = 512 << 20
MATMUL_SIZE = 8192
MATMUL_SIZE_CPU = 2048
_ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device.

    Attributes:
        device: its name.
        bytes_per_second: of its memory; what `memory_kind` says.
        flops_per_second: of a large matrix product; what `matmul_kind` says.
        memory_kind, matmul_kind: how they were taken.
    """

    device: str
    bytes_per_second: float
    flops_per_second: float
    memory_kind: str
    matmul_kind: str


def measure(place: Any) -> Ceilings:
    """Measure the device of a place.

    Args:
        place: Paddle place, activated.

    Returns:
        Its ceilings.
    """
    return _of_cpu() if place.is_cpu_place() else _of_card(place)


def copy_bandwidth() -> float:
    """Bytes read plus bytes written a second of a large copy on the current card."""
    from fastdeploy_lite import _ops_cuda  # noqa: PLC0415
    from fastdeploy_lite.model_executor.ops import cuda_runtime  # noqa: PLC0415

    buffers = [paddle.empty([COPY_BYTES], dtype="uint8") for _ in range(2)]
    to, source = (int(buffer.data_ptr()) for buffer in buffers)
    seconds = _ops_cuda.time_copy(to, source, COPY_BYTES, 10, cuda_runtime.stream())
    return 2 * COPY_BYTES / float(seconds)


def read_bandwidth(nbytes: int = READ_BYTES) -> float:
    """Bytes a second of one pass over main memory with the threads in use.

    By the fastest instruction set's reader: the ceiling belongs to the machine, not to a kernel.

    Args:
        nbytes: how much; more than the caches hold.
    """
    data = np.ones(nbytes // 8, np.uint64)
    return bandwidth_of(data.__array_interface__["data"][0], data.nbytes)


def bandwidth_of(address: int, nbytes: int) -> float:
    """Bytes a second of one pass over the memory there, as `read_bandwidth`."""
    from fastdeploy_lite import _ops_cpu  # noqa: PLC0415

    count = nbytes // 8
    view = (address, "int64", [count], [1])
    chosen, best = _ops_cpu.current_isa(), float("inf")
    for isa in _ops_cpu.available_isas():
        _ops_cpu.set_isa(isa)
        best = min(best, *_seconds(lambda: _ops_cpu.fold_memory(view)))
    _ops_cpu.set_isa(chosen)
    return 8 * count / best


def _seconds(call: Callable[[], Any]) -> list[float]:
    call()
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def _of_cpu() -> Ceilings:
    from fastdeploy_lite import _ops_cpu  # noqa: PLC0415

    size, threads = MATMUL_SIZE_CPU, _ops_cpu.num_threads()
    a, b = paddle.randn([size, size]), paddle.randn([size, size])
    seconds = min(_seconds(lambda: paddle.matmul(a, b)))
    return Ceilings(
        f"CPU, {threads} threads",
        read_bandwidth(),
        2 * size**3 / seconds,
        "read",
        f"Paddle's float32 product of {size}",
    )


def _of_card(place: Any) -> Ceilings:
    from fastdeploy_lite import _ops_cuda  # noqa: PLC0415
    from fastdeploy_lite.benchmarks.timing import graph_seconds, random_bf16  # noqa: PLC0415
    from fastdeploy_lite.model_executor.ops import cuda_runtime  # noqa: PLC0415

    size = MATMUL_SIZE
    weight = ops.allocate_weight("dense", size, size, place)
    ops.randomize_weight(weight, 0)
    ops.finish_weight(weight)
    x = cuda_runtime.empty([size, size], "bfloat16", place)
    ops.upload(random_bf16(size * size), x)
    out = cuda_runtime.empty([size, size], "bfloat16", place)
    seconds = statistics.median(graph_seconds(lambda: ops.linear(x, weight, out)))
    facts = _ops_cuda.device_facts(cuda_runtime.device_index())
    return Ceilings(
        facts.name,
        copy_bandwidth(),
        2 * size**3 / seconds,
        "copy, read and written",
        f"cuBLASLt's bf16 product of {size}",
    )
