"""What surrounds every request: ids, keys, known routes, admission, counters, the access line.

Plain ASGI, one object per concern, so that a refusal costs microseconds and a stream costs nothing
per event. Nothing of a body is read before its key and its route are known (`bodies.py` reads it).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any

import msgspec
from starlette.routing import BaseRoute, Match

from fastdeploy_lite import envs
from fastdeploy_lite.entrypoints.openai.lanes import current_client
from fastdeploy_lite.metrics.metrics import ServerMetrics
from fastdeploy_lite.utils.errors import one_line
from fastdeploy_lite.utils.logging import current_request_id, write_console

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GENERATION_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
# Readable without a key: what load balancers probe, and pages that show nothing of the service.
OPEN_PATHS = frozenset({"/", "/health", "/ping", "/version", "/load", "/docs", "/openapi.json"})
OPEN_PREFIXES: tuple[str, ...] = ("/web/",)
REQUEST_ID = b"x-request-id"
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


async def refuse(
    send: Send, status: int, value: object, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with JSON.

    Args:
        send: ASGI's.
        status: HTTP status.
        value: The body, plain data.
        headers: More headers.
    """
    body = msgspec.json.encode(value)
    length = (b"content-length", b"%d" % len(body))
    all_headers = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})


RETRY = ((b"retry-after", b"1"),)


