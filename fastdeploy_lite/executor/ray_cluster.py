"""Room for ranks in a Ray cluster that somebody else runs."""

from __future__ import annotations

import os
import socket
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastdeploy_lite import device, envs
from fastdeploy_lite.utils.errors import ConfigError, one_line, quote
from fastdeploy_lite.utils.logging import get_logger

ADDRESS_VARIABLE = "RAY_ADDRESS"
LOOK_SECONDS = 0.25
CONNECT_SECONDS = 5.0
SILENT_SECONDS = 2.0  # a wait that is not worth a line
_NOT_FOR_RANKS = ("FD_API_KEY", "FD_LOG_DIR")  # a secret, and a folder of this host
console = get_logger("console")
Resources = dict[str, float]


def import_ray() -> Any:
    """Return the module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray  # noqa: PLC0415 - an extra, and seconds to import
    except ImportError as error:
        raise ConfigError(
            "distributed_executor_backend ray: the package ray cannot be imported"
            f" ({error}): pip install 'fastdeploy-lite[ray]', here and on every node"
        ) from None
    return ray


def connect(ray: Any) -> bool:
    """Join the cluster of `RAY_ADDRESS`, else the one of this host.

    Returns:
        Whether this call did it; a program may have done so before.

    Raises:
        ConfigError: there is none.
    """
    if ray.is_initialized():
        return False
    address = os.environ.get(ADDRESS_VARIABLE) or "auto"
    if address == "local" or "://" in address:
        raise ConfigError(
            f"{ADDRESS_VARIABLE} is {quote(address)}, expected HOST:PORT of the head of a Ray"
            " cluster that this host has joined (ray start --address=HOST:PORT)"
        )
    try:
        _check_reachable(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of changes to come in Ray
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray's are of many kinds: another version, no answer, no cluster
        place = "on this host" if address == "auto" else f"at {address}"
        raise ConfigError(
            f"No Ray cluster can be joined {place} ({_first_line(error)}): start one with"
            f" `ray start --head`, or set {ADDRESS_VARIABLE} to HOST:PORT of its head"
        ) from None
    return True


def _check_reachable(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


@dataclass(frozen=True)
class Demand:
    """What the ranks of a model ask for.

    Attributes:
        each: resources of every rank.
        ranks: how many.
        threads: of ops, a rank.
        on_cards: whether each rank has a card.
    """

    each: Resources
    ranks: int
    threads: int
    on_cards: bool

    def __str__(self) -> str:
        return f"{self.ranks} x ({_listed(self.each)})"


def demand(nodes: Iterable[Mapping[str, float]], ranks: int, replicas: int) -> Demand:
    """Return what to ask for: a card a rank where the cluster has cards, else processors.

    Without `FD_LITE_NUM_THREADS` a rank takes as many processors as let all ranks of all replicas
    find room.

    Args:
        nodes: resources of each node.
        ranks: of one replica.
        replicas: of the model.
    """
    nodes = list(nodes)
    wants_cpu = os.environ.get(device.DEVICE_VARIABLE, "").strip().lower() == "cpu"
    if not wants_cpu and any(node.get("GPU", 0) for node in nodes):
        return Demand({"CPU": 1, "GPU": 1}, ranks, envs.FD_LITE_NUM_THREADS or 1, True)
    processors = [int(node.get("CPU", 0)) for node in nodes]
    threads = envs.FD_LITE_NUM_THREADS or _most_threads(processors, ranks * replicas)
    return Demand({"CPU": threads}, ranks, threads, False)


def _most_threads(processors: list[int], ranks: int) -> int:
    """The most processors a rank such that all ranks find as many on one node each; at least 1."""
    for threads in range(max(processors, default=1), 1, -1):
        if sum(count // threads for count in processors) >= ranks:
            return threads
    return 1


def alive(ray: Any) -> list[Resources]:
    """Return the resources of every node that is there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def place(ray: Any, wanted: Demand, seconds: float) -> Any:
    """Wait for a placement group with one bundle a rank, on as few nodes as can be.

    Args:
        ray: the module, connected.
        wanted: by the ranks.
        seconds: to wait for nodes that are busy or still to come.

    Raises:
        ConfigError: there is no room.
    """
    from ray.util.placement_group import placement_group, remove_placement_group  # noqa: PLC0415

    group = placement_group([wanted.each] * wanted.ranks, strategy="PACK")
    started = time.monotonic()
    said = False
    while not group.wait(timeout_seconds=LOOK_SECONDS):
        waited = time.monotonic() - started
        if waited > seconds:
            remove_placement_group(group)
            raise ConfigError(
                f"The Ray cluster has no room within {seconds:g} s: asked for {wanted}, one rank"
                f" on one node; {_what_there_is(ray)}: add nodes, lower"
                " tensor_parallel_size or FD_LITE_NUM_THREADS, or wait longer with"
                " FD_LITE_RAY_WAIT_SECONDS"
            )
        if not said and waited > SILENT_SECONDS:
            said = True
            console.info(
                "Waiting up to %g s for room in the Ray cluster: asked for %s; %s",
                seconds, wanted, _what_there_is(ray),
            )  # fmt: skip
    return group


def remove(ray: Any, group: Any) -> None:
    """Give the room back."""
    from ray.util.placement_group import remove_placement_group  # noqa: PLC0415

    if ray.is_initialized():
        remove_placement_group(group)


def rank_environment() -> dict[str, str]:
    """Return the variables of this process that steer how a rank computes."""
    wanted = [name for name in envs.VARIABLES if name.startswith("FD_")]
    return {
        name: os.environ[name]
        for name in wanted
        if name in os.environ and name not in _NOT_FOR_RANKS
    }


def _what_there_is(ray: Any) -> str:
    nodes = alive(ray)
    free = ray.available_resources()
    named = "; ".join(sorted(_listed(node) or "nothing" for node in nodes))
    return f"{len(nodes)} nodes have ({named}), of which free: {_listed(free) or 'nothing'}"


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources[name]:g} {name}" for name in ("GPU", "CPU") if name in resources)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0] if lines else type(error).__name__)
