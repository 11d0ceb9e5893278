"""Sums and gathers between processes of several hosts, over ZMQ.

Every rank sends its numbers to every other one and adds all of them in the order of the ranks, so
that the bits are those of `SharedMemoryCommunicator`. The collectives of gloo do neither promise
that order nor let go of a rank that waits when another one has failed; both are needed here.

A word is never answered: what a rank has said of a step is known to all others once it has come,
and a rank that is gone is noticed by whoever started it.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

from fastdeploy_lite.distributed.communicator import (
    LONGEST_WAIT,
    STEP_END,
    HostCommunicator,
    PeerFailedError,
    PeerLostError,
)
from fastdeploy_lite.model_executor import ops

GROUP_BYTES = 16
LAST_WORDS_MS = 1000
_HEADER = struct.Struct(f"<{GROUP_BYTES}sBHQQ")  # group, kind, rank, step, operation
_NUMBERS, _VOTE, _FAILED, _LOST = range(4)
_Floats = npt.NDArray[np.float32]


class NetworkCommunicator(HostCommunicator):
    """Communicator of processes that reach each other by TCP.

    Nothing is encrypted and nobody is asked who they are: the network is trusted, as a Ray cluster
    trusts it. Messages hold numbers only.

    Attributes:
        address: where this rank listens.
    """

    def __init__(
        self, rank: int, size: int, host: str, group: bytes, seconds: float = LONGEST_WAIT
    ) -> None:
        """Listen; nobody is connected yet, see `connect`.

        Args:
            rank, size: which rank of how many.
            host: address of this host that the others can reach.
            group: 16 bytes that no other group has: ports are used again.
            seconds: longest wait for another rank.
        """
        self.rank, self.size = rank, size
        self._group = group
        self._seconds = seconds
        self._context = zmq.Context()
        self._inbox = _unbounded(self._context, zmq.PULL)
        host = f"[{host}]" if ":" in host else host
        port = self._inbox.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._outboxes: list[zmq.Socket[bytes]] = []
        self._sending = threading.Lock()  # a socket is one thread's at a time
        self._bell = threading.Condition()  # guards all below
        self._step, self._operation, self._advanced = 1, 0, 0
        self._arrived = [0] * size
        self._numbers: dict[tuple[int, int], dict[int, _Floats]] = defaultdict(dict)
        self._votes: dict[int, dict[int, bool]] = defaultdict(dict)
        self._failed_step = 0
        self._lost = False
        self._listener = threading.Thread(target=self._listen, name="rank-inbox", daemon=True)
        self._listener.start()

    def connect(self, addresses: Sequence[str]) -> None:
        """Connect to all ranks; a rank that does not listen yet will find what was sent.

        Args:
            addresses: of every rank, this one included.
        """
        for rank, address in enumerate(addresses):
            if rank != self.rank:
                outbox = _unbounded(self._context, zmq.PUSH)
                outbox.linger = LAST_WORDS_MS
                outbox.connect(address)
                self._outboxes.append(outbox)

    def close(self) -> None:
        """See Communicator; words that are under way get through."""
        with self._sending:
            outboxes, self._outboxes = self._outboxes, []
            for outbox in outboxes:
                outbox.close()
        if not self._context.closed:
            self._context.term()  # the listener closes its socket
        self._listener.join()

    # -- what ranks do together --------------------------------------------------------------------

    def all_reduce(self, x: Any) -> None:
        """See Communicator."""
        own = ops.host_array(x)
        parts = self._exchange(own.reshape(-1))
        total = own.reshape(-1)
        if self.rank != 0:
            total[:] = parts[0]
        for part in parts[1:]:
            total += part

    def all_gather(self, x: Any, widths: Sequence[int], out: Any) -> None:
        """See Communicator."""
        rows = x.shape[0]
        parts = self._exchange(ops.host_array(x).reshape(-1))
        pieces = [part.reshape(rows, width) for part, width in zip(parts, widths, strict=True)]
        np.concatenate(pieces, axis=1, out=ops.host_array(out))

    def first_bytes(self, data: bytes) -> bytes:
        """See Communicator."""
        operation = self._arrive()
        if self.rank == 0:
            self._say(_NUMBERS, operation, data)
            return data
        key = (self._step, operation)
        self._wait(lambda: 0 in self._numbers[key], inside_step=True)
        return self._numbers.pop(key)[0].tobytes()

    def agree(self, sound: bool) -> bool:
        """See Communicator."""
        step = self._step
        with self._bell:
            self._arrived[self.rank] = step << 32 | STEP_END
            self._votes[step][self.rank] = sound
        self._say(_VOTE, int(sound))
        self._wait(lambda: len(self._votes[step]) == self.size, inside_step=False)
        with self._bell:
            votes = self._votes.pop(step)
            for key in [key for key in self._numbers if key[0] <= step]:
                del self._numbers[key]  # of a step that failed
            self._step, self._operation, self._advanced = step + 1, 0, 0
        return all(votes.values())

    def fail(self) -> None:
        """See Communicator."""
        with self._bell:
            self._failed_step = self._step
        self._say(_FAILED)

    def lose(self) -> None:
        """See Communicator; any thread may say it."""
        with self._bell:
            self._lost = True
            self._bell.notify_all()
        self._say(_LOST)

    # -- for whoever watches -----------------------------------------------------------------------

    def advance(self) -> None:
        """See HostCommunicator."""
        with self._bell:
            self._advanced += 1

    def is_lost(self) -> bool:
        """See HostCommunicator."""
        return self._lost

    def is_failing(self) -> bool:
        """See HostCommunicator."""
        return self._failed_step >= self._step

    def late(self) -> list[int]:
        """See Communicator, as far as this rank has heard."""
        arrived = self.arrivals()
        return [rank for rank, number in enumerate(arrived) if number < max(arrived)]

    def arrivals(self) -> list[int]:
        """See Communicator, as far as this rank has heard."""
        with self._bell:
            found = list(self._arrived)
            if self._advanced:
                begin = self._step << 32
                done = max(found[self.rank], begin) + self._advanced
                found[self.rank] = min(done, begin | STEP_END)
            return found

    # -- messages ----------------------------------------------------------------------------------

    def _exchange(self, own: _Floats) -> list[_Floats]:
        """Send numbers to all ranks and return those of each, in order."""
        operation = self._arrive()
        self._say(_NUMBERS, operation, own.tobytes())
        key, others = (self._step, operation), self.size - 1
        self._wait(lambda: len(self._numbers[key]) == others, inside_step=True)
        with self._bell:
            found = self._numbers.pop(key)
        found[self.rank] = own.copy() if self.rank else own
        return [found[rank] for rank in range(self.size)]

    def _arrive(self) -> int:
        with self._bell:
            self._operation += 1
            self._arrived[self.rank] = self._step << 32 | self._operation
            return self._operation

    def _say(self, kind: int, operation: int = 0, numbers: bytes = b"") -> None:
        header = _HEADER.pack(self._group, kind, self.rank, self._step, operation)
        with self._sending:
            for outbox in self._outboxes:
                outbox.send_multipart([header, numbers])

    def _listen(self) -> None:
        with suppress(zmq.ContextTerminated):
            while True:
                header, numbers = self._inbox.recv_multipart()
                self._take(header, numbers)
        self._inbox.close(linger=0)

    def _take(self, header: bytes, numbers: bytes) -> None:
        if len(header) != _HEADER.size:
            return
        group, kind, rank, step, operation = _HEADER.unpack(header)
        if group != self._group:
            return
        with self._bell:
            if kind == _NUMBERS:
                self._numbers[step, operation][rank] = np.frombuffer(numbers, np.float32)
                self._arrived[rank] = step << 32 | operation
            elif kind == _VOTE:
                self._votes[step][rank] = bool(operation)
                self._arrived[rank] = step << 32 | STEP_END
            elif kind == _FAILED:
                self._failed_step = max(self._failed_step, step)
            else:
                self._lost = True
            self._bell.notify_all()

    def _wait(self, ready: Callable[[], bool], inside_step: bool) -> None:
        """Wait until `ready`, which is asked under the lock.

        Raises:
            PeerFailedError, PeerLostError: that will not be.
        """
        deadline = time.monotonic() + self._seconds
        with self._bell:
            while True:
                # First: a rank that has failed may have sent numbers before.
                if inside_step and self._failed_step == self._step:
                    raise PeerFailedError("another rank has failed in this step")
                if ready():
                    return
                if self._lost:
                    raise PeerLostError("another rank is gone")
                if not self._bell.wait(deadline - time.monotonic()) and (
                    time.monotonic() >= deadline
                ):
                    break
        late = ", ".join(map(str, self.late()))
        raise PeerLostError(f"rank {late} did not come within {self._seconds:g} s")


def _unbounded(context: zmq.Context[Any], kind: int) -> zmq.Socket[bytes]:
    """A socket on which no sender ever waits: steps bound what is under way."""
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.set_hwm(0)
    return socket
