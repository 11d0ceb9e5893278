"""What must hold when clients, engines and operators misbehave; see docs/guarantees.md."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import storm
from machine import slowdown
from server_process import ServerProcess, free_port, running_server
from waiting import PATIENCE, until

CHAT = "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
PATHS = (CHAT, "/v1/completions")
LONG = {"messages": HELLO, "prompt": "hi", "min_tokens": 1900, "max_tokens": 1990}
TEXT = (
    '<think>hm</think><tool_call>{"name": "get_weather", "arguments": {"city": "北京"}}</tool_call>'
)
KEY = {"Authorization": "Bearer secret-2"}


GUARDED = ("--api-key", "secret-2", "--max-concurrency", "2", "--max-model-len", "2048",
           "--num-gpu-blocks-override", "128")  # fmt: skip


class Background:
    """Requests that run beside a test."""

    def __init__(self, url: str, count: int, body: dict[str, Any], path: str = CHAT) -> None:
        self.results: list[httpx.Response | Exception] = []
        self.client = httpx.Client(timeout=120, headers=KEY, verify=False)
        self.threads = [
            threading.Thread(target=self._run, args=(url + path, body)) for _ in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, url: str, body: dict[str, Any]) -> None:
        try:
            self.results.append(self.client.post(url, json=body))
        except httpx.HTTPError as error:
            self.results.append(error)

    def join(self) -> list[httpx.Response | Exception]:
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        self.client.close()
        return self.results


def assert_gone(family: list[psutil.Process], *ports: int) -> None:
    _, alive = psutil.wait_procs(family, timeout=PATIENCE)
    assert not alive
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


# One server with keys, a name, parsers, a metrics port and a small limit ------------------------


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def controller_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, metrics_port: int, controller_port: int
) -> Iterator[ServerProcess]:
    flags = ("--api-key", "secret-1", *GUARDED, "--served-model-name", "ernie",
             "--reasoning-parser", "think", "--tool-call-parser", "hermes",
             "--metrics-port", str(metrics_port), "--controller-port", str(controller_port),
             "--scheduler-password", "redis-password")  # fmt: skip
    with running_server(tmp_path_factory.mktemp("guarded"), flags) as server:
        server.metrics_port, server.headers = metrics_port, KEY
        yield server


@pytest.fixture
def sdk(guarded: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="secret-1", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "secret-1", "Basic secret-1", "Bearer", "Bearer secret-1x"]
)
def test_wrong_keys_are_refused(guarded: ServerProcess, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for answer in (
        guarded.get("/v1/models", headers=headers),
        guarded.post(CHAT, headers=headers, json={}),
        guarded.post("/detokenize", headers=headers, json={"tokens": [5]}),
    ):
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_right_keys_pass_and_probes_are_open(guarded: ServerProcess) -> None:
    for key in ("Bearer secret-1", "bearer secret-2"):
        answer = guarded.get("/v1/models", headers={"Authorization": key})
        assert answer.status_code == 200
    assert guarded.get("/health").status_code == 200


def test_served_name(sdk: openai.OpenAI) -> None:
    for name in ("ernie", "default", None):
        answer = sdk.chat.completions.create(model=name, messages=HELLO, max_tokens=2)
        assert answer.model == "ernie"
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model="other", messages=HELLO)
    assert caught.value.body is not None
    assert caught.value.code == "model_not_support"
    assert "Unsupported model: [other], support [ernie] or default" in caught.value.message


def test_logprobs_must_be_enabled(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="please enable it in startup config") as e:
        sdk.chat.completions.create(model="ernie", messages=HELLO, logprobs=True)
    assert e.value.param == "logprobs"


def test_metrics_have_their_own_port(guarded: ServerProcess, metrics_port: int) -> None:
    assert guarded.get("/metrics", headers=KEY).status_code == 404
    base = f"http://127.0.0.1:{metrics_port}"
    with httpx.Client(base_url=base, headers=KEY, timeout=PATIENCE) as client:
        assert "fastdeploy:num_requests_running" in client.get("/metrics").text
        shown = client.get("/config-info")
    guarded.says("engine: ", "config.log")
    guarded.says("server: ", "api_server.log")
    assert shown.json()["served_model_name"] == "ernie"
    for secret in ("secret-1", "redis-password"):
        assert secret not in shown.text
        for file in (guarded.folder / "log").glob("*.log"):
            assert secret not in file.read_text()
    for path in ("/metrics", "/config-info"):
        assert httpx.get(f"{base}{path}", timeout=PATIENCE).status_code == 401


def test_controller(guarded: ServerProcess, controller_port: int) -> None:
    base = f"http://127.0.0.1:{controller_port}/controller"
    assert httpx.post(f"{base}/reset_scheduler", timeout=PATIENCE).status_code == 401
    running = Background(guarded.url, 1, LONG)
    guarded.wait_running(1)
    with httpx.Client(base_url=base, headers=KEY, timeout=PATIENCE) as client:
        answer = client.post("/reset_scheduler")
        assert (answer.status_code, answer.text) == (200, "Scheduler Reset Successfully")
        [result] = running.join()
        assert isinstance(result, httpx.Response)
        assert result.json()["choices"][0]["finish_reason"] == "abort"
        answer = client.post("/scheduler", json={"reset": True})
        assert answer.json()["error"]["message"] == "Scheduler updated successfully"
        assert client.post("/scheduler", json={"load_shards_num": 2}).status_code == 400


def test_tools_and_reasoning(sdk: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    fields: dict[str, Any] = {
        "model": "ernie",
        "messages": HELLO,
        "tools": tools,
        "max_tokens": 200,
        "extra_body": {"guided_choice": [TEXT]},
    }
    answer = sdk.chat.completions.create(**fields)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == ""
    assert choice.message.reasoning_content == "hm"
    [call] = choice.message.tool_calls
    assert call.id.startswith("chatcmpl-tool-")
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather", {"city": "北京"},
    )  # fmt: skip
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


def test_tools_and_reasoning_stream(sdk: openai.OpenAI) -> None:
    chunks = list(sdk.chat.completions.create(
        model="ernie", messages=HELLO, max_tokens=200, stream=True,
        extra_body={"guided_choice": [TEXT]},
    ))  # fmt: skip
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(d.reasoning_content or "" for d in deltas) == "hm"
    assert "".join(d.content or "" for d in deltas) == ""
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert calls[0].function.name == "get_weather"
    assert calls[0].type == "function"
    arguments = "".join(call.function.arguments or "" for call in calls)
    assert json.loads(arguments) == {"city": "北京"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_too_many_requests_are_refused_at_once(guarded: ServerProcess) -> None:
    with httpx.Client(base_url=guarded.url, headers=KEY, timeout=PATIENCE) as client:
        body = {**LONG, "stream": True}
        with client.stream("POST", CHAT, json=body) as one, \
                client.stream("POST", CHAT, json=body) as two:  # fmt: skip
            lines = one.iter_lines(), two.iter_lines()  # kept: a forgotten iterator disconnects
            assert all(next(iterator).startswith("data: ") for iterator in lines)
            with httpx.Client(base_url=guarded.url, headers=KEY, timeout=PATIENCE) as late:
                late.get("/health")
                times, busy = [], slowdown()
                for _ in range(10):
                    started = time.perf_counter()
                    answer = late.post(CHAT, json={"messages": HELLO})
                    times.append(time.perf_counter() - started)
                    assert answer.status_code == 429
                    assert answer.json() == {
                        "detail": "Too many requests,current max concurrency is 2"
                    }
            assert sorted(times)[5] < 0.05 * max(busy, slowdown())
    short = {"messages": HELLO, "max_tokens": 1}
    until(lambda: guarded.post(CHAT, headers=KEY, json=short).status_code == 200)


def test_log_lines_cannot_be_forged(guarded: ServerProcess) -> None:
    evil = "x\nERROR    2026-01-01 00:00:00,000 1     a.py[line:1] forged"
    body = {"messages": [{"role": "user", "content": evil}], "max_tokens": 1, "user": evil}
    guarded.post(CHAT, json=body, headers=KEY).raise_for_status()
    guarded.get("/%0aERROR%20forged-path")
    guarded.says("forged", "api_server.log")
    guarded.says("forged-path")
    for file in [guarded.stderr_path, *(guarded.folder / "log").glob("*.log")]:
        text = file.read_text(errors="replace")
        assert not any(line.startswith("ERROR") and "forged" in line for line in text.splitlines())


def test_sigterm_under_load_drains(tmp_path: Path) -> None:
    metrics_port = free_port()
    flags = (*GUARDED, "--metrics-port", str(metrics_port), "--timeout-graceful-shutdown", "120")
    with running_server(tmp_path / "s", flags) as server:
        server.metrics_port, server.headers = metrics_port, KEY
        running = Background(server.url, 2, LONG)
        server.wait_running(2)
        family = server.family()
        server.terminate()

        def refused() -> httpx.Response | None:
            """The answer of a server that is full until it has noticed the signal."""
            answer = server.post(CHAT, json={"messages": HELLO}, headers=KEY)
            return None if answer.status_code == 429 else answer

        answer = until(refused)
        assert answer is not None
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "server_error"
        assert not running.results  # told at once, not when there is room
        for result in running.join():
            assert isinstance(result, httpx.Response), result
            assert result.status_code == 200
            assert result.json()["usage"]["completion_tokens"] >= 1900
        assert server.wait() == 0
        assert_gone(family, server.port, metrics_port)
        assert "Fatal" not in server.stderr  # no process ended by an accident of its own
        assert "Traceback" not in server.stderr


# Engines that die -------------------------------------------------------------------------------


def test_engine_death_turns_health_bad_and_ends_the_server(tmp_path: Path) -> None:
    with running_server(tmp_path / "s", ("--max-model-len", "2048")) as server:
        running = Background(server.url, 3, LONG)
        streams = [Background(server.url, 1, {**LONG, "stream": True}, path) for path in PATHS]
        server.wait_running(5)
        family = server.family()
        server.engine().kill()
        with httpx.Client(base_url=server.url, timeout=PATIENCE) as probe:  # which has 3 s to see
            dead = until(lambda: None if (seen := probe.head("/health")).is_success else seen)
        assert dead is not None
        assert (dead.status_code, dead.content) == (404, b"")
        for result in running.join():
            # An error body, or a connection that the dying server closed: never a hang.
            if isinstance(result, httpx.Response):
                assert result.status_code in (500, 503)
                assert "message" in result.json()["error"]
        for stream in streams:
            [result] = stream.join()
            assert isinstance(result, httpx.Response)  # begun, so 200; the error is an event
            *_, error, end = (line for line in result.text.splitlines() if line)
            assert error.startswith('data: {"error"')
            assert end == "data: [DONE]"
        assert server.wait() != 0
        assert "The engine is dead" in server.stderr
        assert_gone(family, server.port)


def test_restarted_engine_guidance_off_and_strict_statuses(tmp_path: Path) -> None:
    flags = ("--restart-engine", "--guided-decoding-backend", "off", "--max-model-len", "2048",
             "--max-waiting-time", "5")  # fmt: skip
    strict = {"FD_LITE_STRICT_STATUS": "1"}
    with running_server(tmp_path / "s", flags, env=strict) as server:
        body = {"messages": HELLO, "max_tokens": 8, "temperature": 0}
        before = server.post(CHAT, json=body).json()["choices"]
        refused = server.post(CHAT, json={**body, "guided_regex": "a"})
        assert refused.status_code == 500  # upstream's status, on demand
        assert "--guided-decoding-backend auto" in refused.json()["error"]["message"]
        server.post("/v1/pause").raise_for_status()
        late = server.post(CHAT, json=body)
        # Paused: refused at once, not kept waiting.
        assert (late.status_code, late.json()["error"]["code"]) == (503, "connection_error")
        server.post("/v1/resume").raise_for_status()
        engine = server.engine()
        engine.kill()

        def again() -> httpx.Response | None:
            answer = server.post(CHAT, json=body)
            assert answer.status_code in (200, 500, 503)
            return answer if answer.status_code == 200 else None

        answer = until(again)
        assert answer is not None
        assert answer.json()["choices"] == before
        assert server.engine().pid != engine.pid
        family = server.family()
        running = Background(server.url, 2, LONG)
        server.wait_running(2)
        server.terminate()  # no grace: the running ones are aborted and told so
        for result in running.join():
            assert isinstance(result, httpx.Response)
            assert result.json()["choices"][0]["finish_reason"] == "abort"
        assert server.wait() == 0
        assert_gone(family, server.port)


def test_a_killed_server_leaves_no_engine(tmp_path: Path) -> None:
    with running_server(tmp_path / "s", ("--max-model-len", "512")) as server:
        family = server.family()
        paths = [
            c.laddr for c in family[0].net_connections("unix") if "fastdeploy-lite-" in c.laddr
        ]
        assert paths
        os.kill(server.process.pid, signal.SIGKILL)
        server.wait()
        assert_gone(family, server.port)
        assert not any(Path(path).exists() for path in paths)


def test_upstreams_start_line(tmp_path: Path) -> None:
    """FastDeploy's documented command for the 300B model, with busy internal ports."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        busy = str(holder.getsockname()[1])
        metrics = free_port()
        flags = ("--metrics-port", str(metrics), "--engine-worker-queue-port", busy,
                 "--cache-queue-port", busy, "--tensor-parallel-size", "1", "--max-model-len",
                 "32768", "--use-cudagraph", "--enable-prefix-caching", "--enable-chunked-prefill",
                 "--max-num-seqs", "256")  # fmt: skip
        with running_server(tmp_path / "s", flags) as server:
            body = {"messages": HELLO, "max_tokens": 3}
            assert server.post(CHAT, json=body).status_code == 200
            server.metrics_port = metrics
            server.wait_idle()


