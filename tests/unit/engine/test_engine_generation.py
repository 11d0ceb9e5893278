"""How an answer ends: EOS, stops, limits, thinking, constraints; and that faults stay alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import paddle
import pytest
from fake_runner import FakeRunner
from helpers import (
    EOS,
    demo_tokenizer,
    make_config,
    make_core,
    make_request,
    run,
    runner_of,
    tokens,
)

from fastdeploy_lite.config import EarlyStopConfig, FDConfig, RuntimeConfig
from fastdeploy_lite.engine.engine_core import EngineCore, EngineDeadError
from fastdeploy_lite.guided.spec import GuidedSpec
from fastdeploy_lite.request.messages import EngineRequest
from fastdeploy_lite.request.step import SequenceSlice, SliceResult, TokenLogprobs
from fastdeploy_lite.utils.errors import ConfigError


class Script(FakeRunner):
    """A runner that writes a given answer, then letters `a`; -1 marks a forced token."""

    def __init__(self, answer: Sequence[int], logprob: float = -0.5) -> None:
        super().__init__(64)
        self.answer = list(answer)
        self.logprob = logprob
        self.seen: list[SequenceSlice] = []

    def _result(self, part: SequenceSlice) -> SliceResult:
        self.seen.append(part)
        if not part.sample:
            return SliceResult()
        filler = demo_tokenizer().encode_text("a")[0]
        token = self.answer[part.step] if part.step < len(self.answer) else filler
        if part.bitmask is not None:
            allowed = np.unpackbits(part.bitmask.view(np.uint8), bitorder="little").nonzero()[0]
            token = token if token in allowed else int(allowed[0])
        token = part.forced_token if part.forced_token >= 0 else token
        wanted = part.sampling.logprobs is not None
        return SliceResult([token], [TokenLogprobs(self.logprob, 1, [], [])] if wanted else None)


def scripted(answer: Sequence[int], logprob: float = -0.5, **config: Any) -> EngineCore:
    settings = make_config(**config)
    return EngineCore(with_vocabulary(settings), Script(answer, logprob), demo_tokenizer(), 64)


def with_vocabulary(config: RuntimeConfig) -> RuntimeConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=8192))


def ids(text: str) -> list[int]:
    return demo_tokenizer().encode_text(text)


def finish(core: EngineCore, request: EngineRequest) -> tuple[list[int], Any]:
    outputs = run(core, request)[request.request_id]
    return tokens(outputs), outputs[-1]


PROMPT = [20, 21, 22]


@pytest.fixture
def original_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_LITE_COUNT_CLOSING_EOS", "1")


@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize("count", [1, 3])
def test_every_token_up_to_the_limit_is_the_models(count: int, logprobs: int | None) -> None:
    core = scripted([30, 31, 32, 33])
    produced, last = finish(core, make_request("r", PROMPT, count, logprobs=logprobs))
    assert (produced, last.finish_reason) == ([30, 31, 32, 33][:count], "length")
    assert core.stats().steps == count


def test_a_natural_eos_at_the_limit_is_a_stop() -> None:
    produced, last = finish(scripted([30, 31, 2]), make_request("r", PROMPT, 3))
    assert (produced, last.finish_reason) == ([30, 31, EOS], "stop")


def test_a_stop_at_the_limit_has_no_room_for_the_closing_eos() -> None:
    request = make_request("r", PROMPT, 2, stop_token_seqs=((31,),))
    produced, last = finish(scripted([30, 31, 32]), request)
    assert (produced, last.finish_reason, last.stop_reason) == ([30, 31], "stop", 31)


@pytest.mark.usefixtures("original_counting")
def test_the_last_slot_is_eos_at_the_length_limit() -> None:
    produced, last = finish(scripted([30, 31, 32, 33]), make_request("r", PROMPT, 3))
    assert produced == [30, 31, EOS]
    assert (last.finish_reason, last.finished) == ("length", True)


@pytest.mark.usefixtures("original_counting")
def test_one_token_is_just_eos() -> None:
    produced, last = finish(scripted([30]), make_request("r", PROMPT, 1))
    assert (produced, last.finish_reason) == ([EOS], "length")


def test_every_eos_id_appears_as_the_first_one() -> None:
    produced, last = finish(scripted([30, 7]), make_request("r", PROMPT, 10))
    assert (produced, last.finish_reason) == ([30, EOS], "stop")


@pytest.mark.usefixtures("original_counting")
def test_a_natural_eos_in_the_last_slot_is_length() -> None:
    produced, last = finish(scripted([30, 31, 2]), make_request("r", PROMPT, 3))
    assert (produced, last.finish_reason) == ([30, 31, EOS], "length")


@pytest.mark.usefixtures("original_counting")
def test_the_closing_eos_costs_a_step_only_when_its_logprob_is_wanted() -> None:
    for logprobs, steps in ((None, 4), (0, 5)):
        core = scripted([30, 31, 32, 33])
        outputs = run(core, make_request("r", PROMPT, 5, logprobs=logprobs))["r"]
        assert tokens(outputs) == [30, 31, 32, 33, EOS]
        assert core.stats().steps == steps
        assert all((o.new_logprobs is not None) == (logprobs is not None) for o in outputs)


def test_at_most_one_token_per_message() -> None:
    outputs = run(scripted([]), make_request("r", PROMPT, 9))["r"]
    assert [len(o.new_token_ids) for o in outputs] == [1] * 9
    assert [o.finished for o in outputs] == [False] * 8 + [True]


def test_eos_is_banned_below_min_tokens() -> None:
    core = scripted([30, 31, 32])
    run(core, make_request("r", PROMPT, 6, min_tokens=2))
    runner = core._executor
    assert isinstance(runner, Script)
    assert [part.banned_now for part in runner.seen] == [(2, 7), (2, 7), (), (), (), ()]


@pytest.mark.parametrize(
    ("answer", "stop", "expected"),
    [
        ("ab。cd", ("。",), "ab。"),
        ("hello world", ("lo w",), "hello world"),  # ends inside the token " world" or at it
        ("x🙂y", ("🙂",), "x🙂"),
        ("one two three", ("two", "three"), "one two"),
    ],
)
def test_stop_text_is_kept_and_the_next_slot_is_eos(
    answer: str, stop: tuple[str, ...], expected: str
) -> None:
    core = scripted(ids(answer))
    produced, last = finish(core, make_request("r", PROMPT, 100, stop=stop))
    text = demo_tokenizer().decode(produced[:-1])
    assert text.startswith(expected[: len(text)])
    assert any(s in text for s in stop)
    assert not any(s in demo_tokenizer().decode(produced[:-2]) for s in stop)
    assert produced[-1] == EOS
    assert (last.finish_reason, last.stop_reason) == ("stop", next(s for s in stop if s in text))


def test_stop_text_spelled_by_other_tokens_is_found() -> None:
    """Tokenised alone, the text is other tokens than in context: matching tokens misses it."""
    answer = [t for c in "the end" for t in ids(c)]
    assert ids("end") != answer[-3:]
    produced, last = finish(scripted(answer), make_request("r", PROMPT, 100, stop=("end",)))
    assert (produced, last.stop_reason) == ([*answer, EOS], "end")


def test_the_stop_text_that_ends_first_counts_and_none_that_came_too_early() -> None:
    answer = ids("abc")
    produced, last = finish(scripted(answer), make_request("r", PROMPT, 100, stop=("c", "ab")))
    text = demo_tokenizer().decode(produced)
    assert last.stop_reason == ("ab" if text.startswith("ab") else "c")
    # "b" is complete before `min_tokens` lets it count; what follows it completes nothing.
    answer = [t for c in "xbyyyyybz" for t in ids(c)]
    request = make_request("r", PROMPT, 100, min_tokens=4, stop=("yyyzyyyy", "b"))
    produced, last = finish(scripted(answer), request)
    assert demo_tokenizer().decode(produced[:-1]) == "xbyyyyyb"
    assert last.stop_reason == "b"


def test_stop_tokens_and_sequences() -> None:
    sequences = ((18,), (40, 41))
    produced, last = finish(
        scripted([30, 18, 31]), make_request("r", PROMPT, 50, stop_token_seqs=sequences)
    )
    assert (produced, last.stop_reason) == ([30, 18, EOS], 18)
    produced, last = finish(
        scripted([40, 30, 40, 41, 5]), make_request("r", PROMPT, 50, stop_token_seqs=sequences)
    )
    assert (produced, last.stop_reason) == ([40, 30, 40, 41, EOS], 41)


def test_stops_wait_for_min_tokens() -> None:
    request = make_request("r", PROMPT, 50, min_tokens=6, stop_token_seqs=((18,),))
    produced, _ = finish(scripted([18, 18, 18, 18, 18, 18, 18]), request)
    assert produced == [18] * 5 + [EOS]


def thinking_request(budget: int | None, **extra: Any) -> EngineRequest:
    return make_request(
        "r", PROMPT, 60, thinking=True, think_start_id=18, think_end_id=19,
        think_truncate_ids=(50, 19), reasoning_max_tokens=budget, **extra,
    )  # fmt: skip


def test_the_end_of_thinking_is_forced_when_the_budget_is_spent() -> None:
    produced, _ = finish(scripted([30] * 40), thinking_request(5))
    assert produced[:8] == [30] * 5 + [50, 19, 30]
    assert produced.count(19) == 1


def test_thinking_that_ends_in_time_is_left_alone() -> None:
    answer = [30, 30, 19, *[31] * 60]
    produced, _ = finish(scripted(answer), thinking_request(5))
    assert produced[:-1] == answer[:59]


def test_thinking_that_the_model_opens_itself_is_limited_too() -> None:
    request = make_request(
        "r", PROMPT, 20, think_start_id=18, think_end_id=19, think_truncate_ids=(19,),
        reasoning_max_tokens=2,
    )  # fmt: skip
    produced, _ = finish(scripted([30, 18, *[31] * 30]), request)
    assert produced[:6] == [30, 18, 31, 31, 19, 31]


def test_a_budget_of_zero_forces_the_end_at_once() -> None:
    produced, _ = finish(scripted([30] * 40), thinking_request(0))
    assert produced[:3] == [50, 19, 30]


def test_response_length_counts_after_thinking() -> None:
    answer = [30, 30, 30, 19, *[31] * 60]
    produced, last = finish(scripted(answer), thinking_request(None, response_max_tokens=4))
    assert produced == [30, 30, 30, 19, 31, 31, 31, 31]
    assert last.finish_reason == "length"


def test_early_stop_ends_repetition() -> None:
    early = EarlyStopConfig(window_size=6, threshold=0.9)
    request = make_request("r", PROMPT, 100)
    produced, last = finish(scripted([], logprob=-0.01, early_stop=early), request)
    assert (len(produced), last.finish_reason) == (7, "stop")
    produced, _ = finish(scripted([], logprob=-0.2, early_stop=early), request)
    assert len(produced) == 100


def test_early_stop_shows_no_logprobs_that_nobody_asked_for() -> None:
    early = EarlyStopConfig(window_size=6)
    outputs = run(scripted([], early_stop=early), make_request("r", PROMPT, 4))["r"]
    assert all(o.new_logprobs is None for o in outputs)
    with pytest.raises(ConfigError, match="early stop needs probabilities"):
        scripted([], early_stop=early, logprobs_mode="raw_logits")


# Constraints -------------------------------------------------------------------------------------


def test_a_constraint_shapes_the_answer_and_ends_it() -> None:
    spec = GuidedSpec("choice", '["yes", "no"]')
    produced, last = finish(scripted([99] * 9), make_request("r", PROMPT, 50, guided=spec))
    assert demo_tokenizer().decode(produced[:-1]) in ("yes", "no")
    assert (produced[-1], last.finish_reason) == (EOS, "stop")


def test_a_finished_constraint_ends_whatever_min_tokens_says() -> None:
    spec = GuidedSpec("regex", "abc")
    request = make_request("r", PROMPT, 50, guided=spec, min_tokens=40)
    produced, _ = finish(scripted([]), request)
    assert demo_tokenizer().decode(produced[:-1]) == "abc"


def test_a_constraint_waits_for_the_end_of_thinking() -> None:
    spec = GuidedSpec("regex", "[0-9]{3}", start_after="</think>")
    request = thinking_request(4, guided=spec)
    produced, _ = finish(scripted([30] * 50), request)
    text = demo_tokenizer().decode(produced[:-1])
    assert text.partition("</think>")[2].isdigit()
    assert len(text.partition("</think>")[2]) == 3


def test_a_bad_constraint_ends_its_request_only() -> None:
    core = scripted([30] * 9)
    bad = make_request("bad", PROMPT, 9, guided=GuidedSpec("regex", "(("))
    outputs = run(core, bad, make_request("good", PROMPT, 4))
    assert (outputs["bad"][-1].error_code, outputs["bad"][-1].finish_reason) == (400, "error")
    assert "regex" in outputs["bad"][-1].error_msg
    assert tokens(outputs["good"]) == [30, 30, 30, 30]


def test_a_request_may_be_aborted_while_its_constraint_compiles() -> None:
    core = scripted([30] * 9)
    core.add(make_request("r", PROMPT, 9, guided=GuidedSpec("regex", "[a-z]{1,500}x")))
    core.abort(["r"])
    outputs = []
    while core.has_work:
        outputs += core.step()
    assert [o.finish_reason for o in outputs] == ["abort"]
    core.check_integrity()


def test_an_id_may_be_used_again_while_the_old_constraint_still_compiles() -> None:
    core = scripted([30] * 9)
    core.add(make_request("r", PROMPT, 9, guided=GuidedSpec("regex", "[a-z]{1,400}y")))
    core.abort(["r"])
    outputs = run(core, make_request("r", PROMPT, 4))["r"]
    assert [o.finish_reason for o in outputs if o.finished] == ["abort", "length"]
    assert tokens(outputs) == [30, 30, 30, 30]


# Processors --------------------------------------------------------------------------------------


class AddToRow:
    """A processor as upstream's users write them."""

    def __init__(self, config: RuntimeConfig) -> None:
        self.vocab = config.model.vocab_size
        self.amount = 0.0

    def update_state(self, share_inputs: dict[str, Any]) -> None:
        self.amount = share_inputs["logits_processors_args"][0].get("amount", 0.0)
        self.count = int(share_inputs["step_idx"][0][0])

    def apply(self, logits: Any) -> Any:
        assert list(logits.shape) == [1, self.vocab]
        return logits + self.amount + self.count


