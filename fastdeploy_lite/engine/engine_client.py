"""The server's side of the engine: starts the core process, talks to it, notices its death."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from typing import Literal, Protocol

import msgspec
import zmq
import zmq.asyncio

from fastdeploy_lite import envs
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.core_process import (
    FROM_CORE,
    SAID_WHY,
    TO_CORE,
    StartLine,
    open_socket,
)
from fastdeploy_lite.engine.engine_core import EngineDeadError
from fastdeploy_lite.executor.step_clock import StepClock
from fastdeploy_lite.executor.step_limit import StepLimit, StepWatch
from fastdeploy_lite.request.messages import (
    Abort,
    Checked,
    Control,
    EngineOutput,
    EngineRequest,
    EngineStats,
    Fatal,
    FromCore,
    Outputs,
    Ready,
    ToCore,
)
from fastdeploy_lite.utils.errors import RequestError, one_line
from fastdeploy_lite.utils.processes import STOPPED_SECONDS, state_of

IDLE_SILENCE_SECONDS = 5.0  # ten times the interval at which an idle core reports
SHUTDOWN_SECONDS = 5.0
LAST_WORDS_SECONDS = 10.0  # a machine may be too busy to bring them
LONGEST_SOCKET_PATH = 100  # the kernel's limit is 107 bytes
# Not `-m`, which looks into the working directory first: the process must run this very package.
_RUN_CORE = """\
import sys
sys.path[:] = {path!r}
from fastdeploy_lite.utils.processes import die_with_parent
die_with_parent({parent})  # before all that takes long to import
from fastdeploy_lite.engine.core_process import main
sys.exit(main())
"""


class EngineClient(Protocol):
    """What a server asks of its engine, be it one process or several; for one event loop."""

    @property
    def stats(self) -> EngineStats:
        """The newest counters."""
        ...

    @property
    def replica_stats(self) -> list[EngineStats]:
        """Those of each engine process."""
        ...

    @property
    def ready(self) -> Ready | None:
        """What the engine said when the model was loaded; None before."""
        ...

    @property
    def is_healthy(self) -> bool:
        """Whether requests are computed."""
        ...

    @property
    def replicas_healthy(self) -> list[bool]:
        """Whether each engine process lives and has reported lately."""
        ...

    @property
    def engine_pids(self) -> list[int | None]:
        """Process ids of the engine processes; None before `start`."""
        ...

    @property
    def num_unfinished(self) -> int:
        """Requests whose outputs are still awaited here."""
        ...

    async def start(self) -> None:
        """Start the engine and wait until the model is loaded.

        Raises:
            EngineDeadError: It ended instead; the message is the root cause, in one line.
        """

    async def shutdown(self) -> None:
        """End the engine, politely at first; idempotent."""

    async def wait_dead(self) -> str:
        """Wait for the engine's end and return its reason."""
        ...

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """Send a request and yield its outputs; leaving early aborts it.

        Args:
            request: Its id must not be in use.

        Yields:
            Outputs, the last one `finished`.

        Raises:
            RequestError: The id is in use.
            EngineDeadError: The engine is dead or dies meanwhile.
        """
        ...

    async def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """End these requests (None: all) with finish reason "abort"; unknown ids are ignored."""

    async def control(self, action: Literal["pause", "resume", "reset"]) -> None:
        """Pause (ends all requests, refuses new ones), resume, or drop requests and prefixes.

        Returns when that is done and `stats` tell of it.

        Raises:
            EngineDeadError: The engine is dead or dies meanwhile.
            RuntimeError: The core found its own books wrong.
        """

    async def check(self) -> str | None:
        """Ask the core to verify its own books.

        Returns:
            None when no KV block and no request is lost, else what is wrong.

        Raises:
            EngineDeadError: The engine is dead or dies meanwhile.
        """
        ...


