"""What the engine core tells the policy of speculation about its steps."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from helpers import make_core, make_request, run, runner_of

from fastdeploy_lite.engine.engine_core import EngineCore
from fastdeploy_lite.request.step import SequenceSlice, SliceResult
from fastdeploy_lite.speculation.attendance import COMMITTED
from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.speculation.speculator import Speculator


def test_steps_that_read_prompts_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    class Watched(Speculator):
        def note_step(
            self,
            count: int,
            checked: int,
            emitted: int,
            seconds: float,
            decodes: bool = True,
            beside: float = 0.0,
        ) -> None:
            told.append((count, emitted, decodes))
            assert seconds > beside > 0
            super().note_step(count, checked, emitted, seconds, decodes, beside)

    core = make_core(max_num_batched_tokens=64, speculative=SpeculativeConfig("ngram"))
    core._speculator = Watched(SpeculativeConfig("ngram"))
    core.add(make_request("a", [5] * 4, max_tokens=5))
    core.step()
    core.add(make_request("b", [6] * 70, max_tokens=2))
    while core.has_work:
        core.step()
    assert told == [
        (1, 1, False),  # a's prompt
        (1, 1, False),  # a, and a part of b's prompt
        (2, 2, False),  # a, and the rest of it
        (2, 2, True),
        (1, 1, True),
    ]


class Clock:
    """Seconds that pass only when the model computes or somebody waits."""

    def __init__(self, core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.told = 0.0, list[tuple[float, float]]()
        runner, speculator = runner_of(core), core._speculator
        execute = runner.execute

        def slow(slices: Sequence[SequenceSlice]) -> list[SliceResult]:
            self.now += 10.0
            return execute(slices)

        def note_step(*numbers: float) -> None:
            *_, seconds, _, beside = numbers
            self.told.append((seconds, beside))

        monkeypatch.setattr(runner, "execute", slow)
        monkeypatch.setattr(speculator, "note_step", note_step)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_a_step_lasts_until_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done with its tokens is a part of it; a client that goes away for longer is not."""
    core = make_core(speculative=SpeculativeConfig("ngram"))
    clock = Clock(core, monkeypatch)
    core.add(make_request("a", [5] * 4, max_tokens=4))
    for waited in (3.0, 0.5, 1000.0, 7.0):
        core.step()
        clock.now += waited
    assert not core.has_work
    assert clock.told == [(13.0, 3.0), (10.5, 0.5), (20.0, 10.0), (10.0, 0.0)]


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_no_request_leaves_anything_behind(method: str) -> None:
    core = make_core(speculative=SpeculativeConfig(method, adaptive=False))
    for i in range(20):
        run(core, make_request(f"{i}", [5, 6, 7] * 5, max_tokens=1 + i, seed=i))
    core.add(make_request("aborted", [5, 6, 7] * 5))
    for _ in range(4):
        core.step()
    core.abort()
    core.step()
    speculator = core._speculator
    assert speculator is not None
    assert speculator.looks > 100
    assert not speculator._memories
    assert not speculator._open
    assert not speculator._drafters._readers


def test_a_draft_layer_reads_prompts_and_is_asked_once_plain_steps_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make_core(speculative=SpeculativeConfig("mtp", num_speculative_tokens=3))
    runner, seen = runner_of(core), []
    execute = runner.execute

    def watched(slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        seen.append([(part.feeds_draft, part.num_drafts) for part in slices])
        return execute(slices)

    monkeypatch.setattr(runner, "execute", watched)
    run(core, make_request("a", [5] * 4, max_tokens=6))
    # Guesses begin in the step that samples; two steps say what plain ones take.
    assert seen[:4] == [[(True, 3)], [(False, 0)], [(False, 0)], [(True, 3)]]
    core._speculator._purse.add(-1e9)  # type: ignore[union-attr]
    run(core, make_request("b", [6] * 4, max_tokens=COMMITTED + 9))
    assert seen.count([(True, 3)]) == 2 + COMMITTED  # two prompts
    assert seen[-1] == [(False, 0)]
    core._speculator._purse.add(-1e9)  # type: ignore[union-attr]
    count = len(seen)
    run(core, make_request("c", [6] * 4, max_tokens=6))
    assert seen[count:] == [[(False, 0)]] * 6
