"""Ctrl-C while a program is still starting, or about to end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_ours = False  # whether SIGINT's default action is this module's doing


def end_on_interrupt() -> None:
    """From here on Ctrl-C ends the process at once and without a traceback.

    For the time of imports, of loading and of the last clearing up, where a KeyboardInterrupt
    surfaces in foreign code, as an ImportError or never. The process dies of the signal: a shell
    sees status 130. Outside the main thread, and where the signal is handled or ignored on purpose,
    nothing changes.
    """
    global _ours  # noqa: PLW0603 - a process has one action for a signal
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _ours = True


def raise_on_interrupt() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again, if `end_on_interrupt` changed that."""
    global _ours  # noqa: PLW0603
    if _ours:
        _ours = False
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def quiet_interrupts() -> Iterator[None]:
    """Between `end_on_interrupt` and `raise_on_interrupt`."""
    end_on_interrupt()
    try:
        yield
    finally:
        raise_on_interrupt()
