"""What one client can cost the others: the event loop's time, memory, places, sockets, logs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from machine import handicap, promised, slowdown
from server_process import START_SECONDS, ServerProcess, environment, running_server
from waiting import PATIENCE, until

CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
SHORT = {"messages": HELLO, "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f"}}
BODY_BYTES = 4 << 20  # the default of FD_LITE_MAX_BODY_BYTES
VALUES = 250_000  # nearly the default of FD_LITE_MAX_BODY_VALUES
TEXTS = VALUES // 2  # the same in texts
HEAVY = 31_000  # the same in containers or members
UNPRINTABLE = "\x85" * (BODY_BYTES // 6 - 100)  # six bytes each as JSON
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two places, 400 descriptors, JSON log lines, no prompts in them."""
    flags = ("--max-concurrency", "2", "--max-model-len", "2048", "--max-num-seqs", "16")
    env = {"FD_LITE_LOG_FORMAT": "json", "FD_LOG_REQUESTS_LEVEL": "1"}
    prefix = ("prlimit", "--nofile=400:400")
    folder = tmp_path_factory.mktemp("small")
    with running_server(folder, flags, env=env, prefix=prefix) as server:
        yield server


# The event loop and memory ----------------------------------------------------------------------


def ids(count: int) -> str:
    return "[" + ",".join(["4321"] * count) + "]"


def members(count: int) -> str:
    return "{" + ",".join(f'"k{i}":1' for i in range(count)) + "}"


