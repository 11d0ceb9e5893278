"""Several engine processes behind one client: replicas of a model, each with all of its weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from itertools import zip_longest
from typing import Any, Literal, cast

import msgspec

from fastdeploy_lite import _ops_cpu, device, envs
from fastdeploy_lite.engine.args_utils import EngineArgs
from fastdeploy_lite.engine.engine_client import AsyncEngineClient, EngineClient
from fastdeploy_lite.engine.engine_core import EngineDeadError
from fastdeploy_lite.engine.routing import PrefixRouter
from fastdeploy_lite.request.messages import (
    DraftCounts,
    EngineOutput,
    EngineRequest,
    EngineStats,
    Ready,
)
from fastdeploy_lite.utils.errors import ConfigError, FastDeployError, RequestError
from fastdeploy_lite.utils.logging import get_logger

console = get_logger("console")
THREADS_VARIABLE = "FD_LITE_NUM_THREADS"
_NOW = ("time", "num_running", "num_waiting", "num_preempted", "num_blocks", "num_free_blocks",
        "num_cached_blocks", "last_batch_size", "paused")  # fmt: skip


def create_client(args: EngineArgs, *, restart: bool = False) -> EngineClient:
    """Return the client for as many replicas as `args` ask for.

    Args:
        args: Of each engine.
        restart: Whether one of several replicas that dies is started again. A lone one is its
            owner's to start again.

    Raises:
        ConfigError: There are not enough cards.
    """
    if args.data_parallel_size == 1:
        return AsyncEngineClient(args)
    return ReplicatedEngineClient(args, restart=restart)


class _Replica:
    """One engine and the totals of those that were in its place before.

    Attributes:
        client: The engine.
        past: Totals of the dead ones.
        is_starting: Whether one that died is being started again.
    """

    def __init__(self, make: Callable[[], AsyncEngineClient]) -> None:
        self._make = make
        self.client = make()
        self.past = EngineStats()
        self.is_starting = False

    @property
    def is_healthy(self) -> bool:
        return self.client.is_healthy and not self.is_starting

    @property
    def stats(self) -> EngineStats:
        """Totals since the first start; a dead one has nothing now."""
        total = add_stats([self.past, self.client.stats])
        return total if self.is_healthy else _only_totals(total)

    async def renew(self) -> None:
        """Start another engine in place of the dead one. Raises as AsyncEngineClient.start."""
        self.is_starting = True
        old, self.past = self.client, _only_totals(self.stats)
        self.client = self._make()
        await old.shutdown()
        await self.client.start()
        self.is_starting = False


class ReplicatedEngineClient:
    """Replicas, used from one event loop as one engine; an EngineClient.

    A request is computed by one of them. One that dies ends its own requests with an error; the
    others go on. The whole is dead when none is left.

    Args:
        args: Of each engine.
        restart: Whether one that dies is started again.
    """

    def __init__(self, args: EngineArgs, *, restart: bool = False) -> None:
        places = _places(args)
        self._replicas = [
            _Replica(lambda place=place: AsyncEngineClient(args, place))  # type: ignore[misc]
            for place in places
        ]
        slack = max(4, (args.max_num_seqs or 0) // 4)
        self._router = PrefixRouter(len(places), slack)
        self._restart = restart
        self._owners: dict[str, _Replica] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._dead: str | None = None
        self._death = asyncio.Event()

    # Life ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """See EngineClient; all replicas load at the same time, and all must."""
        starts = [asyncio.ensure_future(r.client.start()) for r in self._replicas]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.shutdown()
            raise
        for number, replica in enumerate(self._replicas):
            self._make_room(number, replica)
        self._tasks = [
            asyncio.create_task(self._watch(number)) for number in range(len(self._replicas))
        ]

    async def shutdown(self) -> None:
        """See EngineClient."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await asyncio.gather(*(replica.client.shutdown() for replica in self._replicas))
        self._end("the engine was shut down")

    @property
    def is_healthy(self) -> bool:
        """Whether a replica is healthy."""
        return any(replica.is_healthy for replica in self._replicas)

    @property
    def replicas_healthy(self) -> list[bool]:
        """See EngineClient."""
        return [replica.is_healthy for replica in self._replicas]

    @property
    def ready(self) -> Ready | None:
        """What the first replica said; they are alike."""
        return self._replicas[0].client.ready

    @property
    def stats(self) -> EngineStats:
        """Of all replicas together."""
        return add_stats([replica.stats for replica in self._replicas])

    @property
    def replica_stats(self) -> list[EngineStats]:
        """See EngineClient."""
        return [replica.stats for replica in self._replicas]

    @property
    def engine_pids(self) -> list[int | None]:
        """See EngineClient."""
        return [replica.client.engine_pids[0] for replica in self._replicas]

    @property
    def num_unfinished(self) -> int:
        """See EngineClient."""
        return sum(replica.client.num_unfinished for replica in self._replicas)

    async def wait_dead(self) -> str:
        """See EngineClient."""
        await self._death.wait()
        return self._dead or ""

    async def _watch(self, number: int) -> None:
        """Say that a replica died, and start another in its place if that is wanted."""
        replica = self._replicas[number]
        while True:
            reason = await replica.client.wait_dead()
            console.error("Replica %d is dead: %s", number, reason)
            if not self._restart:
                break
            try:
                await replica.renew()
            except (FastDeployError, RuntimeError, OSError) as error:
                reason = f"replica {number} cannot be restarted: {error}"
                console.error("%s", reason)
                break
            self._make_room(number, replica)
            console.warning("Replica %d is back", number)
        replica.is_starting = False
        if not any(r.is_starting or r.client.is_healthy for r in self._replicas):
            self._end(reason)

    def _make_room(self, number: int, replica: _Replica) -> None:
        ready = replica.client.ready
        self._router.resize(number, 0 if ready is None else ready.num_blocks)

    def _end(self, reason: str) -> None:
        self._dead = self._dead or reason
        self._death.set()

    # Requests ------------------------------------------------------------------------------------

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """See EngineClient."""
        name = request.request_id
        if name in self._owners:
            raise RequestError(
                f"request_id {name!r} is in use", param="request_id", code="invalid_value"
            )
        replica = self._choose(request)
        self._owners[name] = replica
        try:
            async with aclosing(cast("Any", replica.client.generate(request))) as stream:
                async for output in stream:
                    yield output
        finally:
            del self._owners[name]

    def _choose(self, request: EngineRequest) -> _Replica:
        loads = [r.client.num_unfinished if r.is_healthy else None for r in self._replicas]
        if all(load is None for load in loads):
            raise EngineDeadError(self._dead or "no replica is running")
        return self._replicas[self._router.choose(request.prompt_token_ids, loads)]

    async def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """See EngineClient."""
        names = None if request_ids is None else list(request_ids)
        for replica in self._able():
            await replica.client.abort(names)

    async def control(self, action: Literal["pause", "resume", "reset"]) -> None:
        """See EngineClient; each replica does it."""
        await asyncio.gather(*(replica.client.control(action) for replica in self._able()))

    async def check(self) -> str | None:
        """See EngineClient; the first replica whose books are wrong speaks."""
        found = await asyncio.gather(*(replica.client.check() for replica in self._able()))
        return next((error for error in found if error is not None), None)

    def _able(self) -> list[_Replica]:
        able = [replica for replica in self._replicas if replica.is_healthy]
        if not able:
            raise EngineDeadError(self._dead or "no replica is running")
        return able


