"""The engine process: messages both ways, and every way it can end."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from machine import promised
from waiting import PATIENCE

from fastdeploy_lite.engine import engine_client
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.engine_client import AsyncEngineClient
from fastdeploy_lite.engine.engine_core import EngineDeadError
from fastdeploy_lite.engine.request import Request
from fastdeploy_lite.engine.sampling_params import SamplingParams
from fastdeploy_lite.input.preprocess import Preprocessor
from fastdeploy_lite.request.messages import EngineOutput, EngineRequest
from fastdeploy_lite.utils.errors import RequestError

ARGS = EngineArgs(model="demo", max_model_len=512, num_gpu_blocks_override=40)


@pytest.fixture(autouse=True)
def logs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def preprocessor() -> Preprocessor:
    return Preprocessor(ARGS.create_runtime_config())


@asynccontextmanager
async def started(args: EngineArgs = ARGS) -> AsyncIterator[AsyncEngineClient]:
    client = AsyncEngineClient(args)
    await client.start()
    try:
        yield client
    finally:
        await client.shutdown()


def request(
    preprocessor: Preprocessor, name: str, max_tokens: int, prompt: str = "Once"
) -> EngineRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, min_tokens=max_tokens)
    return preprocessor.process(Request(request_id=name, prompt=prompt, sampling_params=params))


def test_the_process_runs_the_parents_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name in the working directory, such as a clone without the native module,
    is not what the parent imported."""
    (tmp_path / "fastdeploy_lite").mkdir()
    (tmp_path / "fastdeploy_lite" / "__init__.py").write_text("raise ImportError('wrong one')")
    monkeypatch.chdir(tmp_path)

    async def start() -> bool:
        async with started() as client:
            return client.is_healthy

    assert asyncio.run(start())


def test_a_polite_end_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """The thread that watches for the parent's end must not hold up the interpreter's."""

    async def start_and_stop() -> list[psutil.Process]:
        async with started() as client:
            assert client.engine_pid is not None
            return [psutil.Process(client.engine_pid)]

    gone, alive = psutil.wait_procs(asyncio.run(start_and_stop()), timeout=PATIENCE)
    assert (len(gone), alive) == (1, [])
    printed = capfd.readouterr().err
    assert "Fatal" not in printed
    assert "SIGABRT" not in printed


async def collect(client: AsyncEngineClient, item: EngineRequest) -> list[EngineOutput]:
    return [output async for output in client.generate(item)]


async def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        await asyncio.sleep(0.02)


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 300))  # type: ignore[arg-type]


def test_requests_through_the_process(preprocessor: Preprocessor, tmp_path: Path) -> None:
    async def main() -> None:
        async with started() as client:
            assert client.ready is not None
            assert client.ready.num_blocks == 40
            assert client.is_healthy
            items = [request(preprocessor, f"r{i}", 20 + i, f"Tale {i}") for i in range(12)]
            together = await asyncio.gather(*(collect(client, item) for item in items))
            alone = [await collect(client, request(preprocessor, f"x{i}", 20 + i, f"Tale {i}"))
                     for i in range(12)]  # fmt: skip
            assert [tokens(a) for a in together] == [tokens(b) for b in alone]
            assert [len(tokens(a)) for a in together] == [20 + i for i in range(12)]
            await until(lambda: client.stats.num_running == 0)
            assert client.stats.requests == 24
            assert await client.check() is None
            await abort_and_leave(client)
            await pause(client)

    async def abort_and_leave(client: AsyncEngineClient) -> None:
        stream = client.generate(request(preprocessor, "left", 400))
        await anext(stream)
        await stream.aclose()  # the reader goes away: aborted
        await until(lambda: client.stats.num_running == 0)
        task = asyncio.create_task(collect(client, request(preprocessor, "cut", 400)))
        await until(lambda: client.stats.num_running == 1)
        with pytest.raises(RequestError, match="'cut' is in use"):
            await collect(client, request(preprocessor, "cut", 4))
        await client.abort(["cut", "unknown"])
        last = (await task)[-1]
        assert (last.finish_reason, last.error_msg) == ("abort", "Aborted")
        assert client.num_unfinished == 0
        await until(lambda: client.stats.num_free_blocks == 40)
        assert await client.check() is None

    async def pause(client: AsyncEngineClient) -> None:
        await client.control("pause")
        assert client.stats.paused
        late = await collect(client, request(preprocessor, "late", 5))
        assert late[-1].error_code == 503
        await client.control("resume")
        assert len(tokens(await collect(client, request(preprocessor, "p", 5)))) == 5
        await client.control("reset")
        await until(lambda: client.stats.num_cached_blocks == 0)

    run(main)
    assert not list(tmp_path.glob("fastdeploy-lite-*")), "the sockets' directory is gone"


