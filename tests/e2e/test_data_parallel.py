"""Two replicas behind one port: answers, counters, and the death of one under load."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from one_answer import BODY, CHAT, LONG, answer, per_replica
from server_process import SMALL, ServerProcess, running_server
from waiting import PATIENCE, until

from fastdeploy_lite import LLM
from fastdeploy_lite.utils.errors import ConfigError

FLAGS = ("--data-parallel-size", "2", *SMALL)


def engines(server: ServerProcess) -> list[psutil.Process]:
    return server.processes("core_process")


def post_many(server: ServerProcess, count: int, body: dict[str, Any]) -> list[Any]:
    """Statuses and texts of requests at the same time; fills as they end, join to have all."""
    found: list[Any] = []

    def post() -> None:
        answer = server.post(CHAT, json=body)
        text = answer.json()["choices"][0]["message"]["content"] if answer.is_success else ""
        found.append((answer.status_code, text))

    threads = [threading.Thread(target=post) for _ in range(count)]
    for thread in threads:
        thread.start()
    found.append(threads)
    return found


def join(found: list[Any]) -> list[tuple[int, str]]:
    threads = next(each for each in found if isinstance(each, list))
    for thread in threads:
        thread.join(120)
    return [each for each in found if isinstance(each, tuple)]


@pytest.mark.timeout(240)
def test_answers_counters_and_a_dead_replica(tmp_path: Path, server: ServerProcess) -> None:
    """What one replica leaves behind, the other one does; without restarts for ever."""
    expected = answer(server)
    with running_server(tmp_path / "s", FLAGS) as both:
        assert len(engines(both)) == 2
        assert answer(both) == expected
        short = join(post_many(both, 8, BODY))
        assert {status for status, _ in short} == {200}
        assert len({text for _, text in short}) == 1
        assert sum(per_replica(both, "replica_requests").values()) == 9
        assert all(per_replica(both, "replica_requests").values())
        assert both.metric("fastdeploy:max_batch_size") == 16
        assert both.metric("fastdeploy:max_gpu_block_num") == 320

        found = post_many(both, 6, LONG)
        both.wait_running(6)
        assert per_replica(both, "replica_num_requests_running") == {"0": 3, "1": 3}
        engines(both)[0].kill()
        ends = join(found)
        assert sorted(status for status, _ in ends)[:3] == [200, 200, 200]
        assert sum(status >= 500 for status, _ in ends) == 3
        assert both.health() == 200
        assert sorted(per_replica(both, "replica_up").values()) == [0, 1]
        assert answer(both) == expected
        assert both.metric("fastdeploy:prompt_tokens_total") > 0
        both.says("is dead: the engine process ended by signal SIGKILL")

        engines(both)[0].kill()  # the last one
        assert both.wait() != 0
        last = [line for line in both.stderr.splitlines() if line.strip()][-1]
        assert last.endswith("the engine is dead: the engine process ended by signal SIGKILL")
        assert "Traceback" not in both.stderr


@pytest.mark.timeout(240)
def test_a_killed_replica_of_two_ranks_is_started_again(tmp_path: Path) -> None:
    """Each replica is split over two processes; one rank's death costs its replica alone."""
    flags = (*FLAGS, "--tensor-parallel-size", "2", "--restart-engine")
    with running_server(tmp_path / "s", flags) as server:
        before = answer(server)
        ranks = server.processes("rank_process")
        assert len(ranks) == 2
        found = post_many(server, 4, LONG)
        server.wait_running(4)
        os.kill(ranks[0].pid, signal.SIGKILL)
        health: set[int] = set()

        def is_back() -> bool:
            health.add(server.health())
            return " is back" in server.stderr and all(per_replica(server, "replica_up").values())

        until(is_back, 2 * PATIENCE, every=0.1)
        assert health == {200}
        ends = join(found)
        assert sum(status >= 500 for status, _ in ends) == 2
        assert sum(status == 200 for status, _ in ends) == 2
        assert len(engines(server)) == 2
        again = join(post_many(server, 4, BODY))
        assert {(status, text) for status, text in again} == {
            (200, before[1][0]["message"]["content"])
        }
        assert not ranks[0].is_running()
        server.terminate()
        assert server.wait() == 0


@pytest.mark.timeout(240)
def test_all_replicas_round_activations_as_asked(tmp_path: Path, server: ServerProcess) -> None:
    """The bits of log-probabilities tell 16 bits from 24."""
    body = {"prompt": "床前明月光", "max_tokens": 6, "temperature": 0, "logprobs": 1}

    def log_probabilities(asked: ServerProcess) -> list[float]:
        found = asked.post("/v1/completions", json=body).json()
        values: list[float] = found["choices"][0]["logprobs"]["token_logprobs"]
        return values

    with running_server(
        tmp_path / "s", (*FLAGS, "--activation-bits", "16", "--enable-logprob")
    ) as both:
        found: list[list[float]] = []
        threads = [
            threading.Thread(target=lambda: found.append(log_probabilities(both))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert len(found) == 6
        assert all(per_replica(both, "replica_requests").values())
        assert all(values == found[0] for values in found)
    assert found[0] != log_probabilities(server)


def test_replicas_are_not_for_the_offline_class() -> None:
    with pytest.raises(ConfigError, match="data_parallel_size 2: replicas are for a server"):
        LLM("demo", data_parallel_size=2)
