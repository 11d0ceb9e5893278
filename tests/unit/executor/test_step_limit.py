"""A step that takes far longer than those before is noticed by another process."""

from __future__ import annotations

import math

import pytest

from fastdeploy_lite.executor.step_clock import StepClock, StepState
from fastdeploy_lite.executor.step_limit import FIRST_SECONDS, SLOWER, StepLimit, StepWatch


def test_nothing_is_too_slow_before_a_step_was_measured() -> None:
    assert StepLimit(60).of(1) == FIRST_SECONDS
    assert StepLimit(900).of(1) == 900
    assert StepLimit(0).of(1) == math.inf


def test_steps_are_measured_by_their_size() -> None:
    limit = StepLimit(60)
    limit.saw(1, 0.02)
    assert limit.of(1) == limit.of(64) == 60
    assert limit.of(2048) == pytest.approx(SLOWER * 0.02 * 2048)
    limit.saw(2048, 30.0)
    assert limit.of(2048) == SLOWER * 30.0
    assert limit.of(4096) == 2 * limit.of(2048)
    assert limit.of(1) == 60  # its own size is known
    other = StepLimit(60)
    other.saw(2048, 30.0)
    assert other.of(1) == SLOWER * 30.0  # at most what a larger one took


def test_a_slow_first_step_is_forgotten() -> None:
    limit = StepLimit(60)
    limit.saw(1, 40.0)
    assert limit.of(1) == SLOWER * 40.0
    for _ in range(1000):
        limit.saw(1, 0.02)
    assert limit.of(1) == 60


def test_two_ends_of_a_clock() -> None:
    ours = StepClock()
    theirs = StepClock(ours.fd)
    assert ours.read() == StepState(0, 0, 0.0, "")
    theirs.begin(12, 60.0)
    assert ours.read() == StepState(1, 12, 60.0, "")
    theirs.end()
    theirs.begin(1, math.inf)
    theirs.say("rank 0: \N{SNOWMAN}" + 3000 * "x")
    shown = ours.read()
    assert (shown.number, shown.tokens, shown.limit) == (2, 1, math.inf)
    assert shown.words.startswith("rank 0: \N{SNOWMAN}xxx")
    ours.close()
    ours.close()


def looks(watch: StepWatch, shown: StepState, seconds: float, start: float) -> str | None:
    """Look four times a second, for so long."""
    for tick in range(int(seconds * 4) + 1):
        found = watch.look(shown, start + tick / 4)
        if found is not None:
            return found
    return None


def test_only_a_step_that_goes_on_is_too_long() -> None:
    watch = StepWatch()
    assert looks(watch, StepState(0, 0, 0.0, ""), 500, 0) is None
    assert looks(watch, StepState(1, 5, 60.0, ""), 59, 500) is None
    assert looks(watch, StepState(2, 5, 60.0, ""), 59, 559) is None
    found = looks(watch, StepState(3, 7, 60.0, ""), 62, 618)
    assert found is not None
    assert found.startswith("a step of 7 tokens has not ended within 60 s (FD_LITE_STEP_SECONDS")
    assert looks(StepWatch(), StepState(1, 7, math.inf, ""), 500, 0) is None


def test_time_in_which_the_whole_machine_stood_still_does_not_count() -> None:
    watch = StepWatch()
    shown = StepState(1, 1, 60.0, "")
    for minute in range(50):
        assert watch.look(shown, minute * 60.0) is None


def test_a_process_may_say_itself_why_it_ends() -> None:
    watch, shown = StepWatch(), StepState(4, 1, 60.0, "rank 0 has slept")
    assert looks(watch, shown, 2.5, 0) is None
    assert looks(watch, shown, 2.5, 2.5) == "rank 0 has slept"
