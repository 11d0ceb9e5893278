"""Waiting for what happens in another thread, process or browser.

A pause that is long enough on one machine is too short on a busy one; a condition is neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")
PATIENCE = 60.0  # seconds that only a test that fails takes


def until(
    condition: Callable[[], Found],
    seconds: float = PATIENCE,
    *,
    every: float = 0.02,
    told: Callable[[], object] | None = None,
) -> Found:
    """Ask until the answer is true in the sense of `bool`, and return it.

    Args:
        condition: Asked at least twice, so that one long stall of this process is no failure.
        seconds: How long at most.
        every: Seconds between two questions.
        told: Says what the failure shows beside the last answer.

    Raises:
        AssertionError: It never was.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        is_late = time.monotonic() > deadline
        time.sleep(every)
        if is_late and not (found := condition()):
            beside = "" if told is None else f"\n{told()}"
            raise AssertionError(f"not within {seconds:g} s; last {found!r}{beside}")
    return found
