"""An executor whose steps can be seen from another process."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastdeploy_lite.executor.base import Executor, ExecutorReport
from fastdeploy_lite.executor.step_clock import StepClock
from fastdeploy_lite.executor.step_limit import StepLimit
from fastdeploy_lite.request.step import SequenceSlice, SliceResult


class TimedExecutor(Executor):
    """Shows on a clock which step another executor is at, and how long that one may take.

    Args:
        executor: the other one.
        clock: where it is shown.
        limit: learns from the steps.
    """

    def __init__(self, executor: Executor, clock: StepClock, limit: StepLimit) -> None:
        self._executor = executor
        self._clock = clock
        self._limit = limit

    def load(self, show_progress: bool = False) -> int:
        """See Executor."""
        return self._executor.load(show_progress)

    def execute(self, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        """See Executor."""
        tokens = sum(len(part.token_ids) for part in slices)
        self._clock.begin(tokens, self._limit.of(tokens))
        started = time.monotonic()
        try:
            results = self._executor.execute(slices)
        finally:
            self._clock.end()
        self._limit.saw(tokens, time.monotonic() - started)
        return results

    def report(self) -> ExecutorReport:
        """See Executor."""
        return self._executor.report()

    def check(self) -> None:
        """See Executor."""
        self._executor.check()

    def close(self) -> None:
        """See Executor."""
        self._executor.close()
