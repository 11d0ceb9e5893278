"""Ranks as actors in a Ray cluster are the ranks of one host: tokens, failures, what is left."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from local_ray import LocalCluster, local_cluster
from machine import promised
from model_driver import generate, make_runner, sequences
from tiny_model import write_tiny_model
from waiting import until

from fastdeploy_lite.config import ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from fastdeploy_lite.executor import ray_cluster
from fastdeploy_lite.executor.base import Executor, ExecutorDeadError
from fastdeploy_lite.executor.processes import ProcessesExecutor
from fastdeploy_lite.executor.ray_cluster import Demand, demand
from fastdeploy_lite.executor.ray_executor import RayExecutor
from fastdeploy_lite.executor.verdict import run_step
from fastdeploy_lite.request.step import SamplerParams, SequenceSlice, SliceResult
from fastdeploy_lite.utils.errors import ConfigError, FastDeployError

RNG = np.random.default_rng(5)
PROMPTS = [[int(i) for i in RNG.integers(0, 8192, n)] for n in (1, 70, 33)]
LENGTH, COUNT = 128, 8


def settings(folder: Path, ranks: int) -> RuntimeConfig:
    return RuntimeConfig(
        model_path=folder,
        model=ModelConfig.from_dir(folder),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=LENGTH),
        parallel=ParallelConfig(ranks, executor_backend="ray"),
        device="cpu",
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(nodes=2) as found:
        yield found


@pytest.fixture(autouse=True)
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_LITE_DEVICE", "cpu")
    if "cluster" in request.fixturenames:
        monkeypatch.setenv("RAY_ADDRESS", request.getfixturevalue("cluster").address)


@contextmanager
def loaded(folder: Path, ranks: int) -> Iterator[RayExecutor]:
    executor = RayExecutor(settings(folder, ranks))
    try:
        executor.load()
        yield executor
    finally:
        executor.close()


def run(executor: Executor) -> list[list[tuple[int, float]]]:
    """Tokens and their log-probabilities, some greedy and some drawn."""
    params = [
        SamplerParams(temperature=0.0, logprobs=1),
        SamplerParams(temperature=0.8, seed=7, repetition_penalty=1.2, logprobs=1),
        SamplerParams(temperature=1.0, seed=3, top_p=0.9, top_k=40, logprobs=1),
    ]
    running = sequences(PROMPTS, LENGTH)
    for one, sampling in zip(running, params, strict=True):
        one.sampling = sampling
    told = Told(executor)
    generate(told, running, COUNT, chunk=40)  # type: ignore[arg-type]
    return [told.logprobs[one.slot] for one in running]


class Told:
    """An executor that notes log-probabilities; slices lose the driver's own logits processors."""

    def __init__(self, executor: Executor) -> None:
        self.config = executor.config  # type: ignore[attr-defined]
        self._executor = executor
        self.logprobs: dict[int, list[tuple[int, float]]] = {}

    def execute(self, slices: list[SequenceSlice]) -> list[SliceResult]:
        for part in slices:
            part.logits_processors = None
        results = self._executor.execute(slices)
        for part, result in zip(slices, results, strict=True):
            for token, found in zip(result.token_ids, result.logprobs or (), strict=True):
                self.logprobs.setdefault(part.slot, []).append((token, found.logprob))
        return results


def inline(folder: Path) -> list[list[tuple[int, float]]]:
    return run(make_runner(folder, length=LENGTH, seqs=8))  # type: ignore[arg-type]


def first_slice(prompt: list[int]) -> SequenceSlice:
    (one,) = sequences([prompt], LENGTH)
    part = one.slice(100)
    part.logits_processors = None
    return part


def test_two_nodes_give_the_tokens_of_one_process(tmp_path: Path, cluster: LocalCluster) -> None:
    folder = write_tiny_model(tmp_path, kind="w4w2")
    wanted = inline(folder)
    processes = ProcessesExecutor(settings(folder, 2))
    try:
        processes.load()
        same_size = run(processes)
    finally:
        processes.close()
    with loaded(folder, 2) as executor:
        pids = [rank.pid for rank in executor.ranks]
        found = run(executor)
        assert executor.report().num_blocks > 0
        check_failed_steps(executor)
        assert run(executor) == found
    assert found == same_size  # bit for bit: the same sums in the same order
    assert [[t for t, _ in row] for row in found] == [[t for t, _ in row] for row in wanted]
    assert len(set(pids)) == 2
    until(lambda: not any(map(psutil.pid_exists, pids)))


