"""`--max-waiting-time`: a request that waits too long for its first token is told so and ends."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_process import ServerProcess, running_server
from waiting import PATIENCE, until

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SHORT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi",
                         "max_tokens": 2}  # fmt: skip
LONG = {**SHORT, "min_tokens": 1900, "max_tokens": 1990}  # some seconds
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
OVER = {"message": "Request waiting time exceeded 1 s", "type": "timeout_error", "param": None,
        "code": "timeout"}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One place in the batch, a second to wait for it."""
    flags = ("--max-num-seqs", "1", "--max-waiting-time", "1", "--max-model-len", "2048")
    with running_server(tmp_path_factory.mktemp("waiting"), flags) as process:
        yield process


def begun(server: ServerProcess, body: dict[str, Any]) -> httpx.Response:
    """The answer of a request that is let in within its second: asked again where one is not."""

    def ask() -> httpx.Response | None:
        found = server.post(CHAT, json=body)
        return None if found.status_code == 500 and found.json()["error"] == OVER else found

    found = until(ask)
    assert found is not None
    return found


@pytest.fixture
def busy(server: ServerProcess) -> Iterator[list[httpx.Response]]:
    """The place is taken, by a request whose answer will stand in the list."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(begun(server, LONG)))
    thread.start()
    until(lambda: answers or server.metric("fastdeploy:num_requests_running"))
    assert not answers, answers[0].text
    yield answers
    server.post("/v1/abort_requests", json={"abort_all": True})
    thread.join(PATIENCE)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("more", [{}, {"n": 3}, {"guided_regex": "[a-z]+"}], ids=str)
def test_who_waits_too_long_is_told_so(
    server: ServerProcess, busy: list[httpx.Response], path: str, more: dict[str, Any]
) -> None:
    started = time.monotonic()
    answer = server.post(path, json={**SHORT, **more})
    assert (answer.status_code, answer.json()["error"]) == (500, OVER)
    assert time.monotonic() - started > 0.9
    until(lambda: server.metric("fastdeploy:num_requests_waiting") == 0)  # it left the queue
    assert not busy  # and who had the place keeps it


def test_a_stream_ends_with_the_same_error(
    server: ServerProcess, busy: list[httpx.Response]
) -> None:
    answer = server.post(CHAT, json={**SHORT, "stream": True})
    *_, event, end = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert (json.loads(event[6:])["error"], end) == (OVER, "data: [DONE]")
    assert not busy


def test_preparation_counts_as_waiting(server: ServerProcess) -> None:
    answer = server.post(CHAT, json={**SHORT, "chat_template": LOOP})
    assert (answer.status_code, answer.json()["error"]) == (500, OVER)


def test_an_answer_that_has_begun_may_take_long(server: ServerProcess) -> None:
    answer = begun(server, LONG)
    assert answer.json()["usage"]["completion_tokens"] >= 1900
    server.wait_idle()
