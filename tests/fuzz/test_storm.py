"""Everything at once, on a pool of KV blocks so small that sequences are preempted.

Constraints, several choices, logprobs, stop lists, tools, echo, streams, speculation; some clients
leave, some requests are aborted by name, and sometimes the service is paused. Every answer that was
let finish equals its lone run; afterwards nothing runs, all blocks are free, and memory has not
grown. `FD_LITE_STORM_SECONDS=1800` makes it a soak: its minutes are printed with `-s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from http_messages import CHAT, COMPLETION, RESPONSES
from server_process import ServerProcess, running_server

SECONDS = float(os.environ.get("FD_LITE_STORM_SECONDS", "12"))
CLIENTS = 12
REPORT_SECONDS = 60.0
LEFT, ABORTED, REFUSED = 0.15, 0.05, 0.05  # shares of the requests
PAUSE_EVERY = min(SECONDS / 2, 60.0)
FLAGS = ("--max-model-len", "512", "--max-num-seqs", "16", "--enable-logprob",
         "--num-gpu-blocks-override", "14", "--reasoning-parser", "think",
         "--tool-call-parser", "hermes")  # fmt: skip
WORDS = ["moon", "river", "李白", "月", "wind", "山", "old", "friend", "酒", "time", "水", "春"]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8},
          "yes": {"type": "boolean"}}, "required": ["name", "yes"]}  # fmt: skip
FEATURES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {}),
    (CHAT, {"max_tokens": 200, "min_tokens": 150}),
    (CHAT, {"n": 3, "temperature": 0.8}),
    (CHAT, {"logprobs": True, "top_logprobs": 5}),
    (CHAT, {"guided_json": SCHEMA}),
    (CHAT, {"guided_regex": "[a-f]{3,9}", "n": 2, "temperature": 1}),
    (CHAT, {"guided_choice": ["yes", "no", "</s>"], "logprobs": True}),
    (CHAT, {"tools": [TOOL], "tool_choice": "required"}),
    (CHAT, {"stop": ["e", "的", "a b"], "temperature": 1, "max_tokens": 100}),
    (CHAT, {"bad_words": ["the", "月"], "logit_bias": {"300": 5}, "frequency_penalty": 1}),
    (CHAT, {"repetition_penalty": 1.3, "top_k": 20, "top_p": 0.9, "temperature": 1.2}),
    (COMPLETION, {"echo": True, "logprobs": 3, "max_tokens": 8}),
    (COMPLETION, {"prompt": ["a", "moon " * 60, "月" * 30], "n": 2, "temperature": 0.5}),
    (COMPLETION, {"prompt_logprobs": 2, "return_token_ids": True}),
    (COMPLETION, {"response_format": {"type": "json_object"}, "max_tokens": 30}),
    (RESPONSES, {"max_output_tokens": 40}),
]
BROKEN = [b"{", b"\xff", b'{"messages": []}', b'{"messages": 3, "prompt": 3, "input": 3}']


def make_bodies() -> list[tuple[str, dict[str, Any]]]:
    """Each feature streamed and whole, on prompts of several lengths."""
    bodies = []
    for number, (path, fields) in enumerate(FEATURES * 2):
        rng = random.Random(number)
        text = " ".join(rng.choices(WORDS, k=rng.choice((1, 10, 60))))
        body: dict[str, Any] = {"temperature": 0, "seed": number, "max_tokens": 40}
        if path == CHAT:
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["input" if path == RESPONSES else "prompt"] = text
        bodies.append((path, {**body, **fields, "stream": number >= len(FEATURES)}))
    return bodies


# What stays the same between two runs of one request.
VARYING = {
    "id", "created", "created_at", "completed_at", "arrival_time", "usage", "item_id",
    "sequence_number", "call_id", "speculate_metrics",
}  # fmt: skip


def stable(value: Any) -> Any:
    """A value without ids, times and counts of the cache."""
    if isinstance(value, dict):
        return {k: stable(v) for k, v in value.items() if k not in VARYING}
    return [stable(item) for item in value] if isinstance(value, list) else value


def joined(events: list[dict[str, Any]]) -> Any:
    """What a stream said, whatever the cuts between its chunks."""
    if any("type" in event for event in events):  # the Responses form: the last event says it all
        return stable(events[-1].get("response"))
    parts: dict[tuple[int, str], str] = {}

    def collect(index: int, path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if key not in VARYING and key != "index":
                    collect(index, f"{path}.{key}", item)
        elif isinstance(value, list):
            for item in value:
                collect(index, path, item)
        elif value is not None:
            parts[index, path] = parts.get((index, path), "") + str(value)

    for event in events:
        for choice in event.get("choices", ()):
            choice.get("delta", {}).pop("role", None)
            collect(choice["index"], "", choice)
    return parts


def is_cut(answer: Any) -> bool:
    """Whether an abort or a pause ended it."""
    text = json.dumps(answer, default=str) if not isinstance(answer, dict) else str(answer)
    return "'abort'" in text or "'incomplete'" in text or "'cancelled'" in text


class Storm:
    """All clients of one storm.

    Args:
        server: The server.
        client: For all requests.
    """

    def __init__(self, server: ServerProcess, client: httpx.AsyncClient) -> None:
        self.bodies = make_bodies()
        self.expected: list[Any] = []
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._server = server
        self._client = client
        self._pauses = 0
        self._paused = False
        self._names = 0

    async def ask(self, number: int, name: str = "") -> Any:
        """The answer of a body; None when the service was paused."""
        path, body = self.bodies[number]
        body = {**body, "request_id": name} if name else body
        if not body["stream"]:
            answer = await self._client.post(path, json=body)
            if answer.status_code == 503:
                return None
            assert answer.status_code == 200, f"{answer.status_code} {answer.text[:300]}"
            return stable(answer.json())
        events = []
        async with self._client.stream("POST", path, json=body) as answer:
            if answer.status_code == 503:
                return None
            assert answer.status_code == 200, f"{answer.status_code}"
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line[6:]))
        error = events[-1].get("error")
        if error and "paused" in error["message"]:
            return None
        assert not error, error
        return joined(events)

    async def lone_runs(self) -> None:
        """Note what each body answers alone."""
        for number in range(len(self.bodies)):
            self.expected.append(await self.ask(number))

    async def run(self, seconds: float) -> None:
        """Let all clients loose."""
        end = time.monotonic() + seconds
        clients = [self._client_loop(number, end) for number in range(CLIENTS)]
        await asyncio.gather(*clients, self._pauser(end), self._reporter(end))

    async def _client_loop(self, number: int, end: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < end and len(self.failures) < 10:
            kind, body = rng.random(), rng.randrange(len(self.bodies))
            try:
                if kind < REFUSED:
                    await self._refused(rng)
                elif kind < REFUSED + LEFT:
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self.ask(body), rng.random())
                    self.counts["left"] += 1
                elif kind < REFUSED + LEFT + ABORTED:
                    await self._aborted(body, rng.random())
                else:
                    await self._whole(body)
            except (httpx.HTTPError, AssertionError, KeyError, IndexError) as error:
                path, fields = self.bodies[body]
                shown = f"{type(error).__name__}: {error}"
                self.failures.append(f"{path} {fields}: {shown[:1500]}")

    async def _refused(self, rng: random.Random) -> None:
        headers = {"content-type": "application/json"}
        path = rng.choice((CHAT, COMPLETION, RESPONSES))
        pauses, paused = self._pauses, self._paused
        answer = await self._client.post(path, content=rng.choice(BROKEN), headers=headers)
        if answer.status_code == 503 and (paused or self._pauses > pauses):
            self.counts["paused"] += 1  # the door is closed before anybody reads the body
            return
        assert answer.status_code == 400, f"{answer.status_code} {answer.text[:200]}"
        self.counts["refused"] += 1

    async def _aborted(self, body: int, after: float) -> None:
        self._names += 1
        name = f"storm-{self._names}"
        asking = asyncio.ensure_future(self.ask(body, name))
        await asyncio.sleep(after)
        await self._client.post("/v1/abort_requests", json={"req_ids": [name]})
        answer = await asking
        self.counts["aborted" if is_cut(answer) else "aborted too late"] += 1

    async def _whole(self, body: int) -> None:
        pauses, paused = self._pauses, self._paused
        answer = await self.ask(body)
        if answer == self.expected[body]:
            self.counts["equal"] += 1
            return
        assert answer is None or is_cut(answer), f"{answer}\nis not\n{self.expected[body]}"
        assert paused or self._pauses > pauses, f"cut without a pause: {answer}"
        self.counts["paused"] += 1
        await asyncio.sleep(0.1)

    async def _pauser(self, end: float) -> None:
        while time.monotonic() + PAUSE_EVERY < end:
            await asyncio.sleep(PAUSE_EVERY)
            self._pauses += 1
            self._paused = True
            (await self._client.post("/v1/pause")).raise_for_status()
            await asyncio.sleep(0.2)
            (await self._client.post("/v1/resume")).raise_for_status()
            self._paused = False

    async def _reporter(self, end: float) -> None:
        started = time.monotonic()
        while time.monotonic() + REPORT_SECONDS < end:
            await asyncio.sleep(REPORT_SECONDS)
            minute = (time.monotonic() - started) / 60
            sizes = {name: size >> 20 for name, size in memory(self._server).items()}
            print(f"minute {minute:.0f}: MiB {sizes} {dict(self.counts)}", flush=True)


def memory(server: ServerProcess) -> dict[str, int]:
    """Resident bytes of the HTTP process and of the engine."""
    http = psutil.Process(server.process.pid).memory_info().rss
    return {"http": http, "engine": server.engine().memory_info().rss}


async def storm(server: ServerProcess, seconds: float) -> Storm:
    """Lone runs, then a storm."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        one = Storm(server, client)
        await one.lone_runs()
        await one.run(seconds)
        return one


