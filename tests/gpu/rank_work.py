"""One rank of test_cuda_ranks: sums, gathers, graphs and failures between cards.

    python rank_work.py RANK SIZE MEMORY_FD WAY RESULT.npz

Every rank does the same in the same order; what it finds is saved under one name each.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
SHAPES = [(1, 8192), (64, 8192), (7, 1001), (4096, 2560)]
GATHERED = [(1, 51712), (64, 5000), (300, 51712)]
DTYPES = ["bfloat16", "float32"]


def numbers(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of the ranks differ in size, so that the order of a sum shows."""
    scale = np.float32(10.0 ** (seed % 10))
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * scale


def sums(communicator: Any, found: dict[str, Any]) -> None:
    import cards

    from fastdeploy_lite.model_executor import ops

    for shape in SHAPES:
        for dtype in DTYPES:
            x = cards.put(numbers(communicator.rank, shape), dtype)
            communicator.all_reduce(x)
            found[f"sum {shape} {dtype}"] = ops.download(x)
    rows = numbers(communicator.rank, (64, 8192))
    one = cards.put(rows[5:6], "bfloat16")
    communicator.all_reduce(one)  # the same bits wherever a row lies
    found["row 5 alone"] = ops.download(one)


def gathers(communicator: Any, found: dict[str, Any]) -> None:
    import cards

    for rows, width in GATHERED:
        out = cards.poisoned([rows, communicator.size * width], "float32")
        x = cards.put(numbers(communicator.rank, (rows, width)))
        communicator.all_gather(x, [width] * communicator.size, out)
        found[f"gather {rows} {width}"] = cards.get(out)[:, :: max(1, width // 64)]


def graphs(communicator: Any, found: dict[str, Any]) -> None:
    """Fifty replays of a captured chain with new numbers each time, and without a graph."""
    import cards

    from fastdeploy_lite import _ops_cuda
    from fastdeploy_lite.model_executor import ops
    from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime

    x, y = cards.poisoned([3, 2560]), cards.poisoned([3, 2560])

    def chain() -> None:
        communicator.all_reduce(x)
        ops.add_inplace(y, x)
        communicator.all_reduce(y)

    def run(work: Any, seed: int) -> np.ndarray:
        ops.upload(cards.bf16_bits(numbers(seed + communicator.rank, (3, 2560))), x)
        ops.upload(cards.bf16_bits(numbers(seed, (3, 2560))), y)
        work()
        return ops.download(y)

    plain = [run(chain, seed) for seed in range(0, 500, 10)]
    stream = int(_ops_cuda.create_stream())
    _ops_cuda.begin_capture(stream)
    with runtime.use_stream(stream):
        chain()
    graph = _ops_cuda.end_capture(stream, False)
    replayed = [
        run(lambda: _ops_cuda.launch_graph(graph, runtime.stream()), seed)
        for seed in range(0, 500, 10)
    ]
    _ops_cuda.destroy_graph(graph)
    found["plain chain"], found["replayed chain"] = np.stack(plain), np.stack(replayed)


def failures(communicator: Any, forgotten: list[float], found: dict[str, Any]) -> None:
    """A step that one rank does not queue; the next one; one that nobody queues."""
    import cards

    from fastdeploy_lite.distributed.communicator import PeerFailedError
    from fastdeploy_lite.model_executor import ops

    verdicts = [communicator.agree(True)]
    started = time.monotonic()
    x = cards.put(np.ones((4, 64)), "bfloat16")
    try:
        if communicator.rank == communicator.size - 1:
            communicator.fail()
            sound = False
        else:
            communicator.all_reduce(x)
            ops.download(x)
            sound = True
    except PeerFailedError:
        sound = False
    verdicts.append(communicator.agree(sound))
    found["seconds to mend"] = time.monotonic() - started
    x = cards.put(np.ones((4, 64)), "bfloat16")
    communicator.all_reduce(x)
    found["sum after"] = cards.get(x)
    verdicts.append(communicator.agree(True))
    verdicts.append(communicator.agree(False))
    found["verdicts"], found["forgotten"] = np.array(verdicts), len(forgotten)


def lost(communicator: Any, found: dict[str, Any]) -> None:
    """The last rank never comes; the others are released while their cards wait."""
    import cards

    from fastdeploy_lite.distributed.communicator import PeerLostError
    from fastdeploy_lite.model_executor import ops

    if communicator.rank == communicator.size - 1:
        return
    threading.Timer(0.5, communicator.lose).start()
    started = time.monotonic()
    try:
        x = cards.put(np.ones((4, 64)), "bfloat16")
        communicator.all_reduce(x)
        ops.download(x)
        communicator.agree(True)
        found["lost"] = "nothing"
    except PeerLostError as error:
        found["lost"] = str(error)
    found["seconds to lose"] = time.monotonic() - started


def main(rank: int, size: int, fd: int, way: str, result: str) -> None:
    from fastdeploy_lite import device

    device.activate(0)
    from fastdeploy_lite.distributed.communicator import SharedMemory, SharedMemoryCommunicator
    from fastdeploy_lite.distributed.nccl import NcclCommunicator

    ranks = SharedMemoryCommunicator(SharedMemory(size, 1, fd), rank, 60.0)
    communicator = NcclCommunicator(ranks, 60.0)
    forgotten: list[float] = []
    communicator.open(lambda: forgotten.append(time.monotonic()))
    communicator.set_way(way)
    found: dict[str, Any] = {}
    sums(communicator, found)
    gathers(communicator, found)
    graphs(communicator, found)
    failures(communicator, forgotten, found)
    lost(communicator, found)
    np.savez(result, **found)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
