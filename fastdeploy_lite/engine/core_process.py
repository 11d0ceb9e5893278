"""The engine core as a process of its own; `engine_client` starts it.

Its parent writes one line of JSON to standard input and keeps the pipe open; when the pipe closes,
the parent is gone and this process ends, whatever it is doing. Messages are msgpack over two ZMQ
sockets, which meet in a directory that only this user can enter and that is gone once they have.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec
import zmq

from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.engine_core import EngineCore, create_core
from fastdeploy_lite.executor.base import ExecutorDeadError
from fastdeploy_lite.executor.step_clock import StepClock
from fastdeploy_lite.input.preprocess import load_tokenizer
from fastdeploy_lite.request.messages import (
    Abort,
    Checked,
    Control,
    EngineOutput,
    EngineRequest,
    Fatal,
    FromCore,
    Outputs,
    ToCore,
)
from fastdeploy_lite.utils.errors import FastDeployError, one_line
from fastdeploy_lite.utils.host_memory import keep_what_is_loaded
from fastdeploy_lite.utils.logging import (
    flush_logs,
    get_logger,
    init_file_logging,
    write_console,
)
from fastdeploy_lite.utils.processes import die_with_standard_input
from fastdeploy_lite.utils.standard_streams import prepare_standard_streams

STATS_SECONDS = 0.5  # an idle core says so this often: silence means that something is wrong
HELLO = b"hello"  # before all messages
TO_CORE, FROM_CORE = "to-core", "from-core"  # names of the sockets in the directory
SAID_WHY = 4  # exit status: the reason has been sent


class StartLine(msgspec.Struct):
    """What the parent writes first.

    Attributes:
        directory: Where the sockets are.
        args: Fields of `EngineArgs`.
        clock: Descriptor of a `StepClock`.
    """

    directory: str
    args: dict[str, Any]
    clock: int


class CoreLoop:
    """Receives, steps, sends.

    Args:
        core: The engine core.
        inbox: Socket to receive from (PULL).
        outbox: Socket to send on (PUSH).
    """

    def __init__(
        self, core: EngineCore, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]
    ) -> None:
        self._core = core
        self._inbox = inbox
        self._outbox = outbox
        self._decoder = msgspec.msgpack.Decoder(ToCore)
        self._encoder = msgspec.msgpack.Encoder()
        self._last_stats = 0.0
        self._last_counts = (0, 0)
        self._stopped = False

    def run(self) -> None:
        """Serve until told to shut down.

        Raises:
            EngineDeadError: The core cannot go on.
        """
        while not self._stopped:
            self.turn()

    def turn(self) -> None:
        """Take what has come, run a step if there is something to do, tell of it.

        Raises:
            EngineDeadError: As `run`.
        """
        self._receive()
        self._core.check_executor()
        self._report(self._core.step() if self._core.has_work else [])

    def _receive(self) -> None:
        wait_ms = 0 if self._core.has_work else int(STATS_SECONDS * 1000)
        while not self._stopped and self._inbox.poll(wait_ms):
            self._take(self._inbox.recv())
            wait_ms = 0

    def _take(self, raw: bytes) -> None:
        """Handle one message; what is wrong with it ends the request that it is about."""
        try:
            message = self._decoder.decode(raw)
        except (ValueError, RecursionError) as error:  # msgspec's are ValueErrors
            self._refuse(raw, one_line(error))
            return
        self._handle(message)

    def _refuse(self, raw: bytes, reason: str) -> None:
        get_logger().error("A message to the engine cannot be read: %s", reason)
        request_id = _request_id_in(raw)
        if request_id is not None and not self._core.has_request(request_id):
            text = f"The engine cannot read this request: {reason}"
            self._send(Outputs([_failed(request_id, 400, text)]))

    def _handle(self, message: ToCore) -> None:
        match message:
            case EngineRequest():
                self._add(message)
            case Abort():
                self._core.abort(message.request_ids)
            case Control():
                self._control(message.action)

    def _add(self, request: EngineRequest) -> None:
        if self._core.has_request(request.request_id):
            get_logger().error("A request was dropped: its id %r is in use", request.request_id)
            return
        try:
            self._core.add(request)
        except Exception as error:  # a request that the core's checks do not understand
            get_logger().error("A request cannot be added", exc_info=error)
            text = f"{type(error).__name__}: {error}"
            self._send(Outputs([_failed(request.request_id, 500, text)]))

    def _control(self, action: str) -> None:
        core = self._core
        if action == "check":
            self._send(Checked(_integrity_error(core)))
        elif action == "shutdown":
            self._stopped = True
        else:
            {"pause": core.pause, "resume": core.resume, "reset": core.reset}[action]()
            self._send(Outputs([], core.stats()))

    def _report(self, outputs: list[EngineOutput]) -> None:
        """Send news; counters come along when they changed in a way that gauges show."""
        now = time.monotonic()
        counts = self._core.counts
        due = counts != self._last_counts or now - self._last_stats >= STATS_SECONDS
        if due or any(output.finished for output in outputs):
            self._last_stats, self._last_counts = now, counts
            self._send(Outputs(outputs, self._core.stats()))
        elif outputs:
            self._send(Outputs(outputs))

    def _send(self, message: FromCore) -> None:
        try:
            raw = self._encoder.encode(message)
        except (ValueError, TypeError, OverflowError):
            if not isinstance(message, Outputs):
                raise
            message = Outputs([self._sendable(o) for o in message.outputs], message.stats)
            raw = self._encoder.encode(message)
        self._outbox.send(raw)

    def _sendable(self, output: EngineOutput) -> EngineOutput:
        """The output, or the end of its request in its place."""
        try:
            self._encoder.encode(output)
        except (ValueError, TypeError, OverflowError) as error:
            self._core.abort([output.request_id])
            return _failed(output.request_id, 500, f"The answer cannot be sent: {error}")
        return output


def _request_id_in(raw: bytes) -> str | None:
    """The id in a request that is not one in all of its fields."""
    try:
        fields = msgspec.msgpack.decode(raw)
    except (ValueError, RecursionError):
        return None
    name = fields.get("request_id") if isinstance(fields, dict) else None
    return name if isinstance(name, str) else None


def _failed(request_id: str, code: int, message: str) -> EngineOutput:
    return EngineOutput(
        request_id, finished=True, finish_reason="error", error_code=code,
        error_msg=one_line(message),
    )  # fmt: skip


def _integrity_error(core: EngineCore) -> str | None:
    try:
        core.check_integrity()
    except RuntimeError as error:
        return one_line(error)
    return None


def open_socket(context: Any, kind: int, directory: str, name: str, *, bind: bool) -> Any:
    """Open one end of a socket in `directory`.

    Args:
        context: ZMQ context.
        kind: zmq.PUSH or zmq.PULL.
        directory: Private to this user.
        name: File name.
        bind: Whether this end creates the file.

    Returns:
        The socket; its queues are unbounded, because neither end may block on the other.
    """
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.linger = 1000  # ms: the last words of a dying process get through
    (socket.bind if bind else socket.connect)(f"ipc://{Path(directory) / name}")
    return socket


def _leave_signals_to_the_parent() -> None:
    """A Ctrl-C or SIGTERM for the whole group must not cut answers that the parent drains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def main() -> int:
    """Run the process; returns its exit status."""
    prepare_standard_streams()
    _leave_signals_to_the_parent()
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=StartLine)
    die_with_standard_input()
    log = get_logger("worker")
    context = zmq.Context()
    outbox = open_socket(context, zmq.PUSH, start.directory, FROM_CORE, bind=False)
    inbox = open_socket(context, zmq.PULL, start.directory, TO_CORE, bind=False)
    outbox.send(HELLO)
    inbox.recv()  # the answer: both sockets have met
    shutil.rmtree(start.directory, ignore_errors=True)
    try:
        init_file_logging()
        config = EngineArgs(**start.args).create_runtime_config(quiet=True)
        core, ready = create_core(config, load_tokenizer(config), StepClock(start.clock))
        _leave_signals_to_the_parent()  # again: Paddle installs handlers of its own
        keep_what_is_loaded()
        log.info("The model is ready: %d KV blocks", ready.num_blocks)
        outbox.send(msgspec.msgpack.encode(ready))
        CoreLoop(core, inbox, outbox).run()
        core.shutdown()
        return 0
    except BaseException as error:  # also MemoryError: the parent must hear the reason
        # A fault of the user's is one line; a fault of ours needs its traceback, on the console.
        if not _says_all(error):
            write_console(traceback.format_exc())  # a stalled console must not keep it alive
        log.error("The engine ended", exc_info=error)
        flush_logs()  # the parent may end this process as soon as it has heard
        outbox.send(msgspec.msgpack.encode(Fatal(_reason(error))))
        return SAID_WHY
    finally:
        context.destroy(linger=1000)


def _reason(error: BaseException) -> str:
    text = str(error)
    return one_line(text if _says_all(error) else f"{type(error).__name__}: {text}")


def _says_all(error: BaseException) -> bool:
    """Whether the message is the whole story: the user's fault, or the end of another process."""
    return isinstance(error, FastDeployError) or isinstance(error.__cause__, ExecutorDeadError)
