"""Admission, bounded bodies and keys, driven without a network."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest

from fastdeploy_lite.entrypoints.openai import middleware
from fastdeploy_lite.entrypoints.openai.middleware import Admission, ApiKeys, BoundedBody

CHAT = "/v1/chat/completions"


async def drive(
    app: Any,
    parts: Iterable[bytes] = (b"{}",),
    path: str = CHAT,
    headers: Any = (),
    hang: bool = False,
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

    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
    await app(scope, receive, send)
    if not sent:
        return 0, None
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(body) if body else None


async def echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    await middleware.refuse(send, 200, {"length": len(message["body"])})


def test_bodies_arrive_whole() -> None:
    assert asyncio.run(drive(BoundedBody(echo, 10), [b"abc", b"de"])) == (200, {"length": 5})


def test_large_bodies_are_refused_before_their_end() -> None:
    status, body = asyncio.run(drive(BoundedBody(echo, 10), [b"x" * 6, b"x" * 6, b"never read"]))
    assert status == 413
    assert "10 bytes" in body["error"]["message"]


def test_slow_bodies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.05)
    status, _ = asyncio.run(drive(BoundedBody(echo, 10), [b"x"], hang=True))
    assert status == 408


def test_a_client_that_leaves_gets_nothing() -> None:
    assert asyncio.run(drive(BoundedBody(echo, 10), [])) == (0, None)


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


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [("/v1/models", b"Bearer b", 200), ("/v1/models", b"bearer a", 200), ("/v1/models", b"", 401),
     ("/v1/models", b"Bearer c", 401), ("/health", b"", 200), ("/v1/models", b"Bearer \xff", 401)],
)  # fmt: skip
def test_keys(path: str, header: bytes, status: int) -> None:
    protected = ApiKeys(echo, ["a", "b"])
    headers = [(b"authorization", header)] if header else []
    assert asyncio.run(drive(protected, path=path, headers=headers))[0] == status


def test_no_keys_means_open() -> None:
    assert asyncio.run(drive(ApiKeys(echo, [])))[0] == 200
