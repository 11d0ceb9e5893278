"""The server on a Unix socket: the same service, found at a path."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from server_process import SMALL, ServerProcess, environment
from waiting import until

HELLO = {"messages": [{"role": "user", "content": "hi"}], "min_tokens": 4, "max_tokens": 4}


def client_of(path: Path) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(path))
    return httpx.Client(transport=transport, base_url="http://localhost", timeout=120)


def is_served(path: Path) -> bool:
    try:
        with client_of(path) as client:
            return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_server_on_a_socket(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("uds")
    path = folder / "s"
    server = ServerProcess(folder, *SMALL, "--uds", str(path), "--max-concurrency", "4")
    try:
        until(lambda: server.process.poll() is not None or is_served(path))
        with client_of(path) as client:
            answer = client.post("/v1/chat/completions", json=HELLO).raise_for_status().json()
            assert answer["usage"]["completion_tokens"] == 4
            assert "fastdeploy:num_requests_running" in client.get("/metrics").text
        with pytest.raises(httpx.ConnectError):
            server.get("/health")  # the port is nobody's
        server.says(f"Uvicorn running on http://localhost on Unix socket {path} (Press")
        server.says('- "POST /v1/chat/completions HTTP/1.1" 200')
        second = subprocess.run(
            [sys.executable, "-m", "fastdeploy_lite.entrypoints.openai.api_server", "--model",
             "demo", "--uds", str(path)],
            cwd=folder, env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert second.returncode == 1
        assert f"uds: '{path}' is already in use" in second.stderr.splitlines()[-1]
        assert is_served(path)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert not path.exists()
    finally:
        server.process.kill()
        server.process.wait()
