"""Where a decode step goes whose experts the CPU computes beside a card."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastdeploy_lite.benchmarks.layer_times import LayerClock, Loop


@dataclass(frozen=True)
class StepTimes:
    """What the thread that leads a step does, one after the other, in milliseconds.

    Attributes:
        before: from the step's beginning until the first layer waits: inputs, and the first launch.
        launches: between layers, native calls that queue segments of graphs.
        python: between layers, all else: Python, and the card's events.
        waiting: for the card, in all layers: what it has not done when nothing else is left to do.
        experts: from a layer's inputs to its answer.
        after: from the last answer to the tokens: the last segment, the head, sampling.
        layers: of these experts, microseconds of each layer.
        loops: of each layer, its shared loops.
    """

    before: float
    launches: float
    python: float
    waiting: float
    experts: float
    after: float
    layers: Sequence[float]
    loops: Sequence[Sequence[Loop]]

    def __str__(self) -> str:
        """One line."""
        return (
            f"before the first layer {self.before:.2f} ms, launches {self.launches:.2f}, other code"
            f" between layers {self.python:.2f}, waiting for the card {self.waiting:.2f}, experts"
            f" {self.experts:.2f}, after the last layer {self.after:.2f}"
        )


class StepClock:
    """Times steps between whose layers a LayerClock looks."""

    def __init__(self, clock: LayerClock, cuda: Any) -> None:
        """Args: clock: that is running; cuda: the native module whose `launch_graph` is timed."""
        self._clock, self._cuda = clock, cuda
        self._launches: list[tuple[int, int]] = []

    def step(self, work: Callable[[], float]) -> StepTimes:
        """Return the times of a step that `work` computes.

        Raises:
            ValueError: no layer has crossed.
        """
        with self._launches_timed():
            begun = time.perf_counter_ns()
            work()
            ended = time.perf_counter_ns()
        waits, arrivals, answers = self._clock.marks()
        if not answers:
            raise ValueError("no layer has crossed")
        between = sum(waits[1:]) - sum(answers[:-1])
        first, last = waits[0], answers[-1]
        launches = sum(end - start for start, end in self._launches if first < start < last)
        layers = [end - start for start, end in zip(arrivals, answers, strict=True)]
        return StepTimes(
            before=(waits[0] - begun) / 1e6,
            launches=launches / 1e6,
            python=(between - launches) / 1e6,
            waiting=(sum(arrivals) - sum(waits)) / 1e6,
            experts=sum(layers) / 1e6,
            after=(ended - answers[-1]) / 1e6,
            layers=[each / 1e3 for each in layers],
            loops=[list(layer) for layer in self._clock.loops],
        )

    @contextmanager
    def _launches_timed(self) -> Iterator[None]:
        launch = self._cuda.launch_graph
        self._launches.clear()

        def timed(*args: Any) -> None:
            start = time.perf_counter_ns()
            launch(*args)
            self._launches.append((start, time.perf_counter_ns()))

        self._cuda.launch_graph = timed
        try:
            yield
        finally:
            self._cuda.launch_graph = launch


def median(steps: Sequence[StepTimes]) -> StepTimes:
    """Return the median of each number over some steps of the same layers and loops."""
    layers = zip(*(step.layers for step in steps), strict=True)
    loops = zip(*(step.loops for step in steps), strict=True)
    return StepTimes(
        before=statistics.median(step.before for step in steps),
        launches=statistics.median(step.launches for step in steps),
        python=statistics.median(step.python for step in steps),
        waiting=statistics.median(step.waiting for step in steps),
        experts=statistics.median(step.experts for step in steps),
        after=statistics.median(step.after for step in steps),
        layers=[statistics.median(each) for each in layers],
        loops=[_median_loops(layer) for layer in loops],
    )


def _median_loops(steps: Sequence[Sequence[Loop]]) -> list[Loop]:
    """Of one layer, loop by loop; none if their number differs (a busy pool's are not shared)."""
    if len({len(loops) for loops in steps}) > 1:
        return []
    found = []
    for same in zip(*steps, strict=True):
        wall, slowest, fastest, mean = (
            int(statistics.median(number)) for number in zip(*same, strict=True)
        )
        found.append((wall, slowest, fastest, mean))
    return found


def mean_loops(layers: Sequence[Sequence[Loop]]) -> list[Loop]:
    """Return the mean over layers of the first loop, of the second and so on; layers with fewer
    loops than most are left out."""
    most = statistics.mode(len(loops) for loops in layers)
    found = []
    for same in zip(*(loops for loops in layers if len(loops) == most), strict=True):
        wall, slowest, fastest, mean = (
            int(statistics.fmean(number)) for number in zip(*same, strict=True)
        )
        found.append((wall, slowest, fastest, mean))
    return found
