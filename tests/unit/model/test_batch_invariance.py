"""A sequence gives bit-identical logits whatever it shares its steps with."""

from __future__ import annotations

from pathlib import Path

import pytest
from invariance import RunnerTests
from model_driver import make_runner

from fastdeploy_lite.worker.model_runner import ModelRunner


@pytest.fixture(params=["tiny_2bits", "tiny_w4w2", "tiny_bf16"])
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    return make_runner(request.getfixturevalue(request.param))


class TestOnTheCpu(RunnerTests):
    pass


def test_step_size_does_not_change_teacher_forced_logits(tiny_w4w2: Path) -> None:
    checks = RunnerTests.checks
    checks.step_sizes(lambda tokens: make_runner(tiny_w4w2, tokens=tokens), (256, 64, 97))
