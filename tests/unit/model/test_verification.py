"""Guesses never change an answer: tokens, log-probabilities and processors' views, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_driver import PaddedSteps, Running, make_runner, sequences

from fastdeploy_lite.model_executor.verification import _row_of
from fastdeploy_lite.request.step import GuessedPosition, SamplerParams, SequenceSlice, SliceResult
from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.worker.model_runner import ModelRunner

LENGTH = 24
KINDS = {
    "greedy": SamplerParams(temperature=0.0),
    "sampled": SamplerParams(temperature=1.0, top_p=0.9, seed=7),
    "hot": SamplerParams(temperature=2.0, top_k=50, min_p=0.01, seed=8),
    "penalties": SamplerParams(
        temperature=0.8,
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        presence_penalty=0.3,
        seed=9,
    ),
    "logprobs": SamplerParams(temperature=0.7, seed=10, logprobs=3),
    "bias": SamplerParams(temperature=0.9, seed=11, logit_bias={5: 3.0}, banned_ids=(6, 7)),
}


@pytest.fixture(scope="module")
def runner(tiny_2bits: Path) -> Iterator[ModelRunner]:
    yield make_runner(tiny_2bits, speculative=SpeculativeConfig("ngram"))


def answers(running: list[Running]) -> list[list[int]]:
    return [one.output for one in running]


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(3, 60, size).tolist() for size in (3, 70, 9, 1, 30, 65)]


def start(kinds: list[str]) -> list[Running]:
    running = sequences(prompts(), 256)
    for one, kind in zip(running, kinds, strict=True):
        one.sampling = KINDS[kind]
    return running


def guess(truth: list[int], known: int, rng: random.Random) -> list[int]:
    """Up to five tokens that follow, some of them wrong."""
    wrong = 0.0 if rng.random() < 0.3 else 0.3
    tokens = truth[known : known + rng.randrange(6)]
    return [rng.randrange(60) if rng.random() < wrong else token for token in tokens]


def draft_slice(one: Running, guesses: list[int], **extra: Any) -> SequenceSlice:
    part = one.slice(10_000, **extra)
    if part.sample and guesses:
        part.token_ids = [*part.token_ids, *guesses]
        part.draft_token_ids = guesses
    return part


def take(one: Running, result: SliceResult) -> None:
    one.take(result)
    # The last sampled token is not computed yet.
    one.done = len(one.prompt) + len(one.output) - 1


def plain(runner: ModelRunner, running: list[Running]) -> list[list[Any]]:
    """Outputs and log-probabilities without guesses; the processors' rows are kept in `running`."""
    logprobs: list[list[Any]] = [[] for _ in running]
    while len(running[0].output) < LENGTH:
        results = runner.execute([one.slice(10_000) for one in running])
        for one, result, found in zip(running, results, logprobs, strict=True):
            one.take(result)
            found.extend(result.logprobs or [None])
    return logprobs


