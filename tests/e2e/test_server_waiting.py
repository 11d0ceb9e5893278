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

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SHORT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi",
                         "max_tokens": 2}  # fmt: skip
LONG = {**SHORT, "min_tokens": 1900, "max_tokens": 1990}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
OVER = {"message": "Request waiting time exceeded 1 s", "type": "timeout_error", "param": None,
        "code": "timeout"}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One place in the batch, a second to wait for it."""
    flags = ("--max-num-seqs", "1", "--max-waiting-time", "1", "--max-model-len", "2048")
    with running_server(tmp_path_factory.mktemp("waiting"), flags) as process:
        yield process


@pytest.fixture
def busy(server: ServerProcess) -> Iterator[list[httpx.Response]]:
    """The place is taken, by a request whose answer will stand in the list."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(server.url + CHAT, json=LONG, timeout=120))

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.metric("fastdeploy:num_requests_running"):
        assert time.monotonic() < deadline and not answers, answers
        time.sleep(0.02)
    yield answers
    httpx.post(f"{server.url}/v1/abort_requests", json={"abort_all": True})
    thread.join(30)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("more", [{}, {"n": 3}, {"guided_regex": "[a-z]+"}], ids=str)
def test_who_waits_too_long_is_told_so(
    server: ServerProcess, busy: list[httpx.Response], path: str, more: dict[str, Any]
) -> None:
    started = time.monotonic()
    answer = httpx.post(server.url + path, json={**SHORT, **more}, timeout=30)
    assert (answer.status_code, answer.json()["error"]) == (500, OVER)
    assert 0.9 < time.monotonic() - started < 10
    deadline = time.monotonic() + 10
    while server.metric("fastdeploy:num_requests_waiting"):  # it left the queue
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not busy  # and who had the place keeps it


def test_a_stream_ends_with_the_same_error(
    server: ServerProcess, busy: list[httpx.Response]
) -> None:
    answer = httpx.post(server.url + CHAT, json={**SHORT, "stream": True}, timeout=30)
    *_, event, end = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert (json.loads(event[6:])["error"], end) == (OVER, "data: [DONE]")
    assert not busy


def test_preparation_counts_as_waiting(server: ServerProcess) -> None:
    answer = httpx.post(server.url + CHAT, json={**SHORT, "chat_template": LOOP}, timeout=30)
    assert (answer.status_code, answer.json()["error"]) == (500, OVER)


def test_an_answer_that_has_begun_may_take_long(server: ServerProcess) -> None:
    body = {**SHORT, "min_tokens": 600, "max_tokens": 600}
    answer = httpx.post(server.url + CHAT, json=body, timeout=120)
    assert answer.json()["usage"]["completion_tokens"] == 600
    server.wait_idle()
