"""What a communicator of cards does when ranks part, with cards that only count.

A card here is a number in shared memory: sums queued. It is idle when all ranks have queued as
many, as NCCL's kernels end when each rank's has come.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fastdeploy_lite.distributed.communicator import (
    PeerFailedError,
    PeerLostError,
    SharedMemory,
    SharedMemoryCommunicator,
)

SIZE = 2
Rank = Callable[[Any, Any], Any]


class Cards:
    """The cards of all ranks; made before the processes part."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.queued = context.Array("l", SIZE)
        self.groups = context.Array("l", SIZE)

    def install(self) -> None:
        """Put native module and runtime of the cards in place of the real ones."""
        native, runtime = ModuleType("native"), ModuleType("runtime")
        cards = self

        class NcclGroup:
            def __init__(self, name: bytes, rank: int, ranks: int, device: int) -> None:
                assert name == b"x" * 128
                self.rank, self.aborted, self.ended = rank, False, True
                self.asked_to_share = False
                with cards.queued.get_lock():
                    cards.queued[rank] = 0
                    cards.groups[rank] += 1
                while len(set(cards.groups)) > 1:  # NCCL, too, waits for all
                    time.sleep(0.01)

            def share_memory(self) -> bool:
                self.asked_to_share = True
                return False  # sums go another way, which nobody notices here

            def all_reduce(self, *_: Any) -> None:
                if self.aborted:
                    raise RuntimeError("NCCL: the group was ended")
                cards.queued[self.rank] += 1

            def is_idle(self) -> bool:
                return len(set(cards.queued)) == 1

            def wait_idle(self, seconds: float, stream: int) -> bool:
                deadline = time.monotonic() + seconds
                while time.monotonic() < deadline and not self.aborted and not self.is_idle():
                    time.sleep(0.01)
                return self.is_idle() and not self.aborted

            def abort(self) -> None:
                self.aborted = True

        def wait(communicator: Any) -> None:
            """What copying a result back does: wait for the card, however long."""
            group = communicator._group
            while not group.aborted and not group.is_idle():
                time.sleep(0.01)

        native.__dict__.update(
            NcclGroup=NcclGroup, nccl_unique_id=lambda: b"x" * 128, synchronize=lambda _: None
        )
        runtime.__dict__.update(
            open_nccl=lambda: None, stream=lambda: 0, device_index=lambda: 0, SCRATCH_BYTES=1,
            scratch=lambda _: 0, address=lambda _: 0, wait=wait,
        )  # fmt: skip
        sys.modules["fastdeploy_lite._ops_cuda"] = native
        import fastdeploy_lite
        from fastdeploy_lite.model_executor import ops

        fastdeploy_lite._ops_cuda = native  # type: ignore[attr-defined]
        name = "fastdeploy_lite.model_executor.ops.cuda_runtime"
        sys.modules[name] = runtime
        ops.cuda_runtime = runtime  # type: ignore[attr-defined]


def on_ranks(*work: Rank, seconds: float = 20.0) -> list[Any]:
    """Run one function per rank in a process of its own; return values or exceptions' names."""
    memory, cards = SharedMemory(SIZE, 1), Cards()
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(SIZE)]

    def run(rank: int) -> None:
        cards.install()
        sys.modules.pop("fastdeploy_lite.distributed.nccl", None)
        from fastdeploy_lite.distributed.nccl import NcclCommunicator, runtime

        communicator = NcclCommunicator(SharedMemoryCommunicator(memory, rank, seconds), seconds)
        forgotten: list[int] = []
        communicator.open(lambda: forgotten.append(1))
        try:
            found = work[rank % len(work)](communicator, runtime)
        except (PeerFailedError, PeerLostError) as error:
            found = f"{type(error).__name__}: {error}"
        pipes[rank][1].send((found, len(forgotten), list(cards.groups)[rank]))

    processes = [context.Process(target=run, args=(rank,)) for rank in range(SIZE)]
    for process in processes:
        process.start()
    results = [pipe[0].recv() if pipe[0].poll(60) else "nothing" for pipe in pipes]
    for process in processes:
        process.join(60)
        assert not process.is_alive()
    memory.close()
    return results