@pytest.mark.parametrize("by_graph", [False, True])
@pytest.mark.parametrize("with_processors", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_guesses_change_nothing(
    runner: ModelRunner, seed: int, with_processors: bool, by_graph: bool
) -> None:
    kinds = list(KINDS)
    expected = start(kinds)
    expected_logprobs = plain(runner, expected)
    rng = random.Random(seed)
    graphs = PaddedSteps(largest=32)
    runner._guess_graphs = graphs if by_graph else None
    running = start(kinds)
    found: list[list[Any]] = [[] for _ in running]
    checked = right = 0
    while pending := [i for i, one in enumerate(running) if len(one.output) < LENGTH]:
        parts = []
        for i in pending:
            one = running[i]
            part = draft_slice(one, guess(expected[i].output, len(one.output), rng))
            if not with_processors:
                part.logits_processors = None
            parts.append(part)
        for i, part, result in zip(pending, parts, runner.execute(parts), strict=True):
            take(running[i], result)
            found[i] += result.logprobs or [None] * len(result.token_ids)
            checked += len(part.draft_token_ids)
            right += len(result.token_ids) - 1
    runner._guess_graphs = None
    assert 0 < right < checked
    assert (len(set(graphs.sizes)) > 1) == by_graph
    for i, one in enumerate(running):
        assert one.output[:LENGTH] == expected[i].output, kinds[i]
        assert found[i][:LENGTH] == expected_logprobs[i], kinds[i]
        if with_processors:  # a row for each token of the answer, with the same bits
            pairs = zip(one.rows[:LENGTH], expected[i].rows, strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs), kinds[i]


def test_masks_and_bans_follow_the_guesses(runner: ModelRunner) -> None:
    """Rows after a guess have masks of their own; bans end where the answer is long enough."""
    words = -(-runner.config.model.vocab_size // 32)

    def only(token: int) -> np.ndarray[Any, Any]:
        mask = np.zeros(words, np.int32)
        mask[token // 32] = np.array(1 << token % 32, np.uint32).view(np.int32)
        return mask

    one = start(["sampled"] * 6)[0]
    take(one, runner.execute([one.slice(100, bitmask=only(11))])[0])
    part = draft_slice(one, [12, 13], bitmask=only(12), draft_bitmasks=[only(13), only(14)])
    take(one, runner.execute([part])[0])
    assert one.output == [11, 12, 13, 14]
    free = draft_slice(one, [15], bitmask=only(15), draft_bitmasks=[None])
    take(one, runner.execute([free])[0])
    assert one.output[4] == 15
    assert len(one.output) == 6


@pytest.mark.parametrize("num_banned", [2, 3])
def test_bans_hold_for_as_many_rows_as_the_answer_is_too_short(
    runner: ModelRunner, num_banned: int
) -> None:
    expected = start(["greedy"] * 6)[1]
    plain(runner, [expected])
    banned = expected.output[3]
    assert banned not in expected.output[1:3]
    one = start(["greedy"] * 6)[1]
    take(one, runner.execute([one.slice(100)])[0])
    part = draft_slice(one, expected.output[1:4], banned_now=(banned,), num_banned_now=num_banned)
    take(one, runner.execute([part])[0])
    assert one.output[:3] == expected.output[:3]
    assert (one.output[3] == banned) == (num_banned == 2)


def test_a_row_that_fails_is_left_to_its_own_step(runner: ModelRunner) -> None:
    expected = start(["greedy"] * 6)[0]
    plain(runner, [expected])
    one = start(["greedy"] * 6)[0]
    take(one, runner.execute([one.slice(100)])[0])
    calls: list[int] = []

    def fails_third(output: Any, _: Any) -> None:
        calls.append(len(output))
        if len(output) == 3:
            raise ValueError("no third token")

    part = draft_slice(one, expected.output[1:4])
    part.logits_processors = [fails_third]
    result = runner.execute([part])[0]
    assert result.error is None
    assert result.token_ids == expected.output[1:3]
    assert calls == [1, 2, 3]
    take(one, result)
    part = draft_slice(one, [])
    part.logits_processors = [fails_third]
    assert "no third token" in (runner.execute([part])[0].error or "")


def test_the_rows_of_a_slice_differ_only_where_they_must() -> None:
    """And what sampling reads is the same."""
    given = {field.name: object() for field in fields(SequenceSlice)}
    given |= {"draft_token_ids": [7, 8], "draft_bitmasks": [None, None], "output_token_ids": [1]}
    part = SequenceSlice(**{**given, "step": 5, "num_banned_now": 2})
    assert _row_of(part, 0) is part
    expected = {field.name: getattr(part, field.name) for field in fields(GuessedPosition)}
    expected |= {"bitmask": None, "step": 6, "output_token_ids": [1, 7]}
    assert _row_of(part, 1) == GuessedPosition(**expected)
    part.logits_processors, part.num_banned_now = None, 1
    expected |= {"logits_processors": None, "banned_now": (), "output_token_ids": [1]}
    assert _row_of(part, 1) == GuessedPosition(**expected)
