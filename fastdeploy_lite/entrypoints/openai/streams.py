"""Server-sent events, and the end of work when the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response

from fastdeploy_lite import envs
from fastdeploy_lite.entrypoints.openai.middleware import Receive, Scope, Send

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting for the first token\n\n"  # a comment: clients skip it, proxies see life
_encoder = msgspec.json.Encoder()


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads an answer."""


def event(value: object, space: str = "") -> bytes:
    """One server-sent event.

    Args:
        value: Plain data.
        space: Upstream's first chat event ends with one extra space.

    Returns:
        The bytes of the event.
    """
    return b"data: " + _encoder.encode(value) + space.encode() + b"\n\n"


def typed_event(value: dict[str, object]) -> bytes:
    """One server-sent event that names its type beside the data.

    Args:
        value: Plain data with a `type`.

    Returns:
        The bytes of the event.
    """
    return b"event: " + str(value["type"]).encode() + b"\n" + event(value)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work`, cancelling it when the client leaves.

    Args:
        request: Whose client is watched; its body must have been read.
        work: What to do.

    Returns:
        The result of `work`.

    Raises:
        ClientGoneError: The client left first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_until_disconnect(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class EventStream(Response):
    """Sends events as they come; a leaving client closes their source at once, and one that reads
    nothing for `FD_LITE_SEND_SECONDS` is taken for gone.

    Args:
        events: The encoded events.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        sender = asyncio.ensure_future(self._send_all(send))
        watcher = asyncio.ensure_future(_until_disconnect(receive))
        limit = envs.FD_LITE_SEND_SECONDS
        try:
            done: set[asyncio.Future[None]] = set()
            while not done and not self._is_stuck(limit):
                done, _ = await asyncio.wait(
                    {sender, watcher}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
                )
            if sender.done():
                sender.result()
        finally:
            watcher.cancel()
            if not sender.done():
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)

    def _is_stuck(self, seconds: float) -> bool:
        """Whether the client has read nothing for that long."""
        since = self._sending_since
        return since is not None and time.monotonic() - since >= seconds

    async def _send_all(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        async with aclosing(self._events) as events:
            async for data in _patient(events, envs.FD_LITE_KEEPALIVE_SECONDS):
                self._sending_since = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._sending_since = None
        await send({"type": "http.response.body", "body": b""})


async def _patient(
    events: AsyncGenerator[bytes, None], seconds: float
) -> AsyncGenerator[bytes, None]:
    """The events; while the first one is awaited, a comment every so often."""
    first = asyncio.ensure_future(anext(events))
    try:
        while not (await asyncio.wait({first}, timeout=seconds))[0]:
            yield KEEP_ALIVE
        yield first.result()
    except StopAsyncIteration:
        return
    finally:
        if not first.done():
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
    async for data in events:
        yield data