def test_a_killed_engine_fails_its_requests_at_once(
    preprocessor: Preprocessor, tmp_path: Path
) -> None:
    async def main() -> None:
        async with started() as client:
            tasks = [
                asyncio.create_task(collect(client, request(preprocessor, f"r{i}", 400)))
                for i in range(3)
            ]
            await until(lambda: client.stats.num_running == 3)
            check = asyncio.create_task(client.check())
            assert client.engine_pid is not None
            with promised(5):
                os.kill(client.engine_pid, signal.SIGKILL)
                for task in tasks:
                    with pytest.raises(EngineDeadError, match="ended by signal SIGKILL"):
                        await task
                assert "SIGKILL" in await client.wait_dead()
            assert not client.is_healthy
            await asyncio.gather(check, return_exceptions=True)
            with pytest.raises(EngineDeadError):
                await collect(client, request(preprocessor, "late", 4))

    run(main)
    assert not list(tmp_path.glob("fastdeploy-lite-*"))


def test_a_failed_start_tells_the_root_cause(tmp_path: Path) -> None:
    async def main() -> None:
        for args, message in (
            (EngineArgs(model=str(tmp_path / "nowhere")), "nowhere"),
            (EngineArgs(model="demo", tensor_parallel_size=3), "tensor_parallel_size"),
        ):
            client = AsyncEngineClient(args)
            with pytest.raises(EngineDeadError, match=message) as caught:
                await client.start()
            assert "\n" not in str(caught.value)
            assert not client.is_healthy

    run(main)
    assert not list(tmp_path.glob("fastdeploy-lite-*"))


LATE_INBOX = """\
import sys, time
sys.path[:] = {path!r}
import zmq
from fastdeploy_lite.engine.core_process import TO_CORE, main
waiting = []
class Late(zmq.Socket):
    def connect(self, address):
        waiting.append(address) if address.endswith(TO_CORE) else super().connect(address)
    def recv(self, *args, **fields):
        if waiting:
            time.sleep(0.5)
            super().connect(waiting.pop())
        return super().recv(*args, **fields)
zmq.Context._socket_class = Late
sys.exit(main())
"""


def test_the_sockets_may_meet_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine connects the second when the core's hello has come through the first."""
    monkeypatch.setattr(engine_client, "_RUN_CORE", LATE_INBOX)

    async def main() -> None:
        async with started() as client:
            assert client.is_healthy

    run(main)


def test_last_words_are_heard_behind_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy parent notices the end of the process before it reads what that has said."""
    meet = AsyncEngineClient._meet

    async def meet_and_sleep(client: AsyncEngineClient) -> None:
        await meet(client)
        assert client._process is not None
        await client._process.wait()
        await asyncio.sleep(1)

    monkeypatch.setattr(AsyncEngineClient, "_meet", meet_and_sleep)
    client = AsyncEngineClient(EngineArgs(model=str(tmp_path / "nowhere")))

    async def main() -> None:
        with pytest.raises(EngineDeadError, match="nowhere"):
            await client.start()

    run(main)


PARENT = """
import asyncio, sys
from fastdeploy_lite.engine import engine_client
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.engine_client import AsyncEngineClient

