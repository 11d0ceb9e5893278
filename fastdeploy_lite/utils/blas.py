"""Threads of OpenBLAS, which multiplies numpy's matrices beside the threads of our own ops."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

TIMEOUT_VARIABLE = "OPENBLAS_THREAD_TIMEOUT"
_SHORTEST = "4"
"""Binary logarithm of processor ticks that an idle thread waits in a loop. Where nobody says so, it
takes up to 40 ms after a product from whatever runs next (measured)."""
_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)


def let_idle_threads_sleep() -> None:
    """Make idle threads sleep at once, unless the environment says how long they are to wait.

    To be called before numpy is imported: the library reads the variable once.
    """
    os.environ.setdefault(TIMEOUT_VARIABLE, _SHORTEST)


def set_num_threads(count: int) -> bool:
    """Limit the threads of products; whether a library was found that could be told."""
    found = [setter for library in _libraries() if (setter := _setter(library)) is not None]
    for setter in found:
        setter(count)
    return bool(found)


def _libraries() -> Iterator[ctypes.CDLL]:
    """Every OpenBLAS that this process has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    paths = {line.split(maxsplit=5)[5] for line in lines if "openblas" in line.rpartition("/")[2]}
    for path in sorted(paths):
        with contextlib.suppress(OSError):  # its file was replaced since
            yield ctypes.CDLL(path)


def _setter(library: ctypes.CDLL) -> ctypes._NamedFuncPointer | None:
    return next((getattr(library, name) for name in _SETTERS if hasattr(library, name)), None)