def test_own_processors_run_per_request() -> None:
    core = scripted([30] * 9, logits_processors=("test_engine_generation:AddToRow",))
    arguments = msgspec.msgpack.encode({"amount": 2.5})
    run(core, make_request("r", PROMPT, 3, logits_processors_args=arguments))
    runner = core._executor
    assert isinstance(runner, Script)
    processors = runner.seen[-1].logits_processors
    assert processors is not None
    row = processors[0]([1, 2], np.zeros(8192, np.float32))
    assert row is not None
    assert (row.dtype, row.shape, float(row[5])) == (np.float32, (8192,), 4.5)


class DocumentedBias:
    """As the original's documents show one: flat stop flags, Paddle tensors, its FDConfig."""

    def __init__(self, fd_config: FDConfig) -> None:
        self.device = paddle.device.get_device()
        self.dtype = fd_config.model_config.dtype
        self.batch_ids: list[int] = []
        self.token_ids: list[int] = []
        self.biases: list[float] = []

    def update_state(self, share_inputs: dict[str, Any]) -> None:
        flags, all_args = share_inputs["stop_flags"], share_inputs["logits_processors_args"]
        alive = [args for args, stopped in zip(all_args, flags, strict=True) if not stopped]
        self.batch_ids, self.token_ids, self.biases = [], [], []
        for slot, args in enumerate(alive):
            bias = args.get("logit_bias") or {}
            self.batch_ids.extend([slot] * len(bias))
            self.token_ids.extend(map(int, bias))
            self.biases.extend(bias.values())

    def apply(self, logits: paddle.Tensor) -> paddle.Tensor:
        if not self.batch_ids:
            return logits
        rows = paddle.to_tensor(self.batch_ids, dtype="int64")
        columns = paddle.to_tensor(self.token_ids, dtype="int64")
        biases = paddle.to_tensor(self.biases, dtype=self.dtype)
        logits[rows, columns] = logits[rows, columns] + biases
        return logits