async def main():
    client = AsyncEngineClient(EngineArgs(model="demo"))
    await client.start()
    print(client.engine_pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_engine_does_not_outlive_its_parent(tmp_path: Path, is_stopped: bool) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            engine.send_signal(signal_number)  # meant for the whole group; the parent decides
        time.sleep(0.3)
        assert engine.is_running()
        if is_stopped:
            engine.send_signal(signal.SIGSTOP)
        parent.kill()
        engine.wait(timeout=PATIENCE)
    finally:
        parent.kill()
        parent.wait()
    assert not list(tmp_path.glob("fastdeploy-lite-*")), "the sockets' directory is left"


# Its model computes a few steps; then one hangs in native code.
HANGING = """\
import ctypes, itertools, sys
sys.path[:] = {{path!r}}
from fastdeploy_lite.{module} import {owner}
real, calls = {owner}.{method}, itertools.count()
def hang(self, *args):
    if next(calls) > 200:
        ctypes.{library}(None).pause()
    return real(self, *args)
{owner}.{method} = hang
from fastdeploy_lite.engine.core_process import main
sys.exit(main())
"""


COUNTING = """\
import gc, pathlib, sys
sys.path[:] = {{path!r}}
from fastdeploy_lite.engine.core_process import CoreLoop, main
real = CoreLoop.run
def run(self):
    counts = gc.get_freeze_count(), len(gc.get_objects())
    pathlib.Path({file!r}).write_text(" ".join(map(str, counts)))
    real(self)
CoreLoop.run = run
sys.exit(main())
"""


def test_what_is_loaded_is_not_looked_through_for_garbage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full collection of it stops the engine for a tenth of a second."""
    file = tmp_path / "counts"
    monkeypatch.setattr(engine_client, "_RUN_CORE", COUNTING.format(file=str(file)))

    async def main() -> None:
        async with started() as client:
            await until(lambda: bool(file.exists() and file.read_text()))
            assert client.is_healthy

    run(main)
    kept, watched = map(int, file.read_text().split())
    assert kept > 50 * watched


@pytest.mark.parametrize("library", ["PyDLL", "CDLL"])
def test_a_step_that_hangs_in_native_code_is_the_end(
    preprocessor: Preprocessor, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    """PyDLL keeps the interpreter's lock: no other thread of that process runs."""
    code = HANGING.format(
        module="worker.model_runner", owner="ModelRunner", method="execute", library=library
    )
    monkeypatch.setattr(engine_client, "_RUN_CORE", code)
    monkeypatch.setenv("FD_LITE_STEP_SECONDS", "2")

    async def main() -> None:
        async with started() as client:
            assert client.engine_pid is not None
            engine = psutil.Process(client.engine_pid)
            reason = r"^a step of 1 tokens has not ended within \d+ s \(FD_LITE_STEP_SECONDS is"
            with pytest.raises(EngineDeadError, match=reason):
                await collect(client, request(preprocessor, "r", 400))
            assert not client.is_healthy
            await until(lambda: not engine.is_running())

    run(main)


@pytest.mark.timeout(120)
def test_the_first_rank_is_missed_by_the_others(
    preprocessor: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can raise an error in a thread that hangs in native code: its process is ended."""
    code = HANGING.format(
        module="distributed.communicator", owner="SharedMemoryCommunicator", method="all_reduce",
        library="CDLL",
    )  # fmt: skip
    monkeypatch.setattr(engine_client, "_RUN_CORE", code)

    async def main() -> None:
        async with started(dataclasses.replace(ARGS, tensor_parallel_size=2)) as client:
            assert client.engine_pid is not None
            family = [psutil.Process(client.engine_pid)]
            family += family[0].children()
            assert len(family) == 2
            reason = rf"^rank 0 \(process {client.engine_pid}\): has slept for 4 s inside a step"
            with pytest.raises(EngineDeadError, match=reason):
                await collect(client, request(preprocessor, "r", 400))
            await until(lambda: not any(process.is_running() for process in family))

    run(main)