def add_stats(parts: Sequence[EngineStats]) -> EngineStats:
    """Counters of all `parts` together; the newest time; paused where one is."""
    total: dict[str, Any] = {}
    for field in msgspec.structs.fields(EngineStats):
        values = [getattr(part, field.name) for part in parts]
        total[field.name] = sum(values) if field.name not in ("time", "drafts") else None
    total["time"] = max(part.time for part in parts)
    total["paused"] = any(part.paused for part in parts)
    drafts = [part.drafts for part in parts if part.drafts is not None]
    if drafts:
        total["drafts"] = _add_drafts(drafts)
    return EngineStats(**total)


def _only_totals(stats: EngineStats) -> EngineStats:
    nothing = EngineStats()
    return msgspec.structs.replace(stats, **{name: getattr(nothing, name) for name in _NOW})


def _add_drafts(parts: Sequence[DraftCounts]) -> DraftCounts:
    total: dict[str, Any] = {}
    for field in msgspec.structs.fields(DraftCounts):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], list):
            total[field.name] = [sum(places) for places in zip_longest(*values, fillvalue=0)]
        else:
            total[field.name] = sum(values)
    return DraftCounts(**total)


def _places(args: EngineArgs) -> list[Mapping[str, str]]:
    """Environment variables of each replica: its cards, or its part of the processors."""
    count, ranks = args.data_parallel_size, args.tensor_parallel_size
    if args.distributed_executor_backend == "ray":
        return [{}] * count  # the cluster gives out its own
    if not device.decide().is_cuda:
        threads = max(1, _ops_cpu.num_threads() // (count * ranks))
        return [{} if envs.FD_LITE_NUM_THREADS else {THREADS_VARIABLE: str(threads)}] * count
    cards = device.visible_cards()
    if len(cards) < count * ranks:
        raise ConfigError(
            f"data_parallel_size {count} with tensor_parallel_size {ranks} takes"
            f" {count * ranks} cards and {len(cards)} can be seen: lower one of the two"
        )
    parts = [cards[i * ranks : (i + 1) * ranks] for i in range(count)]
    return [{device.CARDS_VARIABLE: ",".join(part)} for part in parts]
