"""What is seen of the ranks of a model from outside: how far they are, who is lost, and why."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from fastdeploy_lite.distributed.communicator import STEP_END
from fastdeploy_lite.executor.ending import Ending
from fastdeploy_lite.executor.watch import Pace, RankWatch, Seen

WAIT_STEP_SECONDS = 0.025


class WatchedRank(ABC):
    """One rank.

    Attributes:
        number: which one.
        watch: what was seen of it.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.watch = RankWatch()

    @abstractmethod
    def name(self, text: str) -> str:
        """Say something of this rank."""


class RankSupervisor(ABC):
    """The first reason that a rank ended for is kept; it ends all of them.

    Args:
        patience: seconds in which the watch finds a better reason than whoever waits in vain.
        on_loss: called with the first reason, by whatever thread has found it.
        first_lingers: whether the first rank may come to the end of a step long after the others:
            it calls what users bring.
    """

    def __init__(
        self,
        patience: float,
        on_loss: Callable[[str], None] | None = None,
        first_lingers: bool = True,
    ) -> None:
        self._patience = patience
        self._first_lingers = first_lingers
        self._ending = Ending(on_loss)
        self._pace = Pace()

    def check(self) -> None:
        """Raise what ended a rank, see `Ending`."""
        self._ending.check()

    def give_up(self, reason: str) -> None:
        """End all ranks for a reason that the caller has found, unless there is one already."""
        self._ending.wait(self._patience, WAIT_STEP_SECONDS)
        self._lose(reason)
        self.check()

    @abstractmethod
    def _lose(self, reason: str, is_users: bool = False) -> None:
        """Keep the reason if it is the first one, and end all ranks."""

    def _judge(
        self,
        ranks: Sequence[WatchedRank],
        arrivals: Mapping[int, int],
        states: Mapping[int, tuple[str, int]],
    ) -> None:
        """Notice ranks that are stopped, or do not come on while others wait for them.

        Args:
            ranks: those that may be lost.
            arrivals: how far ranks are, by number; see `Communicator.arrivals`.
            states: see `state_of`, by number; a rank without one is passed over.
        """
        furthest, now = max(arrivals.values(), default=0), time.monotonic()
        self._pace.saw(furthest, now)
        for rank in ranks:
            if rank.number not in states:
                continue
            arrival = arrivals[rank.number]
            is_late = arrival < furthest
            if rank.number == 0 and self._first_lingers:
                is_late = is_late and furthest & STEP_END != STEP_END
            seen = Seen(*states[rank.number], arrival, is_late)
            wrong = rank.watch.judge(seen, self._pace.seconds, now)
            if wrong is not None:
                self._lose(rank.name(wrong))