@pytest.fixture(params=["ngram", "suffix"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server that guesses, with blocks for fewer sequences than it runs."""
    guesses = json.dumps({"method": request.param, "adaptive": False})
    folder = tmp_path_factory.mktemp(request.param)
    flags = (*FLAGS, "--speculative-config", guesses)
    # Nothing is kept free for the sequences that run: they are preempted when they grow.
    with running_server(folder, flags, env={"FD_ENC_DEC_BLOCK_NUM": "0"}) as process:
        yield process


@pytest.mark.timeout(7200)
def test_storm_of_everything(server: ServerProcess) -> None:
    warm = asyncio.run(storm(server, min(SECONDS / 4, 60)))
    assert not warm.failures, "\n".join(warm.failures)
    server.wait_idle()
    before = memory(server)
    one = asyncio.run(storm(server, SECONDS))
    server.wait_idle()
    after = memory(server)
    preempted = server.metric("fastdeploy:request_preempted_total")
    print(f"{dict(one.counts)}, {preempted:.0f} preemptions; bytes {before} -> {after}")
    assert not one.failures, "\n".join(one.failures)
    assert preempted > 0
    assert all(one.counts[kind] for kind in ("equal", "left", "refused")), one.counts
    for name, size in after.items():
        # A leak grows with the number of requests; allocators keep some tens of MiB.
        assert size - before[name] < (64 << 20), f"{name}: {before[name]} -> {size} bytes"
