"""Ctrl-C while a program is still starting."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the process at once and without a traceback.

    For the time of imports and of loading, where a KeyboardInterrupt surfaces in foreign code, as
    an ImportError or never; there is nothing to tidy up yet. Outside the main thread, and where
    the signal is handled or ignored on purpose, nothing changes.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