def test_a_client_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    """It must not hold one of the places for requests for ever."""
    body = json.dumps({**LONG, "n": 16, "return_token_ids": True, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    flags = ("--max-concurrency", "1", "--max-num-seqs", "16")
    env = {"FD_LITE_SEND_SECONDS": "1"}
    with running_server(tmp_path / "s", flags, env=env) as server, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", server.port))
        deaf.sendall(data)
        server.wait_running(16)
        short = {"messages": HELLO, "max_tokens": 2}
        until(lambda: server.post(CHAT, json=short).status_code == 200, every=0.5)
        server.wait_idle()


# Starts that fail -------------------------------------------------------------------------------


def failing(folder: Path, *flags: str, model: str = "demo", port: int | None = None) -> str:
    server = ServerProcess(folder, *flags, model=model, port=port)
    try:
        assert server.wait() != 0
        return server.stderr
    finally:
        server.kill()


def test_busy_port(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        text = failing(tmp_path / "a", port=port)
        assert f"The parameter `port`:{port} is already in use." in text
        text = failing(tmp_path / "b", "--metrics-port", str(port))
        assert f"The parameter `metrics_port`:{port} is already in use." in text


def test_two_starts_at_a_time_on_one_port(tmp_path: Path) -> None:
    """Both bound it, both loaded, and the slower one ended with status 0 and no reason."""
    first = ServerProcess(tmp_path / "a")
    second = ServerProcess(tmp_path / "b", port=first.port)
    both = (first, second)
    try:
        until(lambda: any(server.process.poll() is not None for server in both))
        loser, winner = both if first.process.poll() is not None else both[::-1]
        assert loser.process.returncode == 1
        assert f"The parameter `port`:{first.port} is already in use." in loser.stderr
        assert winner.wait_ready().health() == 200
    finally:
        for server in both:
            server.kill()


def test_broken_checkpoint(tmp_path: Path, demo_dir: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_dir, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100_000])
    text = failing(tmp_path / "s", model=str(model))
    assert "model.safetensors" in text
    last = [line for line in text.splitlines() if "ERROR" in line][-1]
    assert "Failed to start" in last
    worker = (tmp_path / "s" / "log" / "workerlog.0").read_text()
    assert "The engine ended" in worker
    assert "model.safetensors" in worker


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--reasoning-parser", "nope"), "ernie-45-vl-thinking"),
        (("--tool-parser-plugin", "/nonexistent.py", "--tool-call-parser", "x"), "no Python file"),
        (("--max-num-seqs", "300"), "max_num_seqs"),
        (("--model", "/nonexistent/model"), "/nonexistent/model"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, flags: tuple[str, ...], words: str) -> None:
    assert words in failing(tmp_path / "s", *flags)


# Storm ------------------------------------------------------------------------------------------


def test_storm(tmp_path: Path) -> None:
    clients = int(os.environ.get("FD_LITE_STORM_CLIENTS", "24"))
    seconds = float(os.environ.get("FD_LITE_STORM_SECONDS", "8"))
    with running_server(tmp_path / "s", storm.FLAGS) as server:
        storm.check(server, clients, seconds, bodies=12)
