"""The ranks of one model as actors in a Ray cluster: their birth, their words, and their end.

One thread asks every rank for its pulse. A rank that is gone, silent or stuck ends all of them: the
first reason is kept and no actor is left. Ray ends them, too, when this process ends in any way.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from fastdeploy_lite.executor.ray_cluster import LOOK_SECONDS, Demand, rank_environment
from fastdeploy_lite.executor.ray_rank import Greeting, Pulse, RankActor, Refusal
from fastdeploy_lite.executor.supervisor import RankSupervisor, WatchedRank
from fastdeploy_lite.executor.watch import RankWatch
from fastdeploy_lite.utils.errors import one_line

PULSE_SECONDS = 0.5
STALE_SECONDS = 2.0  # what was seen before so long a silence is not held against a rank
SILENT_SECONDS = 6.0  # a lost host sends no word; a busy one answers from a thread of its own
WATCH_GROUP = "watch"


class _Rank(WatchedRank):
    """One actor and what is known of it."""

    def __init__(self, number: int, actor: Any) -> None:
        super().__init__(number)
        self.actor = actor
        self.greeting: Greeting | None = None
        self.pulse: Pulse | None = None
        self.asked: Any = None
        self.asked_at = 0.0

    def name(self, text: str) -> str:
        """See WatchedRank."""
        where = self.greeting
        place = "" if where is None else f" (process {where.pid} on {where.node})"
        return f"rank {self.number}{place}: {text}"


class RankActors(RankSupervisor):
    """All ranks of a model.

    Args:
        ray: the module, connected.
        group: placement group with a bundle for each rank.
        wanted: what each bundle holds.
        arguments: of each rank's `RankActor`.
        on_loss: see RankSupervisor.
    """

    def __init__(
        self,
        ray: Any,
        group: Any,
        wanted: Demand,
        arguments: Sequence[tuple[Any, ...]],
        on_loss: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(SILENT_SECONDS, on_loss, first_lingers=not wanted.on_cards)
        self._ray = ray
        self._closing = threading.Event()
        self._ranks = [
            _Rank(number, self._create(group, number, wanted, each))
            for number, each in enumerate(arguments)
        ]
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._thread.start()

    def _create(self, group: Any, bundle: int, wanted: Demand, arguments: tuple[Any, ...]) -> Any:
        from ray.util.scheduling_strategies import (  # noqa: PLC0415 - an extra
            PlacementGroupSchedulingStrategy,
        )

        kind = self._ray.remote(concurrency_groups={WATCH_GROUP: 1})(RankActor)
        options = kind.options(
            num_cpus=wanted.each["CPU"],
            num_gpus=wanted.each.get("GPU", 0),
            max_restarts=0,  # its peers wait for what it knew: all are started again, or none
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=bundle
            ),
            runtime_env={"env_vars": rank_environment()},
        )
        return options.remote(*arguments)

    @property
    def greetings(self) -> list[Greeting]:
        """Where the ranks are, after `greet`."""
        return [rank.greeting for rank in self._ranks if rank.greeting is not None]

    def greet(self) -> list[Greeting]:
        """Wait until all ranks are there; raises as `check`."""
        for rank, greeting in zip(self._ranks, self.ask("greet"), strict=True):
            rank.greeting = greeting
        return self.greetings

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every rank and return their answers, in order.

        Raises:
            FastDeployError: a rank refuses, and the fault is the user's.
            ExecutorDeadError: a rank refuses, or is lost.
        """
        self.check()
        self._pace.begins(time.monotonic())
        calls = [getattr(rank.actor, method).remote(*arguments) for rank in self._ranks]
        pending = list(calls)
        while pending:
            done, pending = self._ray.wait(pending, timeout=LOOK_SECONDS)
            for call in done:
                self._examine(self._ranks[calls.index(call)], call)
            self.check()
        return list(self._ray.get(calls))

    def _examine(self, rank: _Rank, call: Any) -> None:
        """Take note of an answer that is the end of all."""
        try:
            found = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            self._lose(rank.name(_why_gone(error)))
            return
        if isinstance(found, Refusal):
            self._lose(rank.name(found.reason), found.is_users)

    def close(self) -> None:
        """End all actors; idempotent."""
        self._closing.set()
        self._thread.join()
        self._end()

    # The watch ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closing.wait(PULSE_SECONDS) and self._ending.reason is None:
            self.look()

    def look(self) -> None:
        """Take the pulses that have come, and judge by them; the watch does so on its own."""
        fresh = [rank for rank in self._ranks if rank.greeting is not None and self._feel(rank)]
        self._judge_by_pulses(fresh)

    def _feel(self, rank: _Rank) -> bool:
        """Take a rank's pulse if it has come, and ask for the next one; True where it has come."""
        now = time.monotonic()
        if rank.asked is not None:
            done, _ = self._ray.wait([rank.asked], timeout=0)
            if not done:
                if now - rank.asked_at > SILENT_SECONDS:
                    text = f"has not answered for {SILENT_SECONDS:g} s: is its node there?"
                    self._lose(rank.name(text))
                return False
            try:
                rank.pulse = self._ray.get(rank.asked)
            except self._ray.exceptions.RayError as error:
                self._lose(rank.name(_why_gone(error)))
                return False
            if now - rank.asked_at > STALE_SECONDS:
                rank.watch = RankWatch()  # it may have been stopped: that is not sleep
        is_fresh = rank.asked is not None
        rank.asked = rank.actor.pulse.options(concurrency_group=WATCH_GROUP).remote()
        rank.asked_at = now
        return is_fresh

    def _judge_by_pulses(self, fresh: Sequence[_Rank]) -> None:
        """Judge ranks whose pulse has come since the last look.

        How far a rank was stays true of the one that others wait for, but what it was doing then
        says nothing of now: a rank that is stopped says no more, and would look as if it slept.
        """
        arrivals = {rank.number: rank.pulse.arrival for rank in self._ranks if rank.pulse}
        states = {rank.number: (rank.pulse.state, rank.pulse.ticks) for rank in fresh if rank.pulse}
        self._judge(fresh, arrivals, states)

    def _lose(self, reason: str, is_users: bool = False) -> None:
        if self._ending.tell(one_line(reason), is_users):
            self._end()  # whoever waits for the lost one would wait long

    def _end(self) -> None:
        if not self._ray.is_initialized():
            return
        for rank in self._ranks:
            with suppress(Exception):  # it may be gone
                self._ray.kill(rank.actor, no_restart=True)


def _why_gone(error: Exception) -> str:
    """What Ray knows of the end of an actor, in a few words."""
    cause = getattr(error, "cause", None)
    if cause is not None:  # raised by the actor's own code
        return f"{type(cause).__name__}: {cause}"
    if type(error).__name__ == "ActorUnavailableError":  # Ray will know more in half a minute
        return "cannot be reached: its process or its node is gone"
    known = re.search(r"The actor (?:is dead|died) because ([^.\n]+)", str(error))
    return f"is gone: {known[1]}" if known else f"is gone: {type(error).__name__}: {error}"
