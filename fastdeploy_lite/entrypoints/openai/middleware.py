"""What surrounds every request: keys, admission, bounded bodies, counters, the access line.

Plain ASGI, one object per concern, so that a refusal costs microseconds and a stream costs nothing
per event.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import msgspec

from fastdeploy_lite.metrics.metrics import ServerMetrics
from fastdeploy_lite.utils.errors import one_line

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_SECONDS = 60.0  # a client that sends slower than this holds a connection for nothing
GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})


async def refuse(send: Send, status: int, value: object, retry: bool = False) -> None:
    """Answer with JSON.

    Args:
        send: ASGI's.
        status: HTTP status.
        value: The body, plain data.
        retry: Whether to say when to come back.
    """
    body = msgspec.json.encode(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if retry:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class ApiKeys:
    """Bearer keys on paths that start with `/v1`; others and OPTIONS are open.

    Args:
        app: What to protect.
        keys: Accepted keys; none means no protection.
    """

    def __init__(self, app: App, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        free = scope["type"] != "http" or not self._digests or self._is_open(scope)
        if free or self._has_key(scope):
            await self._app(scope, receive, send)
        else:
            await refuse(send, 401, {"error": "Unauthorized"})

    @staticmethod
    def _is_open(scope: Scope) -> bool:
        return scope["method"] == "OPTIONS" or not scope["path"].startswith("/v1")

    def _has_key(self, scope: Scope) -> bool:
        header = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        # Every digest is compared, so that time tells nothing about which one came close.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


class Admission:
    """Counts generation requests in flight and refuses those beyond the limit at once.

    Args:
        app: What to protect.
        limit: Most requests at the same time.

    Attributes:
        active: Requests in flight.
        closed_reason: Why new requests get 503; None while open.
    """

    def __init__(self, app: App, limit: int) -> None:
        self._app = app
        self._limit = limit
        self.active = 0
        self.closed_reason: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 429 or 503."""
        if scope["type"] != "http" or scope["path"] not in GENERATION_PATHS:
            await self._app(scope, receive, send)
        elif self.closed_reason is not None:
            info = {"message": self.closed_reason, "type": "server_error", "param": None}
            body = {"error": {**info, "code": "connection_error"}}
            await refuse(send, 503, body, retry=True)
        elif self.active >= self._limit:
            detail = f"Too many requests,current max concurrency is {self._limit}"
            await refuse(send, 429, {"detail": detail}, retry=True)
        else:
            await self._count(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.active += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self.active -= 1
            if self.active == 0:
                self._idle.set()

    async def wait_idle(self, seconds: float) -> bool:
        """Wait until no request is in flight.

        Args:
            seconds: How long at most.

        Returns:
            Whether that happened in time.
        """
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True


class BoundedBody:
    """Reads a request's body whole before the application sees it, within a size and a time.

    Args:
        app: What to protect.
        limit: Most bytes.
    """

    def __init__(self, app: App, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body read, or answer 413 or 408."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            await self._refuse(send, 408, f"the body did not arrive within {BODY_SECONDS:.0f} s")
            return
        if body is None:
            return  # the client is gone
        if len(body) > self._limit:
            await self._refuse(send, 413, f"the body is larger than {self._limit} bytes")
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limit or not message.get("more_body"):
                return b"".join(parts)

    @staticmethod
    async def _refuse(send: Send, status: int, message: str) -> None:
        info = {"message": message, "type": "invalid_request_error", "param": "body"}
        await refuse(send, status, {"error": {**info, "code": "invalid_value"}})


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class Observer:
    """HTTP counters and the access line of every request.

    Args:
        app: What to watch.
        metrics: Where to count.
    """

    def __init__(self, app: App, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and note its status and duration."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # nothing sent: the client left first

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            self._note(scope, status, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        # The route's template, not the path: scanners must not create metric series.
        path = getattr(scope.get("route"), "path", None)
        if path is None:
            path = scope["path"] if scope["path"] in GENERATION_PATHS else "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http_requests.labels(method, path, str(status)).inc()
        self._metrics.http_duration.labels(method, path).observe(seconds)
        sys.stderr.write(access_line(scope, status))


_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


def access_line(scope: Scope, status: int) -> str:
    """Upstream's access line; what the client chose in it is escaped.

    Args:
        scope: ASGI's.
        status: Status of the answer.

    Returns:
        The line with its line break.
    """
    client = scope.get("client") or ("-", 0)
    clock = time.strftime("%Y-%m-%d %H:%M:%S")
    path = one_line(scope["path"])[:512].replace('"', "%22")
    request = f"{one_line(scope['method'])} {path} HTTP/{scope.get('http_version', '1.1')}"
    return f'[{clock}] [{os.getpid()}] [INFO] {client[0]}:{client[1]} - "{request}" {status}\n'
