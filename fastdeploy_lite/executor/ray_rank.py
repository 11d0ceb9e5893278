"""One rank of a model as a Ray actor; `executor.ray_actors` places it."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar

from fastdeploy_lite import _ops_cpu, device, plugins
from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.distributed.communicator import Communicator, PeerLostError
from fastdeploy_lite.distributed.group import join
from fastdeploy_lite.distributed.network import NetworkCommunicator
from fastdeploy_lite.executor.base import ExecutorReport
from fastdeploy_lite.executor.inline import report_of
from fastdeploy_lite.executor.part import compute_part
from fastdeploy_lite.executor.remote_slices import Parcel, SliceKeeper
from fastdeploy_lite.executor.verdict import describe
from fastdeploy_lite.request.step import SliceResult
from fastdeploy_lite.utils.errors import ConfigError, FastDeployError
from fastdeploy_lite.utils.logging import write_console
from fastdeploy_lite.utils.processes import state_of
from fastdeploy_lite.worker.model_runner import ModelRunner

DISTRIBUTION = "fastdeploy-lite"
T = TypeVar("T")


@dataclass(frozen=True)
class Greeting:
    """Where a rank is.

    Attributes:
        node, pid: host and process.
        version: of this package there.
        address: where its communicator listens, "" for a lone rank.
    """

    node: str
    pid: int
    version: str
    address: str


@dataclass(frozen=True)
class Pulse:
    """That a rank lives: what `watch.Seen` needs, without what only the others know."""

    state: str
    ticks: int
    arrival: int


@dataclass(frozen=True)
class Refusal:
    """Why a rank cannot go on. `is_users`: the fault is the user's, the text says what to do."""

    reason: str
    is_users: bool = False


@dataclass(frozen=True)
class StepReply:
    """How a step ended on a rank.

    Attributes:
        results: of the rank that samples, where the step was sound on all ranks.
        sound: whether it was.
        reason: what failed here.
        lost: that another rank is gone, in words.
    """

    results: list[SliceResult] | None = None
    sound: bool = True
    reason: str = ""
    lost: str = ""


class RankActor:
    """A rank; Ray calls its methods one after another, and `pulse` at any time.

    Args:
        config: of this rank.
        group: 16 bytes that name the ranks' group.
        threads: of ops.
        on_cards: whether Ray has given each rank a card.
    """

    def __init__(self, config: RuntimeConfig, group: bytes, threads: int, on_cards: bool) -> None:
        import ray  # noqa: PLC0415 - it is there: this is one of its actors

        self._config = config
        self._group = group
        self._threads = threads
        self._on_cards = on_cards
        self._ranks: NetworkCommunicator | None = None
        self._communicator: Communicator | None = None
        self._keeper = SliceKeeper(config.parallel.rank == 0, ray.cloudpickle.loads)
        self._thread: int | None = None

    def greet(self) -> Greeting:
        """Say where this rank is, and begin to listen to the others."""
        import ray  # noqa: PLC0415 - it is there: this is one of its actors

        node: str = ray.util.get_node_ip_address()
        parallel = self._config.parallel
        address = ""
        if parallel.tensor_parallel_size > 1:
            ranks = NetworkCommunicator(
                parallel.rank, parallel.tensor_parallel_size, node, self._group
            )
            self._ranks, address = ranks, ranks.address
        return Greeting(node, os.getpid(), version(DISTRIBUTION), address)

    def pulse(self) -> Pulse:
        """Say that this process lives, and how far it is."""
        state, ticks = state_of(os.getpid(), self._thread)
        rank = self._config.parallel.rank
        arrival = 0 if self._ranks is None else self._ranks.arrivals()[rank]
        return Pulse(state, ticks, arrival)

    def load(self, addresses: Sequence[str]) -> Refusal | None:
        """Meet the other ranks and load this one's part of the model."""
        return self._guarded(lambda: self._load(addresses))

    def _load(self, addresses: Sequence[str]) -> None:
        self._thread = threading.get_native_id()  # of the one thread that computes
        found = device.decide()
        if found.is_cuda != self._on_cards:
            here = ("a processor", "a card")[found.is_cuda]
            raise ConfigError(
                f"this rank would compute on {here}, unlike what the cluster promised:"
                f" {found.reason}; set {device.DEVICE_VARIABLE}=cpu to use no cards"
            )
        plugins.load_plugins(plugins.MODELS)
        _ops_cpu.set_num_threads(self._threads)
        if self._ranks is not None:
            self._ranks.connect(addresses)
            self._communicator = join(self._ranks, self._on_cards)
        self._runner = ModelRunner(self._config, self._communicator)
        self._runner.load_model()

    def count_blocks(self) -> int | Refusal:
        """Say how many KV blocks there is room for, now that all ranks have loaded."""
        return self._guarded(self._runner.profile_num_blocks)

    def allocate(self, num_blocks: int) -> Refusal | None:
        """Allocate the KV cache."""
        return self._guarded(lambda: self._runner.allocate_kv_cache(num_blocks))

    def report(self) -> ExecutorReport:
        """Say what is held."""
        return report_of(self._runner)

    def execute(self, parcel: Parcel) -> StepReply:
        """Compute this rank's part of a step."""
        try:
            return self._execute(parcel)
        except PeerLostError as error:
            return StepReply(sound=False, lost=str(error))

    def _execute(self, parcel: Parcel) -> StepReply:
        def work() -> list[SliceResult]:
            return self._runner.execute(self._keeper.unpack(parcel))

        results, failure = compute_part(self._communicator, work)
        if failure is not None:
            write_console("".join(traceback.format_exception(failure)))
        sound = results is not None
        if self._communicator is not None:
            sound = self._communicator.agree(sound)
        if not sound:
            return StepReply(sound=False, reason="" if failure is None else describe(failure))
        return StepReply(results if self._config.parallel.rank == 0 else None)

    def _guarded(self, work: Callable[[], T]) -> T | Refusal:
        try:
            return work()
        except FastDeployError as error:
            return Refusal(str(error), is_users=True)
        except PeerLostError as error:
            return Refusal(str(error))
        except BaseException as error:  # also MemoryError: the engine must hear the reason
            write_console(traceback.format_exc())
            return Refusal(describe(error))
