"""A server whose model is split over several processes: answers, load, and what ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import storm
from machine import promised
from one_answer import BODY, CHAT, LONG, answer
from server_process import ServerProcess, running_server
from tiny_model import write_tiny_model
from waiting import PATIENCE, until

from fastdeploy_lite import LLM, SamplingParams
from fastdeploy_lite.engine.sampling_params import GuidedDecodingParams

FLAGS = ("--tensor-parallel-size", "2", "--max-model-len", "1024", "--max-num-seqs", "16")
PROMPTS = ["白日依山尽，", "The quick brown fox", "def main():", "Once upon a time", "1, 2, 3, 4,"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = (*FLAGS, "--num-gpu-blocks-override", "160", "--max-concurrency", "1024")
    with running_server(tmp_path_factory.mktemp("split"), flags) as server:
        yield server


def ranks(server: ServerProcess) -> list[psutil.Process]:
    """The processes of the ranks beyond the first."""
    return server.processes("rank_process")


def load(server: ServerProcess, count: int = 3) -> list[threading.Thread]:
    def post() -> None:
        with contextlib.suppress(httpx.HTTPError):  # the server ends
            server.post(CHAT, json=LONG)

    threads = [threading.Thread(target=post) for _ in range(count)]
    for thread in threads:
        thread.start()
    server.wait_running(count)
    return threads


def test_demo_answers_are_those_of_one_process_at_any_size() -> None:
    greedy = SamplingParams(temperature=0, max_tokens=32, logprobs=1)
    found = []
    for size in (1, 2, 4):
        llm = LLM("demo", tensor_parallel_size=size, max_model_len=512, enable_logprob=True)
        outputs = llm.generate(PROMPTS, greedy, use_tqdm=False)
        found.append([list(output.outputs.token_ids) for output in outputs])
        llm.llm_engine.shutdown()
    assert found[0] == found[1] == found[2]


def test_guesses_and_constraints_over_two_ranks() -> None:
    """What is decided on the first rank alone reaches the others as tokens."""
    params = [
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=0.8, seed=7, max_tokens=40, repetition_penalty=1.2),
        SamplingParams(
            temperature=0, max_tokens=40, guided_decoding=GuidedDecodingParams(regex="(ab|cd){9}")
        ),
        SamplingParams(temperature=0, max_tokens=40, prompt_logprobs=1),
        SamplingParams(temperature=1, seed=3, top_p=0.9, max_tokens=40, min_tokens=30),
    ]
    found = []
    for size, method in ((1, "naive"), (2, "ngram"), (2, "suffix")):
        llm = LLM(
            "demo", tensor_parallel_size=size, max_model_len=512, enable_logprob=True,
            speculative_config={"method": method, "adaptive": False},
            guided_decoding_backend="auto",
        )  # fmt: skip
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        found.append([list(output.outputs.token_ids) for output in outputs])
        llm.llm_engine.check_integrity()
        llm.llm_engine.shutdown()
    assert found[0] == found[1] == found[2]


def test_answers_over_http(split: ServerProcess, server: ServerProcess) -> None:
    assert len(ranks(split)) == 1
    assert answer(split) == answer(server)
    assert split.post(CHAT, json={**BODY, "top_p": 9}).status_code == 400


def test_storm_over_two_ranks(split: ServerProcess) -> None:
    storm.check(split, clients=12, seconds=6.0, bodies=6)


@pytest.mark.parametrize(
    ("who", "sent", "reason"),
    [
        ("rank", signal.SIGKILL, "rank 1 (process {pid}): was ended by signal SIGKILL"),
        ("rank", signal.SIGSTOP, "rank 1 (process {pid}): is stopped (SIGSTOP)"),
        ("engine", signal.SIGSTOP, "the engine process is stopped (SIGSTOP)"),
    ],
)
def test_a_rank_that_is_lost_under_load_ends_the_server(
    tmp_path: Path, who: str, sent: signal.Signals, reason: str
) -> None:
    with running_server(tmp_path / "s", FLAGS) as server:
        threads = load(server)
        family = server.family()
        (rank,) = ranks(server)
        engine = psutil.Process(rank.pid).parent()
        assert engine is not None
        victim = rank.pid if who == "rank" else engine.pid
        with promised(10):
            os.kill(victim, sent)
            assert server.wait() != 0
        for thread in threads:
            thread.join(PATIENCE)
        last = [line for line in server.stderr.splitlines() if line.strip()][-1]
        assert last.endswith(f"the engine is dead: {reason.format(pid=victim)}")
        assert "Traceback" not in server.stderr
        assert not psutil.wait_procs(family, PATIENCE)[1]


def test_health_fails_and_a_restarted_engine_has_all_ranks(tmp_path: Path) -> None:
    with running_server(tmp_path / "s", (*FLAGS, "--restart-engine")) as server:
        before = answer(server)
        (rank,) = ranks(server)
        os.kill(rank.pid, signal.SIGKILL)
        until(lambda: server.health() != 200)
        server.wait_ready()
        until(lambda: answer(server) == before)
        (again,) = ranks(server)
        assert again.pid != rank.pid
        assert not rank.is_running()


def test_a_rank_that_cannot_load_has_the_last_word(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", kind="2bits", tensor_parallel_size=2)
    damaged = folder / "rank1" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    server = ServerProcess(tmp_path / "s", *FLAGS, model=str(folder))
    try:
        assert server.wait() != 0
        last = [line for line in server.stderr.splitlines() if line.strip()][-1]
        assert "rank1/model.safetensors" in last
        assert "Traceback" not in server.stderr
    finally:
        server.kill()
