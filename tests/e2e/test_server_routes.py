"""Probes, metrics, control routes."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import httpx
import openai
import psutil
import pytest
from machine import slowdown
from server_process import ServerProcess
from waiting import PATIENCE, until

CHAT = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "hi"}], "min_tokens": 1500, "max_tokens": 1600}


def test_models(client: openai.OpenAI, http: httpx.Client) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("demo", "model", "FastDeploy")
    entry = http.get("/v1/models").json()["data"][0]
    assert entry["max_model_len"] == 2048
    assert entry["root"] == "demo"
    assert entry["parent"] is None
    assert entry["permission"][0]["id"].startswith("modelperm-")
    assert entry["permission"][0]["allow_fine_tuning"] is False
    for name in ("demo", "default"):  # what every request may call it
        assert client.models.retrieve(name).id == "demo"
    for name in ("other", "a/b", "demo/", "%F0%9F%98%80", "x" * 5000):
        answer = http.get(f"/v1/models/{name}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert len(answer.text) < 1000


def test_probes(http: httpx.Client) -> None:
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        answer = http.request(method, path)
        assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_load_balancers_probe_with_head(http: httpx.Client, path: str) -> None:
    with_body, without = http.get(path), http.head(path)
    assert (without.status_code, without.content) == (200, b"")
    assert without.headers["content-length"] == with_body.headers["content-length"] == "0"
    assert "head" not in http.get("/openapi.json").json()["paths"][path]


def test_load_lists_routes(http: httpx.Client) -> None:
    routes = {route["path"]: route for route in http.get("/load").json()["routes"]}
    assert routes[CHAT]["methods"] == ["POST"]
    assert all(path.startswith("/v1") for path in routes)
    assert set(routes[CHAT]) == {"path", "methods", "tags"}


def test_documentation(http: httpx.Client) -> None:
    assert http.get("/docs").status_code == 200
    paths = http.get("/openapi.json").json()["paths"]
    assert CHAT in paths
    for path in ("/v1/embeddings", "/v1/reward"):  # what is not served says so, there and here
        entry = paths[path]["post"]
        assert list(entry["responses"]) == ["501"] and entry["summary"].startswith("Not served")
        answer = http.post(path, json={"input": "x"})
        assert answer.status_code == 501 and "pooling model" in answer.json()["error"]["message"]
    assert "501" not in paths[CHAT]["post"]["responses"]
    assert set(http.get("/version").json()) == {"version", "details"}


def test_tokenize(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "hello 李白"}).json()
    assert answer["count"] == len(answer["tokens"])
    text = http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert text == {"prompt": "hello 李白"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert chat["tokens"][0] == 6


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "one, two"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def prompt_of(http: httpx.Client, **body: Any) -> str:
    """The text of what /tokenize makes of a conversation."""
    found = http.post("/tokenize", json={"messages": TURNS, **body}).raise_for_status().json()
    text = http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"]
    return str(text).removeprefix("<|begin_of_sentence|>")


def test_tokenize_takes_what_decides_on_a_conversations_prompt(http: httpx.Client) -> None:
    """As vLLM's, so that clients count what a chat with the same fields is given."""
    said = "User: hi\nAssistant: one, two"
    closed = f"{said}<|end_of_sentence|>"
    assert prompt_of(http) == f"{closed}Assistant: "
    assert prompt_of(http, add_generation_prompt=True) == f"{closed}Assistant: "
    assert prompt_of(http, add_generation_prompt=False, add_special_tokens=False) == closed
    assert prompt_of(http, continue_final_message=True, add_generation_prompt=False) == said
    assert prompt_of(http, continue_final_message=True) == said
    template = "{{ mood }}{{ tools | length }}{{ enable_thinking }}"
    variables = {"mood": "calm ", "enable_thinking": False}
    given = {"chat_template": template, "chat_template_kwargs": variables, "tools": [TOOL]}
    assert prompt_of(http, **given) == "calm 1False"


