"""Requests made from the served OpenAPI schema, valid and invalid ones: no crash, no hang.

The suite sends a few hundred; `FD_LITE_FUZZ_REQUESTS=10000` sends that many.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from server_process import ServerProcess, running_server

REQUESTS = int(os.environ.get("FD_LITE_FUZZ_REQUESTS", "400"))
# /v1/pause would stop all other requests, for which there is a test of its own.
EXCLUDED = {"/v1/pause"}
DOCUMENTED = {501, 503}
SLOWEST_SECONDS = 60.0
FLAGS = ("--max-model-len", "48", "--max-num-seqs", "16", "--enable-logprob",
         "--num-gpu-blocks-override", "64")  # fmt: skip
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose answers are short: at most 48 tokens with the prompt."""
    with running_server(tmp_path_factory.mktemp("fuzz"), FLAGS) as process:
        yield process


def shaped(case: schemathesis.Case, plausible: bool) -> schemathesis.Case:
    """Let half of the chats hold a real message, so that they reach the model."""
    if plausible and isinstance(case.body, dict) and case.body.get("messages"):
        case.body["messages"] = MESSAGES
    return case


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_schema(server: ServerProcess, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    operations = [operation for operation in operations if operation.path not in EXCLUDED]
    assert {"/v1/chat/completions", "/v1/completions"} <= {op.path for op in operations}
    weights = {"/v1/chat/completions": 6, "/v1/completions": 6}
    choices = [op for op in operations for _ in range(weights.get(op.path, 1))]
    if mode is GenerationMode.NEGATIVE:  # a route without parameters cannot be called wrongly
        choices = [op for op in choices if op.body]
    strategies = {
        id(op): op.as_strategy(generation_mode=mode) for op in operations if op in choices
    }
    statuses: Counter[int] = Counter()
    session = requests.Session()

    @seed(0)
    @settings(
        max_examples=REQUESTS // 2, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(data=st.data(), operation=st.sampled_from(choices), plausible=st.booleans())
    def send(data: st.DataObject, operation: Any, plausible: bool) -> None:
        case = shaped(data.draw(strategies[id(operation)]), plausible)
        started = time.monotonic()
        response = case.call(session=session, timeout=SLOWEST_SECONDS)
        status = response.status_code
        statuses[status] += 1
        assert status < 500 or status in DOCUMENTED, f"{status} {response.text[:500]}"
        assert time.monotonic() - started < SLOWEST_SECONDS

    send()
    assert sum(statuses.values()) >= REQUESTS // 2
    assert statuses[200] or mode is GenerationMode.NEGATIVE
    assert statuses[400] > 0
    assert server.get("/health").status_code == 200
    server.wait_idle()
    answer = server.post("/v1/completions", json={"prompt": "hi", "max_tokens": 3})
    assert answer.json()["usage"]["completion_tokens"] <= 3
