"""A sequence gives bit-identical logits whatever it shares its steps with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_driver import generate, make_runner, sequences

from fastdeploy_lite.model_executor.model_runner import ModelRunner
from fastdeploy_lite.model_executor.step import SamplerParams

LENGTHS = (1, 5, 63, 64, 65, 130)
NEW_TOKENS = 6


def prompts() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [[int(i) for i in random.integers(0, 8192, length)] for length in LENGTHS]


@pytest.fixture(params=["tiny_2bits", "tiny_w4w2", "tiny_bf16"])
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    return make_runner(request.getfixturevalue(request.param))


def lone_runs(runner: ModelRunner, **fields: SamplerParams) -> tuple[list[list[int]], list[bytes]]:
    tokens, rows = [], []
    for prompt in prompts():
        running = sequences([prompt], 192, **fields)
        tokens += generate(runner, running, NEW_TOKENS)
        rows.append(np.stack(running[0].rows).tobytes())
    return tokens, rows


@pytest.mark.parametrize("chunk", [10_000, 64, 17, 1])
def test_batched_and_chunked_runs_equal_lone_runs(runner: ModelRunner, chunk: int) -> None:
    """With small chunks some sequences decode while others still prefill."""
    alone, alone_rows = lone_runs(runner)
    running = sequences(prompts(), 192)
    assert generate(runner, running, NEW_TOKENS, chunk) == alone
    assert [np.stack(one.rows).tobytes() for one in running] == alone_rows


def test_seeded_sampling_does_not_depend_on_the_batch(runner: ModelRunner) -> None:
    sampling = SamplerParams(
        temperature=1.5, top_p=0.9, top_k=50, repetition_penalty=1.3, frequency_penalty=0.5, seed=7
    )
    alone, _ = lone_runs(runner, sampling=sampling)
    assert generate(runner, sequences(prompts(), 192, sampling=sampling), NEW_TOKENS, 33) == alone
    other = SamplerParams(temperature=1.5, top_p=0.9, top_k=50, seed=8)
    assert generate(runner, sequences(prompts(), 192, sampling=other), NEW_TOKENS) != alone


def test_recomputation_after_preemption_continues_alike(runner: ModelRunner) -> None:
    """A preempted sequence comes back fresh, in another slot and other blocks, with its output."""
    sampling = SamplerParams(temperature=1.0, presence_penalty=1.0, repetition_penalty=1.2, seed=3)
    prompt = prompts()[-1]
    (expected,) = generate(runner, sequences([prompt], 192, sampling=sampling), 10)
    (before,) = sequences([prompt], 192, sampling=sampling)
    generate(runner, [before], 4)
    others = sequences(prompts()[:3], 192)
    generate(runner, others, 2)
    (after,) = sequences([prompt], 192, sampling=sampling)
    after.slot, after.blocks, after.output = 5, [20, 9, 14], before.output
    generate(runner, [after], 10, chunk=40)
    assert after.output == expected


def test_teacher_forcing_equals_generation_bit_for_bit(runner: ModelRunner) -> None:
    (one,) = sequences([prompts()[3]], 192)
    generate(runner, [one], NEW_TOKENS, chunk=13)
    forced = runner.logits(one.prompt + one.output[:-1])
    assert np.array_equal(forced[-NEW_TOKENS:], np.stack(one.rows))


def test_step_size_does_not_change_teacher_forced_logits(tiny_w4w2: Path) -> None:
    ids = prompts()[-1] + prompts()[-2]
    whole = make_runner(tiny_w4w2, tokens=256).logits(ids)
    assert np.array_equal(make_runner(tiny_w4w2, tokens=64).logits(ids), whole)
    assert np.array_equal(make_runner(tiny_w4w2, tokens=97).logits(ids), whole)