class AsyncEngineClient:
    """One engine process; an EngineClient.

    Args:
        args: Of the engine; the process builds its configuration from them.
        variables: Of the environment, for this process alone.
    """

    def __init__(self, args: EngineArgs, variables: Mapping[str, str] | None = None) -> None:
        self.stats = EngineStats()
        self.ready: Ready | None = None
        self._args = args
        self._variables = variables or {}
        self._queues: dict[str, asyncio.Queue[EngineOutput | EngineDeadError]] = {}
        self._checks: list[asyncio.Future[str | None]] = []
        self._dead: str | None = None
        self._death = asyncio.Event()
        self._last_news = time.monotonic()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromCore)
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ready_event = asyncio.Event()
        self._directory = ""
        self._clock: StepClock | None = None

    # Life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """See EngineClient."""
        self._directory = _private_directory()
        self._context = zmq.Context()
        self._to_core = open_socket(self._context, zmq.PUSH, self._directory, TO_CORE, bind=True)
        self._from_core = open_socket(
            zmq.asyncio.Context(self._context), zmq.PULL, self._directory, FROM_CORE, bind=True
        )
        self._clock = clock = StepClock()
        # A session of its own keeps the terminal's Ctrl-C away: this process decides.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _RUN_CORE.format(path=sys.path, parent=os.getpid()),
            stdin=asyncio.subprocess.PIPE, start_new_session=True, pass_fds=(clock.fd,),
            env={**os.environ, **self._variables},
        )  # fmt: skip
        assert self._process.stdin is not None
        start = StartLine(self._directory, self._args.to_dict(), clock.fd)
        self._process.stdin.write(msgspec.json.encode(start) + b"\n")
        work = (self._read(), self._watch(), self._watch_for_a_hang(clock))
        self._tasks = [asyncio.create_task(task) for task in work]
        try:
            await self._ready_event.wait()
        except BaseException:
            await self.shutdown()
            raise
        if self._dead is not None:
            await self.shutdown()
            raise EngineDeadError(self._dead)

    async def shutdown(self) -> None:
        """See EngineClient."""
        process = self._process
        if process is not None and process.returncode is None:
            if self.ready is not None and self._dead is None:
                self._send(Control("shutdown"))
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(process.wait(), SHUTDOWN_SECONDS)
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        self._die("the engine was shut down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._directory:
            self._to_core.close(linger=0)
            self._from_core.close(linger=0)
            self._context.term()
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = ""
        if self._clock is not None:
            self._clock.close()

    @property
    def is_healthy(self) -> bool:
        """Whether the process lives and has reported as lately as it can."""
        if self._dead is not None or self.ready is None:
            return False
        return time.monotonic() - self._last_news < self._longest_silence()

    def _longest_silence(self) -> float:
        """Seconds for which the process may say nothing.

        In a step as long as that takes: `_watch_for_a_hang` ends one that takes too long. Between
        two steps of a busy engine not longer than the last one might have taken.
        """
        shown = None if self._clock is None else self._clock.read()
        if shown is not None and shown.number:
            return math.inf
        if not self._queues:
            return IDLE_SILENCE_SECONDS
        known = 0.0 if shown is None else shown.limit
        return known or StepLimit(envs.FD_LITE_STEP_SECONDS).of(1)

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine; None before `start`."""
        return None if self._process is None else self._process.pid

    @property
    def replicas_healthy(self) -> list[bool]:
        """See EngineClient."""
        return [self.is_healthy]

    @property
    def replica_stats(self) -> list[EngineStats]:
        """See EngineClient."""
        return [self.stats]

    @property
    def engine_pids(self) -> list[int | None]:
        """See EngineClient."""
        return [self.engine_pid]

    @property
    def num_unfinished(self) -> int:
        """See EngineClient."""
        return len(self._queues)

    async def wait_dead(self) -> str:
        """See EngineClient."""
        await self._death.wait()
        return self._dead or ""

    # Requests ------------------------------------------------------------------------------------

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """See EngineClient."""
        name = request.request_id
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        if name in self._queues:
            raise RequestError(
                f"request_id {name!r} is in use", param="request_id", code="invalid_value"
            )
        queue: asyncio.Queue[EngineOutput | EngineDeadError] = asyncio.Queue()
        self._queues[name] = queue
        finished = False
        try:
            self._send_request(request)
            while not finished:
                news = await queue.get()
                if isinstance(news, EngineDeadError):
                    finished = True
                    raise news
                finished = news.finished
                yield news
        finally:
            del self._queues[name]
            if not finished and self._dead is None:
                self._send(Abort([name]))

    async def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """See EngineClient."""
        self._send(Abort(None if request_ids is None else list(request_ids)))

    async def control(self, action: Literal["pause", "resume", "reset"]) -> None:
        """See EngineClient."""
        self._send(Control(action))
        error = await self.check()  # answered after the action: the core works in order
        if error is not None:
            raise RuntimeError(error)

    async def check(self) -> str | None:
        """See EngineClient."""
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._checks.append(answer)
        self._send(Control("check"))
        return await answer

    # Wire ----------------------------------------------------------------------------------------

    def _send(self, message: ToCore) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        self._to_core.send(self._encoder.encode(message), zmq.NOBLOCK)

    def _send_request(self, request: EngineRequest) -> None:
        try:
            self._send(request)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise RequestError(f"The request cannot be sent to the engine: {error}") from None

    async def _meet(self) -> None:
        """Answer the core's hello, once its other socket has come, too."""
        hello = await self._from_core.recv()
        while not self._to_core.poll(0, zmq.POLLOUT):
            await asyncio.sleep(0.005)
        self._to_core.send(hello, zmq.NOBLOCK)

    async def _read(self) -> None:
        """Take the core's messages; whatever goes wrong here must be seen, or all would wait."""
        try:
            await self._meet()
            while True:
                self._take(await self._from_core.recv())
        except Exception as error:
            self._die(f"reading the engine's messages failed: {type(error).__name__}: {error}")

    def _take(self, raw: bytes) -> None:
        self._last_news = time.monotonic()
        try:
            message = self._decoder.decode(raw)
        except (ValueError, RecursionError) as error:
            self._end_those_in(raw, one_line(error))
            return
        match message:
            case Outputs():
                self._dispatch(message)
            case Ready():
                self.ready = message
                self.stats.num_blocks = self.stats.num_free_blocks = message.num_blocks
                self._ready_event.set()
            case Checked():
                answer = self._checks.pop(0)
                if not answer.done():  # who asked may have left
                    answer.set_result(message.error)
            case Fatal():
                self._die(message.error)

    def _dispatch(self, message: Outputs) -> None:
        if message.stats is not None:
            self.stats = message.stats
        for output in message.outputs:
            queue = self._queues.get(output.request_id)
            if queue is not None:  # its client may have left
                queue.put_nowait(output)

    def _end_those_in(self, raw: bytes, reason: str) -> None:
        """End the requests that an unreadable message is about; nobody will tell of them again.

        Raises:
            ValueError: It does not even say which.
        """
        for name in _request_ids_in(raw):
            queue = self._queues.get(name)
            if queue is not None:
                text = f"The engine's answer cannot be read: {reason}"
                queue.put_nowait(
                    EngineOutput(
                        name, finished=True, finish_reason="error", error_code=500, error_msg=text
                    )
                )
                self._send(Abort([name]))

    async def _watch(self) -> None:
        assert self._process is not None
        code = await self._process.wait()
        # Its last words may still be in the socket, and say more than an exit status.
        seconds = LAST_WORDS_SECONDS if code == SAID_WHY else 0.2
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._death.wait(), seconds)
        self._die(f"the engine process ended {_exit_text(code)}")

    async def _watch_for_a_hang(self, clock: StepClock) -> None:
        """End a process that a signal has stopped, or whose step does not end: it would be silent
        for ever."""
        process = self._process
        assert process is not None
        stopped_since: float | None = None
        steps, wrong = StepWatch(), None
        while process.returncode is None and wrong is None:
            await asyncio.sleep(STOPPED_SECONDS / 6)
            now = time.monotonic()
            wrong = steps.look(clock.read(), now)
            if state_of(process.pid)[0] != "T":
                stopped_since = None
                continue
            stopped_since = stopped_since or now
            if now - stopped_since > STOPPED_SECONDS:
                wrong = "the engine process is stopped (SIGSTOP)"
        if wrong is not None:
            self._die(wrong)
            with suppress(ProcessLookupError):
                process.kill()

    def _die(self, reason: str) -> None:
        if self._dead is not None:
            return
        self._dead = reason
        error = EngineDeadError(reason)
        for queue in self._queues.values():
            queue.put_nowait(error)
        for check in self._checks:
            if not check.done():
                check.set_exception(error)
        self._death.set()
        self._ready_event.set()


def _request_ids_in(raw: bytes) -> list[str]:
    outputs = msgspec.msgpack.decode(raw)["outputs"]
    return [output["request_id"] for output in outputs]


def _private_directory() -> str:
    """A directory that only this user can enter, with a path short enough for a socket."""
    path = tempfile.mkdtemp(prefix="fastdeploy-lite-")
    if len(path) + len(FROM_CORE) + 1 > LONGEST_SOCKET_PATH:
        shutil.rmtree(path)
        path = tempfile.mkdtemp(prefix="fastdeploy-lite-", dir="/tmp")
    return path


def _exit_text(code: int) -> str:
    if code < 0:
        return f"by signal {signal.Signals(-code).name}"
    return f"with exit status {code}"
