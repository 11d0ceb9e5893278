"""Decode steps on a CPU as the native calls that they make, repeated without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.model_executor.workspace import Workspace

MOST_SEQUENCES = 32
"""Of a step that is kept, at 0.3 MB for 28 layers: beside the work of more, Python is little."""


class RecordedSteps:
    """The recordings of one runner, see worker.model_runner.DecodeGraphs.

    A step of a number of sequences makes the same calls on the same addresses each time, for a
    model whose forward pass is nothing but ops (`is_replayable`). The first one is computed as
    usual and noted; the others repeat the notes, to the same bits.
    """

    def __init__(self, workspace: Workspace) -> None:
        """Args: workspace: of the forward pass."""
        self._workspace = workspace
        self._generation = workspace.generation
        self._steps: dict[int, tuple[_ops_cpu.Recording, Any]] = {}

    def bucket(self, num_seqs: int) -> int | None:
        """`num_seqs` itself, None for steps that are not worth keeping."""
        return num_seqs if num_seqs <= MOST_SEQUENCES else None

    def run(self, size: int, forward: Callable[[], Any]) -> Any:
        """Compute a step of `size` sequences and return what `forward` returns.

        Args:
            size: from `bucket`.
            forward: computes the step; always with the same addresses for one size.
        """
        if self._generation != self._workspace.generation:
            self._steps.clear()  # a buffer moved: what was noted points to freed memory
            self._generation = self._workspace.generation
        known = self._steps.get(size)
        if known is None:
            return self._first_run(size, forward)
        repeat, result = known
        repeat()
        return result

    def _first_run(self, size: int, forward: Callable[[], Any]) -> Any:
        recording = _ops_cpu.Recording()
        with recording:
            result = forward()
        if self._generation == self._workspace.generation:  # else it has grown a buffer
            self._steps[size] = recording, result
        return result
