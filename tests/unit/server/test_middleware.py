"""Admission, bounded bodies and keys, driven without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest

from fastdeploy_lite.entrypoints.openai import middleware
from fastdeploy_lite.entrypoints.openai.middleware import Admission, ApiKeys, Gate, RootPath

CHAT = "/v1/chat/completions"


async def drive(
    app: Any,
    parts: Iterable[bytes] = (b"{}",),
    path: str = CHAT,
    headers: Any = (),
    hang: bool = False,
    method: str = "POST",
) -> tuple[int, Any]:
    """Send one request through an ASGI application; returns status and body."""
    pending = list(parts)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if pending:
            part = pending.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(pending) or hang}
        if hang:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    await app(scope, receive, send)
    if not sent:
        return 0, None
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(body) if body else None


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await middleware.refuse(send, 200, {"path": scope["path"]})


def test_admission_counts_and_closes() -> None:
    async def run() -> None:
        release = asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await release.wait()
            await middleware.refuse(send, 200, {})

        admission = Admission(slow, 1)
        first = asyncio.create_task(drive(admission))
        await asyncio.sleep(0)
        assert admission.active == 1
        status, body = await drive(admission)
        assert (status, body) == (
            429, {"detail": "Too many requests,current max concurrency is 1"}
        )  # fmt: skip
        assert not await admission.wait_idle(0.01)
        release.set()
        assert (await first)[0] == 200
        assert await admission.wait_idle(1)
        assert (await drive(admission))[0] == 200
        admission.closed_reason = "The server is shutting down"
        status, body = await drive(admission)
        assert (status, body["error"]["message"]) == (503, "The server is shutting down")
        assert (await drive(admission, path="/health"))[0] == 200

    asyncio.run(run())


def test_a_failing_handler_gives_its_place_back() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("x")

    admission = Admission(broken, 1)
    for _ in range(3):
        with pytest.raises(KeyError):
            asyncio.run(drive(admission))
    assert admission.active == 0


def test_a_full_house_is_said_before_the_body() -> None:
    async def run() -> None:
        async def unread(scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError("the body must not be read")

        admission = Admission(unread, 1)
        admission.active = 1
        assert (await drive(Gate(unread, admission)))[0] == 429
        admission.closed_reason = "The engine is starting"
        assert (await drive(Gate(unread, admission)))[0] == 503

    asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "path", "header", "status"),
    [
        ("GET", "/v1/models", b"Bearer b", 200),
        ("GET", "/v1/models", b"bearer a", 200),
        ("GET", "/v1/models", b"", 401),
        ("GET", "/v1/models", b"Bearer c", 401),
        ("GET", "/v1/models", b"Bearer \xff", 401),
        ("GET", "/v1/models", b"Bearer ", 401),
        ("GET", "/v1/models", b"Bearer", 401),
        ("GET", "/health", b"", 200),
        ("POST", "/ping", b"", 200),
        ("POST", "/health", b"", 401),
        ("GET", "/metrics", b"", 401),
        ("GET", "/config-info", b"", 401),
        ("POST", "/tokenize", b"", 401),
        ("POST", "/detokenize", b"", 401),
        ("POST", "/controller/reset_scheduler", b"", 401),
        ("POST", "/nope", b"", 401),
        ("OPTIONS", "/v1/models", b"", 200),
    ],
)
def test_keys(method: str, path: str, header: bytes, status: int) -> None:
    protected = ApiKeys(echo, ["a", "b"])
    headers = [(b"authorization", header)] if header else []
    given = asyncio.run(drive(protected, path=path, headers=headers, method=method))
    assert given[0] == status
    if status == 401:
        assert given[1]["error"]["code"] == "invalid_api_key"


def test_no_keys_means_open() -> None:
    assert asyncio.run(drive(ApiKeys(echo, [])))[0] == 200


@pytest.mark.parametrize(
    ("path", "seen"),
    [("/fd/v1/models", "/v1/models"), ("/v1/models", "/v1/models"), ("/fd", "/fd")],
)
def test_a_proxys_prefix_is_taken_off(path: str, seen: str) -> None:
    for prefix in ("/fd", "/fd/"):
        assert asyncio.run(drive(RootPath(echo, prefix), path=path)) == (200, {"path": seen})


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("http://127.0.0.1:8180/v1/models", "/v1/models"),
        ("HTTPS://example.org/fd/v1/models", "/v1/models"),
        ("http://example.org", "/"),
        ("ftp://example.org/v1/models", "ftp://example.org/v1/models"),
        ("/v1/http://example.org", "/v1/http://example.org"),
        ("*", "*"),
    ],
)
def test_a_whole_address_is_as_good_as_its_path(path: str, seen: str) -> None:
    assert asyncio.run(drive(RootPath(echo, "/fd"), path=path)) == (200, {"path": seen})
    guarded = RootPath(ApiKeys(echo, ["a"]), "/fd")
    status = asyncio.run(drive(guarded, path=path))[0]
    assert status == asyncio.run(drive(ApiKeys(echo, ["a"]), path=seen))[0]
