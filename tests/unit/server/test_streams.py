"""What a stream sends while nothing has been generated."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from fastdeploy_lite.entrypoints.openai.streams import KEEP_ALIVE, EventStream


async def send_all(events: AsyncGenerator[bytes, None], sent: list[bytes]) -> None:
    """Note in `sent` what a stream sends."""

    async def receive() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(bytes(message.get("body", b"<head>")))  # type: ignore[call-overload]

    await EventStream(events)({"type": "http"}, receive, send)  # type: ignore[arg-type]


def test_comments_come_until_the_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastdeploy_lite.entrypoints.openai.streams.envs",
        type("E", (), {"FD_LITE_KEEPALIVE_SECONDS": 0.02, "FD_LITE_SEND_SECONDS": 60}),
    )

    sent: list[bytes] = []
    seconds: list[float] = []

    async def events() -> AsyncGenerator[bytes, None]:
        started = time.monotonic()
        while sent.count(KEEP_ALIVE) < 3:
            await asyncio.sleep(0.001)
        seconds.append(time.monotonic() - started)
        yield b"data: 1\n\n"
        await asyncio.sleep(0.09)
        yield b"data: 2\n\n"

    asyncio.run(send_all(events(), sent))
    head, *comments, one, two, end = sent
    assert (head, one, two, end) == (b"<head>", b"data: 1\n\n", b"data: 2\n\n", b"")
    assert set(comments) == {KEEP_ALIVE}
    assert len(comments) * 0.02 <= seconds[0] + 0.02


def test_an_empty_stream_ends() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        return
        yield b""

    sent: list[bytes] = []
    asyncio.run(send_all(events(), sent))
    assert sent == [b"<head>", b""]
