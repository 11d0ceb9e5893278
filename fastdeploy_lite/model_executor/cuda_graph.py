"""Decode steps as CUDA graphs: one launch instead of some hundred kernel launches from Python.

A graph belongs to a batch size ("bucket") and holds the addresses of static buffers, of the
workspace, and of the KV cache. It is captured when its bucket is first needed: the step runs once
as usual, which settles every buffer and every cuBLASLt plan and computes the step's result, and
once more on a private stream that only records. Where the host has a part in the step
(`runtime.on_host`: experts in main memory), it becomes several graphs with that part between them.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdeploy_lite import _ops_cuda
from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime
from fastdeploy_lite.model_executor.recorder import Part, Recorder
from fastdeploy_lite.model_executor.workspace import Workspace

FINE_UPTO = 32
FINE_STEP = 4
COARSE_STEP = 16


def default_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes worth a graph: 1, 2, 4, 8 ... 32 by 4, then by 16, and the largest batch itself.

    A padding row costs attention and experts like a real one, so small batches get fine steps.
    """
    fine = [1, 2, *range(FINE_STEP, FINE_UPTO, FINE_STEP)]
    sizes = [*fine, *range(FINE_UPTO, max_num_seqs, COARSE_STEP), max_num_seqs]
    return sorted({size for size in sizes if size <= max_num_seqs})


class _Graph:
    """An executable graph."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __call__(self) -> None:
        """Queue all of its work."""
        _ops_cuda.launch_graph(self.handle, runtime.stream())

    def __del__(self) -> None:
        _ops_cuda.destroy_graph(self.handle)


@dataclass(frozen=True)
class _Step:
    """What replays a step, and the tensor that this fills."""

    parts: Sequence[Part]
    result: Any

    def __call__(self) -> None:
        for part in self.parts:
            part()


class CudaDecodeGraphs:
    """The graphs of one runner, see worker.model_runner.DecodeGraphs."""

    def __init__(
        self, workspace: Workspace, max_num_seqs: int, sizes: Sequence[int] | None = None
    ) -> None:
        """Args: workspace: of the forward pass; sizes: buckets, by default `default_sizes`."""
        self._workspace = workspace
        wanted = default_sizes(max_num_seqs) if sizes is None else sizes
        self._sizes = sorted({size for size in wanted if 0 < size <= max_num_seqs})
        self._steps: dict[int, _Step] = {}
        self._generation = workspace.generation
        self._stream = int(_ops_cuda.create_stream())

    def bucket(self, num_seqs: int) -> int | None:
        """Smallest size that holds `num_seqs` sequences; None: run the step without a graph."""
        index = bisect.bisect_left(self._sizes, num_seqs)
        return self._sizes[index] if index < len(self._sizes) else None

    def run(self, size: int, forward: Callable[[], Any]) -> Any:
        """Compute a step of `size` sequences and return the tensor that `forward` returns.

        Args:
            size: from `bucket`.
            forward: queues the step's kernels; always with the same addresses for one size.
        """
        if self._generation != self._workspace.generation:
            self._steps.clear()  # a buffer moved: what was captured points to freed memory
            self._generation = self._workspace.generation
        step = self._steps.get(size)
        if step is None:
            return self._first_run(size, forward)
        step()
        return step.result

    def replay_seconds(self, size: int, repeats: int) -> float:
        """Mean time of one replay of the step of `size` on its last inputs.

        Raises:
            KeyError: no step of this size was captured.
        """
        step, stream = self._steps[size], runtime.stream()
        _ops_cuda.synchronize(stream)
        started = time.perf_counter()
        for _ in range(repeats):
            step()
        _ops_cuda.synchronize(stream)
        return (time.perf_counter() - started) / repeats

    def _first_run(self, size: int, forward: Callable[[], Any]) -> Any:
        result = forward()
        if self._generation != self._workspace.generation:
            return result  # this step grew a buffer; the next one of this size captures
        self._steps[size] = self._capture(forward)
        return result

    def _capture(self, forward: Callable[[], Any]) -> _Step:
        recorder = Recorder(lambda: _ops_cuda.begin_capture(self._stream), self._end_capture)
        with runtime.use_stream(self._stream), runtime.recording(recorder.cut):
            result = recorder.record(forward)
        return _Step(recorder.parts, result)

    def _end_capture(self, discard: bool) -> _Graph | None:
        handle = int(_ops_cuda.end_capture(self._stream, discard))
        return _Graph(handle) if handle else None
