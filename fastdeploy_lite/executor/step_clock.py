"""Memory in which a process says which step it is at, for the process that started it.

No thread is needed to write it and nothing to read it but the memory: a step that hangs in native
code stops every thread that would tell of it.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass

_STATE = struct.Struct("<QQdI")  # number, tokens, limit, bytes of words
_MOST_WORDS = 2048


@dataclass(frozen=True)
class StepState:
    """What a clock shows.

    Attributes:
        number: of the step that is computed, 0 between steps.
        tokens: of it.
        limit: seconds that it may take; infinite where there is no limit.
        words: why the devices are lost, "" while they are not.
    """

    number: int
    tokens: int
    limit: float
    words: str


class StepClock:
    """One end; one thread writes steps, any thread says words, another process reads.

    Args:
        fd: descriptor from the process that made it; None makes it, inherited by no child unless
            it is passed on.
    """

    def __init__(self, fd: int | None = None) -> None:
        size = _STATE.size + _MOST_WORDS
        self.fd = os.memfd_create("fastdeploy-lite-steps") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self._steps = 0

    def begin(self, tokens: int, limit: float) -> None:
        """Say that a step has begun."""
        self._steps += 1
        struct.pack_into("<Qd", self._map, 8, tokens, limit)
        struct.pack_into("<Q", self._map, 0, self._steps)  # last: whoever sees it sees the rest

    def end(self) -> None:
        """Say that it has ended."""
        struct.pack_into("<Q", self._map, 0, 0)

    def say(self, words: str) -> None:
        """Say why the devices are lost, should this process be unable to say it otherwise."""
        raw = words.encode()[:_MOST_WORDS]
        self._map[_STATE.size : _STATE.size + len(raw)] = raw
        struct.pack_into("<I", self._map, _STATE.size - 4, len(raw))

    def read(self) -> StepState:
        """Return what is shown now."""
        number, tokens, limit, size = _STATE.unpack_from(self._map)
        raw = self._map[_STATE.size : _STATE.size + size]
        return StepState(number, tokens, limit, raw.decode(errors="replace"))

    def close(self) -> None:
        """Close this end; idempotent."""
        if self.fd >= 0:
            self._map.close()
            os.close(self.fd)
            self.fd = -1