@pytest.mark.parametrize(
    "name", ["test_engine_generation:DocumentedBias", "test_engine_generation.DocumentedBias"]
)
def test_the_documented_processor_works(name: str) -> None:
    built_in = "fastdeploy.model_executor.logits_processor:LogitBiasLogitsProcessor"
    core = scripted([30] * 9, logits_processors=(name, built_in))
    arguments = msgspec.msgpack.encode({"logit_bias": {"5": 3.5, "7": -2.0}})
    run(core, make_request("r", PROMPT, 3, logits_processors_args=arguments))
    runner = core._executor
    assert isinstance(runner, Script)
    (processor,) = runner.seen[-1].logits_processors or ()
    row = processor([1, 2], np.zeros(8192, np.float32))
    assert row is not None
    assert (float(row[5]), float(row[7]), float(np.abs(row).sum())) == (3.5, -2.0, 5.5)


@pytest.mark.parametrize("name", ["NoSuch", "no.module:X", "test_engine_generation:NoSuch"])
def test_unknown_processors_are_refused_at_start(name: str) -> None:
    with pytest.raises(ConfigError, match="logits_processors"):
        scripted([], logits_processors=(name,))


# Faults ------------------------------------------------------------------------------------------


def test_a_request_that_the_runner_fails_for_ends_alone() -> None:
    core = make_core()
    runner_of(core).failing = {"bad"}
    requests = [make_request(name, [11, 12, 13 + i], 6) for i, name in enumerate(["a", "bad", "b"])]
    outputs = run(core, *requests)
    assert outputs["bad"][-1].error_code == 500
    assert "FloatingPointError: cannot compute ['bad']" in outputs["bad"][-1].error_msg
    for request in (requests[0], requests[2]):
        alone = run(make_core(), request)[request.request_id]
        assert tokens(outputs[request.request_id]) == tokens(alone)
    assert core.stats().failed_steps == 1


