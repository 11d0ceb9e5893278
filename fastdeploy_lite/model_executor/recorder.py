"""A step recorded in segments: what a card can replay alone, and between it what the host does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

Part: TypeAlias = Callable[[], object]
Result = TypeVar("Result")


class Recorder:
    """Collects the parts of one step; running them in order repeats the step."""

    def __init__(self, begin: Callable[[], None], end: Callable[[bool], Part | None]) -> None:
        """Args: begin: starts to record queued work instead of running it; end: stops, and returns
        what replays it: None if nothing was queued, or if it is told to discard."""
        self._begin = begin
        self._end = end
        self._is_open = False
        self.parts: list[Part] = []

    def record(self, forward: Callable[[], Result]) -> Result:
        """Record what `forward` queues; return its result, which a replay fills.

        Whatever `forward` raises ends the recording first.
        """
        self._open()
        try:
            result = forward()
        except BaseException:
            self._close(discard=True)
            raise
        self._close()
        return result

    def cut(self, work: Part) -> None:
        """End a segment and begin another; `work` runs between them at each replay, not now."""
        self._close()
        self.parts.append(work)
        self._open()

    def _open(self) -> None:
        self._begin()
        self._is_open = True

    def _close(self, discard: bool = False) -> None:
        if not self._is_open:
            return  # it is `_end` that has failed
        self._is_open = False
        part = self._end(discard)
        if part is not None:
            self.parts.append(part)
