"""Logging in upstream's record layout, to the console and to the files that its users know.

Importing this module or calling `get_logger` touches nothing on disk and prints nothing: only
`init_file_logging`, called when a server or an engine process starts, opens files.  User text
cannot forge a record: line breaks and control characters in messages are escaped.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import sys
import time
from pathlib import Path

from fastdeploy_lite import envs
from fastdeploy_lite.utils.errors import ConfigError, one_line, quote

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
_RED, _YELLOW, _RESET = "\033[31m", "\033[33m", "\033[0m"


class RecordFormatter(logging.Formatter):
    """`INFO     2026-01-14 15:10:33,026 30393 engine.py[line:202] message`, on one line.

    A traceback, when there is one, follows on its own lines, each indented by four spaces, so that
    no part of it can be taken for a record.
    """

    def __init__(self, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """Lay out one record."""
        head = (
            f"{record.levelname:<8} {self.formatTime(record)} {record.process or 0:<5} "
            f"{record.filename}[line:{record.lineno}] "
        )
        text = head + one_line(record.getMessage())
        if record.exc_info:
            lines = self.formatException(record.exc_info).splitlines()
            text += "".join(f"\n    {one_line(line)}" for line in lines)
        if self._colour and record.levelno >= logging.WARNING:
            return f"{_RED if record.levelno >= logging.ERROR else _YELLOW}{text}{_RESET}"
        return text


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
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        handler = _ConsoleHandler()
        handler.setFormatter(RecordFormatter(colour=sys.stderr.isatty()))
        logger.addHandler(handler)
    logger.setLevel(_level())
    logger.propagate = False


def init_file_logging(directory: str | Path | None = None) -> Path:
    """Open the log files of a server or engine process.  Idempotent.

    Args:
        directory: Where the files go; None takes `FD_LOG_DIR`.

    Returns:
        The directory.

    Raises:
        ConfigError: The directory cannot be written.
    """
    init_console_logging()
    folder = Path(directory or envs.FD_LOG_DIR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("no permission")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"FD_LOG_DIR {quote(str(folder))} cannot be written: {reason}") from None
    for name, file_name in FILES.items():
        logger = get_logger(name)
        logger.setLevel(_level())
        logger.propagate = False
        if not any(isinstance(handler, _FileHandler) for handler in logger.handlers):
            logger.addHandler(_FileHandler(folder / file_name))
    return folder


def _level() -> int:
    return logging.DEBUG if envs.FD_DEBUG else logging.INFO


class _ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the present `sys.stderr`; a closed terminal is no reason to fail."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (the base's name)
        """Drop the record: nothing can be printed about a broken terminal."""


class _FileHandler(logging.handlers.TimedRotatingFileHandler):
    """One file, rotated at midnight, `FD_LOG_BACKUP_COUNT` old ones kept.

    The server and the engine write to the same files, and both rotate them: only the first one
    moves the file away, the other one just opens the new one.
    """

    complained = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (the base's name)
        """Drop the record: a full disk is said once, and neither ends the service nor floods it."""
        if not _FileHandler.complained:
            _FileHandler.complained = True
            reason = one_line(sys.exc_info()[1])
            sys.stderr.write(f"{self.baseFilename} cannot be written, records are lost: {reason}\n")

    def __init__(self, path: Path) -> None:
        super().__init__(
            path, when="midnight", backupCount=envs.FD_LOG_BACKUP_COUNT, encoding="utf-8",
            delay=True,
        )  # fmt: skip
        self.setFormatter(RecordFormatter())

    def doRollover(self) -> None:  # noqa: N802  (the base's name)
        """Move the file to yesterday's name unless that exists, and open a new one."""
        if self.stream:
            self.stream.close()
            self.stream = None  # reopened by the next record
        day = time.localtime(self.rolloverAt - self.interval)
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            # A link fails if the name exists, where a rename would destroy what lies there.
            os.link(self.baseFilename, f"{self.baseFilename}.{time.strftime(self.suffix, day)}")
            Path(self.baseFilename).unlink()
        for old in self.getFilesToDelete():
            Path(old).unlink(missing_ok=True)
        self.rolloverAt = self.computeRollover(int(time.time()))
