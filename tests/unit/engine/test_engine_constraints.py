"""Constraints work beside the steps: a slow one costs its own request only."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import make_core, make_request, run, tokens
from waiting import until

from fastdeploy_lite.engine.engine_core import EngineCore
from fastdeploy_lite.guided import compiler, paced, trial
from fastdeploy_lite.guided.matcher import Bitmask
from fastdeploy_lite.guided.paced import PacedMatcher
from fastdeploy_lite.guided.spec import GuidedSpec
from fastdeploy_lite.guided.trial import ConstraintTrial, Vocabulary
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.errors import RequestError

AMBIGUOUS = GuidedSpec("grammar", 'start: s\ns: s s | "a" | "b"\n')


class SlowMatcher:
    """Allows everything; each token takes `seconds` of the processor, once `may_follow`."""

    is_active, is_finished = True, False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.may_follow = threading.Event()
        self.may_follow.set()
        self.accepted: list[int] = []

    def accept(self, token_id: int) -> bool:
        self.may_follow.wait(60)
        end = time.thread_time() + self.seconds
        while time.thread_time() < end:
            time.sleep(0)  # as the library: other threads run meanwhile
        self.accepted.append(token_id)
        return token_id != 13

    def fill_bitmask(self, row: Bitmask) -> None:
        row.fill(-1)

    def look_ahead(self, guess: list[int], words: int) -> tuple[list[int], list[Any]]:
        return guess, [np.full(words, -1, np.int32)] * len(guess)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def test_a_paced_matcher_follows_tokens(pool: ThreadPoolExecutor) -> None:
    matcher = SlowMatcher(0.0)
    paced_matcher = PacedMatcher(matcher, 4, pool.submit)
    assert paced_matcher.settle(5)
    for token in (5, 6):
        paced_matcher.advance(token)
        assert paced_matcher.settle(5)
    assert matcher.accepted == [5, 6]
    assert paced_matcher.mask is not None and (paced_matcher.mask == -1).all()
    paced_matcher.advance(13)
    with pytest.raises(RuntimeError, match="token 13, which the constraint forbids"):
        paced_matcher.settle(5)


def test_a_slow_constraint_ends_with_its_own_error(pool: ThreadPoolExecutor) -> None:
    matcher = SlowMatcher(0.1)
    slow = PacedMatcher(matcher, 4, pool.submit)
    assert slow.settle(5)
    with pytest.raises(RequestError, match="takes too much time to follow"):
        for token in range(20):
            matcher.may_follow.clear()
            slow.advance(5)
            followed = token
            assert not slow.settle(0.0)
            matcher.may_follow.set()
            assert slow.settle(60)
    assert 3 <= followed <= 8, "half a second, and a hundredth for each token"
    assert slow.look_ahead([1, 2]) == ([], [])


def test_a_constraint_that_never_answers_is_given_up(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = SlowMatcher(0.0)
    stuck.may_follow.clear()
    matcher = PacedMatcher(stuck, 4, pool.submit)
    assert matcher.settle(5)
    matcher.advance(5)
    assert not matcher.settle(0.0)
    monkeypatch.setattr(paced, "LONGEST_SECONDS", 0.0)
    with pytest.raises(RequestError, match="too much time"):
        matcher.settle(0.0)
    stuck.may_follow.set()


def slow_core(monkeypatch: pytest.MonkeyPatch, seconds: float, **config: Any) -> EngineCore:
    core = make_core(**config)
    words = -(-core.config.model.vocab_size // 32)
    monkeypatch.setattr(
        core, "_paced", lambda _: PacedMatcher(SlowMatcher(seconds), words, core._masks.submit)
    )
    monkeypatch.setattr(compiler, "compile", lambda *_: None or object())
    return core


def test_other_streams_go_on_beside_a_slow_constraint(monkeypatch: pytest.MonkeyPatch) -> None:
    core = slow_core(monkeypatch, 0.3)
    plain = make_request("plain", [11, 12], 100)
    core.add(plain)
    core.add(make_request("slow", [14, 15], 100, guided=GuidedSpec("regex", "a")))
    gaps, found, last = [], [], time.perf_counter()
    ends = {}
    while core.has_work:
        for output in core.step():
            if output.request_id == "plain":
                gaps.append(time.perf_counter() - last)
                last = time.perf_counter()
                found += output.new_token_ids
            if output.finished:
                ends[output.request_id] = output
    core.check_integrity()
    assert found == tokens(run(make_core(), plain)["plain"])
    assert ends["slow"].error_code == 400
    assert "takes too much time" in str(ends["slow"].error_msg)
    assert float(np.median(gaps)) < 0.05, "no step waits for the 0.3 s"


@pytest.mark.parametrize("seconds", [0.0, 0.008])
def test_answers_are_the_same_however_long_a_constraint_takes(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    names = [f"r{i}" for i in range(3)]
    spec = GuidedSpec("regex", "a")
    requests = [make_request(n, [20, 21 + i], 12, guided=spec) for i, n in enumerate(names)]
    found = run(slow_core(monkeypatch, seconds), *requests)
    plain = run(make_core(), *(make_request(n, [20, 21 + i], 12) for i, n in enumerate(names)))
    assert {n: tokens(found[n]) for n in names} == {n: tokens(plain[n]) for n in names}


# Trials ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(demo_dir: Path) -> Ernie4_5Tokenizer:
    return Ernie4_5Tokenizer.from_pretrained(demo_dir, eos_token_ids=[2, 7])


@pytest.fixture(scope="module")
def trials(tokenizer: Ernie4_5Tokenizer) -> Iterator[ConstraintTrial]:
    trials = ConstraintTrial(Vocabulary.of(tokenizer, 8192))
    yield trials
    trials.close()


def test_a_trial_says_what_compiling_says(
    trials: ConstraintTrial, tokenizer: Ernie4_5Tokenizer
) -> None:
    for spec in (
        GuidedSpec("choice", '["yes", "no </s>"]'),
        GuidedSpec("json_schema", json.dumps({"type": "object"})),
        GuidedSpec("regex", "(("),
        GuidedSpec("json_schema", "false"),
        GuidedSpec("grammar", "start: nowhere"),
        AMBIGUOUS,
    ):
        expected = error = None
        try:
            compiler.compile(spec, tokenizer, 8192)
        except RequestError as failure:
            expected = (str(failure), failure.param)
        for _ in range(2):
            error = None
            try:
                trials.check(spec)
            except RequestError as failure:
                error = (str(failure), failure.param)
            assert error == expected


@pytest.mark.parametrize("what", ["time", "memory", "crash"])
def test_a_trial_is_killed_without_harm(
    tokenizer: Ernie4_5Tokenizer, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    bodies = {
        "time": "while True: pass",
        "memory": "x = bytearray(1 << 40)",
        "crash": "import os; os.kill(os.getpid(), 11)",
    }
    monkeypatch.setattr(trial, "_RUN", PATCHED.format(path="{path!r}", body=bodies[what]))
    trials = ConstraintTrial(Vocabulary.of(tokenizer, 8192))
    try:
        started = time.monotonic()
        with pytest.raises(RequestError, match="too much"):
            trials.check(GuidedSpec("regex", "hostile"))
        assert time.monotonic() - started < 30
        trials.check(GuidedSpec("regex", "plain"))
    finally:
        trials.close()


def test_a_busy_machine_is_no_fault_of_a_constraint(
    tokenizer: Ernie4_5Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What could not be tried in time, or not at all, is tried again when it is asked again."""
    began = tmp_path / "began"
    body = f"""import os, time
        if not os.path.exists({str(began)!r}):
            open({str(began)!r}, "w").close()
            time.sleep(60)"""
    code = f"{PATCHED.format(path='{path!r}', body=body)}".replace("\ntrial.main", WAITS_A_SECOND)
    monkeypatch.setattr(trial, "_RUN", code)
    trials = ConstraintTrial(Vocabulary.of(tokenizer, 8192))
    spec = GuidedSpec("regex", "hostile")
    try:
        with monkeypatch.context() as no_process:
            no_process.setattr(trial.subprocess, "Popen", Mock(side_effect=BlockingIOError))
            with pytest.raises(RequestError, match="cannot be tried"):
                trials.check(spec)
        with pytest.raises(RequestError, match="too much time"):
            trials.check(spec)
        assert began.exists()
        until(lambda: is_usable(trials, spec))
    finally:
        trials.close()


