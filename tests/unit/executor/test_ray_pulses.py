"""What pulses say of ranks in a Ray cluster; the cluster is played here, and so is the clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fastdeploy_lite.executor import ray_actors, supervisor
from fastdeploy_lite.executor.base import ExecutorDeadError
from fastdeploy_lite.executor.ray_actors import PULSE_SECONDS, RankActors
from fastdeploy_lite.executor.ray_cluster import Demand
from fastdeploy_lite.executor.ray_rank import Greeting, Pulse

AHEAD, BEHIND = 8, 4  # arrivals inside one step


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Actor:
    """An actor with a pulse, None while it says nothing.

    The answer to a question is fixed when it is taken up, as that of a process that was stopped.
    """

    def __init__(self, pulse: Pulse) -> None:
        self.answer: Pulse | None = pulse
        self.pulse = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: self))


class Cluster:
    """As much of Ray as a watch needs."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def wait(self, calls: list[Actor], timeout: float) -> tuple[list[Actor], list[Actor]]:
        done = [call for call in calls if call.answer is not None]
        return done, [call for call in calls if call.answer is None]

    def get(self, call: Actor) -> Pulse | None:
        return call.answer

    def is_initialized(self) -> bool:
        return False


class Watched(RankActors):
    """Two ranks that have said where they are; the test is the thread that watches them."""

    def __init__(self, actors: list[Actor]) -> None:
        self._given = actors
        super().__init__(Cluster(), None, Demand({"CPU": 1}, 2, 1, False), [(), ()])
        for rank in self._ranks:
            rank.greeting = Greeting("10.0.0.1", 70 + rank.number, "1", "")

    def _create(self, group: Any, bundle: int, wanted: Any, arguments: Any) -> Any:
        return self._given[bundle]

    def _watch(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(ray_actors, "time", found)
    monkeypatch.setattr(supervisor, "time", found)
    return found


def pass_time(watched: Watched, clock: Clock, seconds: float) -> None:
    for _ in range(round(seconds / PULSE_SECONDS)):
        clock.now += PULSE_SECONDS
        watched.look()


def test_a_rank_without_a_word_is_not_said_to_sleep(clock: Clock) -> None:
    first, second = Actor(Pulse("S", 10, AHEAD)), Actor(Pulse("S", 10, BEHIND))
    watched = Watched([first, second])
    pass_time(watched, clock, 1)
    second.answer = None  # stopped, and the other one waits for it
    pass_time(watched, clock, 5.5)
    watched.check()
    pass_time(watched, clock, 1.5)
    with pytest.raises(ExecutorDeadError, match=r"^rank 1 \(process 71 on 10\.0\.0\.1\): has not"):
        watched.check()


def test_a_rank_that_was_stopped_and_goes_on_has_not_slept(clock: Clock) -> None:
    first, second = Actor(Pulse("S", 10, AHEAD)), Actor(Pulse("S", 10, BEHIND))
    watched = Watched([first, second])
    pass_time(watched, clock, 1)
    second.answer = None
    pass_time(watched, clock, 5)
    second.answer = Pulse("S", 10, BEHIND)
    pass_time(watched, clock, 1)
    watched.check()


def test_a_rank_that_answers_and_does_nothing_sleeps(clock: Clock) -> None:
    watched = Watched([Actor(Pulse("S", 10, AHEAD)), Actor(Pulse("S", 10, BEHIND))])
    pass_time(watched, clock, 3.5)
    watched.check()
    pass_time(watched, clock, 2)
    with pytest.raises(ExecutorDeadError, match=r"^rank 1 .*has slept for 4 s inside a step"):
        watched.check()
