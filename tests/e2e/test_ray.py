"""A server whose ranks live in a Ray cluster of two nodes: answers, and the loss of a node."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from local_ray import LocalCluster, local_cluster
from one_answer import answer, per_replica
from server_process import SMALL, ServerProcess, running_server, wait_until

FLAGS = ("--distributed-executor-backend", "ray", *SMALL)


def actors() -> set[int]:
    """Processes that hold a rank, wherever they run."""
    return {
        p.pid for p in psutil.process_iter(["cmdline"]) if "RankActor" in str(p.info["cmdline"])
    }


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
            wait_until(lambda: remote.health() == 200 and up(remote, is_split), 120)
            assert answer(remote) == expected
            remote.terminate()
            assert remote.wait(30) == 0
        wait_until(lambda: not actors(), 10)


@pytest.mark.timeout(300)
def test_whoever_is_killed_leaves_no_actor_and_no_room_taken(
    tmp_path: Path, server: ServerProcess
) -> None:
    """The second engine finds the room of the first; the cluster is somebody else's and stays."""
    with local_cluster(nodes=2) as cluster:
        env = {"RAY_ADDRESS": cluster.address, "FD_LITE_DEVICE": "cpu"}
        flags = (*FLAGS, "--tensor-parallel-size", "2", "--restart-engine")
        with running_server(tmp_path / "s", flags, env=env) as remote:
            expected = answer(server)
            assert answer(remote) == expected
            first = actors()
            (engine,) = [p for p in remote.family() if "core_process" in str(p.cmdline())]
            engine.kill()
            wait_until(lambda: not first & actors(), 10)
            wait_until(lambda: remote.health() == 200, 120)
            assert answer(remote) == expected
            assert len(actors()) == 2
            family = remote.family()
            remote.process.kill()
            remote.wait(10)
            wait_until(lambda: not any(process.is_running() for process in family), 10)
            wait_until(lambda: not actors(), 10)


def lose_a_node(remote: ServerProcess, cluster: LocalCluster, is_split: bool) -> None:
    """A model that is split fails as a whole, one of two replicas leaves the other at work."""
    cluster.lose(cluster.nodes[0])
    if is_split:
        assert wait_until(lambda: remote.health() != 200, 10) < 10
    else:
        assert wait_until(lambda: not up(remote, is_split), 10) < 10
        assert remote.health() == 200
        assert answer(remote)[0] == 200
    wait_until(lambda: "rank " in remote.stderr and "Waiting up to" in remote.stderr, 60)
    assert "Traceback" not in remote.stderr


def up(remote: ServerProcess, is_split: bool) -> bool:
    return is_split or all(per_replica(remote, "replica_up").values())
