"""Unix sockets: taking one before the model loads, without opening it; leaving none behind."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from fastdeploy_lite.utils.errors import ConfigError, quote

MODE = 0o666  # as uvicorn's: the folder says who may come, as with a port of this machine
_PROBE_SECONDS = 1.0
_BOUND = Path("/proc/net/unix")


class UnixSocket:
    """A path that a server has taken.

    Attributes:
        path: absolute.
        socket: bound to it; refuses connections until it listens.
    """

    def __init__(self, path: Path, bound: socket.socket) -> None:
        self.path = path
        self.socket = bound
        self._file = _identity(path)

    def listen(self, backlog: int) -> None:
        """Open it; `backlog` is the number of connections that the kernel keeps."""
        self.socket.listen(backlog)

    def close(self) -> None:
        """Close it, and remove its file unless that is another's by now; idempotent."""
        self.socket.close()
        if self._file is not None and _identity(self.path) == self._file:
            with suppress(OSError):
                self.path.unlink()
        self._file = None


def reserve_path(name: str) -> UnixSocket:
    """Bind a path, so that whoever else wants it hears so before a model is loaded.

    The file of a server that was killed is taken over; one on which somebody answers, or to which
    a process is bound that has yet to open it, is not touched.

    Args:
        name: Path; a relative one counts from the working directory.

    Returns:
        The bound socket.

    Raises:
        ConfigError: The path is taken or cannot be bound.
    """
    path = Path(os.path.abspath(name))  # noqa: PTH100 - links stay as they are
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_if_left(path)
        bound.bind(str(path))
        path.chmod(MODE)
        return UnixSocket(path, bound)
    except (OSError, ValueError) as error:  # ConfigError is a ValueError
        bound.close()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"uds: cannot bind {quote(str(path))}: {_reason(error)}") from None


def _remove_if_left(path: Path) -> None:
    """Remove the socket of a process that is gone; anything else in its place is an error."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"uds: {quote(str(path))} exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        code = probe.connect_ex(str(path))
    if code != errno.ECONNREFUSED or _is_bound(path):
        why = "no permission to ask who it is of" if code in (errno.EACCES, errno.EPERM) else ""
        raise ConfigError(f"uds: {quote(str(path))} is already in use{why and f': {why}'}")
    path.unlink()


def _is_bound(path: Path) -> bool:
    """Whether a process has this path and has yet to open it: it refuses as one that is gone."""
    try:
        lines = _BOUND.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    return any(line.endswith(f" {path}") for line in lines)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return "it is already in use"
    if number == errno.ENOENT:
        return "its folder does not exist"
    return getattr(error, "strerror", None) or str(error)