BODIES: dict[str, tuple[str, str]] = {
    "floats": (COMPLETION, '{"prompt":[' + "1.5," * VALUES + "1]}"),
    "ids": (COMPLETION, '{"prompt":' + ids(VALUES) + "}"),
    "ids as messages": (CHAT, '{"messages":' + ids(VALUES) + "}"),
    "lists": (COMPLETION, '{"prompt":[' + "[]," * (HEAVY - 100) + "[1]]}"),
    "objects": (CHAT, '{"messages":[' + "{}," * (HEAVY - 3000) + "{}]}"),
    "text": (COMPLETION, '{"prompt":"' + "x" * (BODY_BYTES - 50) + '"}'),
    "chinese": (CHAT, '{"messages":[{"role":"user","content":"' + "中" * (BODY_BYTES // 3 - 50)
                + '"}]}'),
    "emoji": (COMPLETION, '{"prompt":"' + "x" * (BODY_BYTES // 2 - 50) + '😀"}'),
    "escapes": (COMPLETION, '{"prompt":"' + "\\u4e2d" * (BODY_BYTES // 6 - 50) + '"}'),
    "unknown field": (CHAT, json.dumps({**SHORT, "x": "y" * (BODY_BYTES - 200)})),
    "metadata": (CHAT, json.dumps(SHORT)[:-1] + ',"metadata":' + members(HEAVY // 2) + "}"),
    "schema": (CHAT, json.dumps(SHORT)[:-1] + ',"guided_json":' + members(HEAVY // 2) + "}"),
    "banned ids": (CHAT, json.dumps(SHORT)[:-1] + ',"bad_words_token_ids":' + ids(VALUES) + "}"),
    "stops": (CHAT, json.dumps(SHORT)[:-1] + ',"stop":[' + '"a",' * TEXTS + '"b"]}'),
    "choices": (CHAT, json.dumps(SHORT)[:-1] + ',"guided_choice":[' + '"a",' * TEXTS + '"b"]}'),
    "detokenize": ("/detokenize", '{"tokens":' + ids(VALUES) + "}"),
    "a thousand prompts": (COMPLETION, json.dumps({"max_tokens": 1, "prompt": ["a"] * 1024})),
    "items": (RESPONSES, json.dumps({"input": [HELLO[0]] * 9000, "max_output_tokens": 1})),
    "included": (RESPONSES, '{"input":"hi","include":[' + "1," * VALUES + "1]}"),
    "tools": (CHAT, json.dumps({**SHORT, "tools": [TOOL] * 6000})),
    "items' tools": (RESPONSES, '{"input":"hi","tools":[' + "{}," * (HEAVY - 3000) + "{}]}"),
    "side channel": (COMPLETION, '{"suffix":{"x":1},"prompt":' + ids(VALUES) + "}"),
    "aborted": ("/v1/abort_requests", '{"req_ids":[' + '"a",' * TEXTS + '"b"]}'),
    "half a pair behind ids": (COMPLETION, '{"prompt":' + ids(200_000) + ',"stop":"\\ud83d"}'),
    "half a pair behind texts": (CHAT, '{"messages":[' + '"a",' * TEXTS + '"\\ud83d"]}'),
    "half a pair in lists": (CHAT, '{"x":[' + "[[1]]," * (HEAVY // 3) + '"\\ud83d"]}'),
    "a number beyond range": (COMPLETION, '{"prompt":' + ids(200_000) + ',"seed":1e999}'),
    "floats as a bias": (CHAT, '{"messages":[],"logit_bias":{"1":[' + "1.23456," * VALUES + "1]}}"),
    "an id to escape": (CHAT, json.dumps({**SHORT, "request_id": UNPRINTABLE})),
    "a user to escape": (CHAT, json.dumps({**SHORT, "user": UNPRINTABLE})),
    "a model to escape": (CHAT, json.dumps({**SHORT, "model": UNPRINTABLE})),
    "a tool's name": (CHAT, json.dumps({**SHORT, "tools": [TOOL], "tool_choice": {
        "type": "function", "function": {"name": UNPRINTABLE}}})),
    "a role to escape": (CHAT, json.dumps({"messages": [{"role": UNPRINTABLE}]})),
    "a pattern": (CHAT, json.dumps({**SHORT, "guided_regex": UNPRINTABLE})),
    "tokenize": ("/tokenize", '{"prompt":"' + "hello " * (BODY_BYTES // 6 - 50) + '"}'),
}  # fmt: skip


class Watcher:
    """Asks for /health without pause and looks at the process's memory, beside a test."""

    def __init__(self, server: ServerProcess) -> None:
        self.stalls: list[float] = []
        self.most_bytes = 0
        self._told = 0
        self._process = psutil.Process(server.process.pid)
        self._port = server.port
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=f) for f in (self._probe, self._weigh)]

    def __enter__(self) -> Watcher:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def longest(self) -> float:
        """Longest wait for an answer since this was asked last, the present one included."""
        enough = len(self.stalls) + 1  # the one that is under way counts
        until(lambda: len(self.stalls) >= enough, every=0.001)
        longest = max(self.stalls[self._told :])
        self._told = len(self.stalls)
        return longest

    def _probe(self) -> None:
        with socket.create_connection(("127.0.0.1", self._port)) as probe:
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not self._stopping.is_set():
                started = time.perf_counter()
                probe.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                data = b""
                while b"\r\n\r\n" not in data:
                    data += probe.recv(4096)
                self.stalls.append(time.perf_counter() - started)
                time.sleep(0.001)

    def _weigh(self) -> None:
        while not self._stopping.is_set():
            self.most_bytes = max(self.most_bytes, self._process.memory_info().rss)
            time.sleep(0.005)


def post(server: ServerProcess, name: str) -> int:
    path, body = BODIES[name]
    header = {"content-type": "application/json"}
    return server.post(path, content=body.encode(), headers=header).status_code


@pytest.mark.parametrize("name", BODIES)
def test_no_allowed_body_holds_the_event_loop(server: ServerProcess, name: str) -> None:
    """At most 50 ms of its own time on an idle core, beyond what an idle loop is held meanwhile."""
    stalls = []
    for _ in range(6):
        with Watcher(server) as watcher:
            time.sleep(0.3)
            control = watcher.longest()
            before = slowdown()
            assert post(server, name) in (200, 400)
            stall = watcher.longest() - control
        stalls.append(stall / max(before, slowdown()) / handicap())
        if stalls[-1] <= 0.05:
            return
    raise AssertionError(f"{name}: the loop stood still for {min(stalls) * 1000:.0f} ms")


def test_no_allowed_body_costs_much_memory(server: ServerProcess) -> None:
    """At most four times a full body while it is served, and all of them together afterwards."""

    def rss() -> int:
        return int(psutil.Process(server.process.pid).memory_info().rss)

    for name in BODIES:
        post(server, name)  # the first round also buys what is kept
    first = rss()
    for name in BODIES:
        before = rss()
        with Watcher(server) as watcher:
            post(server, name)
        assert watcher.most_bytes - before <= 4 * BODY_BYTES, name
    assert rss() - first <= 4 * BODY_BYTES


def test_looping_templates_do_not_delay_plain_requests(server: ServerProcess) -> None:
    hostile = {"messages": HELLO, "chat_template": LOOP, "max_tokens": 1}
    with httpx.Client(base_url=server.url, timeout=120) as client:

        def loop() -> None:
            with contextlib.suppress(httpx.HTTPError):  # last in their lane, they may wait long
                client.post(CHAT, json=hostile)

        threads = [threading.Thread(target=loop) for _ in range(24)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        for _ in range(3):
            with promised(5):  # it was 87 s
                server.post(CHAT, json=SHORT).raise_for_status()
        for thread in threads:
            thread.join(180)


# Connections ------------------------------------------------------------------------------------


def connect(server: ServerProcess, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(data)
    return connection


def head(path: str, length: int = 100) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def test_clients_without_a_body_hold_no_place(small: ServerProcess) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect(small, head(CHAT)))
        time.sleep(0.2)
        assert small.post(CHAT, json=SHORT).status_code == 200


@pytest.mark.parametrize("data", [b"", b"POST / HT", head(CHAT)], ids=["silent", "head", "body"])
def test_many_idle_connections_leave_the_port_reachable(small: ServerProcess, data: bytes) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(600):  # more than the server has descriptors
            stack.enter_context(contextlib.closing(connect(small, data)))
        assert small.get("/health").status_code == 200
        assert small.post(CHAT, json=SHORT).status_code == 200


def test_unknown_routes_read_no_body(small: ServerProcess) -> None:
    with connect(small, head("/nope", 30 << 20)) as connection:
        connection.settimeout(PATIENCE)
        assert connection.recv(100).startswith(b"HTTP/1.1 404")


def test_a_disconnect_behind_a_pipelined_byte_ends_the_request(small: ServerProcess) -> None:
    body = json.dumps({"messages": HELLO, "min_tokens": 1900, "max_tokens": 1990}).encode()
    before = small.metric("fastdeploy:generation_tokens_total")
    connection = connect(small, head(CHAT, len(body)) + body)
    small.wait_running(1)
    connection.sendall(b"G")
    time.sleep(0.1)
    connection.close()
    small.wait_idle()
    assert small.metric("fastdeploy:generation_tokens_total") - before < 1900


# Ids and logs -----------------------------------------------------------------------------------


def test_requests_are_named_in_headers_and_logs(small: ServerProcess) -> None:
    secret = "xyzzy-secret"
    headers = {"X-Request-Id": "trace-7"}
    body = {"messages": [{"role": "user", "content": secret}], "max_tokens": 2, "user": "me",
            "bad_words": [secret]}  # fmt: skip
    for stream in (False, True):
        answer = small.post(CHAT, json={**body, "stream": stream}, headers=headers)
        assert answer.headers["x-request-id"] == "trace-7"
    evil = small.get("/health", headers={"X-Request-Id": "a b\x7f"})
    assert len(evil.headers["x-request-id"]) == 32  # not taken over

    def said() -> list[str]:
        """What the log says of these requests; its last line may be half there."""
        lines = (small.folder / "log" / "api_server.log").read_text().split("\n")[:-1]
        records = map(json.loads, lines)
        return [r["message"] for r in records if r.get("request_id") == "trace-7"]

    until(lambda: sum("Create chat request" in message for message in said()) == 2)
    small.says("trace-7")
    for file in [small.stderr_path, *(small.folder / "log").iterdir()]:
        assert secret not in file.read_text()


def test_logs_are_for_their_user_alone(small: ServerProcess) -> None:
    for file in (small.folder / "log").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((small.folder / "log").stat().st_mode) == 0o700


def test_a_stalled_stderr_stops_nobody(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        with running_server(tmp_path, ("--max-model-len", "512"), stderr=writer) as server:
            with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
                for _ in range(1500):  # far more than the pipe holds
                    assert client.get("/health").status_code == 200
                assert client.post(CHAT, json=SHORT).status_code == 200
            server.terminate()
            assert server.wait() == 0
    finally:
        os.close(reader)
        os.close(writer)


def test_stderr_on_a_full_disk_stops_nobody(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with running_server(tmp_path, ("--max-model-len", "512"), stderr=full) as server:
            with connect(server) as kept:  # one connection: it must not be reset
                for _ in range(3):
                    kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert kept.recv(4096).startswith(b"HTTP/1.1 200")
            server.terminate()
            assert server.wait() == 0
    finally:
        os.close(full)


def test_closed_standard_streams_are_no_sockets(tmp_path: Path) -> None:
    prefix = ("bash", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "bash")
    with running_server(tmp_path, ("--max-model-len", "512"), prefix=prefix) as server:
        assert server.post(CHAT, json=SHORT).status_code == 200
        server.terminate()
        assert server.wait() == 0


# TLS, proxies, starts that are refused ----------------------------------------------------------


def make_certificate(folder: Path) -> tuple[Path, Path]:
    key, certificate = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out",
         certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, certificate


def test_tls_root_path_and_cors(tmp_path: Path) -> None:
    key, certificate = make_certificate(tmp_path)
    flags = ("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--root-path", "/llm",
             "--allowed-origins", '["http://page.example"]', "--max-model-len", "512",
             "--api-key", "k", "--skip-port-check")  # fmt: skip
    server = ServerProcess(tmp_path / "s", *flags)
    try:
        base, context = (
            f"https://127.0.0.1:{server.port}",
            __import__("ssl").create_default_context(),
        )
        context.load_verify_locations(certificate)
        with httpx.Client(base_url=base, verify=context, timeout=PATIENCE) as client:

            def is_ready() -> bool:
                with contextlib.suppress(httpx.HTTPError):
                    return client.get("/health").status_code == 200
                return False

            until(is_ready, START_SECONDS, every=0.1, told=lambda: server.stderr)
            headers = {"Authorization": "Bearer k", "Origin": "http://page.example"}
            for prefix in ("", "/llm"):
                answer = client.post(prefix + CHAT, json=SHORT, headers=headers)
                assert answer.status_code == 200
                assert answer.headers["access-control-allow-origin"] == "http://page.example"
            asking = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST",
                      "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
            assert client.options(CHAT, headers=asking).status_code == 200
            other = client.options(CHAT, headers={**asking, "Origin": "http://evil.example"})
            assert "access-control-allow-origin" not in other.headers
            refused = client.get("/v1/models", headers={"Origin": "http://page.example"})
            assert refused.status_code == 401  # and the page may read why:
            assert "access-control-allow-origin" in refused.headers
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("flags", "env", "words"),
    [
        (("--api-key", ""), {}, "api_key is empty"),
        ((), {"FD_API_KEY": ","}, "FD_API_KEY"),
        (("--host", "192.0.2.1"), {}, "no such address"),
        (("--served-model-name", b"\xff"), {}, "is not UTF-8"),
        (("--model", "baidu/none"), {}, "pip install 'fastdeploy-lite[aistudio]'"),
    ],
)
def test_starts_that_are_refused_say_why(
    tmp_path: Path, flags: tuple[Any, ...], env: dict[str, str], words: str
) -> None:
    server = ServerProcess(tmp_path / "s", *flags, env=env)
    try:
        assert server.wait() != 0
        assert words in server.stderr.splitlines()[-1]
    finally:
        server.kill()


def test_variables_without_a_meaning_are_named(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, "--host", "192.0.2.1", env={"FD_LOG_DIRECTORY": "x"})
    try:
        server.wait()
        assert "without a meaning here: FD_LOG_DIRECTORY" in server.stderr
    finally:
        server.kill()


# Batches and consoles ---------------------------------------------------------------------------


def run_cli(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> Any:
    command = [sys.executable, "-m", "fastdeploy_lite.entrypoints.cli.main", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(env), capture_output=True, timeout=300, check=False
    )


def test_a_batch_survives_its_worst_line(tmp_path: Path) -> None:
    good = '{"custom_id": "a%d", "method": "POST", "url": "%s", "body": %s}'
    body = json.dumps({"messages": HELLO, "max_tokens": 2})
    lines = [
        (good % (0, CHAT, body)).encode(),
        (good % (1, CHAT, body.replace("hi", "\\ud83d"))).encode(),
        b'{"custom_id": "\\udfff", "url": "' + CHAT.encode() + b'", "body": {}}',
        b'{"custom_id": "\xff", "url": "x", "body": {}}',
        b"\xff\xfe",
        b"[" * 5000,
        b'{"custom_id": "b", "url": "/v1/chat/completions", "body": 7}',
        b'{"custom_id": "c", "url": "/v1/chat/completions", "body": {"seed": 1e999}}',
        (good % (9, CHAT, body)).encode(),
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    done = run_cli(tmp_path, "run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", "demo",
                   "--max-model-len", "512")  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(answers) == len(lines)
    assert [a["error"] is None for a in answers] == [True] + [False] * 7 + [True]
    assert "messages[0].content" in str(answers[1]["error"])


def test_consoles_that_are_not_utf8_see_escapes(tmp_path: Path) -> None:
    env = {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = run_cli(tmp_path, "tokenizer", "--model", "demo", "--encode", "李白", env=env)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    done = run_cli(tmp_path, "generate", "李白", "--max-tokens", "3", env=env)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
