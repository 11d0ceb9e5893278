"""The server with speculation on: chunks of several tokens everywhere, and its metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_process import ServerProcess, running_server

FLAGS = (
    "--max-model-len", "512", "--max-num-seqs", "8", "--enable-logprob",
    "--num-gpu-blocks-override", "64",
)  # fmt: skip
SPECULATION = json.dumps({"method": "ngram", "num_speculative_tokens": 4, "adaptive": False})
POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
BODIES: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0},
    "sampled": {"temperature": 0.8, "seed": 5, "top_p": 0.9},
    "stop": {"temperature": 0, "stop": ["地上"]},
    "logprobs": {"temperature": 0, "logprobs": 2},
    "choices": {"temperature": 0.9, "seed": 1, "n": 2},
}


@pytest.fixture(scope="module")
def guessing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("speculation")
    with running_server(folder, (*FLAGS, "--speculative-config", SPECULATION)) as process:
        yield process


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tmp_path_factory.mktemp("usual"), FLAGS) as process:
        yield process


def complete(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    body = {"model": "default", "prompt": POEM * 3, "max_tokens": 40, **fields}
    answer = server.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(server: ServerProcess, **fields: Any) -> list[dict[str, Any]]:
    """Choice objects of a stream, in order."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as client:
        chunks = client.completions.create(
            model="default", prompt=POEM * 3, max_tokens=40, stream=True, **fields
        )
        return [choice.model_dump() for chunk in chunks for choice in chunk.choices]


@pytest.mark.parametrize("kind", BODIES)
def test_answers_are_those_of_a_server_without_guesses(
    guessing: ServerProcess, usual: ServerProcess, kind: str
) -> None:
    keep = ("text", "logprobs", "finish_reason")
    found = complete(guessing, **BODIES[kind])
    expected = complete(usual, **BODIES[kind])
    assert [[c[k] for k in keep] for c in found["choices"]] == [
        [c[k] for k in keep] for c in expected["choices"]
    ]
    assert found["usage"]["completion_tokens"] == expected["usage"]["completion_tokens"]
    assert expected["choices"][0].get("speculate_metrics") is None


@pytest.mark.parametrize("kind", BODIES)
def test_a_stream_adds_up(guessing: ServerProcess, kind: str) -> None:
    whole = complete(guessing, **BODIES[kind])["choices"]
    parts = streamed(guessing, **BODIES[kind])
    for index, choice in enumerate(whole):
        own = [part for part in parts if part["index"] == index]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        if kind == "logprobs":
            tokens = [t for part in own if part["logprobs"] for t in part["logprobs"]["tokens"]]
            assert tokens == choice["logprobs"]["tokens"]


def test_chat_reports_what_guesses_gave(guessing: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": POEM * 4}], "max_tokens": 60, "temperature": 0}
    answer = guessing.post("/v1/chat/completions", json=body).json()
    metrics = answer["choices"][0]["speculate_metrics"]
    heads = metrics["accepted_tokens_per_head"]
    assert heads == sorted(heads, reverse=True)
    assert sum(heads) == metrics["accepted_tokens"] >= answer["usage"]["completion_tokens"] - 1
    assert metrics["average_accept_length"] == pytest.approx(metrics["accepted_tokens"] / heads[0])
    assert 0 < metrics["accept_ratio"] < 1
    assert len(metrics["accept_ratio_per_head"]) == len(heads) - 1


def test_prometheus_counts_guesses(guessing: ServerProcess, usual: ServerProcess) -> None:
    complete(guessing, temperature=0)
    text = guessing.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    accepted = families["fastdeploy:spec_decode_num_accepted_tokens"].samples[0].value
    drafted = families["fastdeploy:spec_decode_num_draft_tokens"].samples[0].value
    assert 0 < accepted < drafted
    assert families["fastdeploy:spec_decode_efficiency"].samples[0].value > 1
    assert "spec_decode" not in usual.get("/metrics").text


def test_an_unknown_method_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("unknown")
    server = ServerProcess(folder, "--speculative-config", '{"method": "eagle"}')
    assert server.process.wait(60) != 0
    last = server.stderr_path.read_text().strip().splitlines()[-1]
    assert (
        "speculative_config.method: found 'eagle', expected one of ngram, suffix, mtp, naive"
        in last
    )
