"""Preparation by turns."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from fastdeploy_lite.entrypoints.openai.lanes import Lane, current_client


async def as_client(lane: Lane, client: str, function: Any, *args: Any) -> Any:
    current_client.set(client)
    return await lane.run(function, *args)


def test_clients_take_turns() -> None:
    """A queue of one client does not delay another by more than one job."""
    order: list[str] = []

    async def run() -> None:
        lane = Lane("test", 1)
        hold = threading.Event()
        first = asyncio.create_task(as_client(lane, "a", hold.wait, 60))
        await asyncio.sleep(0.01)
        names = ["a"] * 6 + ["b"] * 2 + ["c"]
        jobs = [asyncio.create_task(as_client(lane, n, order.append, n)) for n in names]
        await asyncio.sleep(0.01)
        hold.set()
        await asyncio.gather(first, *jobs)
        lane.close()

    asyncio.run(run())
    assert order == ["a", "b", "c", "a", "b", "a", "a", "a", "a"]


def test_leaving_clients_leave_no_hole() -> None:
    """Cancelled waiters are skipped; a thread counts as busy until its job has ended."""

    async def run() -> None:
        lane = Lane("test", 2)
        hold = threading.Event()
        busy = [asyncio.create_task(as_client(lane, "a", hold.wait, 60)) for _ in range(2)]
        await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(as_client(lane, "a", int)) for _ in range(9)]
        await asyncio.sleep(0.01)
        for task in [*busy, *waiting[::2]]:
            task.cancel()
        other = asyncio.create_task(as_client(lane, "b", int))
        await asyncio.sleep(0.05)
        assert not other.done()
        hold.set()
        await asyncio.gather(other, *busy, *waiting, return_exceptions=True)
        while lane._free < 2:  # the threads tell of their ends one by one
            await asyncio.sleep(0.01)
        assert not lane._queues
        lane.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_failing_jobs_free_their_thread() -> None:
    async def run() -> None:
        lane = Lane("test", 1)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await lane.run(divmod, 1, 0)
        assert await lane.run(int) == 0
        lane.close()

    asyncio.run(run())
