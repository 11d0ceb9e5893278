"""Sums and gathers between cards.

NCCL moves the numbers (`custom_ops/cuda/nccl.h`); who is at work, what failed and who is gone is
said as between processes without cards. A card that waits for another one cannot
be asked to stop, so a thread beside each rank ends its kernels when nobody will come.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from fastdeploy_lite import _ops_cuda, envs
from fastdeploy_lite.distributed.communicator import (
    LONGEST_WAIT,
    Communicator,
    HostCommunicator,
    PeerFailedError,
    PeerLostError,
)
from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime
from fastdeploy_lite.model_executor.ops._view import Arguments

log = logging.getLogger(__name__)

SumWay = Literal["shared memory", "NCCL", "gathered"]
"""Small sums by one kernel that reads the other cards' memory (`peer_sums.h`), NCCL's own sums, or
numbers that NCCL gathers and this rank adds in the order of the ranks."""

LOOK_SECONDS = 0.05
END_SECONDS = 3.0
MEND_SECONDS = 1.0
"""So long a card may take to end what was queued before the group is made anew."""


class NcclCommunicator(Communicator):
    """Communicator of processes that have a card each."""

    def __init__(self, ranks: HostCommunicator, seconds: float = LONGEST_WAIT) -> None:
        """Nothing is connected yet, see `open`.

        Args:
            ranks: the end of this process, where ranks say how they are.
            seconds: longest wait for the cards to meet, and to end a step.
        """
        self.rank, self.size = ranks.rank, ranks.size
        self._ranks = ranks
        self._seconds = seconds
        self._group: Any = None
        self._forget: Callable[[], None] = lambda: None
        self._began: float | None = None
        self._reason = ""
        self._closed = threading.Event()

    def open(self, forget: Callable[[], None]) -> None:
        """See Communicator; the card of this process is the current one."""
        runtime.open_nccl()
        self._forget = forget
        self._connect()
        threading.Thread(target=self._watch, name="card-watch", daemon=True).start()
        atexit.register(self.close)  # NCCL's threads must not outlive what they use

    def close(self) -> None:
        """See Communicator."""
        atexit.unregister(self.close)
        if not self._closed.is_set() and self._group is not None:
            self._end_group()
        self._closed.set()
        self._ranks.close()

    def all_reduce(self, x: Any) -> None:
        """See Communicator."""
        view = Arguments("all_reduce", x).view(
            "x", x, ("bfloat16", "float32"), *[None] * len(x.shape)
        )
        count = 1
        for extent in view[2]:
            count *= extent
        self._ranks.advance()
        with self._released():
            self._group.all_reduce(
                runtime.address(view), view[1] == "float32", count, *_scratch(), runtime.stream()
            )

    def all_gather(self, x: Any, widths: Sequence[int], out: Any) -> None:
        """See Communicator; all widths are equal."""
        if len(set(widths)) != 1:
            raise ValueError(f"all_gather: cards have as many columns each, found {list(widths)}")
        args = Arguments("all_gather", x)
        rows = args.view("x", x, "float32", None, widths[self.rank])
        target = args.view("out", out, "float32", x.shape[0], sum(widths))
        self._ranks.advance()
        with self._released():
            self._group.all_gather(
                runtime.address(rows), *rows[2], runtime.address(target), *_scratch(),
                runtime.stream(),
            )  # fmt: skip

    def set_way(self, way: SumWay) -> None:
        """Choose how sums are made, where there is a choice; all ways have the same bits.

        The group forgets it when it is made anew; for tests and measurements.
        """
        self._group.set_sharing(way == "shared memory")
        self._group.set_order(way == "gathered")

    def first_bytes(self, data: bytes) -> bytes:
        """See Communicator."""
        with self._explained():
            return self._ranks.first_bytes(data)

    def begin(self) -> None:
        """See Communicator."""
        self._began = time.monotonic()
        self._ranks.advance()

    def agree(self, sound: bool) -> bool:
        """See Communicator. After a step that failed, the group is whole again."""
        with self._explained():
            # Whoever was freed has waited for numbers that never came, and holds others.
            agreed = self._ranks.agree(sound and not self._group.aborted)
            self._began = None
            if self._ranks.is_lost():
                raise PeerLostError("another rank is gone")
            if not agreed:
                self._mend()
        return agreed

    def fail(self) -> None:
        """See Communicator."""
        self._ranks.fail()

    def lose(self) -> None:
        """See Communicator; what runs on this card ends, too."""
        self._ranks.lose()
        if self._group is not None:
            self._group.abort()

    def late(self) -> list[int]:
        """See Communicator."""
        return self._ranks.late()

    def arrivals(self) -> list[int]:
        """See Communicator."""
        return self._ranks.arrivals()

    # -- the group -------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Make the group; all ranks do so together."""
        own = _ops_cuda.nccl_unique_id() if self.rank == 0 else bytes(_ID_BYTES)
        name = self._ranks.first_bytes(own)
        made: queue.SimpleQueue[Any] = queue.SimpleQueue()
        device = runtime.device_index()

        def make() -> None:
            try:
                group = _ops_cuda.NcclGroup(name, self.rank, self.size, device)
                if envs.FD_LITE_PEER_SUMS and not group.share_memory():
                    log.info("The cards cannot read each other's memory: all sums go through NCCL")
                made.put(group)
            except RuntimeError as error:
                made.put(error)

        # On a thread of its own: NCCL would wait for ever for a rank that is gone.
        threading.Thread(target=make, daemon=True).start()
        deadline = time.monotonic() + self._seconds
        while True:
            with contextlib.suppress(queue.Empty):
                found = made.get(timeout=LOOK_SECONDS)
                break
            if self._ranks.is_lost():
                raise PeerLostError("another rank is gone")
            if time.monotonic() > deadline:
                raise PeerLostError(f"the cards did not meet within {self._seconds:g} s")
        if isinstance(found, RuntimeError):
            raise found
        self._group = found

    def _mend(self) -> None:
        """Go on with the group, or with a new one where a rank has not queued what others have."""
        if self._ranks.agree(self._group.wait_idle(MEND_SECONDS, runtime.stream())):
            return
        log.warning("A step failed on one card only; the cards connect anew")
        self._end_group()
        self._connect()

    def _end_group(self) -> None:
        """End the group, what it runs, and the graphs that hold it."""
        self._group.abort()
        with contextlib.suppress(RuntimeError):  # a card that has failed
            _ops_cuda.synchronize(runtime.stream())
        self._forget()
        deadline = time.monotonic() + END_SECONDS
        while not self._group.ended and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS / 10)

    def _watch(self) -> None:
        """End this card's kernels when the numbers that they wait for will not come."""
        failing_since: float | None = None
        while not self._closed.wait(LOOK_SECONDS):
            now, began = time.monotonic(), self._began
            if not self._ranks.is_failing():
                failing_since = None
            elif failing_since is None:
                failing_since = now
            elif now - failing_since > MEND_SECONDS:
                self._group.abort()
            if began is not None and now - began > self._seconds:
                self._reason = f"the cards did not end a step within {self._seconds:g} s"
                self._ranks.lose()
            if self._ranks.is_lost():
                self._group.abort()
                return

    @contextlib.contextmanager
    def _released(self) -> Any:
        """Tell in which way the group has ended, if it has."""
        try:
            yield
        except RuntimeError as error:
            if self._ranks.is_lost():
                raise PeerLostError(self._reason or "another rank is gone") from error
            if self._ranks.is_failing():
                raise PeerFailedError("another rank has failed in this step") from error
            raise

    @contextlib.contextmanager
    def _explained(self) -> Any:
        try:
            yield
        except PeerLostError as error:
            raise PeerLostError(self._reason or str(error)) from None


_ID_BYTES = 128


def _scratch() -> tuple[int, int]:
    return runtime.scratch(runtime.SCRATCH_BYTES), runtime.SCRATCH_BYTES
