"""A server whose ranks live in a Ray cluster of two nodes: answers, and the loss of a node."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from local_ray import LocalCluster, local_cluster
from one_answer import answer, per_replica
from server_process import ServerProcess, running_server

FLAGS = (
    "--distributed-executor-backend", "ray", "--max-model-len", "1024", "--max-num-seqs", "8",
    "--num-gpu-blocks-override", "160",
)  # fmt: skip


def actors() -> set[int]:
    """Processes that hold a rank, wherever they run."""
    return {
        p.pid for p in psutil.process_iter(["cmdline"]) if "RankActor" in str(p.info["cmdline"])
    }


def wait(ready: Callable[[], bool], seconds: float) -> float:
    started = time.monotonic()
    while not ready():
        assert time.monotonic() - started < seconds
        time.sleep(0.1)
    return time.monotonic() - started


def health(server: ServerProcess) -> int:
    return httpx.get(f"{server.url}/health", timeout=10).status_code


@pytest.mark.timeout(600)
@pytest.mark.parametrize("split", ["--tensor-parallel-size", "--data-parallel-size"])
def test_serve_answer_lose_a_node_and_recover(
    tmp_path: Path, server: ServerProcess, split: str
) -> None:
    with local_cluster(nodes=2) as cluster:
        env = {"RAY_ADDRESS": cluster.address, "FD_LITE_DEVICE": "cpu"}
        flags = (*FLAGS, split, "2", "--restart-engine")
        with running_server(tmp_path / "s", flags, env=env) as remote:
            expected = answer(server)
            assert answer(remote) == expected
            first = actors()
            assert len(first) == 2
            is_split = split == "--tensor-parallel-size"
            lose_a_node(remote, cluster, is_split)
            cluster.add()
            wait(lambda: health(remote) == 200 and up(remote, is_split), 120)
            assert answer(remote) == expected
            remote.terminate()
            assert remote.wait(30) == 0
        wait(lambda: not actors(), 10)


def lose_a_node(remote: ServerProcess, cluster: LocalCluster, is_split: bool) -> None:
    """A model that is split fails as a whole, one of two replicas leaves the other at work."""
    cluster.lose(cluster.nodes[0])
    if is_split:
        assert wait(lambda: health(remote) != 200, 10) < 10
    else:
        assert wait(lambda: not up(remote, is_split), 10) < 10
        assert health(remote) == 200
        assert answer(remote)[0] == 200
    wait(lambda: "rank " in remote.stderr and "Waiting up to" in remote.stderr, 60)
    assert "Traceback" not in remote.stderr


def up(remote: ServerProcess, is_split: bool) -> bool:
    return is_split or all(per_replica(remote, "replica_up").values())
