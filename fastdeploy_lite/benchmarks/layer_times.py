"""Where the time of a layer goes whose experts the CPU computes beside a card."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from fastdeploy_lite import _ops_cpu

_MARKS = 3  # of a crossing: the host begins to wait, the inputs are there, the answer is written
_ARRIVED, _DONE = 1, 2
Loop: TypeAlias = tuple[int, int, int, int]
"""Of _ops_cpu.loop_times(): nanoseconds of a loop, its busiest, least busy and average thread."""


@dataclass(frozen=True)
class LayerTimes:
    """Means over the layers of a step, in microseconds.

    `handing_on` + `waiting` is the card's part of a layer and both crossings. `work` is the
    host's part; its shared loops take `in_loops`, of which threads are busy `fastest` to `slowest`
    and `mean` on average.

    Attributes:
        handing_on: from an answer to the wait for the next layer: launches, and Python.
        waiting: for the card.
        work: the experts, from the inputs' arrival to the answer.
        loops: their number.
        in_loops: on the thread that begins them, waking and waiting for others included.
        slowest, fastest, mean: how long threads are busy in them: sums over the loops of the
            busiest one, of the least busy one, and of the average.
    """

    handing_on: float
    waiting: float
    work: float
    loops: float
    in_loops: float
    slowest: float
    fastest: float
    mean: float

    def __str__(self) -> str:
        """One line."""
        return (
            f"handing on {self.handing_on:.0f}, waiting for the card {self.waiting:.0f}, experts"
            f" {self.work:.0f} us (in {self.loops:.1f} loops {self.in_loops:.0f}, threads busy"
            f" {self.mean:.0f} ({self.fastest:.0f} to {self.slowest:.0f}), outside of loops"
            f" {self.work - self.in_loops:.0f})"
        )


class LayerClock:
    """Looks at the clock at each crossing of a link.

    Attributes:
        loops: since the last `step`, the shared loops of each layer's experts.
    """

    def __init__(self, link: Any) -> None:
        """Args: link: a CudaHostLink that all layers of interest share."""
        self._link = link
        self._marks: list[int] = []
        self.loops: list[list[Loop]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Look meanwhile."""
        before = self._link.mark
        self._link.mark = self._mark
        _ops_cpu.time_loops(True)
        self.discard()
        try:
            yield
        finally:
            _ops_cpu.time_loops(False)
            self._link.mark = before

    def discard(self) -> None:
        """Forget what was seen since the last `step`."""
        self._marks.clear()
        self.loops.clear()

    def marks(self) -> tuple[list[int], list[int], list[int]]:
        """Return the nanoseconds since the last `step` at which layers began to wait, at which
        their inputs had arrived, and at which they had answered."""
        waits, arrivals, answers = (self._marks[i::_MARKS] for i in range(_MARKS))
        return waits, arrivals, answers

    def step(self) -> LayerTimes:
        """Return the times of the layers since the last call.

        Raises:
            ValueError: no layer has crossed.
        """
        waits, arrivals, answers = self.marks()
        layers = len(answers)
        if not layers:
            raise ValueError("no layer has crossed")
        loops = [loop for layer in self.loops for loop in layer]
        sums = np.array(loops, np.int64).reshape(-1, 4).sum(axis=0)
        times = LayerTimes(
            _mean(answers[:-1], waits[1:]),
            _mean(waits, arrivals),
            _mean(arrivals, answers),
            len(loops) / layers,
            *(sums / (1e3 * layers)).tolist(),
        )
        self.discard()
        return times

    def _mark(self) -> None:
        kind = len(self._marks) % _MARKS
        if kind == _ARRIVED:
            _ops_cpu.loop_times()  # what was before is no expert's
        self._marks.append(time.perf_counter_ns())
        if kind == _DONE:
            self.loops.append(_ops_cpu.loop_times())


def _mean(begins: Sequence[int], ends: Sequence[int]) -> float:
    gaps = [end - begin for begin, end in zip(begins, ends, strict=True)]
    return statistics.fmean(gaps) / 1e3 if gaps else 0.0


def median(steps: Sequence[LayerTimes]) -> LayerTimes:
    """Return the median of each number over some steps."""
    rows = zip(*(dataclasses.astuple(step) for step in steps), strict=True)
    return LayerTimes(*map(statistics.median, rows))
