"""Other processes of this machine: what the kernel says of them, and an end with a parent's."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path

_PR_SET_PDEATHSIG = 1

STOPPED_SECONDS = 1.5
"""A process that is stopped (SIGSTOP) for longer will not come back in time for who waits."""


def state_of(pid: int, thread: int | None = None) -> tuple[str, int]:
    """Return state letter and used processor ticks of a process, ("", 0) when it is gone.

    `T` is stopped by a signal, `t` by a debugger. Source: proc_pid_stat(5).

    Args:
        pid: the process.
        thread: native id of the one of its threads that is meant.
    """
    place = f"/proc/{pid}" if thread is None else f"/proc/{pid}/task/{thread}"
    try:
        text = Path(f"{place}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])


def die_with_parent(parent: int) -> None:
    """Arrange for the end of this process when its parent's ends.

    The kernel does it, so that it does not matter what this process is at, be it stopped.

    Args:
        parent: process id of whoever has started this one, from a thread that lives as long.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before
        os._exit(3)


def die_with_standard_input() -> None:
    """Arrange for the end of this process when its parent closes standard input.

    To be called when nobody else reads it.
    """

    def wait() -> None:
        # Not through `sys.stdin`, whose lock the end of the interpreter would wait for in vain.
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()
