"""The command line against the demo model: offline, and as a client of the server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import ServerProcess, environment


def command(
    folder: Path, *arguments: str, text: str = "", status: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "fastdeploy_lite.entrypoints.cli.main", *arguments],
        check=False, cwd=folder, env=environment(), input=text, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == status, done.stderr[-2000:]
    return done


def test_generate(tmp_path: Path) -> None:
    arguments = (
        "generate",
        "解析三首李白的诗",
        "--chat",
        "--max-tokens",
        "40",
        "--temperature",
        "0",
    )
    assert "李白" in command(tmp_path, *arguments).stdout
    assert not list(tmp_path.iterdir())  # no log directory: nothing was asked to be logged


def test_chat_here(tmp_path: Path) -> None:
    done = command(tmp_path, "chat", "--max-tokens", "16", "--temperature", "0",
                   text="解析三首李白的诗\n\nhello\n")  # fmt: skip
    assert "李白" in done.stdout
    assert len(done.stdout.splitlines()) >= 2
    assert "> " not in done.stdout  # prompts are for people


def test_clients(server: ServerProcess, tmp_path: Path) -> None:
    url = ("--url", f"{server.url}/v1", "--max-tokens", "24", "--temperature", "0")
    assert "李白" in command(tmp_path, "chat", *url, "-q", "解析三首李白的诗").stdout
    assert command(tmp_path, "complete", *url, "-q", "床前明月光").stdout.strip()
    url = ("--url", server.url.removeprefix("http://"), *url[2:])
    loop = command(tmp_path, "chat", *url, "--system-prompt", "x", text="解析三首李白的诗\n")
    assert "李白" in loop.stdout


def test_a_client_without_server_says_so(tmp_path: Path) -> None:
    done = command(tmp_path, "complete", "--url", "http://127.0.0.1:9/v1", "-q", "x", status=1)
    assert len(done.stderr.strip().splitlines()) == 1
    assert "No server at" in done.stderr


@pytest.mark.parametrize("backend", ["openai-chat", "openai"])
def test_bench_serve(server: ServerProcess, tmp_path: Path, backend: str) -> None:
    arguments = ["bench", "serve", "--backend", backend, "--base-url", server.url,
                 "--dataset-name", "random", "--num-prompts", "6", "--max-concurrency", "3",
                 "--random-input-len", "20", "--random-output-len", "12",
                 "--result-filename", "result.json"]  # fmt: skip
    done = command(tmp_path, *arguments)
    assert "time to first token" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (6, 0)
    assert result["total_output_tokens"] in range(66, 73)  # eleven tokens and the closing one
    assert result["ttft_ms"]["p50"] > 0
    assert result["itl_ms"]["p99"] >= result["itl_ms"]["p50"] > 0


def test_bench_serve_against_nothing(tmp_path: Path) -> None:
    done = command(tmp_path, "bench", "serve", "--port", "9", "--dataset-name", "random", status=1)
    assert "The server at http://127.0.0.1:9: no answer" in done.stderr


def test_bench_offline(tmp_path: Path) -> None:
    command(tmp_path, "bench", "latency", "--input-len", "8", "--output-len", "4",
            "--batch-size", "2", "--num-iters-warmup", "0", "--num-iters", "2",
            "--output-json", "latency.json")  # fmt: skip
    assert len(json.loads((tmp_path / "latency.json").read_text())["latencies"]) == 2
    command(tmp_path, "bench", "throughput", "--input-len", "8", "--output-len", "4",
            "--num-prompts", "3", "--output-json", "throughput.json")  # fmt: skip
    result = json.loads((tmp_path / "throughput.json").read_text())
    assert result["num_requests"] == 3
    assert result["output_tokens"] in range(9, 13)


def test_run_batch(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    good = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    lines = [
        good,
        {**good, "custom_id": "b", "body": {**body, "top_p": 7}},
        {**good, "custom_id": "c", "url": "/v1/embeddings"},
        {**good, "custom_id": "d", "body": {**body, "stream": True}},
        {"method": "POST"},
    ]
    source = "\n".join([*map(json.dumps, lines), "not json", ""])
    (tmp_path / "in.jsonl").write_text(source)
    command(tmp_path, "run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", "demo")
    answers = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [a["custom_id"] for a in answers] == ["a", "b", "c", "d", None, None]
    assert all(a["id"].startswith("fastdeploy-") for a in answers)
    first = answers[0]["response"]
    assert first["status_code"] == 200
    assert first["request_id"].startswith("fastdeploy-batch-")
    assert first["body"]["usage"]["completion_tokens"] <= 4
    assert answers[1]["response"]["status_code"] == 400
    assert all(a["error"] is not None for a in answers[1:])
    assert all(a["response"] is None for a in answers[2:])
