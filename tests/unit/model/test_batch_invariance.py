"""A sequence gives bit-identical logits whatever it shares its steps with."""

from __future__ import annotations

from pathlib import Path

import pytest
from invariance import Invariance
from model_driver import make_runner

from fastdeploy_lite.model_executor.model_runner import ModelRunner

CHECKS = Invariance()


@pytest.fixture(params=["tiny_2bits", "tiny_w4w2", "tiny_bf16"])
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    return make_runner(request.getfixturevalue(request.param))


@pytest.mark.parametrize("chunk", [10_000, 64, 17, 1])
def test_batched_and_chunked_runs_equal_lone_runs(runner: ModelRunner, chunk: int) -> None:
    CHECKS.batched_and_chunked(runner, chunk)


def test_seeded_sampling_does_not_depend_on_the_batch(runner: ModelRunner) -> None:
    CHECKS.seeded_sampling(runner)


def test_recomputation_after_preemption_continues_alike(runner: ModelRunner) -> None:
    CHECKS.preempted(runner)


def test_teacher_forcing_equals_generation_bit_for_bit(runner: ModelRunner) -> None:
    CHECKS.teacher_forced(runner)


def test_step_size_does_not_change_teacher_forced_logits(tiny_w4w2: Path) -> None:
    CHECKS.step_sizes(lambda tokens: make_runner(tiny_w4w2, tokens=tokens), (256, 64, 97))