def test_tokenize_counts_what_a_chat_is_given(http: httpx.Client) -> None:
    for fields in ({}, {"add_generation_prompt": False}, {"continue_final_message": True}):
        body = {"messages": TURNS, "max_tokens": 1, **fields}
        answer = http.post(CHAT, json=body).raise_for_status().json()
        counted = http.post("/tokenize", json=body).raise_for_status().json()
        assert counted["count"] == answer["usage"]["prompt_tokens"]


def test_tokenize_shows_its_pieces(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"prompt": "hello", "return_token_strs": True}).json()
    assert len(answer["token_strs"]) == answer["count"]
    assert "".join(answer["token_strs"]).replace("\u2581", " ").strip() == "hello"
    assert http.post("/tokenize", json={"prompt": "hello"}).json()["token_strs"] is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template": "{{ raise_exception('no') }}"}, "chat_template"),
        ({"add_generation_prompt": "perhaps"}, "add_generation_prompt"),
        ({"tools": [{"type": "function"}]}, "tools"),
    ],
)
def test_tokenize_refuses_what_a_chat_refuses(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    answer = http.post("/tokenize", json={"messages": TURNS, **fields})
    assert answer.status_code == 400
    assert param in answer.json()["error"]["param"]


def test_ids_outside_of_the_vocabulary_have_no_text(http: httpx.Client) -> None:
    """They were left out in silence."""
    answer = http.post("/detokenize", json={"tokens": [1060, 8192]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "tokens"
    assert error["message"] == "tokens: token id 8192 is outside the model's vocabulary of 8192"


def test_metrics(server: ServerProcess, http: httpx.Client) -> None:
    before = server.metric("fastdeploy:generation_tokens_total")
    http.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9,
                          "min_tokens": 8}).raise_for_status()  # fmt: skip
    answer = http.get("/metrics")
    assert answer.status_code == 200
    assert "text/plain" in answer.headers["content-type"]
    server.wait_idle()
    assert server.metric("fastdeploy:generation_tokens_total") - before >= 8
    assert server.metric("fastdeploy:num_requests_running") == 0
    assert server.metric("fastdeploy:num_requests_waiting") == 0
    assert server.metric("fastdeploy:gpu_cache_usage_perc") == 0
    assert server.metric("fastdeploy:time_to_first_token_seconds_count") > 0
    label = f'http_requests_total{{method="POST",path="{CHAT}",status_code="200"}}'
    assert label in answer.text


def test_config_info(http: httpx.Client) -> None:
    info = http.get("/config-info").json()
    assert info["max_num_seqs"] == 16
    assert "FD_LOG_DIR" in info["env_config"]


def test_pause_and_resume(server: ServerProcess, http: httpx.Client) -> None:
    """Pausing ends what runs and refuses what comes, in upstream's bodies."""
    answers: list[dict] = []
    thread = threading.Thread(target=lambda: answers.append(server.post(CHAT, json=LONG).json()))
    short = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    assert http.get("/v1/is_paused").json()["result"] == {"is_paused": False}
    thread.start()
    server.wait_running(1)
    try:
        assert http.post("/v1/pause").json()["status"] == "success"
        thread.join(PATIENCE)
        assert answers[0]["choices"][0]["finish_reason"] == "abort"
        state = http.get("/v1/is_paused").json()
        assert (state["status"], state["result"]) == ("success", {"is_paused": True})
        for body in (short, {**short, "stream": True}):
            refused = http.post(CHAT, json=body)
            assert refused.status_code == 503
            assert "paused" in refused.json()["error"]["message"]
    finally:
        assert http.post("/v1/resume").json()["status"] == "success"
    assert http.post(CHAT, json=short).status_code == 200


def test_abort_by_id(server: ServerProcess, http: httpx.Client) -> None:
    answers: list[dict] = []

    def ask() -> None:
        answers.append(server.post(CHAT, json={**LONG, "request_id": "victim"}).json())

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: http.post("/v1/abort", json={"request_id": "chatcmpl-victim"}).json()["aborted"])
    thread.join(PATIENCE)
    assert answers[0]["choices"][0]["finish_reason"] == "abort"
    assert answers[0]["usage"]["completion_tokens"] < 1600
    server.wait_idle()


