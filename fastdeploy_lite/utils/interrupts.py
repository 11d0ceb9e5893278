"""Ctrl-C where it would come at a bad moment: while a program starts, ends, or keeps its books."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

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


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let a Ctrl-C act after this block, not in the middle of it.

    Only in the main thread, where Python runs handlers, and where a Python function is one.
    """
    handler = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(handler):
        yield
        return
    pressed: list[FrameType | None] = []

    def note(_: int, frame: FrameType | None) -> None:
        pressed.append(frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        handler(signal.SIGINT, pressed[0])


class Stop:
    """Ctrl-C that stops what may be stopped, once, and does nothing else.

    A hasty second one would otherwise cut what clears up after the first.
    """

    def __init__(self) -> None:
        self._is_possible = False

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Take every Ctrl-C in this block; it is entered in the main thread."""
        previous = signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    @contextlib.contextmanager
    def possible(self) -> Iterator[None]:
        """In this block, inside `heeded`, the first Ctrl-C raises KeyboardInterrupt."""
        self._is_possible = True
        try:
            yield
        finally:
            self._is_possible = False

    def _press(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_possible:
            self._is_possible = False
            raise KeyboardInterrupt
