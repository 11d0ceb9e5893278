"""Why the ranks of a model have ended."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastdeploy_lite.executor.base import ExecutorDeadError
from fastdeploy_lite.utils.errors import FastDeployError


class Ending:
    """The first reason that is told; what follows from it is not kept.

    Args:
        on_first: called with that reason, by the thread that tells it.

    Attributes:
        reason: in one line, None while all ranks live.
    """

    def __init__(self, on_first: Callable[[str], None] | None = None) -> None:
        self.reason: str | None = None
        self._on_first = on_first
        self._is_users = False

    def tell(self, reason: str, is_users: bool = False) -> bool:
        """Say why a rank has ended, and whether that is the user's fault; True for the first."""
        if self.reason is not None:
            return False
        self.reason, self._is_users = reason, is_users
        if self._on_first is not None:
            self._on_first(reason)
        return True

    def check(self) -> None:
        """Raise what ended a rank.

        Raises:
            FastDeployError: the user's fault, such as a file that is damaged.
            ExecutorDeadError: anything else.
        """
        if self.reason is not None:
            raise (FastDeployError if self._is_users else ExecutorDeadError)(self.reason)

    def wait(self, seconds: float, step: float) -> None:
        """Give who may know the reason so long to tell it; looks every `step` seconds."""
        deadline = time.monotonic() + seconds
        while self.reason is None and time.monotonic() < deadline:
            time.sleep(step)
