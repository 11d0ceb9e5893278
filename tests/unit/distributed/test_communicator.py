"""Sums and gathers between processes: order, bits, and what ends a wait."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fastdeploy_lite.distributed.communicator import (
    HostCommunicator,
    PeerFailedError,
    PeerLostError,
    SharedMemory,
    SharedMemoryCommunicator,
)
from fastdeploy_lite.distributed.network import NetworkCommunicator
from fastdeploy_lite.model_executor import ops

Rank = Callable[[HostCommunicator], Any]
Run = Callable[..., list[Any]]
GROUP = b"sixteen bytes ok"


@pytest.fixture(params=["memory", "network"])
def on_ranks(request: pytest.FixtureRequest) -> Run:
    """Runs one function per rank, over memory of one host or over its network."""
    return partial(run_on_ranks, request.param == "network")


def run_on_ranks(over_network: bool, size: int, *work: Rank, seconds: float = 20.0) -> list[Any]:
    """Run one function per rank in processes of their own; return values or exceptions' names."""
    memory = SharedMemory(size, 1)
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(size)]

    def connected(rank: int) -> HostCommunicator:
        if not over_network:
            return SharedMemoryCommunicator(memory, rank, seconds)
        communicator = NetworkCommunicator(rank, size, "127.0.0.1", GROUP, seconds)
        pipes[rank][1].send(communicator.address)
        communicator.connect(pipes[rank][1].recv())
        return communicator

    def run(rank: int) -> None:
        communicator = connected(rank)
        try:
            found = work[rank % len(work)](communicator)
        except (PeerFailedError, PeerLostError) as error:
            found = type(error).__name__
        pipes[rank][1].send(found)
        communicator.close()

    processes = [context.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    if over_network:
        addresses = [pipe[0].recv() for pipe in pipes]
        for pipe in pipes:
            pipe[0].send(addresses)
    results = [pipe[0].recv() if pipe[0].poll(60) else "nothing" for pipe in pipes]
    for process in processes:
        process.join(60)
        assert not process.is_alive()
    memory.close()
    return results


def numbers(rank: int, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(rank).standard_normal(shape).astype(np.float32) * 10.0**rank


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (700, 1000)])  # the last one in pieces
def test_sums_have_the_order_of_the_ranks_bit_for_bit(
    on_ranks: Run, size: int, shape: tuple[int, ...]
) -> None:
    def add(communicator: HostCommunicator) -> Any:
        x = paddle.to_tensor(numbers(communicator.rank, shape))
        for _ in range(3):  # buffers are used again
            ops.upload(numbers(communicator.rank, shape), x)
            communicator.all_reduce(x)
        assert communicator.agree(True)
        return x.numpy()

    expected = numbers(0, shape)
    for rank in range(1, size):
        expected = expected + numbers(rank, shape)
    for found in on_ranks(size, add):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rows", [1, 5, 9000])
def test_columns_are_put_side_by_side(on_ranks: Run, rows: int) -> None:
    widths = [30, 31, 64]

    def gather(communicator: HostCommunicator) -> Any:
        own = paddle.to_tensor(numbers(communicator.rank, (rows, widths[communicator.rank])))
        out = paddle.empty([rows, sum(widths)], "float32")
        communicator.all_gather(own, widths, out)
        return out.numpy()

    expected = np.concatenate([numbers(r, (rows, w)) for r, w in enumerate(widths)], axis=1)
    for found in on_ranks(3, gather):
        np.testing.assert_array_equal(found, expected)


def test_a_failed_step_fails_for_all_and_the_next_one_is_sound(on_ranks: Run) -> None:
    def follow(communicator: HostCommunicator) -> Any:
        x = paddle.ones([4, 4])
        verdicts = []
        for step in range(4):
            try:
                for operation in range(5):
                    if (step, operation, communicator.rank) == (1, 2, 1):
                        communicator.fail()
                        break
                    communicator.all_reduce(x)
                verdicts.append(communicator.agree((step, communicator.rank) != (1, 1)))
            except PeerFailedError:
                verdicts.append(communicator.agree(False))
            ops.upload(np.full((4, 4), step, np.float32), x)
        communicator.all_reduce(x)
        return verdicts, float(x[0, 0])

    for found in on_ranks(3, follow):
        assert found == ([True, False, True, True], 9.0)


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(on_ranks: Run) -> None:
    def waits(communicator: HostCommunicator) -> Any:
        communicator.all_reduce(paddle.ones([2, 2]))

    started = time.monotonic()
    assert on_ranks(2, waits, lambda _: "away", seconds=0.5) == ["PeerLostError", "away"]
    assert time.monotonic() - started < 10


def test_who_waits_is_released_when_a_rank_is_lost(on_ranks: Run) -> None:
    def waits(communicator: HostCommunicator) -> Any:
        communicator.agree(True)

    def loses(communicator: HostCommunicator) -> Any:
        while communicator.late() != [communicator.rank]:
            time.sleep(0.01)
        communicator.lose()
        return "gone"

    assert on_ranks(2, waits, loses) == ["PeerLostError", "gone"]


def test_the_memory_has_no_name() -> None:
    before = {path.name for path in Path("/dev/shm").iterdir()}
    memory = SharedMemory(2, 1)
    found = {path.name for path in Path("/dev/shm").iterdir()} - before
    memory.close()
    assert not any("fastdeploy" in name for name in found)


def test_what_the_first_rank_says_is_known_to_all(on_ranks: Run) -> None:
    def listen(communicator: HostCommunicator) -> Any:
        heard = []
        for word in (b"abcd", b"efgh" * 50_000):
            own = word if communicator.rank == 0 else bytes(len(word))
            heard.append(communicator.first_bytes(own) == word)
        heard.append(communicator.agree(True))
        return heard, communicator.is_failing(), communicator.is_lost()

    assert on_ranks(3, listen) == [([True, True, True], False, False)] * 3


def test_a_failure_is_seen_from_outside_the_step(on_ranks: Run) -> None:
    """Whoever watches a card asks while the rank's own thread is inside a sum."""

    def watches(communicator: HostCommunicator) -> Any:
        while not communicator.is_failing():
            time.sleep(0.01)
        sound = communicator.agree(False)
        return sound, communicator.is_failing()

    def fails(communicator: HostCommunicator) -> Any:
        communicator.fail()
        return communicator.agree(False), communicator.is_failing()

    assert on_ranks(2, watches, fails) == [(False, False)] * 2


def test_strangers_on_the_network_are_not_heard() -> None:
    """A port is used again: what was meant for another group must not count."""
    first = NetworkCommunicator(0, 2, "127.0.0.1", GROUP, 0.3)
    stranger = NetworkCommunicator(1, 2, "127.0.0.1", b"another group...", 0.3)
    first.connect([first.address, stranger.address])
    stranger.connect([first.address, stranger.address])
    try:
        stranger.lose()
        with pytest.raises(PeerLostError, match=r"rank 1 did not come within 0\.3 s"):
            first.agree(True)
        assert not first.is_lost()
    finally:
        first.close()
        stranger.close()
