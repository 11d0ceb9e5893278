"""One greedy request, for servers whose answers are compared."""

from __future__ import annotations

import re
import time
from typing import Any

import httpx
from server_process import ServerProcess

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me of the moon over the old river."}],
    "max_tokens": 24,
    "temperature": 0,
}
LONG = {**BODY, "max_tokens": 900, "min_tokens": 800}


def answer(server: ServerProcess) -> Any:
    """Status and choices."""
    found = httpx.post(f"{server.url}{CHAT}", json=BODY, timeout=60)
    return found.status_code, found.json().get("choices")


def wait_running(server: ServerProcess, count: int) -> None:
    """Wait until so many requests are at work."""
    deadline = time.monotonic() + 30
    while server.metric("fastdeploy:num_requests_running") < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def per_replica(server: ServerProcess, name: str) -> dict[str, float]:
    """Samples of one gauge by replica."""
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    found = re.findall(rf'^fastdeploy:{name}{{replica="(\d+)"}} (\S+)$', text, re.MULTILINE)
    return {replica: float(value) for replica, value in found}