def test_a_runner_that_always_fails_is_a_dead_engine() -> None:
    core = make_core(max_num_seqs=1)
    runner_of(core).failing = {f"r{i}" for i in range(5)}
    for i in range(5):
        core.add(make_request(f"r{i}", [11], 5))
    outputs = []
    with pytest.raises(EngineDeadError, match="failed 3 steps in a row: FloatingPointError"):
        for _ in range(9):
            outputs += core.step()
    assert [o.error_code for o in outputs] == [500, 500]


def test_a_sequence_error_of_the_runner_ends_its_request_only() -> None:
    class OneBad(Script):
        def _result(self, part: SequenceSlice) -> SliceResult:
            if part.request_id == "bad":
                return SliceResult(error="logits are NaN\nforged line")
            return super()._result(part)

    core = EngineCore(with_vocabulary(make_config()), OneBad([30] * 9), demo_tokenizer(), 64)
    outputs = run(core, make_request("bad", PROMPT, 5), make_request("good", PROMPT, 3))
    assert outputs["bad"][-1].error_msg == "logits are NaN\\nforged line"
    assert tokens(outputs["good"]) == [30, 30, 30]


def test_the_core_refuses_what_cannot_run() -> None:
    core = make_core(max_model_len=64, num_blocks=4)
    too_long = run(core, make_request("r", [11] * 60, 10))["r"]
    assert (too_long[0].error_code, too_long[0].finished) == (400, True)
    assert "Input text is too long" in too_long[0].error_msg
    assert run(core, make_request("e", [], 4))["e"][0].error_code == 400
    core.add(make_request("twice", [11], 4))
    with pytest.raises(ValueError, match="'twice' is in use"):
        core.add(make_request("twice", [11], 4))


