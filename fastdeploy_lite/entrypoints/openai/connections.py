"""Connections within bounds: their number, how long they may be silent, how long they may not read.

uvicorn parses HTTP and runs the application; it bounds neither of these, and neither do hypercorn
and granian (hypercorn has read time-outs, but no limit on connections; granian runs the application
in processes that it starts itself, while this service has one engine client on one loop). So the
limits are laid around uvicorn's protocol object:

* A connection that has not sent a whole request head `FD_LITE_HEAD_SECONDS` after it opened, or
  after the first byte of a further request, is closed.
* Beyond the number that file descriptors allow, the newcomer takes the place of the connection that
  has waited longest for its client: first one that never asked for anything, then one between two
  requests, then one that owes the rest of a body.
* A connection whose client reads nothing for `FD_LITE_SEND_SECONDS` is cut, not flushed.
* Bytes that come early (pipelining) are read on, within `EARLY_BYTES`: behind a paused transport
  the end of a connection would stay unseen, and its request would run for nobody.
"""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastdeploy_lite import envs
from fastdeploy_lite.utils.logging import get_logger

BACKLOG = 256  # connections that the kernel keeps, and the most that one turn of the loop accepts
SPARE_DESCRIPTORS = 96  # log files, sockets to the engine, model files, pipes
MOST_CONNECTIONS = 16384
EARLY_BYTES = 64 << 10
SWEEP_SECONDS = 1.0
WARN_SECONDS = 60.0
_log = get_logger("console")


def connection_limit() -> int:
    """How many connections this process can hold; raises the soft limit on descriptors first.

    Returns:
        A number that leaves descriptors for everything else.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + BACKLOG + SPARE_DESCRIPTORS
    best = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < best:
        resource.setrlimit(resource.RLIMIT_NOFILE, (best, hard))
        soft = best
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(min(soft - BACKLOG - SPARE_DESCRIPTORS, MOST_CONNECTIONS), 16)


class Connections:
    """All open connections of the service, on all its ports.

    Args:
        limit: Most at the same time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[GuardedProtocol, None] = {}  # oldest first
        self._cut = 0
        self._warn_next = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: GuardedProtocol) -> None:
        """Take a connection in; beyond the limit another one, or this one, is cut.

        Args:
            connection: Just made.
        """
        if len(self._open) >= self._limit:
            self._warn()
            (self._longest_waiting() or connection).cut()
        self._open[connection] = None

    def shortage(self, wanted: int) -> str | None:
        """What to say where fewer connections fit than requests are allowed; None where not.

        Args:
            wanted: Requests at the same time.
        """
        if self._limit >= wanted:
            return None
        return (
            f"File descriptors leave room for {self._limit} connections at a time, and "
            f"{wanted} requests are allowed: raise their limit (ulimit -Hn), or lower "
            "--max-concurrency"
        )

    def _warn(self) -> None:
        """Of cut connections, once in a while: their clients see a reset and no reason."""
        self._cut += 1
        now = time.monotonic()
        if now >= self._warn_next:
            self._warn_next = now + WARN_SECONDS
            _log.warning(
                "All %d connections that file descriptors allow are in use: newcomers take the "
                "place of idle ones, %d so far; raise the limit (ulimit -Hn)",
                self._limit,
                self._cut,
            )

    def discard(self, connection: GuardedProtocol) -> None:
        """Forget a connection that is gone."""
        self._open.pop(connection, None)

    def _longest_waiting(self) -> GuardedProtocol | None:
        ranked: list[GuardedProtocol | None] = [None, None, None]
        for connection in self._open:
            rank = connection.waiting_rank()
            if rank is not None and ranked[rank] is None:
                ranked[rank] = connection
                if rank == 0:
                    break
        return next((connection for connection in ranked if connection is not None), None)

    async def watch(self) -> None:
        """Enforce the time-outs until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now, send_seconds = time.monotonic(), envs.FD_LITE_SEND_SECONDS
            for connection in list(self._open):
                connection.check(now, send_seconds)


class GuardedProtocol(H11Protocol):
    """uvicorn's protocol, with the limits of this module.

    Args:
        connections: Where it registers.
        **options: uvicorn's.
    """

    def __init__(self, *, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._registry = connections
        self._served = False  # has asked for something
        self._head_deadline: float | None = None
        self._early = 0
        self._unsent = 0
        self._unsent_since = 0.0

    @property
    def _is_active(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def waiting_rank(self) -> int | None:
        """How cheaply this connection is given up, 0 first; None while it is owed an answer."""
        if self.transport.is_closing():
            return None
        if self._is_active:
            return 2 if self.cycle.more_body else None
        return 1 if self._served else 0

    def cut(self) -> None:
        """Close without flushing: whoever does not read or speak gets nothing more."""
        self._registry.discard(self)
        self.transport.abort()

    def check(self, now: float, send_seconds: float) -> None:
        """Close the connection if its client has been silent or deaf for too long.

        Args:
            now: Monotonic clock.
            send_seconds: How long a client may read nothing.
        """
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent or self._unsent == 0:
            self._unsent_since = now
        self._unsent = unsent
        late = self._head_deadline is not None and now > self._head_deadline
        if late or (unsent and now - self._unsent_since > send_seconds):
            self.cut()

    # asyncio's calls -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came."""
        super().connection_made(transport)
        self._await_head()
        self._registry.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection ended, whoever ended it."""
        self._registry.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        is_early = self._is_active and not self.cycle.more_body
        super().data_received(data)
        if is_early and self._is_active:
            self._read_on(len(data))
        elif not self._is_active and self._head_deadline is None:
            self._await_head()

    def handle_events(self) -> None:
        """Act on what has been parsed."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._served, self._early, self._head_deadline = True, 0, None
        if self._is_active and not self.cycle.more_body and self.flow.read_paused:
            self._read_on(0)

    def on_response_complete(self) -> None:
        """An answer went out; the next request may be here already."""
        self._early = 0
        super().on_response_complete()
        unread = self.conn.their_state is h11.SEND_BODY  # refused before its body had come
        if not self._is_active and (unread or self.conn.trailing_data[0]):
            self._await_head()

    def _await_head(self) -> None:
        self._head_deadline = time.monotonic() + envs.FD_LITE_HEAD_SECONDS

    def _read_on(self, size: int) -> None:
        """Go on reading beside a running answer, so that the client's end is noticed."""
        self._early += size
        if self._early > EARLY_BYTES:
            self.cut()
        else:
            self.flow.resume_reading()