@pytest.mark.parametrize("name", ["victim2", "chatcmpl-victim2", None])
def test_abort_in_upstreams_form(
    server: ServerProcess, http: httpx.Client, name: str | None
) -> None:
    """`req_ids` with and without the prefix, and `abort_all`."""
    answers: list[dict] = []

    def ask() -> None:
        answers.append(server.post(CHAT, json={**LONG, "request_id": "victim2"}).json())

    thread = threading.Thread(target=ask)
    thread.start()
    # Twice: nothing is done or told twice.
    body = {"abort_all": True} if name is None else {"req_ids": [name, "absent"] * 2}

    def abort() -> dict[str, Any] | None:
        found = http.post("/v1/abort_requests", json=body).json()
        assert found["status"] == "success"
        return found["result"] if found["result"]["aborted"] else None

    result = until(abort)
    assert result is not None
    thread.join(PATIENCE)
    assert result["aborted"] == [{"request_id": "chatcmpl-victim2"}]
    assert result["not_found"] == ([] if name is None else ["absent"])
    assert answers[0]["choices"][0]["finish_reason"] == "abort"
    for bad in ({}, {"req_ids": "x"}, {"req_ids": []}, {"req_ids": ["x"] * 4097}):
        assert http.post("/v1/abort_requests", json=bad).status_code == 400
    server.wait_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_blocks(server: ServerProcess, stream: bool) -> None:
    before = server.metric("fastdeploy:generation_tokens_total")
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.wait_running(1)
    server.wait_idle()
    assert server.metric("fastdeploy:generation_tokens_total") - before < 1500


def test_health_is_quick_during_long_prefills(server: ServerProcess) -> None:
    prompts = [f"{index} " + "word " * 1900 for index in range(8)]  # no prefix in common
    body = {"prompt": prompts, "max_tokens": 1, "seed": 1}
    thread = threading.Thread(target=lambda: server.post("/v1/completions", json=body))
    times, busy = [], slowdown()
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as probe:
        probe.get("/health")  # opens the connection
        thread.start()
        while thread.is_alive():
            started = time.monotonic()
            assert probe.get("/health").status_code == 200
            times.append(time.monotonic() - started)
            time.sleep(0.01)
    thread.join()
    busy = max(busy, slowdown())
    assert times
    # 100 ms is the promise on a machine of its own; a shared one may stall a process for longer.
    assert sorted(times)[int(0.9 * len(times))] < 0.1 * busy
    assert max(times) < 1.0 * busy


def test_answers_do_not_wait_for_the_clients_acknowledgement(server: ServerProcess) -> None:
    """Nagle against delayed ACK would add 40 ms to each request of a kept connection."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:

        def seconds() -> float:
            started = time.monotonic()
            client.post("/tokenize", json={"prompt": "hi"})
            return time.monotonic() - started

        seconds()  # opens the connection
        until(lambda: seconds() < 0.03)


def test_the_http_process_does_not_load_paddle(server: ServerProcess) -> None:
    files = [m.path for m in psutil.Process(server.process.pid).memory_maps()]
    assert not [path for path in files if "libpaddle" in path]
    assert [m.path for m in server.engine().memory_maps() if "libpaddle" in m.path]


def test_internal_sockets_stay_on_this_machine(server: ServerProcess) -> None:
    for process in server.family():
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip == "127.0.0.1"


def test_start_up_lines_in_order(server: ServerProcess) -> None:
    lines = [
        "Number of api-server workers: 1.", "Waiting for worker processes to be ready...",
        "Worker processes are launched with ",
        "Weights: int8 linears, ccq experts; 2.3", "2-bit rows: natural order, by the weights: ",
        "Detected 256 gpu blocks and 0 cpu blocks in "
        "cache (block size: 64).", "FastDeploy will be serving ", "Launching metrics service at http://",
        "Launching chat completion service at http://", "Launching completion service at http://",
        "Application startup complete.", f"Uvicorn running on {server.url} (Press CTRL+C to quit)",
    ]  # fmt: skip
    text = server.says(lines[-1])
    positions = [text.index(line) for line in lines]
    assert positions == sorted(positions)
    server.says("Reset block num, the total_block_num:256", "config.log")
