"""Two runners of one process on one card, which share no memory that kernels write."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cards
import numpy as np
import pytest
from model_driver import Running, generate, make_runner, sequences

LENGTH, NEW_TOKENS, REPEATS = 512, 24, 4


def attention(sequences: int, context: int, kv_heads: int, seed: int) -> Callable[[], Any]:
    """A step of one token each, over blocks of its own; returns what it writes."""
    from fastdeploy_lite.model_executor import ops

    random = np.random.default_rng(seed)
    width = -(-context // 64)
    blocks = sequences * width
    shape = [blocks, kv_heads, 64, 128]
    q = cards.put(random.standard_normal((sequences, 4 * kv_heads * 128)), "bfloat16")
    cache = [cards.put(random.standard_normal(shape), "bfloat16") for _ in range(2)]
    table = cards.put(random.permutation(blocks).reshape(sequences, width).astype(np.int32))
    ends = cards.put(np.arange(sequences + 1, dtype=np.int32))
    contexts = cards.put(np.full(sequences, context, np.int32))
    out = cards.poisoned([sequences, 4 * kv_heads * 128])

    def run() -> Any:
        ops.paged_attention(q, *cache, table, ends, contexts, 128**-0.5, out)
        return out

    return run


@pytest.mark.parametrize(
    "sizes",
    [
        ((3, 4000, 2), (2, 3000, 4)),  # the last block of a sequence merges its segments
        ((48, 2000, 4), (40, 2500, 4)),  # blocks draw their segments
    ],
    ids=["tickets", "draws"],
)
def test_attention_beside_another_on_its_own_stream_and_scratch(
    sizes: tuple[tuple[int, int, int], ...],
) -> None:
    from fastdeploy_lite import _ops_cuda
    from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime

    launches = [attention(*size, seed) for seed, size in enumerate(sizes)]
    wanted = [cards.get(run()).copy() for run in launches]
    scratches = [runtime.Scratch(cards.place()) for _ in sizes]
    streams = [int(_ops_cuda.create_stream()) for _ in sizes]
    for scratch in scratches:
        with scratch.use():  # allocated before the kernels overlap
            runtime.scratch(1), runtime.attention_counters()
    for _ in range(50):
        for run, scratch, stream in zip(launches, scratches, streams, strict=True):
            with scratch.use(), runtime.use_stream(stream):
                run()
    for stream in streams:
        _ops_cuda.synchronize(stream)
    for run, scratch, one in zip(launches, scratches, wanted, strict=True):
        with scratch.use():  # counters are where the next launch needs them
            np.testing.assert_array_equal(cards.get(run()), one)


@pytest.mark.usefixtures("deterministic")  # in turns, the steps are other ones than alone
class TestRunners:
    """Tokens and logits of each, as when it was alone."""

    @pytest.fixture(scope="class")
    def runners(self, demo_dir: Path) -> list[Any]:
        from fastdeploy_lite.config import CacheConfig

        cache = CacheConfig(num_blocks=8 * LENGTH // 64)
        return [make_runner(demo_dir, length=LENGTH, device=None, cache=cache) for _ in range(2)]

    @pytest.fixture(scope="class")
    def alone(self, runners: list[Any]) -> list[np.ndarray]:
        rows = []
        for number, runner in enumerate(runners):
            for _ in range(3):  # buffers grow, graphs are captured, graphs are replayed
                running = texts(number)
                generate(runner, running, NEW_TOKENS, 100)
                rows.append(rows_of(running))
            np.testing.assert_array_equal(rows[-1], rows[-2])
            np.testing.assert_array_equal(rows[-1], rows[-3])
        return [rows[2], rows[5]]

    def test_in_turns(self, runners: list[Any], alone: list[np.ndarray]) -> None:
        both = [texts(number) for number in range(2)]
        for count in range(1, NEW_TOKENS + 1):
            for runner, running in zip(runners, both, strict=True):
                generate(runner, running, count, 100)
        for running, wanted in zip(both, alone, strict=True):
            np.testing.assert_array_equal(rows_of(running), wanted)

    @pytest.mark.timeout(300)
    @pytest.mark.parametrize("own_streams", [False, True], ids=["one stream", "own streams"])
    def test_at_the_same_time(
        self, runners: list[Any], alone: list[np.ndarray], own_streams: bool
    ) -> None:
        from fastdeploy_lite import _ops_cuda
        from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime

        def work(number: int) -> None:
            queue: Any = contextlib.nullcontext()
            if own_streams:
                queue = runtime.use_stream(int(_ops_cuda.create_stream()))
            with queue:
                for _ in range(REPEATS):
                    running = texts(number)
                    generate(runners[number], running, NEW_TOKENS, 100)
                    np.testing.assert_array_equal(rows_of(running), alone[number])

        _ops_cuda.synchronize(runtime.stream())
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(work, number) for number in range(2)]:
                done.result(240)


def texts(number: int) -> list[Running]:
    """Sequences whose contexts have one segment and two, another count for each runner."""
    random = np.random.default_rng(number)
    lengths = [(400, 3, 300, 90), (420, 310, 7)][number]
    return sequences([random.integers(300, 8000, n).tolist() for n in lengths], LENGTH)


def rows_of(running: list[Running]) -> np.ndarray:
    """The logits of every sampled token."""
    return np.stack([row for one in running for row in one.rows])
