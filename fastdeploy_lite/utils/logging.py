"""Logging in upstream's record layout, to the console and to the files that its users know.

Importing this module or calling `get_logger` touches nothing on disk and prints nothing: only
`init_file_logging`, called when a server or an engine process starts, opens files.  User text
cannot forge a record: line breaks and control characters in messages are escaped.  In such a
process no record waits for its reader: files and the console have threads of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import io
import json
import logging
import os
import sys
from pathlib import Path

from fastdeploy_lite import envs
from fastdeploy_lite.utils.errors import VariableError, one_line, quote
from fastdeploy_lite.utils.log_sinks import LogFile, Sink, write_all

ROOT = "fastdeploy_lite"
# logger -> file, upstream's names
FILES = {
    "console": "console.log",
    "fastdeploy": "fastdeploy.log",
    "api_server": "api_server.log",
    "config": "config.log",
    "data_processor": "data_processor.log",
    "worker": "workerlog.0",
}
LAST_WORDS_SECONDS = 1.0  # for sinks to empty when the process ends
_RED, _YELLOW, _RESET = "\033[31m", "\033[33m", "\033[0m"
_STDERR = 2

current_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")


class RecordFormatter(logging.Formatter):
    """`INFO     2026-01-14 15:10:33,026 30393 engine.py[line:202] message`, on one line.

    A traceback, when there is one, follows on its own lines, each indented by four spaces, so that
    no part of it can be taken for a record. The id of the HTTP request stands before the message.
    """

    def __init__(self, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """Lay out one record."""
        request_id = current_request_id.get()
        head = (
            f"{record.levelname:<8} {self.formatTime(record)} {record.process or 0:<5} "
            f"{record.filename}[line:{record.lineno}] "
        )
        text = head + (f"[{request_id}] " if request_id else "") + one_line(record.getMessage())
        if record.exc_info:
            lines = self.formatException(record.exc_info).splitlines()
            text += "".join(f"\n    {one_line(line)}" for line in lines)
        if self._colour and record.levelno >= logging.WARNING:
            return f"{_RED if record.levelno >= logging.ERROR else _YELLOW}{text}{_RESET}"
        return text


class JsonFormatter(logging.Formatter):
    """One JSON object a line, for collectors: `FD_LITE_LOG_FORMAT=json`."""

    def format(self, record: logging.LogRecord) -> str:
        """Lay out one record."""
        value: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "process": record.process,
            "logger": record.name,
            "file": record.filename,
            "line": record.lineno,
            "message": record.getMessage(),
        }
        if request_id := current_request_id.get():
            value["request_id"] = request_id
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        return json.dumps(value)  # ASCII: no reader can stumble


def formatter(colour: bool = False) -> logging.Formatter:
    """The layout that `FD_LITE_LOG_FORMAT` names.

    Args:
        colour: Whether warnings and errors are coloured; the text layout only.

    Returns:
        A formatter.
    """
    return JsonFormatter() if envs.FD_LITE_LOG_FORMAT == "json" else RecordFormatter(colour)


def get_logger(name: str = "fastdeploy") -> logging.Logger:
    """A logger of the package.

    Args:
        name: One of `FILES`; other names belong to `fastdeploy.log`.

    Returns:
        The logger; it stays silent below WARNING until a process sets up logging.
    """
    channel = name if name in FILES else f"fastdeploy.{name}"
    return logging.getLogger(f"{ROOT}.{channel}")


def init_console_logging() -> None:
    """Send `console` records to the terminal (stderr), coloured when it is one.  Idempotent."""
    logger = get_logger("console")
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())
    logger.setLevel(_level())
    logger.propagate = False


def init_file_logging(directory: str | Path | None = None) -> Path:
    """Open the log files of a server or engine process.  Idempotent.

    Args:
        directory: Where the files go; None takes `FD_LOG_DIR`.

    Returns:
        The directory.

    Raises:
        VariableError: The directory cannot be written.
    """
    init_console_logging()
    folder = Path(directory or envs.FD_LOG_DIR)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("no permission")
    except OSError as error:
        text = f"FD_LOG_DIR {quote(str(folder))} cannot be written: {error.strerror or error}"
        raise VariableError(text) from None
    _Console.detach()
    for name, file_name in FILES.items():
        logger = get_logger(name)
        logger.setLevel(_level())
        logger.propagate = False
        if not any(isinstance(handler, FileHandler) for handler in logger.handlers):
            logger.addHandler(FileHandler(folder / file_name))
    return folder


def _level() -> int:
    level: int = getattr(logging, envs.FD_LOG_LEVEL or ("DEBUG" if envs.FD_DEBUG else "INFO"))
    return level


class _Console:
    """The terminal of this process: written directly, or by a thread once it is detached."""

    sink: Sink | None = None

    @classmethod
    def detach(cls) -> None:
        """From now on nobody waits for the reader of stderr.  Idempotent."""
        if cls.sink is None and _is_descriptor(sys.stderr):
            cls.sink = Sink(lambda data: write_all(_STDERR, data))
            atexit.register(cls.sink.flush, LAST_WORDS_SECONDS)

    @classmethod
    def write(cls, text: str) -> None:
        """Print; a closed, full or broken terminal is no reason to fail."""
        if cls.sink is not None:
            cls.sink.put(text.encode("utf-8", "backslashreplace"))
            return
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)


def _is_descriptor(stream: object) -> bool:
    """Whether the stream is the process's own stderr, not what a notebook or a test put there."""
    try:
        return isinstance(stream, io.TextIOBase) and stream.fileno() == _STDERR
    except (OSError, ValueError):
        return False


def write_console(text: str) -> None:
    """Print text that is no log record, for instance an access line, beside the records.

    Args:
        text: Whole lines.
    """
    _Console.write(text)


class ConsoleStream(io.TextIOBase):
    """The console as a stream, for progress bars: never fails, and never blocks in a server."""

    def write(self, text: str) -> int:
        """Print text."""
        _Console.write(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""
        if _Console.sink is None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()

    def isatty(self) -> bool:
        """Whether a person looks on."""
        return sys.stderr.isatty()


def flush_logs(seconds: float = LAST_WORDS_SECONDS) -> None:
    """Wait until what was logged is written.

    Args:
        seconds: How long at most, per file and for the console.
    """
    if _Console.sink is not None:
        _Console.sink.flush(seconds)
    for name in FILES:
        for handler in get_logger(name).handlers:
            if isinstance(handler, FileHandler):
                handler.sink.flush(seconds)


class ConsoleHandler(logging.Handler):
    """Writes to the present `sys.stderr`, or to its thread in a server."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(formatter(colour=sys.stderr.isatty()))

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        _Console.write(f"{self.format(record)}\n")


class FileHandler(logging.Handler):
    """One of the log files.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(formatter())
        self.file = LogFile(path, envs.FD_LOG_BACKUP_COUNT)
        self.sink = Sink(self.file.write, self._complain)
        self._complained = False
        atexit.register(self.sink.flush, LAST_WORDS_SECONDS)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record."""
        self.sink.put(f"{self.format(record)}\n".encode("utf-8", "backslashreplace"))

    def _complain(self, error: OSError) -> None:
        """A full disk is said once, and neither ends the service nor floods it."""
        if not self._complained:
            self._complained = True
            reason = one_line(error.strerror or error)
            path = one_line(self.file.path)
            _Console.write(f"{path} cannot be written, records are lost: {reason}\n")
