"""A Ray cluster of several nodes on this machine, as Ray's own tests have it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Ray reads it while it is imported: every node, driver and actor then stays on the loopback device.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
NODE = {"object_store_memory": 80 << 20}
SYSTEM = {
    "worker_niceness": 0,  # by default 15: beside other tests actors would hardly ever run
    # How soon the head gives up a node that is gone; by default after half a minute.
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}


class LocalCluster:
    """A head without processors, and nodes with one each."""

    def __init__(self) -> None:
        pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SYSTEM, **NODE}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []

    @property
    def address(self) -> str:
        """What `RAY_ADDRESS` is to be."""
        return str(self._cluster.address)

    def add(self, **resources: float) -> Any:
        """Add a node, with one processor unless told otherwise."""
        node = self._cluster.add_node(**{"num_cpus": 1, **NODE, **resources})
        self.nodes.append(node)
        return node

    def lose(self, node: Any) -> None:
        """Kill everything that runs on a node at once."""
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


@contextlib.contextmanager
def local_cluster(nodes: int) -> Iterator[LocalCluster]:
    """A cluster with so many nodes beside its head."""
    cluster = LocalCluster()
    try:
        for _ in range(nodes):
            cluster.add()
        yield cluster
    finally:
        cluster.close()
