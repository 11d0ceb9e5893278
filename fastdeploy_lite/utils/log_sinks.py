"""Where log bytes go, without ever making the writer of a record wait.

A full disk, a stalled pipe or a hung network file system stops the thread of its sink, not the
event loop that logs: what does not fit into the sink's queue is counted and said later.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

QUEUE_BYTES = 4 << 20
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Sink:
    """A bounded queue and the thread that empties it.

    Args:
        write: Takes bytes; may block, may raise OSError.
        on_error: Told of each OSError; None for nobody.
    """

    def __init__(
        self,
        write: Callable[[bytes], None],
        on_error: Callable[[OSError], None] | None = None,
    ) -> None:
        self._write = write
        self._on_error = on_error
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._lost = 0
        self._is_writing = False
        self._thread: threading.Thread | None = None

    def put(self, data: bytes) -> None:
        """Queue data, or count it as lost when the queue is full.  Never blocks, never raises.

        Args:
            data: Whole lines.
        """
        with self._changed:
            if self._size + len(data) > QUEUE_BYTES:
                self._lost += 1
                return
            self._waiting.append(data)
            self._size += len(data)
            if self._thread is None:
                # A daemon: a blocked write must not keep the process from ending.
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                self._thread.start()
            self._changed.notify()

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written.

        Args:
            seconds: How long at most.

        Returns:
            Whether it was.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._waiting and not self._is_writing, seconds
            )

    def _run(self) -> None:
        while True:
            data = self._take()
            try:
                self._write(data)
            except OSError as error:
                if self._on_error is not None:
                    self._on_error(error)
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()

    def _take(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting))
            data = b"".join(self._waiting)
            if self._lost:
                data += b"(%d log records were lost here: nobody took them)\n" % self._lost
            self._waiting.clear()
            self._size = self._lost = 0
            self._is_writing = True
            return data


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything to a descriptor; what a non-blocking one does not take is dropped.

    Args:
        descriptor: Open for writing.
        data: What to write.

    Raises:
        OSError: It cannot be written.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            return


class LogFile:
    """One log file of this user alone, rotated at midnight, found again after somebody renamed it.

    Several processes may write to it: only the first one moves yesterday's away. A symbolic link in
    its place is replaced, never followed.

    Args:
        path: The file.
        backups: How many old ones are kept.
    """

    def __init__(self, path: Path, backups: int) -> None:
        self.path = path
        self._backups = backups
        self._descriptor = -1
        self._day = time.strftime("%Y-%m-%d", time.localtime(self._last_change()))

    def write(self, data: bytes) -> None:
        """Append whole lines.

        Raises:
            OSError: It cannot be opened or written.
        """
        today = time.strftime("%Y-%m-%d")
        if today != self._day:
            self.rotate(today)
        if not self._is_in_place():
            self._open()
        write_all(self._descriptor, data)

    def rotate(self, today: str) -> None:
        """Give the file yesterday's name unless that exists, and delete the oldest ones.

        Args:
            today: The new day, `YYYY-MM-DD`.
        """
        self.close()
        self._day, day = today, self._day
        if not self.path.is_file() or self.path.is_symlink():
            return  # a device is nothing to be moved away
        with contextlib.suppress(OSError):
            # A link fails if the name exists, where a rename would destroy what lies there.
            os.link(self.path, f"{self.path}.{day}", follow_symlinks=False)
            self.path.unlink()
        dated = sorted(self.path.parent.glob(f"{self.path.name}.[0-9]*-[0-9]*-[0-9]*"))
        for old in dated[: max(len(dated) - self._backups, 0)]:
            old.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; the next write opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _last_change(self) -> float:
        try:
            return self.path.stat(follow_symlinks=False).st_mtime
        except OSError:
            return time.time()

    def _is_in_place(self) -> bool:
        if self._descriptor < 0:
            return False
        try:
            there = self.path.stat(follow_symlinks=False)
        except OSError:
            return False
        mine = os.fstat(self._descriptor)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _open(self) -> None:
        self.close()
        try:
            descriptor = os.open(self.path, _FLAGS, 0o600)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            self.path.unlink()
            descriptor = os.open(self.path, _FLAGS | os.O_EXCL, 0o600)
        status = os.fstat(descriptor)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISCHR(status.st_mode)):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file")
        if (
            stat.S_ISREG(status.st_mode)
            and status.st_mode & 0o077
            and status.st_uid == os.geteuid()
        ):
            os.fchmod(descriptor, 0o600)  # written by a release that left it open to everybody
        os.set_blocking(descriptor, True)
        self._descriptor = descriptor