def step(communicator: Any, runtime: Any, sums: int, fails: bool = False) -> bool:
    """One step of `sums` sums; the verdict of all ranks."""
    import paddle

    communicator.begin() if communicator.rank == 0 else None
    x = paddle.ones([2, 2])
    try:
        for _ in range(sums):
            communicator.all_reduce(x)
        if fails:
            raise ValueError
        if communicator.rank == 0:
            runtime.wait(communicator)
        sound = True
    except PeerFailedError:
        sound = False
    except ValueError:
        communicator.fail()
        sound = False
    return bool(communicator.agree(sound))


def test_a_failure_after_all_was_queued_keeps_the_group() -> None:
    def follow(communicator: Any, runtime: Any) -> Any:
        return [step(communicator, runtime, 3, fails=i == 1) for i in range(3)]

    assert on_ranks(follow) == [([True, False, True], 0, 1)] * 2


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_queues_less_gets_a_new_group_with_all_others(who: int) -> None:
    def follow(communicator: Any, runtime: Any) -> Any:
        alone = communicator.rank == who
        return [
            step(communicator, runtime, 3),
            step(communicator, runtime, 1 if alone else 3, fails=alone),
            step(communicator, runtime, 2),
            step(communicator, runtime, 2),
        ]

    started = time.monotonic()
    assert on_ranks(follow) == [([True, False, True, True], 1, 2)] * 2
    assert time.monotonic() - started < 15


def test_what_the_first_rank_tells_comes_in_order_beside_sums() -> None:
    def follow(communicator: Any, runtime: Any) -> Any:
        import paddle

        told = []
        for step in range(3):
            if communicator.rank == 0:
                communicator.begin()
            for word in (b"abcd", b"efghijkl" * 40_000):
                communicator.all_reduce(paddle.ones([2, 2]))
                own = word if communicator.rank == 0 else bytes(len(word))
                told.append(communicator.first_bytes(own) == word)
            told.append(communicator.agree(step != 1))
        return told

    found = on_ranks(follow)
    assert found == [([True, True, True, True, True, False, True, True, True], 0, 1)] * 2


def test_a_card_that_waits_is_freed_when_a_rank_is_lost() -> None:
    def waits(communicator: Any, runtime: Any) -> Any:
        return step(communicator, runtime, 3)

    def loses(communicator: Any, runtime: Any) -> Any:
        time.sleep(0.3)
        communicator.lose()
        return "gone"

    first, second = on_ranks(waits, loses)
    assert first[0] == "PeerLostError: another rank is gone"
    assert second[0] == "gone"


def test_cards_that_never_end_a_step_are_given_up() -> None:
    def waits(communicator: Any, runtime: Any) -> Any:
        return step(communicator, runtime, 3)

    def idles(communicator: Any, runtime: Any) -> Any:
        return step(communicator, runtime, 2)

    first, second = on_ranks(waits, idles, seconds=3.0)
    assert first[0] == "PeerLostError: the cards did not end a step within 3 s"
    assert str(second[0]).startswith("PeerLostError: ")


def test_who_comes_on_is_seen() -> None:
    def follow(communicator: Any, runtime: Any) -> Any:
        import paddle

        seen = []
        if communicator.rank == 0:
            communicator.begin()
            seen.append(communicator.late())
            communicator.all_reduce(paddle.ones([2, 2]))
            while communicator.late() != [0]:
                time.sleep(0.01)
            seen.append(len(np.unique(communicator.arrivals())))
        else:
            ahead, own = communicator.arrivals()
            while ahead < own + 2:  # the first rank has looked, and gone on
                time.sleep(0.01)
                ahead, own = communicator.arrivals()
        communicator.agree(True)
        return seen

    assert on_ranks(follow)[0][0] == [[1], 2]


@pytest.mark.parametrize("text", ["0", "1"])
def test_every_new_group_is_asked_to_share_memory(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("FD_LITE_PEER_SUMS", text)

    def follow(communicator: Any, runtime: Any) -> Any:
        alone = communicator.rank == 1
        first = communicator._group.asked_to_share
        step(communicator, runtime, 1 if alone else 3, fails=alone)
        return first, communicator._group.asked_to_share

    assert on_ranks(follow) == [((text == "1",) * 2, 1, 2)] * 2
