"""The scheduler and the core over a fake runner: any schedule gives the same tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from fake_runner import FakeRunner, next_token
from helpers import demo_tokenizer, make_core, make_request, run, runner_of, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from machine import handicap, work_seconds

from fastdeploy_lite.engine.output_processor import OutputProcessor
from fastdeploy_lite.request.messages import EngineRequest
from fastdeploy_lite.request.step import SequenceSlice, SliceResult


def lone(request: EngineRequest, eos_every: int = 0) -> list[int]:
    """Tokens of a request that has the engine to itself, without any reuse."""
    core = make_core(64, eos_every, max_num_batched_tokens=512, prefix=False)
    return tokens(run(core, request)[request.request_id])


def prompt(length: int, start: int = 0) -> list[int]:
    return [10 + (start + i) % 900 for i in range(length)]


def test_tokens_follow_the_history() -> None:
    request = make_request("a", prompt(5), max_tokens=4, seed=3)
    expected: list[int] = []
    for step in range(4):
        expected.append(next_token(prompt(5) + expected, 3, step))
    assert lone(request) == expected


def test_decodes_come_first_and_prefill_takes_the_rest_of_the_budget() -> None:
    core = make_core(max_num_batched_tokens=64)
    core.add(make_request("a", prompt(10), max_tokens=20))
    core.step()
    core.add(make_request("b", prompt(100, 500), max_tokens=4))
    for _ in range(3):
        core.step()
    assert runner_of(core).steps == [
        [("a", 0, 10)],
        [("a", 10, 1), ("b", 0, 63)],
        [("a", 11, 1), ("b", 63, 37)],
        [("a", 12, 1), ("b", 100, 1)],
    ]


def test_without_chunked_prefill_a_prompt_is_computed_at_once() -> None:
    core = make_core(max_num_batched_tokens=512, chunked=False)
    run(core, *(make_request(f"r{i}", prompt(200, i * 50), max_tokens=3) for i in range(4)))
    prefills = [part for step in runner_of(core).steps for part in step if part[2] > 1]
    assert prefills == [(f"r{i}", 0, 200) for i in range(4)]


def test_admission_is_first_come_first_served() -> None:
    core = make_core(max_num_seqs=2)
    run(core, *(make_request(f"r{i}", prompt(5, i), max_tokens=3 + i) for i in range(5)))
    order = list(dict.fromkeys(name for step in runner_of(core).steps for name, _, _ in step))
    assert order == [f"r{i}" for i in range(5)]


def test_the_sequence_admitted_last_is_preempted_and_comes_back_first() -> None:
    core = make_core(12, max_num_seqs=3, max_model_len=512, prefix=False)
    requests = [make_request(f"r{i}", prompt(60, i * 200), max_tokens=300) for i in range(3)]
    for request in requests:
        core.add(request)
    preempted: list[str] = []
    core._scheduler._on_preempt = lambda sequence: preempted.append(sequence.request_id)
    outputs: dict[str, Any] = {r.request_id: [] for r in requests}
    while core.has_work:
        running = [s.request_id for s in core._scheduler.running]
        seen = len(preempted)
        for output in core.step():
            outputs[output.request_id].append(output)
        for name in preempted[seen:]:
            assert name == running.pop(), "not the one admitted last"
        core.check_integrity()
    assert core.stats().preemptions == len(preempted) > 0
    for request in requests:
        assert tokens(outputs[request.request_id]) == lone(request)


def test_preempted_requests_keep_their_place_before_newcomers() -> None:
    core = make_core(12, max_num_seqs=3, prefix=False)
    for i in range(3):
        core.add(make_request(f"r{i}", prompt(60, i * 200), max_tokens=300))
    for _ in range(300):
        core.step()
        if core.stats().preemptions:
            break
    core.add(make_request("late", prompt(5), max_tokens=5))
    assert [s.request_id for s in core._scheduler.waiting][-1] == "late"
    assert core.stats().num_preempted == len(core._scheduler.waiting) - 1 > 0


def test_prefix_cache_serves_whole_blocks_and_leaves_one_token() -> None:
    core = make_core(max_num_batched_tokens=512)
    shared = prompt(192)
    run(core, make_request("first", shared, max_tokens=3))
    again = run(core, make_request("again", shared, max_tokens=3))["again"]
    longer = run(core, make_request("longer", [*shared, 99, 98], max_tokens=3))["longer"]
    assert again[-1].num_cached_tokens == 128, "192 tokens are 3 blocks; the last one is recomputed"
    assert longer[-1].num_cached_tokens == 192
    assert tokens(again) == lone(make_request("x", shared, max_tokens=3))
    stats = core.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.prefix_hit_tokens) == (3, 2, 320)


@pytest.mark.parametrize("budget", [100, 512])
def test_a_prefix_of_one_batch_is_computed_once(budget: int) -> None:
    """Those who come together share what the first computes, and it counts as cached."""
    core = make_core(64, max_num_batched_tokens=budget)
    shared = prompt(200)
    ends: dict[str, list[int]] = {"a": [], "b": [], "c": [9, 8, 7], "d": [5] * 70}
    requests = [make_request(name, [*shared, *end], max_tokens=3) for name, end in ends.items()]
    outputs = run(core, *requests)
    for request in requests:
        assert tokens(outputs[request.request_id]) == lone(request)
    cached = {name: outputs[name][-1].num_cached_tokens for name in ends}
    assert cached == {"a": 0, "b": 192, "c": 192, "d": 192}
    computed = sum(count for step in runner_of(core).steps for _, _, count in step if count > 1)
    assert computed == 200 + 8 + 11 + 78


def test_nobody_waits_for_a_prefix_that_it_cannot_use() -> None:
    """Without the cache, or where every position must be computed, all begin at once."""
    for prefix, scores in ((False, None), (True, 0)):
        core = make_core(64, max_num_batched_tokens=512, prefix=prefix)
        for name in "ab":
            core.add(make_request(name, prompt(100), max_tokens=3, prompt_logprobs=scores))
        core.step()
        assert runner_of(core).steps == [[("a", 0, 100), ("b", 0, 100)]]


@pytest.mark.parametrize(("output_caching", "cached"), [(True, 128), (False, 64)])
def test_generated_tokens_are_reused_when_configured(output_caching: bool, cached: int) -> None:
    core = make_core(output_caching=output_caching)
    answer = tokens(run(core, make_request("a", prompt(100), max_tokens=60))["a"])[:-1]
    follow_up = [*prompt(100), *answer, 50, 51]
    result = run(core, make_request("b", follow_up, max_tokens=3))["b"]
    assert result[-1].num_cached_tokens == cached
    assert tokens(result) == lone(make_request("b", follow_up, max_tokens=3))


def test_prompt_logprobs_cover_every_position_even_when_cached_or_preempted() -> None:
    core = make_core(12, max_num_seqs=3, max_num_batched_tokens=64)
    run(core, make_request("warm", prompt(150), max_tokens=2))
    requests = [
        make_request(f"r{i}", prompt(150), max_tokens=350, prompt_logprobs=0) for i in range(3)
    ]
    outputs = run(core, *requests)
    assert core.stats().preemptions
    for request in requests:
        found = [o for o in outputs[request.request_id] if o.prompt_logprobs is not None]
        assert len(found) == 1
        assert found[0] is outputs[request.request_id][0]
        assert [entry.logprob for entry in found[0].prompt_logprobs] == [-p for p in range(1, 150)]


def test_a_step_of_64_sequences_costs_less_than_a_millisecond_without_the_model() -> None:
    """Scheduler, rules, messages and text; about 0.45 ms where `work` takes its 0.2."""
    core = make_core(64 * 10, max_num_seqs=64, max_num_batched_tokens=4096)
    core._executor = Instant(1)
    texts = OutputProcessor(demo_tokenizer())
    for i in range(64):
        request = make_request(f"r{i}", prompt(50), max_tokens=400)
        core.add(request)
        texts.add(request)
    core.step()
    seconds, yardsticks = [], []
    for _ in range(300):
        started = time.perf_counter()
        for output in core.step():
            texts.process(output)
        seconds.append(time.perf_counter() - started)
        yardsticks.append(work_seconds())
    assert sorted(seconds)[30] < 1e-3 * handicap(sorted(yardsticks)[30])


class Instant(FakeRunner):
    """A model runner that takes no time."""

    def execute(self, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        return [SliceResult([11] if part.sample else []) for part in slices]


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 300),  # prompt length
        st.sampled_from([0, 1, 2]),  # which shared beginning
        st.integers(1, 150),  # max_tokens
        st.integers(0, 3),  # seed
        st.integers(0, 5),  # arrives after this many steps
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(
    REQUESTS,
    st.integers(10, 20),
    st.sampled_from([64, 100, 256]),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([0, 7]),
)
def test_any_schedule_gives_the_tokens_of_a_lone_run(
    shapes: list[tuple[int, int, int, int, int]],
    num_blocks: int,
    budget: int,
    max_num_seqs: int,
    prefix: bool,
    eos_every: int,
) -> None:
    core = make_core(
        num_blocks,
        eos_every,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=450,
        prefix=prefix,
    )
    requests = [
        make_request(f"r{i}", prompt(length, 300 * kind), max_tokens, seed, min_tokens=1)
        for i, (length, kind, max_tokens, seed, _) in enumerate(shapes)
    ]
    outputs: dict[str, list[Any]] = {request.request_id: [] for request in requests}
    arrivals = sorted(range(len(requests)), key=lambda i: shapes[i][4])
    step = 0
    while arrivals or core.has_work:
        while arrivals and shapes[arrivals[0]][4] <= step:
            core.add(requests[arrivals.pop(0)])
        for output in core.step():
            outputs[output.request_id].append(output)
        step += 1
        core.check_integrity()
        assert step < 5000
    for request in requests:
        assert tokens(outputs[request.request_id]) == lone(request, eos_every)
        ends = [o.finished for o in outputs[request.request_id]]
        assert ends == [False] * (len(ends) - 1) + [True]


SHAPES = st.lists(
    st.tuples(st.integers(1, 150), st.integers(1, 350), st.booleans()), min_size=1, max_size=4
)


class Engine(RuleBasedStateMachine):
    """Requests come, are aborted, and the engine steps, in any order, with few blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.core = make_core(10, 401, max_num_seqs=3, max_num_batched_tokens=64, max_model_len=500)
        self.requests: dict[str, EngineRequest] = {}
        self.outputs: dict[str, list[Any]] = {}
        self.aborted: set[str] = set()

    @initialize(shapes=SHAPES)
    def start(self, shapes: list[tuple[int, int, bool]]) -> None:
        self.add([*shapes, (100, 350, True), (100, 350, False), (20, 350, True)])

    @rule(shapes=SHAPES)
    def add(self, shapes: list[tuple[int, int, bool]]) -> None:
        for length, most, kind in shapes:
            name = f"r{len(self.requests)}"
            self.requests[name] = make_request(name, prompt(length, 400 * kind), most)
            self.outputs[name] = []
            self.core.add(self.requests[name])

    @rule(count=st.integers(1, 200))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.collect()

    @rule(pick=st.integers(0, 1000))
    def abort(self, pick: int) -> None:
        name = f"r{pick % len(self.requests)}"
        if not any(o.finished for o in self.outputs[name]):
            self.aborted.add(name)
        self.core.abort([name, "unknown"])

    @precondition(lambda self: len(self.requests) > 20)
    @rule()
    def reset(self) -> None:
        self.aborted |= {n for n, o in self.outputs.items() if not any(x.finished for x in o)}
        self.core.reset()
        assert self.core.stats().num_free_blocks == 10

    def collect(self) -> None:
        for output in self.core.step():
            self.outputs[output.request_id].append(output)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.core.check_integrity()

    def teardown(self) -> None:
        steps = 0
        while self.core.has_work:
            self.collect()
            steps += 1
            assert steps < 20_000
        self.core.check_integrity()
        stats = self.core.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, 10)
        for name, outputs in self.outputs.items():
            assert [o.finished for o in outputs].count(True) == 1
            expected = lone(self.requests[name], 401)
            if name in self.aborted:
                assert outputs[-1].finish_reason == "abort"
                assert "Aborted" in outputs[-1].error_msg
                assert tokens(outputs) == expected[: len(tokens(outputs))]
            else:
                assert tokens(outputs) == expected


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