def is_usable(trials: ConstraintTrial, spec: GuidedSpec) -> bool:
    try:
        trials.check(spec)
    except RequestError:
        return False
    return True


WAITS_A_SECOND = "\ntrial.WALL_SECONDS = 1.0\ntrial.main"
PATCHED = """\
import sys
sys.path[:] = {path}
from fastdeploy_lite.guided import trial
build = trial.GuidedDecoder.compile
def compile(self, spec):
    if spec.value == "hostile":
        {body}
    return build(self, spec)
trial.GuidedDecoder.compile = compile
trial.main()
"""


def test_the_cache_counts_bytes(
    tokenizer: Ernie4_5Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "CACHE_BYTES", 4 * compiler.LEAST_BYTES)
    decoder = compiler.GuidedDecoder(tokenizer)
    for i in range(9):
        decoder.compile(GuidedSpec("choice", json.dumps([f"x{i}"])))
        assert decoder._cached_bytes == sum(size for _, size in decoder._cache.values())
        assert decoder._cached_bytes <= 4 * compiler.LEAST_BYTES
    assert 0 < len(decoder._cache) <= 4
    monkeypatch.setattr(compiler, "_resident_bytes", iter([0, 1 << 40]).__next__)
    decoder.compile(GuidedSpec("choice", '["huge"]'))
    assert not decoder._cache, "what is larger than the cache is not kept"