def test_a_full_queue_answers_at_once() -> None:
    core = make_core()
    limit = core.config.scheduler.max_waiting_requests
    for i in range(limit + 1):
        core.add(make_request(f"r{i}", [11], 2))
    refused = [o for o in core.step() if o.error_code == 429]
    assert [o.request_id for o in refused] == [f"r{limit}"]


def test_pause_and_resume() -> None:
    core = make_core()
    core.add(make_request("r", [11], 5))
    core.step()
    core.add(make_request("waits", [11], 5))
    core.pause()
    core.add(make_request("late", [11], 5))  # it was on its way
    outputs = core.step()
    assert [(o.request_id, o.finish_reason, o.error_code) for o in outputs] == [
        ("r", "abort", 499), ("waits", "abort", 499), ("late", "error", 503),
    ]  # fmt: skip
    assert not core.has_work
    core.check_integrity()
    core.resume()
    assert len(tokens(run(core, make_request("r", [11], 5))["r"])) == 5


def test_stats_and_times_tell_the_truth() -> None:
    core = make_core()
    outputs = run(core, make_request("a", [11] * 70, 5), make_request("b", [12] * 10, 3))
    stats = core.stats()
    assert (stats.requests, stats.prompt_tokens, stats.generation_tokens) == (2, 80, 8)
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, 64)
    assert stats.num_cached_blocks == 1
    timing = outputs["a"][0].timing
    assert timing.received <= timing.scheduled <= timing.first_token
    assert outputs["a"][-1].timing == timing
