"""A server whose ranks live in a Ray cluster of two nodes: answers, and the loss of a node."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from local_ray import LocalCluster, local_cluster
from machine import promised
from one_answer import answer, per_replica
from server_process import SMALL, ServerProcess, running_server
from waiting import PATIENCE, until

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
            until(lambda: remote.health() == 200 and up(remote, is_split), 2 * PATIENCE)
            assert answer(remote) == expected
            remote.terminate()
            assert remote.wait() == 0
        until(lambda: not actors())


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
            (engine,) = remote.processes("core_process")
            engine.kill()
            until(lambda: remote.health() != 200)  # the server hears of it as soon as Ray, or later
            until(lambda: not first & actors())
            until(lambda: remote.health() == 200, 2 * PATIENCE)
            assert answer(remote) == expected
            assert len(actors()) == 2
            family = remote.family()
            remote.process.kill()
            remote.wait()
            assert not psutil.wait_procs(family, PATIENCE)[1]
            until(lambda: not actors())


def lose_a_node(remote: ServerProcess, cluster: LocalCluster, is_split: bool) -> None:
    """A model that is split fails as a whole, one of two replicas leaves the other at work."""
    cluster.lose(cluster.nodes[0])
    with promised(10):
        until(lambda: remote.health() != 200 if is_split else not up(remote, is_split))
    if not is_split:
        assert remote.health() == 200
        assert answer(remote)[0] == 200
    until(lambda: "rank " in remote.stderr and "Waiting up to" in remote.stderr)
    assert "Traceback" not in remote.stderr


def up(remote: ServerProcess, is_split: bool) -> bool:
    return is_split or all(per_replica(remote, "replica_up").values())
