"""Connections within bounds, on a real loopback socket with a toy application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvicorn

from fastdeploy_lite.entrypoints.openai import connections
from fastdeploy_lite.entrypoints.openai.connections import Connections, GuardedProtocol

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Toy:
    """Answers at once, or when the client has left (`/wait`), or with much (`/large`)."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.waiting = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b"ok"
        if scope["path"] == "/wait":
            self.waiting.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()
            return
        if scope["path"] == "/large":
            body = b"x" * (64 << 20)
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})


class Running:
    """A server, its application and its connections."""

    def __init__(self, limit: int) -> None:
        self.toy = Toy()
        self.connections = Connections(limit)
        self.port = 0
        self.taken = 0

    def protocol(self, **options: Any) -> GuardedProtocol:
        """What the server makes for a client that has come."""
        made = GuardedProtocol(connections=self.connections, **options)
        take_in = made.connection_made

        def count(transport: asyncio.Transport) -> None:
            take_in(transport)
            self.taken += 1

        made.connection_made = count  # type: ignore[method-assign, assignment]
        return made

    async def open(self, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect and send; returns once the server has taken the connection in."""
        before = self.taken
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        await writer.drain()
        await until(lambda: self.taken > before)
        await asyncio.sleep(0.02)
        return reader, writer


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # `drive` ends what takes too long
        await asyncio.sleep(0.005)


class QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@contextlib.asynccontextmanager
async def running(limit: int = 100) -> AsyncIterator[Running]:
    state = Running(limit)
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    state.port = bound.getsockname()[1]
    protocol: Any = state.protocol
    toy: Any = state.toy
    config = uvicorn.Config(toy, http=protocol, ws="none", lifespan="off", log_config=None,
                            timeout_graceful_shutdown=0)  # fmt: skip
    server = QuietServer(config)
    tasks = [asyncio.create_task(server.serve(sockets=[bound])),
             asyncio.create_task(state.connections.watch())]  # fmt: skip
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield state
    finally:
        server.should_exit = True
        tasks[1].cancel()
        await asyncio.wait(tasks, timeout=60)
        bound.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SWEEP_SECONDS", 0.05)
    monkeypatch.setenv("FD_LITE_HEAD_SECONDS", "1")
    monkeypatch.setenv("FD_LITE_SEND_SECONDS", "1")


def drive(test: Callable[[Running], Any], limit: int = 100) -> None:
    async def run() -> None:
        async with running(limit) as state:
            await asyncio.wait_for(test(state), 60)

    asyncio.run(run())


@pytest.mark.parametrize(
    "early", [b"", b"G", GET, b"\r\n", b"GET /" + b"x" * 9000], ids=["-", "G", "GET", "CRLF", "9k"]
)
@pytest.mark.parametrize("late", [True, False])
def test_a_disconnect_is_seen_behind_early_bytes(early: bytes, late: bool) -> None:
    async def test(state: Running) -> None:
        first = b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"
        _, writer = await state.open(first if late else first + early)
        await state.toy.waiting.wait()
        if late:
            for part in (early[:1], early[1:]):
                writer.write(part)
                await asyncio.sleep(0.02)
        writer.close()
        await state.toy.left.wait()

    drive(test)


def test_early_bytes_have_an_end() -> None:
    async def test(state: Running) -> None:
        _, writer = await state.open(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(200):
                writer.write(b"x" * 10_000)
                await writer.drain()
        await state.toy.left.wait()

    drive(test)


def test_pipelined_requests_are_answered_in_turn() -> None:
    async def test(state: Running) -> None:
        reader, _ = await state.open(GET * 20)
        for _ in range(20):
            await reader.readuntil(b"\r\n\r\nok")

    drive(test)


@pytest.mark.parametrize(
    "data",
    [b"", b"GET / HT", GET + b"GET", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1"],
)
def test_silent_connections_are_closed(data: bytes) -> None:
    async def test(state: Running) -> None:
        reader, _ = await state.open(data)
        with contextlib.suppress(ConnectionResetError):
            await reader.read()  # whatever was answered, then the end
        assert len(state.connections) == 0

    drive(test)


def test_bytes_one_by_one_do_not_buy_time() -> None:
    async def test(state: Running) -> None:
        reader, writer = await state.open()
        started = asyncio.get_running_loop().time()
        with contextlib.suppress(OSError):
            for _ in range(100):
                writer.write(b"G")
                await asyncio.sleep(0.1)
                if reader.at_eof() or not state.connections:
                    break
        assert asyncio.get_running_loop().time() - started < 5

    drive(test)


def test_kept_connections_live_on_between_requests() -> None:
    async def test(state: Running) -> None:
        reader, writer = await state.open(GET)
        await reader.readuntil(b"ok")
        await asyncio.sleep(1.5)  # beyond the time for a head: none has begun
        writer.write(GET)
        await reader.readuntil(b"ok")

    drive(test)


def test_a_reader_that_does_not_read_loses_its_socket() -> None:
    async def test(state: Running) -> None:
        _, writer = await state.open(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        transport: Any = writer.transport
        transport.pause_reading()
        while len(state.connections):
            await asyncio.sleep(0.05)

    drive(test)


def test_a_slow_reader_keeps_it() -> None:
    async def test(state: Running) -> None:
        reader, _ = await state.open(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        received = 0
        while received < 64 << 20:
            received += len(await reader.read(1 << 20))
            await asyncio.sleep(0.05)

    drive(test)


def test_newcomers_take_the_place_of_those_who_wait_longest() -> None:
    async def test(state: Running) -> None:
        asked, idle = await state.open(GET)
        await asked.readuntil(b"ok")
        _, busy = await state.open(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        silent = [await state.open() for _ in range(10)]
        assert len(state.connections) == 5
        reader, _ = await state.open(GET)
        await reader.readuntil(b"ok")
        await until(lambda: all(r.at_eof() for r, _ in silent[:7]))
        assert not asked.at_eof()  # silent ones go first
        assert not state.toy.left.is_set()  # nobody who is owed an answer
        idle.close()
        busy.close()

    drive(test, limit=5)


def test_a_full_house_of_answers_refuses_newcomers() -> None:
    async def test(state: Running) -> None:
        running = [await state.open(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(3)]
        reader, _ = await state.open(GET)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        assert not any(r.at_eof() for r, _ in running)

    drive(test, limit=3)


def test_too_few_descriptors_are_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, and when connections are cut: clients see a reset and no reason."""
    monkeypatch.setattr(connections, "_log", logging.getLogger("seen"))  # the console's is not
    few = Connections(16)
    assert few.shortage(16) is None
    told = few.shortage(512)
    assert told is not None
    assert "room for 16 connections" in told
    assert "512 requests" in told

    async def test(state: Running) -> None:
        kept = [await state.open() for _ in range(5)]
        assert len(kept) == 5

    with caplog.at_level("WARNING"):
        drive(test, limit=3)
    told_again = [r.getMessage() for r in caplog.records if "All 3 connections" in r.getMessage()]
    assert len(told_again) == 1, "not for each"


def test_the_limit_leaves_descriptors() -> None:
    assert 16 <= connections.connection_limit() <= connections.MOST_CONNECTIONS