def check_failed_steps(executor: RayExecutor) -> None:
    """A request to blame fails alone, be it for its numbers or for what it brings along."""
    good, bad = first_slice(PROMPTS[1]), first_slice(PROMPTS[2])
    bad.slot, bad.block_table = 1, [5, 4]
    bad.token_ids = [*list(bad.token_ids)[:-1], 8192]  # outside the vocabulary
    verdict = run_step(executor, [good, bad])
    assert len(verdict.results[0].token_ids) == 1
    assert "rank 0: ValueError" in (verdict.results[1].error or "")
    assert "token id 8192" in (verdict.results[1].error or "")
    assert not verdict.is_broken
    lock = threading.Lock()
    bad = first_slice(PROMPTS[2])
    bad.slot, bad.block_table = 1, [5, 4]
    bad.logits_processors = [lambda _, row, lock=lock: None]
    verdict = run_step(executor, [first_slice(PROMPTS[1]), bad])
    assert len(verdict.results[0].token_ids) == 1
    assert "cannot be sent to the rank that calls it" in (verdict.results[1].error or "")


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ("node", "(is gone: its node has died|cannot be reached: its process or its node is gone)"),
        ("kill", "(is gone: its worker process has died|cannot be reached: .*)"),
        ("stop", r"has not answered for 6 s: is its node there\?"),
    ],
)
def test_a_lost_rank_ends_all_within_ten_seconds(
    tmp_path: Path, cluster: LocalCluster, loss: str, reason: str
) -> None:
    folder = write_tiny_model(tmp_path, kind="2bits")
    with loaded(folder, 2) as executor:
        run(executor)
        pids = [rank.pid for rank in executor.ranks]
        node = node_of(cluster, pids[1])
        named = rf"^rank 1 \(process {pids[1]} on 127\.0\.0\.1\): {reason}"
        with promised(10), pytest.raises(ExecutorDeadError, match=named):
            if loss == "node":
                cluster.lose(node)
            else:
                os.kill(pids[1], signal.SIGKILL if loss == "kill" else signal.SIGSTOP)
            until(executor.check, every=0.05)
    if loss == "node":
        cluster.add()
    until(lambda: not any(map(psutil.pid_exists, pids)))


def node_of(cluster: LocalCluster, pid: int) -> Any:
    """The node that an actor runs on: its raylet started it."""
    parent = psutil.Process(pid).ppid()
    for node in cluster.nodes:
        if parent in [info.process.pid for info in node.all_processes["raylet"]]:
            return node
    raise AssertionError(f"process {pid} is a child of no node but of {parent}")


def test_a_rank_that_cannot_load_says_why(tmp_path: Path, cluster: LocalCluster) -> None:
    folder = write_tiny_model(tmp_path, kind="2bits", tensor_parallel_size=2)
    damaged = folder / "rank1" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    with (
        pytest.raises(FastDeployError, match=r"^rank 1 \(.*rank1/model\.safetensors"),
        loaded(folder, 2),
    ):
        pass


def test_a_cluster_without_room_says_what_was_asked_for_and_what_there_is(
    tmp_path: Path, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FD_LITE_RAY_WAIT_SECONDS", "1")
    folder = write_tiny_model(tmp_path, kind="2bits")
    text = r"no room within 1 s: asked for 4 x \(1 CPU\).*3 nodes have \(1 CPU; 1 CPU; nothing\)"
    with pytest.raises(ConfigError, match=text), loaded(folder, 4):
        pass


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("ray://127.0.0.1:1", r"RAY_ADDRESS is 'ray://.*expected HOST:PORT"),
        ("127.0.0.1:1", r"No Ray cluster can be joined at 127\.0\.0\.1:1 .*ray start --head"),
    ],
)
def test_without_a_cluster_it_is_said_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=reason):
        RayExecutor(settings(write_tiny_model(tmp_path, kind="2bits"), 1))


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(write_tiny_model(tmp_path, kind="2bits"), 1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'fastdeploy-lite\[ray\]'"):
        RayExecutor(config)


def test_a_model_that_does_not_divide_is_refused_first(tmp_path: Path) -> None:
    config = settings(write_tiny_model(tmp_path), 1)
    config = replace(config, parallel=ParallelConfig(3, executor_backend="ray"))
    with pytest.raises(ConfigError, match="size 3"):
        RayExecutor(config)


@pytest.mark.parametrize(
    ("nodes", "ranks", "replicas", "each"),
    [
        ([0, 8, 8], 2, 1, {"CPU": 8}),
        ([0, 8, 8], 2, 2, {"CPU": 4}),
        ([3, 1], 2, 1, {"CPU": 1}),
        ([12, 5], 3, 1, {"CPU": 5}),
        ([1], 4, 1, {"CPU": 1}),  # there is no room: one each is asked for
        ([], 1, 1, {"CPU": 1}),
    ],
)
def test_processors_are_shared_so_that_all_ranks_find_room(
    nodes: list[int], ranks: int, replicas: int, each: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = demand([{"CPU": count} for count in nodes], ranks, replicas)
    assert (found.each, found.ranks, found.on_cards) == (each, ranks, False)
    assert found.threads == each["CPU"]
    monkeypatch.setenv("FD_LITE_NUM_THREADS", "3")
    assert demand([{"CPU": 64}], ranks, replicas).each == {"CPU": 3}


def test_cards_are_taken_where_the_cluster_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}]
    assert not demand(nodes, 2, 1).on_cards  # FD_LITE_DEVICE=cpu
    monkeypatch.delenv("FD_LITE_DEVICE")
    assert demand(nodes, 2, 1) == Demand({"CPU": 1, "GPU": 1}, 2, 1, True)
    assert str(demand(nodes, 2, 1)) == "2 x (1 GPU, 1 CPU)"


def test_ranks_get_what_steers_them_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_API_KEY", "secret")
    monkeypatch.setenv("FD_LITE_WINT2_ROW_ORDER", "natural")
    found = ray_cluster.rank_environment()
    assert found["FD_LITE_WINT2_ROW_ORDER"] == "natural"
    assert "FD_API_KEY" not in found
