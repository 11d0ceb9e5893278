"""What the kernel says of another process of this machine."""

from __future__ import annotations

from pathlib import Path

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
