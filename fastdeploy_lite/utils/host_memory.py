"""Main memory of this machine, as far as this process may use it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current"),  # version 2
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
)

# Of <malloc.h>; glibc's parameters of `mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_RETURNED_BYTES = 1 << 20


def return_freed_memory() -> None:
    """Give large buffers back to the system as soon as they are freed, in this process.

    By default glibc keeps an arena for every thread and raises its thresholds to the largest buffer
    seen, so that a server's memory grows with every thread that has once met a large request.  Does
    nothing where the C library knows no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES // 2)
        mallopt(_M_TRIM_THRESHOLD, _RETURNED_BYTES)


def keep_what_is_loaded() -> None:
    """Take what this process holds now out of garbage collection: it serves until its end.

    A full collection walks modules, frameworks and vocabularies otherwise, with every other thread
    of the process waiting, and finds nothing in them: 75 ms of an engine on a server's core.
    """
    gc.collect()  # what is garbage already would be kept, too
    gc.freeze()


def available_bytes() -> int:
    """Bytes that can be allocated without swapping: the kernel's estimate, or what a container's
    limit leaves if that is less.
    """
    available = _meminfo("MemAvailable")
    for limit_name, usage_name in _LIMITS:
        limit, usage = _number(_CGROUP / limit_name), _number(_CGROUP / usage_name)
        if limit is not None and usage is not None:
            available = min(available, max(0, limit - usage))
    return available


def total_bytes() -> int:
    """Bytes of main memory, or the container's limit if that is less."""
    limits = [_number(_CGROUP / name) for name, _ in _LIMITS]
    return min([_meminfo("MemTotal"), *(limit for limit in limits if limit is not None)])


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {name}")


def _number(path: Path) -> int | None:
    """Content of a control file, None when it is absent or says "max"."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
