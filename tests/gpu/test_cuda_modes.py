"""A model with FD_DETERMINISTIC_MODE=0, the default: the bits of steps of few tokens.

Its 2-bit experts sum these in another way than larger steps and prompts (test_cuda_moe_modes.py).
What the other mode promises of all steps is tested in test_cuda_invariance.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from invariance import Invariance, make_prompts
from model_driver import generate, make_runner, sequences
from test_cuda_invariance import LIMITS, SIZES
from test_cuda_model import distance, prompts, run
from test_cuda_moe_modes import FEW
from tiny_model import write_tiny_model

from fastdeploy_lite.worker.model_runner import ModelRunner

pytestmark = pytest.mark.usefixtures("fast")
LONGEST = 320


@pytest.fixture(scope="module", params=["2bits", "w4w2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    return write_tiny_model(directory, kind=request.param, seed=21, experts=8, **SIZES)


@pytest.fixture(scope="module", params=[True, False], ids=["graphs", "eager"])
def runner(request: pytest.FixtureRequest, folder: Path) -> ModelRunner:
    return make_runner(folder, use_cudagraph=request.param, **LIMITS)


def rows(
    runner: ModelRunner, texts: Sequence[list[int]], chunk: int, tokens: int = 6
) -> list[np.ndarray]:
    """Logits of what follows each text, which is read by so many tokens a step."""
    running = sequences(texts, LONGEST)
    generate(runner, running, tokens, chunk)
    return [np.stack(one.rows) for one in running]


def test_what_follows_whole_prompts_has_the_same_bits_in_any_company(runner: ModelRunner) -> None:
    """Each prompt is read in one step, and in one of more tokens than digits serve."""
    lengths = (FEW + 1, 40, 63, 64, 65, 130, 200, 300)
    Invariance(lengths, LONGEST).batched_and_chunked(runner, 10_000)


def test_steps_of_few_tokens_have_the_same_bits_in_any_company(runner: ModelRunner) -> None:
    texts = make_prompts((1, 5, 30, 63, 64, 65, 66, 130))
    alone = [rows(runner, [text], FEW)[0] for text in texts]
    for chunk in (7, 1):
        for text, wanted in zip(texts, alone, strict=True):
            np.testing.assert_array_equal(rows(runner, [text], chunk)[0], wanted)
    for chunk in (FEW // len(texts), 1):
        for found, wanted in zip(rows(runner, texts, chunk), alone, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_steps_of_few_tokens_are_near_those_of_many(runner: ModelRunner) -> None:
    texts = make_prompts((40, 63, 64, 65, 66, 130))
    few, many = (
        np.concatenate([rows(runner, [text], chunk, 1)[0] for text in texts])
        for chunk in (FEW, 10_000)
    )
    assert distance(few, many) < 0.1


@pytest.mark.timeout(300)
def test_the_demo_model_follows_the_cpu_in_steps_of_few_tokens(
    tmp_path: Path, demo_dir: Path
) -> None:
    """Prompts, too, are read in such steps."""
    texts = prompts(demo_dir)[:8]
    runner = make_runner(demo_dir, **LIMITS)
    running = sequences(texts, LONGEST)
    generate(runner, running, 48, FEW // len(texts))
    whole = [one.prompt + one.output[:-1] for one in running]
    cpu = run(tmp_path, "cpu", demo_dir, {"sequences": whole})
    same: list[bool] = []
    for i, one in enumerate(running):
        wanted = cpu[str(i)][len(one.prompt) - 1 :]
        assert distance(np.stack(one.rows), wanted) < 0.1
        same += (wanted.argmax(-1) == one.output).tolist()
    print(f"{sum(same)} of {len(same)} tokens are the likeliest on both devices")
    assert np.mean(same) > 0.95


@pytest.mark.timeout(300)
def test_seeds_reproduce_in_equal_steps(tmp_path: Path, demo_dir: Path) -> None:
    sampling = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "seed": 5}
    request = {"prompts": prompts(demo_dir)[:6], "max_tokens": 40, "sampling": sampling}
    first, second = (run(tmp_path, "", demo_dir, request) for _ in range(2))
    assert all(np.array_equal(first[key], second[key]) for key in first)
