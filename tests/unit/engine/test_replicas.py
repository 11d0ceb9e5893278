"""Several engines behind one client: who gets a request, what is counted, what a death costs."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from waiting import PATIENCE

from fastdeploy_lite import device
from fastdeploy_lite.config import BLOCK_SIZE
from fastdeploy_lite.engine import replicas
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.engine_client import AsyncEngineClient
from fastdeploy_lite.engine.engine_core import EngineDeadError
from fastdeploy_lite.engine.replicas import ReplicatedEngineClient, add_stats, create_client
from fastdeploy_lite.engine.request import Request
from fastdeploy_lite.engine.routing import PrefixRouter
from fastdeploy_lite.engine.sampling_params import SamplingParams
from fastdeploy_lite.input.preprocess import Preprocessor
from fastdeploy_lite.request.messages import (
    DraftCounts,
    EngineOutput,
    EngineRequest,
    EngineStats,
)
from fastdeploy_lite.utils.errors import ConfigError, RequestError

ARGS = EngineArgs(
    model="demo", max_model_len=512, max_num_seqs=4, num_gpu_blocks_override=40,
    data_parallel_size=2,
)  # fmt: skip


@functools.cache
def _preprocessor() -> Preprocessor:
    return Preprocessor(ARGS.create_runtime_config())


def request(name: str, max_tokens: int = 12) -> EngineRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, min_tokens=max_tokens)
    asked = Request(request_id=name, prompt="Once", sampling_params=params)
    return _preprocessor().process(asked)


async def collect(client: ReplicatedEngineClient, item: EngineRequest) -> list[EngineOutput]:
    return [output async for output in client.generate(item)]


@pytest.fixture(autouse=True)
def logs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def tokens(seed: int, blocks: int) -> list[int]:
    return [(seed * 7919 + i) % 8000 for i in range(blocks * BLOCK_SIZE)]


# -- routing ----------------------------------------------------------------------------------


def router(replicas: int = 3, slack: int = 4, blocks: int = 100) -> PrefixRouter:
    made = PrefixRouter(replicas, slack)
    for replica in range(replicas):
        made.resize(replica, blocks)
    return made


def test_the_longest_prefix_wins_and_then_the_least_load() -> None:
    made = router()
    assert made.choose(tokens(1, 4), [1, 0, 2]) == 1
    assert made.choose(tokens(2, 4), [1, 1, 0]) == 2
    assert made.choose(tokens(1, 4) + tokens(3, 2), [0, 3, 0]) == 1
    longer = tokens(2, 2) + tokens(4, 1)
    assert made.choose(longer, [0, 0, 0]) == 2
    assert made.choose(tokens(9, 1)[:10], [2, 1, 1]) == 1  # shorter than a block: load alone


def test_a_prefix_does_not_pile_up_work_on_one_replica() -> None:
    made, loads = router(2, slack=4), [0, 0]
    for _ in range(40):  # all share a system prompt
        loads[made.choose(tokens(1, 3), loads)] += 1
    assert abs(loads[0] - loads[1]) <= 5


def test_replicas_that_take_none_are_passed_over() -> None:
    made = router(2)
    assert made.choose(tokens(1, 2), [0, None]) == 0
    assert made.choose(tokens(1, 2), [None, 9]) == 1


def test_books_are_as_large_as_a_cache_and_forget_ends_first() -> None:
    made = router(2, blocks=4)
    assert made.choose(tokens(1, 4), [0, 1]) == 0
    assert made.choose(tokens(2, 2), [0, 1]) == 0  # takes the place of the first one's end
    assert made._known_blocks(0, _digests(tokens(1, 4))) == 2
    assert made._known_blocks(0, _digests(tokens(2, 2))) == 2
    made.resize(0, 4)  # another process, with an empty cache
    assert made._known_blocks(0, _digests(tokens(2, 2))) == 0


def _digests(prompt: list[int]) -> list[bytes]:
    from fastdeploy_lite.engine.kv_cache import DigestChain

    return DigestChain(BLOCK_SIZE).up_to(len(prompt) // BLOCK_SIZE, prompt, ())


# -- counters ---------------------------------------------------------------------------------


def test_counters_add_up() -> None:
    one = EngineStats(time=5.0, num_running=1, steps=3, step_seconds=0.5, num_blocks=10)
    one.drafts = DraftCounts(4, 2, 3, 2, [2], [3, 1])
    other = EngineStats(time=4.0, num_running=2, steps=4, step_seconds=0.25, paused=True)
    other.drafts = DraftCounts(1, 1, 1, 1, [1, 1], [1, 1])
    total = add_stats([one, other, EngineStats()])
    assert (total.time, total.num_running, total.steps, total.num_blocks) == (5.0, 3, 7, 10)
    assert total.step_seconds == 0.75
    assert total.paused
    assert total.drafts == DraftCounts(5, 3, 4, 3, [3, 1], [4, 2])
    assert add_stats([EngineStats()]) == EngineStats()


# -- processes --------------------------------------------------------------------------------


@asynccontextmanager
async def started(restart: bool = False) -> AsyncIterator[ReplicatedEngineClient]:
    client = create_client(ARGS, restart=restart)
    assert isinstance(client, ReplicatedEngineClient)
    try:
        await client.start()
        yield client
    finally:
        await client.shutdown()


def drive(work: Callable[[ReplicatedEngineClient], Awaitable[None]], restart: bool = False) -> None:
    async def run() -> None:
        async with started(restart) as client:
            await work(client)

    asyncio.run(run())


def test_requests_are_shared_out_and_the_books_are_right() -> None:
    async def work(client: ReplicatedEngineClient) -> None:
        assert client.is_healthy and client.replicas_healthy == [True, True]
        assert len(set(client.engine_pids)) == 2
        names = [f"r{i}" for i in range(8)]
        found = await asyncio.gather(*(collect(client, request(name)) for name in names))
        assert all(outputs[-1].finished for outputs in found)
        texts = {tuple(t for o in outputs for t in o.new_token_ids) for outputs in found}
        assert len(texts) == 1  # equal replicas give equal answers
        assert await client.check() is None
        await client.control("reset")
        assert [stats.requests for stats in client.replica_stats] == [4, 4]
        assert client.stats.requests == 8
        assert client.num_unfinished == 0

        [first] = await _busy(client, 1)
        with pytest.raises(RequestError, match="'long0' is in use"):
            await collect(client, request("long0"))
        await client.abort(["long0", "unknown"])
        assert (await first)[-1].finish_reason == "abort"
        await client.control("pause")
        assert client.stats.paused
        await client.control("resume")
        assert not client.stats.paused

    drive(work)


async def _busy(
    client: ReplicatedEngineClient, count: int
) -> list[asyncio.Task[list[EngineOutput]]]:
    tasks = [
        asyncio.create_task(collect(client, request(f"long{i}", max_tokens=400)))
        for i in range(count)
    ]
    await _until(lambda: client.stats.num_running == count)
    return tasks


async def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


def _kill_one(client: ReplicatedEngineClient) -> None:
    pid = client.engine_pids[0]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(120)
def test_a_death_costs_the_requests_of_one_replica() -> None:
    async def work(client: ReplicatedEngineClient) -> None:
        tasks = await _busy(client, 4)
        _kill_one(client)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(end, EngineDeadError) for end in ends) == 2
        assert sum(isinstance(end, list) and end[-1].finished for end in ends) == 2
        assert client.is_healthy and client.replicas_healthy == [False, True]
        done = await collect(client, request("after"))  # the other one takes all
        assert done[-1].finished
        assert client.stats.requests >= 4  # what the dead one counted is not forgotten
        other = client.engine_pids[1]
        assert other is not None
        os.kill(other, signal.SIGKILL)
        assert "SIGKILL" in await asyncio.wait_for(client.wait_dead(), PATIENCE)
        with pytest.raises(EngineDeadError):
            await collect(client, request("late"))

    drive(work)


@pytest.mark.timeout(180)
def test_a_dead_replica_comes_back_with_restarts() -> None:
    async def work(client: ReplicatedEngineClient) -> None:
        pids = client.engine_pids
        await asyncio.gather(*(collect(client, request(f"r{i}")) for i in range(4)))
        before = client.stats.generation_tokens
        _kill_one(client)
        await _until(lambda: client.replicas_healthy == [False, True])
        assert (await collect(client, request("meanwhile")))[-1].finished
        await _until(lambda: all(client.replicas_healthy))
        assert client.engine_pids[0] not in (None, pids[0])
        assert client.engine_pids[1] == pids[1]
        await asyncio.gather(*(collect(client, request(f"s{i}")) for i in range(4)))
        await client.control("reset")
        assert client.stats.generation_tokens > before
        assert client.replica_stats[0].requests == 4  # two before, two after

    drive(work, restart=True)


@pytest.mark.timeout(180)
def test_a_replica_that_cannot_come_back_is_named_and_costs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(replicas.console, "error", lambda text, *args: lines.append(text % args))
    small = EngineArgs(model="demo", num_gpu_blocks_override=1)

    async def work(client: ReplicatedEngineClient) -> None:
        client._replicas[0]._make = lambda: AsyncEngineClient(small)
        _kill_one(client)
        await _until(lambda: len(lines) >= 2)
        assert "replica 0 cannot be restarted" in lines[1]
        assert "KV cache" in lines[1]
        assert client.replicas_healthy == [False, True]
        assert (await collect(client, request("after")))[-1].finished

    drive(work, restart=True)


def test_replicas_that_cannot_load_end_the_start() -> None:
    args = EngineArgs(model="demo", data_parallel_size=2, num_gpu_blocks_override=1)

    async def run() -> None:
        client = create_client(args)
        with pytest.raises(EngineDeadError, match="KV cache"):
            await client.start()
        assert not client.is_healthy

    asyncio.run(run())


def test_one_replica_is_a_plain_client() -> None:
    assert isinstance(create_client(EngineArgs(model="demo")), AsyncEngineClient)


def test_each_replica_gets_cards_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "decide", lambda: device.Device("nvidia", "cards of this test"))
    monkeypatch.setattr(device, "visible_cards", lambda: ["2", "3", "5", "7"])
    args = EngineArgs(model="demo", data_parallel_size=2, tensor_parallel_size=2)
    made = ReplicatedEngineClient(args)
    variables = [replica.client._variables for replica in made._replicas]
    assert variables == [{"CUDA_VISIBLE_DEVICES": "2,3"}, {"CUDA_VISIBLE_DEVICES": "5,7"}]
    args = EngineArgs(model="demo", data_parallel_size=4, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="takes 8 cards and 4 can be seen"):
        ReplicatedEngineClient(args)


def test_replicas_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdeploy_lite import _ops_cpu

    monkeypatch.setattr(_ops_cpu, "num_threads", lambda: 12)
    monkeypatch.delenv("FD_LITE_NUM_THREADS", raising=False)
    made = ReplicatedEngineClient(EngineArgs(model="demo", data_parallel_size=3))
    assert [r.client._variables for r in made._replicas] == [{"FD_LITE_NUM_THREADS": "4"}] * 3
