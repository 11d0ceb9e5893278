"""A headless Chromium, where the machine has one, and a server that says what a test scripts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from server_process import free_port
from waiting import PATIENCE, until

from fastdeploy_lite.entrypoints.openai import web

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
MISSING = "needs Chromium: apt-get install chromium chromium-driver"


@contextlib.contextmanager
def browser(folder: Path, size: tuple[int, int] = (1280, 800), language: str = "en",
            dark: bool = False) -> Iterator[webdriver.Chrome]:  # fmt: skip
    """A browser with a fresh profile that reaches nothing but this machine."""
    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        f"--user-data-dir={folder}", f"--lang={language}", f"--accept-lang={language}",
        f"--window-size={size[0]},{size[1]}",
    ):  # fmt: skip
        options.add_argument(flag)
    if dark:
        options.add_argument("--force-dark-mode")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.execute_cdp_cmd("Emulation.setLocaleOverride", {"locale": language})
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600},
    )
    try:
        yield driver
    finally:
        driver.quit()


class ScriptedServer:
    """The real pages over an interface that answers what `answers` says.

    Attributes:
        answers: One list of deltas per request, used up in order; a float is a pause in seconds,
            a dict with "status" is a refusal, a string is content.
        requests: Bodies received.
        key: Accepted key; empty for none.
        metrics: Text of `/metrics`, or what makes it for each look; None answers 404.
        may_name_models: Cleared, `/v1/models` waits until it is set.
        left: How many streams were not read to their end.
    """

    def __init__(self) -> None:
        self.answers: list[list[Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.key = ""
        self.metrics: str | Callable[[], str] | None = ""
        self.may_name_models = threading.Event()
        self.may_name_models.set()
        self.left = 0
        self.port = free_port()
        self.app = FastAPI(docs_url=None, redoc_url=None)
        web.add_pages(self.app)
        self._add_routes()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _refused(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "Unauthorized"}}, 401)
        return None

    def _add_routes(self) -> None:
        app = self.app

        @app.get("/health")
        async def health() -> Response:
            return Response()

        @app.get("/version")
        async def version() -> dict[str, str]:
            return {"version": "0"}

        @app.get("/metrics")
        async def metrics() -> Response:
            if self.metrics is None:
                return PlainTextResponse("", 404)
            return PlainTextResponse(self.metrics() if callable(self.metrics) else self.metrics)

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            while not self.may_name_models.is_set():
                await asyncio.sleep(0.02)
            model = {"id": "scripted", "max_model_len": 1000}
            return self._refused(request) or JSONResponse({"data": [model]})

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            self.requests.append(await request.json())
            script = self.answers.pop(0)
            if isinstance(script[0], dict) and "status" in script[0]:
                error = {"error": {"message": script[0]["message"], "param": None}}
                return JSONResponse(error, script[0]["status"])
            return self._refused(request) or StreamingResponse(
                self._events(script), media_type="text/event-stream"
            )

    async def _events(self, script: list[Any]) -> AsyncIterator[bytes]:
        tokens, finish, whole = 0, "stop", False
        try:
            yield self._event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
            for part in script:
                if isinstance(part, float):
                    await asyncio.sleep(part)
                    continue
                delta = {"content": part} if isinstance(part, str) else part
                finish = "tool_calls" if "tool_calls" in delta else finish
                tokens += 1
                yield self._event({"choices": [{"index": 0, "delta": delta}]})
            end = {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
            yield self._event(end)
            usage = {
                "prompt_tokens": 200,
                "completion_tokens": tokens,
                "total_tokens": 200 + tokens,
                "prompt_tokens_details": {"cached_tokens": 128},
            }
            yield self._event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
            whole = True
        finally:
            self.left += not whole

    @staticmethod
    def _event(value: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(value).encode() + b"\n\n"


@contextlib.contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """A running `ScriptedServer`."""
    scripted = ScriptedServer()
    config = uvicorn.Config(scripted.app, "127.0.0.1", scripted.port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield scripted
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
