"""Tells a rank that hangs from one that is slow."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from fastdeploy_lite.utils.processes import STOPPED_SECONDS

IDLE_SECONDS = 4.0  # a rank that sleeps for so long while others wait for it hangs
BUSY_SECONDS = 8.0
SLOWER = 4  # times as long as the fastest a rank may take: parts differ by a third at most
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Seen:
    """What is seen of a rank from outside.

    Attributes:
        state, ticks: of its process, see `state_of`.
        arrival: see `Communicator.arrivals`.
        is_late: whether another rank is ahead of it.
    """

    state: str
    ticks: int
    arrival: int
    is_late: bool


class Pace:
    """How long the fastest rank took from one place where ranks wait to the next.

    Attributes:
        seconds: the last time, not below what the watch can tell apart.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._furthest = 0
        self._began = time.monotonic()

    def begins(self, now: float) -> None:
        """A message has been sent: what was before was waiting for it."""
        self._began = now

    def saw(self, furthest: int, now: float) -> None:
        """The furthest rank has come so far."""
        if furthest != self._furthest:
            self.seconds = now - self._began
            self._furthest, self._began = furthest, now


class RankWatch:
    """What was seen of one rank before."""

    def __init__(self) -> None:
        self._stopped_since: float | None = None
        self._last = Seen("", -1, -1, False)
        self._busy_at = 0.0
        self._late_since = 0.0
        self._late_ticks = 0

    def judge(self, seen: Seen, pace: float, now: float) -> str | None:
        """Return why the rank is lost, None while it is not.

        Args:
            seen: the rank as it is.
            pace: seconds that the fastest rank took for the same piece.
            now: time of `time.monotonic`.
        """
        if seen.state != "T":
            self._stopped_since = None
        elif self._stopped_since is None:
            self._stopped_since = now
        elif now - self._stopped_since > STOPPED_SECONDS:
            return "is stopped (SIGSTOP)"
        if not seen.is_late or seen.arrival != self._last.arrival:
            self._late_since, self._late_ticks = now, seen.ticks
            self._busy_at = now
        if seen.state == "R" or seen.ticks != self._last.ticks:  # at least short of a processor
            self._busy_at = now
        self._last = seen
        if now - self._busy_at > IDLE_SECONDS:
            return f"has slept for {IDLE_SECONDS:g} s inside a step"
        used = (seen.ticks - self._late_ticks) / TICKS_A_SECOND
        waited, allowed = now - self._late_since, max(BUSY_SECONDS, SLOWER * pace)
        # A process that others crowd off the processors is slow, not lost.
        if waited > allowed and used > allowed / 2:
            return f"has been busy for {waited:.0f} s with what another rank did in {pace:.1f} s"
        return None
