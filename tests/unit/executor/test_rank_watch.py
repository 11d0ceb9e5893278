"""Who watches the ranks tells one that hangs from one that is slow."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastdeploy_lite.config import ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from fastdeploy_lite.executor import ranks as ranks_module
from fastdeploy_lite.executor import watch as watch_module
from fastdeploy_lite.executor.base import ExecutorDeadError
from fastdeploy_lite.executor.messages import Start
from fastdeploy_lite.executor.ranks import RankProcesses
from fastdeploy_lite.executor.watch import Pace

SPINS = "while True: pass"
NAPS = "import time\nwhile True: time.sleep(0.2); sum(range(200_000))"


class Communicator:
    """What the watch asks."""

    def __init__(self) -> None:
        self.arrived = [1, 1]
        self.is_lost = False

    def arrivals(self) -> list[int]:
        return self.arrived

    def lose(self) -> None:
        self.is_lost = True


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, demo_dir: Path) -> Callable[[str], Any]:
    config = RuntimeConfig(
        model_path=demo_dir,
        model=ModelConfig.from_dir(demo_dir),
        scheduler=SchedulerConfig(),
        parallel=ParallelConfig(2, 1),
    )

    def make(code: str) -> tuple[RankProcesses, Communicator]:
        monkeypatch.setattr(ranks_module, "_RUN_RANK", code.replace("{", "{{").replace("}", "}}"))
        communicator = Communicator()
        first = Start(config, 0, 1, 1, False)
        return RankProcesses([first], 0, communicator), communicator  # type: ignore[arg-type]

    return make


def wait_for_the_end(watch: RankProcesses, seconds: float) -> float:
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        watch.check()
        time.sleep(0.05)
    return time.monotonic() - started


@pytest.mark.timeout(90)
def test_a_rank_that_is_busy_for_ever_is_lost_within_ten_seconds_of_a_processor(
    start: Callable[[str], Any],
) -> None:
    watch, communicator = start(SPINS)
    try:
        wait_for_the_end(watch, 1)  # while nobody waits for it, it may do what it likes
        communicator.arrived = [2, 1]
        process = psutil.Process(watch.pids[0])
        started = time.monotonic()
        last = used = sum(process.cpu_times()[:2])
        with pytest.raises(ExecutorDeadError, match=r"^rank 1 \(process \d+\): has been busy for"):
            while time.monotonic() - started < 60:
                with contextlib.suppress(psutil.NoSuchProcess):
                    last = sum(process.cpu_times()[:2])
                wait_for_the_end(watch, 0.2)
        assert communicator.is_lost
        assert last - used < 10  # more seconds only where others crowd it off the processors
    finally:
        watch.close()


@pytest.mark.timeout(60)
def test_a_rank_that_comes_on_or_has_long_pieces_is_waited_for(
    start: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "BUSY_SECONDS", 1.0)
    watch, communicator = start(SPINS)
    try:
        for arrived in range(2, 6):
            communicator.arrived = [9, arrived]
            wait_for_the_end(watch, 0.6)
        watch._pace.seconds = 30.0  # what the fastest rank took for the same piece
        communicator.arrived = [9, 8]
        wait_for_the_end(watch, 4)
    finally:
        watch.close()


@pytest.mark.timeout(60)
def test_a_rank_that_gets_little_of_a_processor_is_slow_not_lost(
    start: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "BUSY_SECONDS", 2.0)
    watch, communicator = start(NAPS)
    try:
        communicator.arrived = [2, 1]
        wait_for_the_end(watch, 4)
    finally:
        watch.close()


def test_the_pace_is_that_of_the_furthest_and_forgets_idle_time() -> None:
    pace = Pace()
    pace.begins(100.0)
    pace.saw(5, 100.25)
    assert pace.seconds == 0.25
    pace.saw(5, 130.0)
    assert pace.seconds == 0.25
    pace.begins(500.0)  # nobody computed in between
    pace.saw(6, 502.0)
    assert pace.seconds == 2.0
