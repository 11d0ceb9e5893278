"""The processes of the ranks beyond the first: their birth, their words, and their end.

One thread starts them, reads what they say and watches them. What ends one of them ends all: the
first reason is kept, everybody who waits in a collective is released, and no process is left.
"""

from __future__ import annotations

import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from fastdeploy_lite.device import CARDS_VARIABLE
from fastdeploy_lite.distributed.communicator import Communicator
from fastdeploy_lite.executor.channel import Channel
from fastdeploy_lite.executor.messages import (
    FromRank,
    RankFatal,
    Start,
    Step,
    ToRank,
    encode_start,
)
from fastdeploy_lite.executor.supervisor import RankSupervisor, WatchedRank
from fastdeploy_lite.utils.processes import state_of

LOOK_SECONDS = 0.25
END_SECONDS = 2.0
# Not `-m`, which looks into the working directory first: the process must run this very package.
_RUN_RANK = """\
import sys
sys.path[:] = {path!r}
from fastdeploy_lite.utils.processes import die_with_parent
die_with_parent({parent})  # before all that takes long to import
from fastdeploy_lite.executor.rank_process import main
sys.exit(main({descriptor}))
"""


class _Rank(WatchedRank):
    """One process and what is known of it."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], channel: Channel) -> None:
        super().__init__(number)
        self.process = process
        self.channel = channel
        self.inbox: queue.SimpleQueue[FromRank] = queue.SimpleQueue()
        self.fatal: RankFatal | None = None

    def name(self, text: str) -> str:
        """See WatchedRank."""
        return f"rank {self.number} (process {self.process.pid}): {text}"


class _FirstRank(WatchedRank):
    """The thread that computes in this process."""

    def __init__(self) -> None:
        super().__init__(0)
        self.thread: int | None = None

    def name(self, text: str) -> str:
        """See WatchedRank."""
        return f"rank 0 (process {os.getpid()}): {text}"

    def state(self) -> tuple[str, int]:
        """State of the thread, and ticks of the whole process without those of the watch, which
        asks: parts of an op run on threads of their own."""
        ticks = state_of(os.getpid())[1] - state_of(os.getpid(), threading.get_native_id())[1]
        return state_of(os.getpid(), self.thread)[0], ticks


class RankProcesses(RankSupervisor):
    """All ranks but the first, which this process is.

    Args:
        starts: what to send to each process first.
        memory_fd: descriptor that they inherit.
        communicator: of the first rank; knows who waits for whom, and frees who waits.
        cards: of each rank, none on the CPU.
        on_loss: called with the first reason, by whatever thread has found it; it may be that the
            first rank hangs, which is not looked for without.
    """

    def __init__(
        self,
        starts: Sequence[Start],
        memory_fd: int,
        communicator: Communicator,
        cards: Sequence[str] = (),
        on_loss: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(2 * LOOK_SECONDS, on_loss)
        self._first = _FirstRank()
        # A card is waited for in silence, and other threads of a user's program may hold this one.
        self._watches_first = on_loss is not None and not cards
        self._starts = [encode_start(start) for start in starts]
        self._memory_fd = memory_fd
        self._communicator = communicator
        self._cards = cards
        self._ranks: list[_Rank] = []
        self._selector = selectors.DefaultSelector()
        self._closing = threading.Event()
        self._started = threading.Event()
        self._decoder: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
        # The kernel ends the children when the thread that made them ends: it must be this one.
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._thread.start()
        self._started.wait()
        self.check()

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank from 1."""
        return [rank.process.pid for rank in self._ranks]

    # What the engine's thread calls ---------------------------------------------------------------

    def send(self, message: ToRank) -> None:
        """Tell every rank; raises as `check`."""
        raw = msgspec.msgpack.encode(message)
        self._first.thread = threading.get_native_id() if isinstance(message, Step) else None
        self._pace.begins(time.monotonic())
        for rank in self._ranks:
            try:
                rank.channel.send(raw)
            except OSError:
                self.give_up(f"rank {rank.number} cannot be reached")

    def answers(self) -> list[FromRank]:
        """Return one answer of every rank, in their order; raises as `check`."""
        found = []
        for rank in self._ranks:
            while True:
                self.check()
                with suppress(queue.Empty):
                    found.append(rank.inbox.get(timeout=LOOK_SECONDS))
                    break
        return found

    def close(self) -> None:
        """End all processes and wait until they are gone; idempotent."""
        self._closing.set()
        self._thread.join()

    # The watch ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            for number, start in enumerate(self._starts, 1):
                self._ranks.append(self._start(number, start))
        except Exception as error:  # no process, no memory
            self._lose(f"a rank cannot be started: {type(error).__name__}: {error}")
        finally:
            self._started.set()
        while not self._closing.is_set() and self._ending.reason is None:
            self._listen()
            self._look()
        self._end()
        self._closing.wait()  # outlives the last child, see __init__

    def _start(self, number: int, start: bytes) -> _Rank:
        ours, theirs = socket.socketpair()
        with theirs:
            code = _RUN_RANK.format(path=sys.path, descriptor=theirs.fileno(), parent=os.getpid())
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True,
                pass_fds=(theirs.fileno(), self._memory_fd), env=self._environment(number),
            )  # fmt: skip
        rank = _Rank(number, process, Channel(ours))
        rank.channel.send(start)
        self._selector.register(rank.channel, selectors.EVENT_READ, rank)
        return rank

    def _environment(self, number: int) -> dict[str, str] | None:
        if not self._cards:
            return None
        return {**os.environ, CARDS_VARIABLE: self._cards[number]}

    def _listen(self) -> None:
        for key, _ in self._selector.select(LOOK_SECONDS):
            rank: _Rank = key.data
            try:
                message = self._decoder.decode(rank.channel.receive())
            except (EOFError, OSError):
                self._lose(*self._last_words(rank))
                return
            if isinstance(message, RankFatal):
                rank.fatal = message
                self._lose(*self._last_words(rank))
            else:
                rank.inbox.put(message)

    def _last_words(self, rank: _Rank) -> tuple[str, bool]:
        """Why a rank has ended, and whether that is the user's fault."""
        fatal = rank.fatal
        if fatal is not None:
            named = fatal.reason if fatal.is_users else rank.name(fatal.reason)
            return named, fatal.is_users
        try:
            code = rank.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return rank.name("closed its connection"), False
        if code < 0:
            return rank.name(f"was ended by signal {signal.Signals(-code).name}"), False
        return rank.name(f"ended with exit status {code}"), False

    def _look(self) -> None:
        arrivals = dict(enumerate(self._communicator.arrivals()))
        states = {rank.number: state_of(rank.process.pid) for rank in self._ranks}
        if self._watches_first and self._first.thread is not None:
            states[0] = self._first.state()
        self._judge([self._first, *self._ranks], arrivals, states)

    def _lose(self, reason: str, is_users: bool = False) -> None:
        self._ending.tell(reason, is_users)
        self._communicator.lose()

    def _end(self) -> None:
        self._selector.close()
        for rank in self._ranks:
            rank.process.kill()  # also what is stopped; nothing of theirs needs to be saved
        for rank in self._ranks:
            rank.process.wait()
            if rank.process.stdin is not None:
                rank.process.stdin.close()
            rank.channel.close()
