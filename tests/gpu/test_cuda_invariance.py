"""On a card, too, a row's bits depend on the row and its context alone: ops, model and engine."""

from __future__ import annotations

from pathlib import Path

import cards
import matrices
import numpy as np
import pytest
from invariance import Invariance, RunnerTests
from model_driver import make_runner
from tiny_model import write_tiny_model

from fastdeploy_lite.config import CacheConfig, ExpertOffloadConfig
from fastdeploy_lite.worker.model_runner import ModelRunner

pytestmark = pytest.mark.usefixtures("deterministic")  # prompts against single tokens
LIMITS = {
    "device": None,
    "tokens": 1024,
    "length": 1024,
    "cache": CacheConfig(num_blocks=128),
}
SIZES = {
    "hidden_size": 640,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "intermediate_size": 1280,
    "moe_intermediate_size": 640,
}
"""Several k tiles and column blocks, so that products are split in every way that they can be."""


@pytest.fixture(scope="module", params=["2bits", "w4w2", "bf16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    return write_tiny_model(directory, kind=request.param, seed=21, experts=8, **SIZES)


@pytest.fixture(scope="module", params=[True, False], ids=["graphs", "eager"])
def runner(request: pytest.FixtureRequest, folder: Path) -> ModelRunner:
    return make_runner(folder, use_cudagraph=request.param, **LIMITS)


@pytest.fixture(scope="module", params=[True, False], ids=["graphs", "eager"])
def offloaded_runner(request: pytest.FixtureRequest, folder: Path) -> ModelRunner:
    """One layer's experts in main memory, the other's on the card."""
    offload = ExpertOffloadConfig(cpu_layers=1)
    return make_runner(folder, use_cudagraph=request.param, expert_offload=offload, **LIMITS)


class TestOnTheCard(RunnerTests):
    checks = Invariance((1, 5, 63, 64, 65, 700), longest=768)


class TestBesideMainMemory(RunnerTests):
    checks = Invariance((1, 5, 63, 64, 65, 700), longest=768)

    @pytest.fixture
    def runner(self, offloaded_runner: ModelRunner) -> ModelRunner:
        return offloaded_runner


def test_step_size_does_not_change_teacher_forced_logits(folder: Path) -> None:
    limits = {**LIMITS, "seqs": 4}
    TestOnTheCard.checks.step_sizes(
        lambda tokens: make_runner(folder, **{**limits, "tokens": tokens}), (1024, 256, 97)
    )


def test_the_demo_model_in_a_full_batch(demo_dir: Path) -> None:
    """64 sequences, so that steps use every height of tile."""
    lengths = [1 + 13 * i for i in range(60)] + [1, 2, 3, 800]
    cache = CacheConfig(num_blocks=64 * 13)
    limits = {"seqs": 64, "device": None, "tokens": 2048, "length": 1024, "cache": cache}
    runner = make_runner(demo_dir, **limits)
    Invariance(lengths, longest=832).batched_and_chunked(runner, 300)


@pytest.mark.parametrize(("rows", "columns"), [(256, 512), (2560, 3584), (8192, 1024), (1000, 520)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_products_do_not_depend_on_the_batch(rows: int, columns: int, dtype: str) -> None:
    """cuBLASLt picks another kernel for nearly every one of these counts."""
    from fastdeploy_lite.model_executor import ops

    random = np.random.default_rng(rows)
    weight, _ = matrices.make("dense", random, rows, columns)
    x = cards.round_bf16(random.standard_normal((2048, rows)))
    whole = None
    for tokens in (2048, 1000, 512, 300, 129, 128, 64, 33, 32, 17, 16, 12, 8, 5, 2, 1):
        out = cards.poisoned([tokens, columns], dtype)
        ops.linear(cards.put(x[:tokens], "bfloat16"), weight, out)
        found = cards.get(out)
        whole = found if whole is None else whole
        np.testing.assert_array_equal(found, whole[:tokens], str(tokens))


@pytest.mark.parametrize(
    ("hidden", "experts", "top_k"), [(384, 16, 4), (2560, 64, 6), (8192, 64, 8), (1000, 200, 3)]
)
def test_routing_does_not_depend_on_the_batch(hidden: int, experts: int, top_k: int) -> None:
    from fastdeploy_lite.model_executor import ops

    random = np.random.default_rng(hidden)
    x = cards.round_bf16(random.standard_normal((3000, hidden)))
    gate = (random.standard_normal((hidden, experts)) * hidden**-0.5).astype(np.float32)
    bias = (random.standard_normal(experts) * 0.01).astype(np.float32)
    constants = (cards.put(gate), cards.put(bias), top_k)

    def route(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = cards.poisoned([len(part), top_k], "int32")
        weights = cards.poisoned([len(part), top_k], "float32")
        ops.route(cards.put(part, "bfloat16"), *constants, ids, weights)
        return cards.get(ids), cards.get(weights)

    ids, weights = route(x)
    for tokens in (1000, 513, 128, 65, 33, 16, 3, 1):
        for first in (0, 700):
            some_ids, some_weights = route(x[first : first + tokens])
            np.testing.assert_array_equal(some_ids, ids[first : first + tokens], str(tokens))
            np.testing.assert_array_equal(some_weights, weights[first : first + tokens])
