"""Blocking preparation beside the event loop: in lanes, and in each lane by turns of the clients.

Templates and constraints that a request brings along cost as much as their author likes. They have
a lane of their own, so that plain requests never wait for them; and in every lane the next job is
taken from the client whose turn it is, so that nobody waits for more than one job of each other.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")

# Who asks: a key where keys are needed, else an address.
current_client: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="")


class Lane:
    """Some threads and a queue per client; admission bounds how many wait.

    Args:
        name: Of the threads.
        threads: Jobs at the same time.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, name)
        self._free = threads
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run a job when it is its client's turn.

        Args:
            function: What to run; it cannot be interrupted, but its waiter can.
            *args: Its arguments.

        Returns:
            Its result.
        """
        await self._turn(current_client.get())
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()  # the id of the request, for log records
        try:
            job: Future[Result] = self._executor.submit(context.run, function, *args)
        except BaseException:
            self._release()
            raise
        # Not when the waiter leaves: the thread is still busy then.
        job.add_done_callback(lambda _: _soon(loop, self._release))
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """Start nothing more."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, client: str) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release()  # it had just been given
            else:
                self._forget(client, turn)
            raise

    def _forget(self, client: str, turn: asyncio.Future[None]) -> None:
        queue = self._queues.get(client)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._queues[client]

    def _release(self) -> None:
        """Give the free thread to the first job of the client whose turn it is."""
        while self._queues:
            client, queue = self._queues.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._queues[client] = queue  # at the end: the others come first
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


def _soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)
