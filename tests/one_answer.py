"""One greedy request, for servers whose answers are compared."""

from __future__ import annotations

import re
from typing import Any

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
    found = server.post(CHAT, json=BODY)
    return found.status_code, found.json().get("choices")


def per_replica(server: ServerProcess, name: str) -> dict[str, float]:
    """Samples of one gauge by replica."""
    text = server.get("/metrics").text
    found = re.findall(rf'^fastdeploy:{name}{{replica="(\d+)"}} (\S+)$', text, re.MULTILINE)
    return {replica: float(value) for replica, value in found}