def error(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The error body of a refusal.

    Args:
        message: What is wrong.
        kind: Error type.
        code: Machine-readable reason.
        param: Part of the request.

    Returns:
        `{"error": {...}}` with all four keys.
    """
    info = {"message": one_line(message), "type": kind, "param": param, "code": code}
    return {"error": info}


class ApiKeys:
    """Bearer keys on everything but probes, static pages and OPTIONS.

    Args:
        app: What to protect.
        keys: Accepted keys; none means no protection.
        open_paths: Paths that may be read without a key; the default is every port's.
    """

    def __init__(
        self, app: App, keys: Iterable[str], open_paths: frozenset[str] = OPEN_PATHS
    ) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        free = scope["type"] != "http" or not self._digests or self._is_open(scope)
        if free or self._has_key(scope):
            who = (
                _authorization(scope).hex() if self._digests else (scope.get("client") or ("",))[0]
            )
            token = current_client.set(who)
            try:
                await self._app(scope, receive, send)
            finally:
                current_client.reset(token)
            return
        text = "Unauthorized: send a key of this server as 'Authorization: Bearer KEY'"
        body = error(text, "invalid_request_error", "invalid_api_key")
        await refuse(send, 401, body, ((b"www-authenticate", b"Bearer"),))

    def _is_open(self, scope: Scope) -> bool:
        method, path = scope["method"], scope["path"]
        if method == "OPTIONS" or (method == "POST" and path == "/ping"):
            return True
        reads = method in ("GET", "HEAD")
        prefixed = bool(OPEN_PREFIXES) and path.startswith(OPEN_PREFIXES)
        return reads and (prefixed or path in self._open_paths)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = _authorization(scope).partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        # Every digest is compared, so that time tells nothing about which one came close.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def _authorization(scope: Scope) -> bytes:
    return next((value for name, value in scope["headers"] if name == b"authorization"), b"")


class KnownRoutes:
    """Answers 404 and 405 from the head of a request, before its body is read.

    Args:
        app: The application.
        routes: Its routes.
    """

    def __init__(self, app: App, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if somebody will answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        matches = [route.matches(scope)[0] for route in self._routes]
        if Match.FULL in matches:
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"][:256]
        if Match.PARTIAL not in matches:
            text = f"Invalid URL ({method} {path}): there is no such route; see /docs"
            await refuse(send, 404, error(text, "invalid_request_error", "not_found"))
            return
        allowed = ", ".join(sorted(self._methods(scope)))
        text = f"Method {method} is not allowed for {path}: use {allowed}"
        body = error(text, "invalid_request_error", "method_not_allowed")
        await refuse(send, 405, body, ((b"allow", allowed.encode()),))

    def _methods(self, scope: Scope) -> set[str]:
        reached = (r for r in self._routes if r.matches(scope)[0] is not Match.NONE)
        return {method for route in reached for method in getattr(route, "methods", None) or ()}


class Admission:
    """Counts generation requests in flight and refuses those beyond the limit at once.

    A request counts from the arrival of its whole body on: clients that send slowly hold no place.

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
        elif not await self.refused(scope, send):
            await self._count(scope, receive, send)

    async def refused(self, scope: Scope, send: Send) -> bool:
        """Answer a request for which there is no room.

        Args:
            scope: ASGI's.
            send: ASGI's.

        Returns:
            Whether it was refused.
        """
        if scope["path"] not in GENERATION_PATHS:
            return False
        if self.closed_reason is not None:
            body = error(self.closed_reason, "server_error", "connection_error")
            await refuse(send, 503, body, RETRY)
        elif self.active >= self._limit:
            detail = f"Too many requests,current max concurrency is {self._limit}"
            await refuse(send, 429, {"detail": detail}, RETRY)
        else:
            return False
        return True

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


class Gate:
    """Refuses from the head of a request what admission would refuse after its body.

    Args:
        app: Reads the body, then asks `admission`.
        admission: Who decides.
    """

    def __init__(self, app: App, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 429 or 503."""
        if scope["type"] == "http" and await self._admission.refused(scope, send):
            return
        await self._app(scope, receive, send)


def without_host(path: str) -> str:
    """The path of an address that may be whole; other texts as they are."""
    scheme, found, rest = path.partition("://")
    if not found or scheme.lower() not in ("http", "https"):
        return path
    return "/" + rest.partition("/")[2]


class RootPath:
    """Takes off what stands before the path that routes know.

    That is a prefix that a proxy puts before every path and does not strip, and scheme and host
    where a client sends the whole address (RFC 9112, 3.2.2).

    Args:
        app: The application.
        prefix: `--root-path`; empty for none.
    """

    def __init__(self, app: App, prefix: str) -> None:
        self._app = app
        self._prefix = prefix.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with the path that routes know."""
        path = without_host(scope.get("path", ""))
        if self._prefix and path.startswith(f"{self._prefix}/"):
            path = path[len(self._prefix) :]
        if "path" in scope:
            scope["path"] = path  # in place: the observer reads it later
        await self._app(scope, receive, send)


class Observer:
    """HTTP counters, the id and the access line of every request.

    The id is the client's `X-Request-Id`, or a new one; it stands in the answer's headers, in the
    access line and in every log record that is written for the request.

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
        request_id = _request_id(scope)
        token = current_request_id.set(request_id)

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (REQUEST_ID, request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            current_request_id.reset(token)
            self._note(scope, status, time.perf_counter() - started, request_id)

    def _note(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        # The route's template, not the path: scanners must not create metric series.
        path = getattr(scope.get("route"), "path", None)
        if path is None:
            path = scope["path"] if scope["path"] in GENERATION_PATHS else "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.http_requests.labels(method, path, str(status)).inc()
        self._metrics.http_duration.labels(method, path).observe(seconds)
        write_console(access_line(scope, status, request_id))


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


def access_line(scope: Scope, status: int, request_id: str = "") -> str:
    """Upstream's access line; what the client chose in it is escaped.

    Args:
        scope: ASGI's.
        status: Status of the answer.
        request_id: Of the request; empty leaves it out.

    Returns:
        The line with its line break.
    """
    client = scope.get("client") or ("-", 0)
    clock = time.strftime("%Y-%m-%d %H:%M:%S")
    path = one_line(scope["path"][:512])[:512].replace('"', "%22")
    request = f"{one_line(scope['method'])} {path} HTTP/{scope.get('http_version', '1.1')}"
    if envs.FD_LITE_LOG_FORMAT == "json":
        fields = {"time": clock, "level": "INFO", "process": os.getpid(), "logger": "access",
                  "client": f"{client[0]}:{client[1]}", "message": request, "status": status,
                  "request_id": request_id}  # fmt: skip
        return f"{json.dumps(fields)}\n"
    line = f'[{clock}] [{os.getpid()}] [INFO] {client[0]}:{client[1]} - "{request}" {status}'
    return f"{line} {request_id}\n" if request_id else f"{line}\n"
