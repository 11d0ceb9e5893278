"""How long an engine may be silent: as long as the step may take that it is at; time is played."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from fastdeploy_lite.engine import engine_client
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.engine_client import IDLE_SILENCE_SECONDS, AsyncEngineClient
from fastdeploy_lite.executor.step_clock import StepClock
from fastdeploy_lite.executor.step_limit import FIRST_SECONDS
from fastdeploy_lite.request.messages import Ready


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(engine_client, "time", found)
    return found


@pytest.fixture
def steps() -> Iterator[StepClock]:
    found = StepClock()
    yield found
    found.close()


def ready_client(steps: StepClock, *, busy: bool) -> AsyncEngineClient:
    client = AsyncEngineClient(EngineArgs(model="demo"))
    client.ready = Ready(num_blocks=8, load_seconds=1.0, device="cpu")
    client._clock = steps
    if busy:
        client._queues["r"] = asyncio.Queue()
    return client


@pytest.mark.parametrize("busy", [True, False])
def test_a_step_is_healthy_as_long_as_it_may_take(
    clock: Clock, steps: StepClock, busy: bool
) -> None:
    """Whoever watches the step ends the process when it takes longer; a client may have left."""
    client = ready_client(steps, busy=busy)
    steps.begin(2048, 900.0)
    clock.now += 899
    assert client.is_healthy
    steps.begin(2048, float("inf"))  # FD_LITE_STEP_SECONDS=0
    clock.now += 1e6
    assert client.is_healthy


def test_silence_between_steps_is_bounded_by_the_last_ones_limit(
    clock: Clock, steps: StepClock
) -> None:
    client = ready_client(steps, busy=True)
    steps.begin(2048, 900.0)
    steps.end()
    clock.now += 899
    assert client.is_healthy
    clock.now += 2
    assert not client.is_healthy


@pytest.mark.parametrize(
    ("seconds", "limit"), [("60", FIRST_SECONDS), ("1000", 1000.0), ("0", None)]
)
def test_before_a_first_step_the_variable_counts(
    clock: Clock, steps: StepClock, monkeypatch: pytest.MonkeyPatch, seconds: str,
    limit: float | None,
) -> None:  # fmt: skip
    monkeypatch.setenv("FD_LITE_STEP_SECONDS", seconds)
    client = ready_client(steps, busy=True)
    clock.now += 299 if limit is None else limit - 1
    assert client.is_healthy
    clock.now += 1e6 if limit is None else 2
    assert client.is_healthy == (limit is None)


def test_an_idle_engine_reports_often(clock: Clock, steps: StepClock) -> None:
    client = ready_client(steps, busy=False)
    clock.now += IDLE_SILENCE_SECONDS - 1
    assert client.is_healthy
    clock.now += 2
    assert not client.is_healthy
