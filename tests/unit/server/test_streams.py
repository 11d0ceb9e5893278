"""What a stream sends while nothing has been generated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from fastdeploy_lite.entrypoints.openai.streams import KEEP_ALIVE, EventStream


async def sent_by(events: AsyncGenerator[bytes, None]) -> list[bytes]:
    sent: list[bytes] = []

    async def receive() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(bytes(message.get("body", b"<head>")))  # type: ignore[call-overload]

    await EventStream(events)({"type": "http"}, receive, send)  # type: ignore[arg-type]
    return sent


def test_comments_come_until_the_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastdeploy_lite.entrypoints.openai.streams.envs",
        type("E", (), {"FD_LITE_KEEPALIVE_SECONDS": 0.02, "FD_LITE_SEND_SECONDS": 60}),
    )

    async def events() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.09)
        yield b"data: 1\n\n"
        await asyncio.sleep(0.09)
        yield b"data: 2\n\n"

    head, *comments, one, two, end = asyncio.run(sent_by(events()))
    assert (head, one, two, end) == (b"<head>", b"data: 1\n\n", b"data: 2\n\n", b"")
    assert 2 <= len(comments) <= 5
    assert set(comments) == {KEEP_ALIVE}


def test_an_empty_stream_ends() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        return
        yield b""

    assert asyncio.run(sent_by(events())) == [b"<head>", b""]
