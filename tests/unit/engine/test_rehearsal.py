"""Steps before the first request: which ones, and that they are sound."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from fake_runner import FakeRunner
from helpers import make_config

from fastdeploy_lite.config import BLOCK_SIZE
from fastdeploy_lite.engine.rehearsal import PATIENCE, TIMED, UNTIMED, rehearse
from fastdeploy_lite.executor.base import ExecutorDeadError, ExecutorReport
from fastdeploy_lite.request.step import SequenceSlice, SliceResult
from fastdeploy_lite.speculation.config import SpeculativeConfig

REPEATS = UNTIMED + TIMED


class Card(FakeRunner):
    """Checks what a step of a card needs; a step takes a second and a tenth for each token."""

    place = "Place(nvidia:0)"
    now = 0.0
    error: Exception | None = None
    result = SliceResult([9])

    def report(self) -> ExecutorReport:
        return ExecutorReport(self.num_blocks, 0.0, self.place)

    def execute(self, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        if self.error is not None:
            raise self.error
        tokens = sum(len(part.token_ids) for part in slices)
        assert tokens <= self.limit
        assert len({part.slot for part in slices}) == len(slices)
        assert len({block for part in slices for block in part.block_table}) == len(slices)
        for part in slices:
            assert max(part.block_table) < self.num_blocks
            assert part.start + len(part.token_ids) <= BLOCK_SIZE
            self._write(part)
            known = [*part.prompt_token_ids, *part.output_token_ids]
            assert len(known) == part.start + 1
            assert self.blocks[part.block_table[0]][: len(known)] == known
            assert list(part.token_ids[1:]) == part.draft_token_ids
            assert part.num_rows == len(part.token_ids)
        self.now += 1.0 + tokens / 10
        self.steps.append([(p.request_id, p.start, len(p.token_ids)) for p in slices])
        return [self.result] * len(slices)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card(num_blocks=64, limit=256)
    monkeypatch.setattr(time, "perf_counter", lambda: card.now)
    monkeypatch.setattr(time, "monotonic", lambda: card.now / 1e3)
    return card


def config(**more: Any) -> Any:
    return make_config(speculative=SpeculativeConfig("suffix"), **more)


def test_every_size_that_guesses_may_have_is_run_and_timed(clock: Card) -> None:
    found = rehearse(config(), clock)
    assert found is not None
    assert list(found.plain) == [1, 2, 4]
    assert list(found.checking) == [2, 4, 6, 8, 12, 16, 24, 32]  # 4 sequences of 9 tokens
    for seconds in (found.plain, found.checking):
        assert all(taken == pytest.approx(1.0 + n / 10) for n, taken in seconds.items())
    assert len(clock.steps) == REPEATS * 11
    assert [len(step) for step in clock.steps[-REPEATS:]] == [4] * REPEATS
    assert [sum(n for _, _, n in step) for step in clock.steps[-REPEATS:]] == [32] * REPEATS


def test_few_blocks_or_places_bound_the_steps(clock: Card) -> None:
    clock.num_blocks = 3
    found = rehearse(config(max_num_seqs=3), clock)
    assert found is not None
    assert list(found.plain) == [1, 2, 3]
    assert list(found.checking) == [2, 4, 6, 8, 12, 16, 24]


def test_what_takes_too_long_is_left_out(clock: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    found = rehearse(config(), clock)
    assert found is not None
    assert (list(found.plain), list(found.checking)) == ([1, 2], [])
    assert clock.now < PATIENCE + REPEATS * 1.2


@pytest.mark.parametrize(
    "settings",
    [
        make_config(),
        make_config(speculative=SpeculativeConfig("naive")),
        make_config(speculative=SpeculativeConfig("mtp")),
        config(max_model_len=BLOCK_SIZE - 1),
    ],
)
def test_nothing_is_run_where_nothing_can_be_looked_up(clock: Card, settings: Any) -> None:
    assert rehearse(settings, clock) is None
    assert not clock.steps


def test_nothing_is_run_on_a_cpu(clock: Card) -> None:
    clock.place = "Place(cpu)"
    assert rehearse(config(), clock) is None
    assert not clock.steps


def test_a_step_that_fails_ends_it_and_nothing_else(clock: Card) -> None:
    clock.error = RuntimeError("no memory")
    assert rehearse(config(), clock) is None
    clock.error, clock.result = None, SliceResult(error="not numbers")
    assert rehearse(config(), clock) is None


def test_a_card_that_is_lost_is_said(clock: Card) -> None:
    clock.error = ExecutorDeadError("gone")
    with pytest.raises(ExecutorDeadError, match="gone"):
        rehearse(config(), clock)
