"""Sums and gathers between the ranks that share each layer of a model.

Between CPU processes of one host everything goes through shared memory (`rank_group.h`), between
hosts over sockets (`distributed.network`), between cards through NCCL (`distributed.nccl`). The
order of a sum is that of the ranks, so its bits depend on the tensor-parallel size alone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.model_executor.ops._view import Arguments

LONGEST_WAIT = 300.0
"""Seconds that a rank waits for the others inside a step. It bounds their difference, not the step;
ranks that are gone, stopped or asleep are noticed much earlier, by whoever started them."""
STEP_END = (1 << 32) - 1
"""The low bits of the arrival of a rank that has ended its step, see `Communicator.arrivals`."""
SMALLEST_BUFFER = 1 << 18  # floats: 1 MiB, which stays in the cache of a core


class PeerFailedError(RuntimeError):
    """Another rank has failed in this step; it knows the reason."""


class PeerLostError(RuntimeError):
    """Another rank is gone or did not come in time."""


class Communicator(ABC):
    """One rank's end. All ranks call the same methods in the same order, each from one thread.

    Attributes:
        rank, size: which rank of how many.
    """

    rank: int
    size: int

    def open(self, forget: Callable[[], None]) -> None:  # noqa: B027 - memory needs none
        """Meet the other ranks, once the device of this process has been chosen.

        Args:
            forget: called after a step that failed, where graphs hold what is gone.

        Raises:
            PeerLostError: a rank does not come.
        """

    def close(self) -> None:  # noqa: B027 - as above
        """Leave the other ranks; nothing is called any more."""

    def begin(self) -> None:  # noqa: B027 - sums show it
        """Say that this rank is at work on a step; the first rank does."""

    @abstractmethod
    def all_reduce(self, x: Any) -> None:
        """Replace activations x by the sum of every rank's, added in the order of the ranks.

        Raises:
            PeerFailedError, PeerLostError: the sum will not come.
        """

    @abstractmethod
    def all_gather(self, x: Any, widths: Sequence[int], out: Any) -> None:
        """Put every rank's columns side by side.

        Args:
            x: float32 [R, widths[rank]].
            widths: columns of each rank.
            out: float32 [R, sum of widths].

        Raises:
            PeerFailedError, PeerLostError: they will not come.
        """

    @abstractmethod
    def first_bytes(self, data: bytes) -> bytes:
        """Return the first rank's `data` on every rank; as long on each, a multiple of four.

        Raises:
            PeerFailedError, PeerLostError: they will not come.
        """

    @abstractmethod
    def agree(self, sound: bool) -> bool:
        """End a step: wait for all ranks and return whether it was sound on each of them.

        Raises:
            PeerLostError: a rank does not come.
        """

    @abstractmethod
    def fail(self) -> None:
        """Say that the step has failed here, so that nobody waits for this rank's numbers."""

    @abstractmethod
    def lose(self) -> None:
        """Say that a rank is gone: every wait of every rank ends with PeerLostError."""

    @abstractmethod
    def late(self) -> list[int]:
        """Return the ranks that another one is ahead of; all but those waited for are not busy."""

    @abstractmethod
    def arrivals(self) -> list[int]:
        """Return of each rank a number that grows as it comes on in a step."""


class HostCommunicator(Communicator):
    """One that carries numbers and words between processes; cards use the words alone."""

    @abstractmethod
    def advance(self) -> None:
        """Show that this rank comes on in a step whose sums are made elsewhere."""

    @abstractmethod
    def is_lost(self) -> bool:
        """Whether somebody has said that a rank is gone."""

    @abstractmethod
    def is_failing(self) -> bool:
        """Whether a rank has failed in a step that this one has not ended yet; for any thread."""


class SharedMemory:
    """Memory for a group of processes: without a name, so that nothing is left when they die.

    Args:
        ranks: processes that will use it.
        widest: columns of the widest piece that is gathered.
        fd: descriptor from the process that made it; None makes it.
    """

    def __init__(self, ranks: int, widest: int, fd: int | None = None) -> None:
        self.ranks = ranks
        self.floats = max(SMALLEST_BUFFER, widest)
        size = _ops_cpu.RankGroup.bytes(ranks, self.floats)
        self.fd = os.memfd_create("fastdeploy-lite-ranks") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def close(self) -> None:
        """Close the descriptor; the mapping lives as long as its users."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SharedMemoryCommunicator(HostCommunicator):
    """Communicator of CPU processes on one host."""

    def __init__(self, memory: SharedMemory, rank: int, seconds: float = LONGEST_WAIT) -> None:
        """Args: seconds: longest wait for another rank."""
        self.rank, self.size = rank, memory.ranks
        self._memory = memory
        self._seconds = seconds
        self._group = _ops_cpu.RankGroup(memory.address, rank, memory.ranks, memory.floats)

    def all_reduce(self, x: Any) -> None:
        """See Communicator."""
        view = Arguments("all_reduce", x).view("x", x, "float32", *[None] * len(x.shape))
        self._check(self._group.all_reduce(view, self._seconds))

    def all_gather(self, x: Any, widths: Sequence[int], out: Any) -> None:
        """See Communicator."""
        args = Arguments("all_gather", x)
        rows = args.view("x", x, "float32", None, widths[self.rank])
        target = args.view("out", out, "float32", x.shape[0], sum(widths))
        self._check(self._group.all_gather(rows, list(widths), target, self._seconds))

    def agree(self, sound: bool) -> bool:
        """See Communicator."""
        outcome = self._group.agree(sound, self._seconds)
        if outcome == FAILED:
            return False
        self._check(outcome)
        return True

    def fail(self) -> None:
        """See Communicator."""
        self._group.fail()

    def lose(self) -> None:
        """See Communicator."""
        self._group.lose()

    def late(self) -> list[int]:
        """See Communicator."""
        arrivals = self._group.arrivals()
        return [rank for rank, arrived in enumerate(arrivals) if arrived < max(arrivals)]

    def arrivals(self) -> list[int]:
        """See Communicator."""
        return self._group.arrivals()

    def advance(self) -> None:
        """See HostCommunicator."""
        self._group.advance()

    def is_lost(self) -> bool:
        """See HostCommunicator."""
        return self._group.is_lost()

    def is_failing(self) -> bool:
        """See HostCommunicator."""
        return self._group.is_failing()

    def first_bytes(self, data: bytes) -> bytes:
        """See Communicator."""
        own = np.frombuffer(data, np.float32)  # bits that are only copied
        count, size = own.size, self.size
        found = np.empty((count, size), np.float32)
        view = (own.ctypes.data, "float32", [count, 1], [1, 1])
        out = (found.ctypes.data, "float32", [count, size], [size, 1])
        self._check(self._group.all_gather(view, [1] * size, out, self._seconds))
        return bytes(found[:, 0].tobytes())

    def _check(self, outcome: int) -> None:
        if outcome == FAILED:
            raise PeerFailedError("another rank has failed in this step")
        if outcome == LOST:
            raise PeerLostError("another rank is gone")
        if outcome == TIMED_OUT:
            late = ", ".join(map(str, self.late()))
            raise PeerLostError(f"rank {late} did not come within {self._seconds:g} s")


# Outcomes of rank_group.h.
FAILED, LOST, TIMED_OUT = 1, 2, 3
