"""Every rank of a model as an actor in a Ray cluster, on whichever nodes have room."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from fastdeploy_lite import envs
from fastdeploy_lite.checkpoint.linears import check_tensor_parallel
from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.distributed.network import GROUP_BYTES
from fastdeploy_lite.executor import ray_cluster
from fastdeploy_lite.executor.base import Executor, ExecutorReport, RankError
from fastdeploy_lite.executor.ray_actors import RankActors
from fastdeploy_lite.executor.ray_cluster import Demand
from fastdeploy_lite.executor.ray_rank import DISTRIBUTION, Greeting, StepReply
from fastdeploy_lite.executor.remote_slices import SliceSender
from fastdeploy_lite.request.step import SequenceSlice, SliceResult
from fastdeploy_lite.utils.errors import ConfigError
from fastdeploy_lite.utils.logging import get_logger

console = get_logger("console")


class RayExecutor(Executor):
    """Runs a model over actors; this process computes nothing itself."""

    def __init__(self, config: RuntimeConfig, on_loss: Callable[[str], None] | None = None) -> None:
        """Join the cluster; nothing is started yet.

        Args:
            config: of the model.
            on_loss: see RankSupervisor.

        Raises:
            ConfigError: the model cannot be had at this size, or there is no cluster.
        """
        check_tensor_parallel(config.model, config.parallel.tensor_parallel_size)
        self.config = config
        self._ray = ray_cluster.import_ray()
        self._joined = ray_cluster.connect(self._ray)
        self._on_loss = on_loss
        self._sender = SliceSender(self._ray.cloudpickle.dumps)
        self._place: Any = None
        self._ranks: RankActors | None = None
        self._loads: list[ExecutorReport] = []

    @property
    def ranks(self) -> list[Greeting]:
        """Where the ranks are."""
        return [] if self._ranks is None else self._ranks.greetings

    def load(self, show_progress: bool = False) -> int:
        """See Executor; the cluster has some time to make room. Ranks draw no bars."""
        try:
            return self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> int:
        parallel = self.config.parallel
        wanted = ray_cluster.demand(
            ray_cluster.alive(self._ray),
            parallel.tensor_parallel_size,
            parallel.data_parallel_size,
        )
        self._place = ray_cluster.place(self._ray, wanted, envs.FD_LITE_RAY_WAIT_SECONDS)
        self._ranks = ranks = RankActors(
            self._ray, self._place, wanted, self._arguments(wanted), self._on_loss
        )
        greetings = ranks.greet()
        _check_versions(greetings)
        nodes = Counter(greeting.node for greeting in greetings)
        console.info(
            "Ranks on the nodes of the Ray cluster: %s",
            ", ".join(f"{count} on {node}" for node, count in nodes.items()),
        )
        ranks.ask("load", [greeting.address for greeting in greetings])
        num_blocks: int = min(ranks.ask("count_blocks"))
        ranks.ask("allocate", num_blocks)
        self._loads = ranks.ask("report")
        return num_blocks

    def _arguments(self, wanted: Demand) -> list[tuple[Any, ...]]:
        group, parallel = secrets.token_bytes(GROUP_BYTES), self.config.parallel
        configs = [
            replace(self.config, parallel=replace(parallel, rank=rank))
            for rank in range(parallel.tensor_parallel_size)
        ]
        return [(config, group, wanted.threads, wanted.on_cards) for config in configs]

    def execute(self, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        """See Executor."""
        ranks = self._ranks
        assert ranks is not None
        parcel = self._sender.pack(slices)
        replies: list[StepReply] = ranks.ask("execute", parcel)
        for reply in replies:
            if reply.lost:
                ranks.give_up(reply.lost)
        results = replies[0].results
        if results is None:
            raise _verdict(replies)
        return results

    def report(self) -> ExecutorReport:
        """See Executor."""
        memory: Counter[str] = Counter()
        for each in self._loads:
            memory.update(each.memory)
        slowest = max(each.load_seconds for each in self._loads)
        return replace(self._loads[0], memory=dict(memory), load_seconds=slowest)

    def check(self) -> None:
        """See Executor."""
        if self._ranks is not None:
            self._ranks.check()

    def close(self) -> None:
        """See Executor."""
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None
        if self._place is not None:
            ray_cluster.remove(self._ray, self._place)
            self._place = None
        if self._joined:
            self._ray.shutdown()
            self._joined = False


def _verdict(replies: Sequence[StepReply]) -> Exception:
    """What a step failed of, from all ranks together."""
    for number, reply in enumerate(replies):
        if reply.reason:
            return RankError(f"rank {number}: {reply.reason}")
    return RankError("a rank failed without a reason")


def _check_versions(greetings: Sequence[Greeting]) -> None:
    own = version(DISTRIBUTION)
    for greeting in greetings:
        if greeting.version != own:
            raise ConfigError(
                f"{DISTRIBUTION} is {own} here and {greeting.version} on {greeting.node}:"
                " install one version on all nodes"
            )
