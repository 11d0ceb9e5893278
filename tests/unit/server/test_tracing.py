"""Spans of requests, with the SDK's own in-memory exporter and a collector of ours."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_middleware import drive

from fastdeploy_lite.entrypoints.openai import middleware, tracing
from fastdeploy_lite.entrypoints.openai.tracing import start_tracing
from fastdeploy_lite.utils.errors import ConfigError

pytest.importorskip("opentelemetry.sdk")
PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def generates(scope: Any, receive: Any, send: Any) -> None:
    now = time.time()
    tracing.note_phases("chatcmpl-1#0", (now - 3, now - 2, now - 1, now), 5)
    await middleware.refuse(send, 200, {})


def spans_in(folder: Path, env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    for name, value in {"FD_LOG_DIR": str(folder), **env}.items():
        monkeypatch.setenv(name, value)
    tracer = start_tracing()
    assert tracer is not None
    asyncio.run(drive(tracer.around(generates), headers=[(b"traceparent", PARENT)]))
    asyncio.run(drive(tracer.around(generates), method="GET"))
    tracer.close()
    monkeypatch.setattr(tracing, "_active", None)
    file = folder / "trace.log"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_request_is_a_span_below_its_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *phases, request = spans_in(tmp_path, {"FD_TRACE": "local"}, monkeypatch)
    assert [span["name"] for span in phases] == ["queue", "prefill", "decode"]
    assert request["name"] == "POST /v1/chat/completions"
    assert request["parent_id"] == "0xb7ad6b7169203331"
    assert request["attributes"]["http.response.status_code"] == 200
    assert all(span["parent_id"] == request["context"]["span_id"] for span in phases)
    assert phases[0]["attributes"]["fastdeploy.tokens"] == 5
    assert phases[0]["end_time"] == phases[1]["start_time"]


def test_spans_reach_a_collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str, str | None, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, self.headers["authorization"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        env = {"TRACES_ENABLE": "true", "TRACES_EXPORTER": "otlp", "FD_SERVICE_NAME": "mine",
               "EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
               "EXPORTER_OTLP_HEADERS": "Authorization=secret"}  # fmt: skip
        spans_in(tmp_path, env, monkeypatch)
        collector.shutdown()
    path, key, body = received[0]
    assert (path, key) == ("/v1/traces", "secret")
    assert b"POST /v1/chat/completions" in body
    assert b"mine" in body


def test_a_dead_collector_costs_spans_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"FD_TRACE": "otel", "TRACES_EXPORTER": "otlp",
           "EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}  # fmt: skip
    started = time.monotonic()
    spans_in(tmp_path, env, monkeypatch)
    assert time.monotonic() - started < 20


def test_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FD_TRACE", raising=False)
    assert start_tracing() is None
    tracing.note_phases("x", (0.0, 0.0, 0.0, 0.0), 1)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FD_TRACE", "otel")
    monkeypatch.setenv("TRACES_EXPORTER", "otlp")
    with pytest.raises(ConfigError, match="EXPORTER_OTLP_ENDPOINT"):
        start_tracing()
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace.export", None)
    monkeypatch.setenv("TRACES_EXPORTER", "console")
    with pytest.raises(ConfigError, match=r"fastdeploy-lite\[otel\]"):
        start_tracing()
