"""Several cards: sums and gathers, their bits, a whole model, and what ends a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cards
import numpy as np
import partings
import psutil
import pytest
import rank_work
from model_driver import generate, make_runner, sequences
from test_cuda_model import NEW_TOKENS, prompts, run

from fastdeploy_lite import device

SIZE = 2
WORK = Path(rank_work.__file__)
pytestmark = [
    pytest.mark.skipif(
        len(device.visible_cards()) < SIZE, reason=f"{SIZE} NVIDIA cards are needed"
    ),
    pytest.mark.usefixtures("deterministic"),  # answers of other batches and chunks are compared
]
Found = list[dict[str, Any]]


def work_on_cards(folder: Path, way: str) -> Found:
    """What every rank has found, see rank_work.py."""
    from fastdeploy_lite.distributed.communicator import SharedMemory

    memory = SharedMemory(SIZE, 1)
    path = os.pathsep.join([str(WORK.parents[2]), os.environ.get("PYTHONPATH", "")])
    processes = []
    for rank, card in enumerate(device.visible_cards()[:SIZE]):
        arguments = [str(rank), str(SIZE), str(memory.fd), way]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": card, "PYTHONPATH": path}
        env.pop("CUSTOM_DEVICE_ROOT", None)
        processes.append(
            subprocess.Popen(
                [sys.executable, str(WORK), *arguments, str(folder / f"{rank}.npz")],
                env=env, pass_fds=(memory.fd,), stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    memory.close()
    found = []
    for rank, process in enumerate(processes):
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error[-3000:]
        with np.load(folder / f"{rank}.npz") as file:
            found.append({key: file[key] for key in file.files})
    return found


@pytest.fixture(scope="module", params=["shared memory", "NCCL", "gathered"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return work_on_cards(tmp_path_factory.mktemp("ranks"), request.param)


def expected_sum(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """float32 sums in the order of the ranks, rounded once."""
    terms = [rank_work.numbers(seed + rank, shape) for rank in range(SIZE)]
    if dtype == "float32":
        return sum(terms[1:], terms[0])
    rounded = [cards.round_bf16(term) for term in terms]
    return cards.bf16_bits(sum(rounded[1:], rounded[0]))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", rank_work.DTYPES)
@pytest.mark.parametrize("shape", rank_work.SHAPES, ids=str)
def test_sums_bit_for_bit(found: Found, shape: tuple[int, ...], dtype: str) -> None:
    for one in found:
        np.testing.assert_array_equal(one[f"sum {shape} {dtype}"], expected_sum(shape, dtype))


def test_a_row_has_the_same_bits_wherever_it_lies(found: Found) -> None:
    for one in found:
        np.testing.assert_array_equal(one["row 5 alone"][0], one["sum (64, 8192) bfloat16"][5])


@pytest.mark.parametrize(("rows", "width"), rank_work.GATHERED)
def test_columns_lie_side_by_side(found: Found, rows: int, width: int) -> None:
    parts = [rank_work.numbers(rank, (rows, width)) for rank in range(SIZE)]
    wanted = np.concatenate(parts, axis=1)[:, :: max(1, width // 64)]
    for one in found:
        np.testing.assert_array_equal(one[f"gather {rows} {width}"], wanted)


def test_graphs_replay_what_was_captured(found: Found) -> None:
    for one in found:
        np.testing.assert_array_equal(one["plain chain"], one["replayed chain"])
        assert len(np.unique(one["plain chain"][:, 0, 0])) > 10  # other numbers, other sums
        np.testing.assert_array_equal(one["plain chain"], found[0]["plain chain"])


def test_a_step_that_one_rank_does_not_queue_costs_the_step_alone(found: Found) -> None:
    for one in found:
        assert one["verdicts"].tolist() == [True, False, True, False]
        assert one["seconds to mend"] < 10
        assert one["forgotten"] == 1  # the last failure left nothing behind
        np.testing.assert_array_equal(one["sum after"], np.full((4, 64), SIZE))


def test_a_rank_that_never_comes_releases_the_others(found: Found) -> None:
    assert "gone" in str(found[0]["lost"])
    assert found[0]["seconds to lose"] < 5


# -- a model ----------------------------------------------------------------------------------


def demo_config(demo_dir: Path) -> Any:
    from fastdeploy_lite.config import (
        CacheConfig,
        ModelConfig,
        ParallelConfig,
        RuntimeConfig,
        SchedulerConfig,
    )

    return RuntimeConfig(
        model_path=demo_dir,
        model=ModelConfig.from_dir(demo_dir),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=256),
        cache=CacheConfig(num_blocks=64),
        parallel=ParallelConfig(SIZE),
    )


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, demo_dir: Path) -> dict[str, np.ndarray]:
    request = {
        "prompts": prompts(demo_dir),
        "max_tokens": NEW_TOKENS,
        "engine": {"tensor_parallel_size": SIZE},
    }
    return run(tmp_path_factory.mktemp("split"), "", demo_dir, request)


@pytest.mark.timeout(300)
def test_demo_tokens_are_those_of_one_card_or_part_at_a_tie(
    split: dict[str, np.ndarray], tmp_path: Path, demo_dir: Path
) -> None:
    """As between card and CPU: sums in bf16 round elsewhere where they are made of two parts."""
    request = {"prompts": prompts(demo_dir), "max_tokens": NEW_TOKENS}
    alone = run(tmp_path, "", demo_dir, request)
    found = partings.find(prompts(demo_dir), split, alone)
    if not found:
        return
    texts = partings.request(found)
    exact, rounded = run(tmp_path, "cpu", demo_dir, texts), run(tmp_path, "", demo_dir, texts)
    for j, parting in enumerate(found):
        partings.assert_near(parting, exact[str(j)][-1], rounded[str(j)][-1], widest=6)


@pytest.mark.timeout(300)
def test_logits_of_two_cards_are_as_near_to_float32_as_those_of_one(
    tmp_path: Path, demo_dir: Path
) -> None:
    from fastdeploy_lite.executor.processes import ProcessesExecutor

    texts = prompts(demo_dir)
    exact, alone = (run(tmp_path, kind, demo_dir, {"sequences": texts}) for kind in ("cpu", ""))
    executor = ProcessesExecutor(demo_config(demo_dir))
    try:
        executor.load()
        rows = []
        for text in texts:
            running = sequences([text], 256)
            generate(executor, running, 1)
            rows.append(running[0].rows[0])
    finally:
        executor.close()
    ours, theirs = [], []
    for i, row in enumerate(rows):
        ours.append(np.std(row - exact[str(i)][-1]))
        theirs.append(np.std(alone[str(i)][-1] - exact[str(i)][-1]))
    print(f"deviation of logits: two cards {np.mean(ours):.4f}, one {np.mean(theirs):.4f}")
    assert np.mean(ours) < 2 * np.mean(theirs)


@pytest.mark.timeout(300)
def test_small_batches_chunks_and_no_graphs_change_no_token(
    split: dict[str, np.ndarray], tmp_path: Path, demo_dir: Path
) -> None:
    engine = {
        "tensor_parallel_size": SIZE, "use_cudagraph": False, "max_num_batched_tokens": 64,
        "max_num_seqs": 3,
    }  # fmt: skip
    request = {"prompts": prompts(demo_dir), "max_tokens": NEW_TOKENS, "engine": engine}
    again = run(tmp_path, "", demo_dir, request)
    for key, tokens in split.items():
        np.testing.assert_array_equal(again[key], tokens)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_failed_steps_and_lost_ranks(demo_dir: Path, sent: signal.Signals) -> None:
    from fastdeploy_lite.executor.base import ExecutorDeadError, RankError
    from fastdeploy_lite.executor.processes import ProcessesExecutor

    random = np.random.default_rng(5)
    texts = [[int(i) for i in random.integers(0, 8192, n)] for n in (1, 70, 33)]

    def tokens(executor: Any) -> list[list[int]]:
        running = sequences(texts, 256)
        generate(executor, running, 12, 40)
        return [one.output for one in running]

    executor = ProcessesExecutor(demo_config(demo_dir))
    try:
        executor.load()
        wanted = tokens(executor)
        part = sequences(texts[1:2], 256)[0].slice(100)
        message = executor._writer.step([part])
        message.slices[0].new_blocks[0] = 10**6  # on the other rank alone
        executor._writer.step = lambda _: message  # type: ignore[method-assign]
        started = time.monotonic()
        with pytest.raises(RankError, match=r"^rank 1: ValueError: .*block table"):
            executor.execute([part])
        assert time.monotonic() - started < 10
        del executor._writer.step  # type: ignore[method-assign]
        assert tokens(executor) == wanted

        (pid,) = executor.pids
        os.kill(pid, sent)
        started = time.monotonic()
        with pytest.raises(ExecutorDeadError, match=rf"^rank 1 \(process {pid}\)"):
            while time.monotonic() - started < 20:
                tokens(executor)
        assert time.monotonic() - started < 10
    finally:
        executor.close()
    assert not psutil.pid_exists(pid)


def test_more_ranks_than_cards_are_refused(demo_dir: Path) -> None:
    from fastdeploy_lite.config import ModelConfig, ParallelConfig, RuntimeConfig
    from fastdeploy_lite.executor.processes import ProcessesExecutor
    from fastdeploy_lite.utils.errors import ConfigError

    count = len(device.visible_cards())
    size = 2 ** count.bit_length()
    config = RuntimeConfig(
        model_path=demo_dir, model=ModelConfig.from_dir(demo_dir), parallel=ParallelConfig(size)
    )
    with pytest.raises(ConfigError, match=rf"size {size}: .* {count} can be seen"):
        ProcessesExecutor(config)


@pytest.mark.timeout(300)
def test_a_rank_without_a_part_of_the_experts(tmp_path: Path) -> None:
    """One step of 128 rows for two ranks: the other one adds zeros."""
    from tiny_model import write_tiny_model

    from fastdeploy_lite.config import (
        CacheConfig,
        ModelConfig,
        ParallelConfig,
        RuntimeConfig,
        SchedulerConfig,
    )
    from fastdeploy_lite.executor.processes import ProcessesExecutor

    folder = write_tiny_model(tmp_path, kind="2bits", moe_intermediate_size=128, seed=3)
    ids = np.random.default_rng(1).integers(0, 8192, 100).tolist()
    alone = make_runner(folder, device=None, cache=CacheConfig(num_blocks=16))
    running = sequences([ids], 128)
    generate(alone, running, 1, 128)
    config = RuntimeConfig(
        model_path=folder, model=ModelConfig.from_dir(folder),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=128),
        cache=CacheConfig(num_blocks=64), parallel=ParallelConfig(SIZE),
    )  # fmt: skip
    executor = ProcessesExecutor(config)
    try:
        executor.load()
        both = sequences([ids], 128)
        generate(executor, both, 1, 128)
    finally:
        executor.close()
    row, other = (np.asarray(one[0].rows[0]) for one in (running, both))
    assert np.abs(row - other).max() < 0.05 * np.abs(row).max()
