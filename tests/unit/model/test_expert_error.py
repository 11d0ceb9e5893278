"""The study of a card's accuracy watches and replaces the experts of the product's own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracles import expert_error as study
from oracles.card_arithmetics import exact
from oracles.ernie_float32 import Files

from fastdeploy_lite.entrypoints import evaluation
from fastdeploy_lite.worker.model_runner import ModelRunner

TOKENS = list(range(100, 140))


@pytest.fixture(scope="module")
def runner(demo_dir: Path) -> ModelRunner:
    return evaluation.load_runner(demo_dir, len(TOKENS), "cpu")


def test_all_rows_of_all_layers_are_seen(runner: ModelRunner) -> None:
    seen = study.captured(runner, [TOKENS, TOKENS[:7]])
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    for x, ids, weights in seen.values():
        assert x.shape == (47, 384)
        assert ids.shape == weights.shape == (47, 4)
        np.testing.assert_array_equal(x[40:], x[:7])
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)


def test_experts_with_exact_products_are_those_of_the_model_but_for_bf16(
    runner: ModelRunner, demo_dir: Path
) -> None:
    files = Files(demo_dir)
    answers = {
        key: study.answer_of(study.Experts(files, layer), exact)
        for layer, key in study.mixtures(runner).items()
    }
    plain = runner.logits(TOKENS)
    with study.answered(answers):
        found = runner.logits(TOKENS)
    error = np.abs(found - plain).max() / plain.std()
    assert 0 < error < 0.1
    np.testing.assert_array_equal(runner.logits(TOKENS), plain)


def test_errors_of_rows_are_shares_of_their_own_deviation() -> None:
    wanted = np.float64([[1, 3], [100, 300]])
    np.testing.assert_allclose(study.shares(wanted + np.array([[0.1], [1]]), wanted), [0.1, 0.01])
