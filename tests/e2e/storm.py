"""A storm of clients: mixed lengths, some killed at random moments, some malformed.

`python tests/e2e/storm.py --clients 300 --seconds 180` starts a server of the demo model, on the
card if there is one (with FD_DETERMINISTIC_MODE=1: answers would depend on their company), and
checks that nothing is lost: every surviving answer equals the answer of a lone run, every malformed
request is refused, all KV blocks return, and memory does not grow. Flags of the server follow `--`,
as `-- --speculative-config '{"method": "suffix"}'`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from server_process import ServerProcess, running_server

CHAT = "/v1/chat/completions"
KILLED, MALFORMED = 0.3, 0.1
WORDS = ("moon", "river", "李白", "月", "wind", "山", "old", "friend", "酒", "time", "水", "春")
FLAGS = ("--max-model-len", "1024", "--max-num-seqs", "32", "--max-concurrency", "1024",
         "--num-gpu-blocks-override", "160")  # fmt: skip
BROKEN: list[bytes] = [
    b"{", b"[1]", b'{"messages": 3}', b'{"messages": [], "max_tokens": 3}', b"\xff\xfe",
    b'{"messages": [{"role": "user", "content": "x"}], "top_p": 9}',
    b'{"messages": [{"role": "user", "content": "x"}], "guided_regex": "("}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0, "stream": true}',
]  # fmt: skip


def make_bodies(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    bodies = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.choice((1, 5, 20, 80, 300)))
        bodies.append(
            {
                "messages": [{"role": "user", "content": " ".join(words)}],
                "temperature": 0,
                "max_tokens": rng.choice((1, 4, 16, 48, 96)),
                "stream": rng.random() < 0.6,
            }
        )
    return bodies


async def read_answer(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """The text and finish reason of an answer."""
    if not body["stream"]:
        choice = (await client.post(CHAT, json=body)).raise_for_status().json()["choices"][0]
        return f"{choice['message']['content']}|{choice['finish_reason']}"
    text, reason = "", None
    async with client.stream("POST", CHAT, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith('data: {"error"'):
                raise AssertionError(line)
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text += choice["delta"]["content"] or ""
                reason = choice.get("finish_reason", reason)
    return f"{text}|{reason}"


class Storm:
    """All clients of one storm."""

    def __init__(self, client: httpx.AsyncClient, bodies: list[dict[str, Any]], seed: int) -> None:
        self.client = client
        self.bodies = bodies
        self.seed = seed
        self.expected: list[str] = []
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    async def lone_runs(self) -> None:
        for body in self.bodies:
            self.expected.append(await read_answer(self.client, body))

    async def run(self, clients: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        await asyncio.gather(*(self._client(number, deadline) for number in range(clients)))

    async def _client(self, number: int, deadline: float) -> None:
        rng = random.Random(self.seed * 1000 + number)
        await asyncio.sleep(rng.random())
        while time.monotonic() < deadline:
            kind = rng.random()
            try:
                if kind < MALFORMED:
                    await self._malformed(rng)
                elif kind < MALFORMED + KILLED:
                    await self._killed(rng)
                else:
                    await self._whole(rng)
            except (httpx.HTTPError, AssertionError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")

    async def _malformed(self, rng: random.Random) -> None:
        headers = {"content-type": "application/json"}
        answer = await self.client.post(CHAT, content=rng.choice(BROKEN), headers=headers)
        assert answer.status_code == 400, f"{answer.status_code} {answer.text[:200]}"
        self.counts["refused"] += 1

    async def _killed(self, rng: random.Random) -> None:
        body = {**rng.choice(self.bodies), "max_tokens": 400, "min_tokens": 300}
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read_answer(self.client, body), rng.random() * 2)
        self.counts["killed"] += 1

    async def _whole(self, rng: random.Random) -> None:
        number = rng.randrange(len(self.bodies))
        answer = await read_answer(self.client, self.bodies[number])
        expected = self.expected[number]
        assert answer == expected, f"body {number}: {answer!r} is not {expected!r}"
        self.counts["equal"] += 1


def memory(server: ServerProcess) -> dict[str, int]:
    """Resident bytes of the HTTP process and of the engine."""
    return {
        "http": psutil.Process(server.process.pid).memory_info().rss,
        "engine": server.engine().memory_info().rss,
    }


async def storm(url: str, clients: int, seconds: float, bodies: int, seed: int) -> Storm:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        one = Storm(client, make_bodies(bodies, seed), seed)
        await one.lone_runs()
        await one.run(clients, seconds)
        return one


def check(
    server: ServerProcess, clients: int, seconds: float, bodies: int, seed: int = 0
) -> dict[str, Any]:
    """Run a storm and assert that nothing was lost.

    Returns:
        Counts and memory before and after.
    """
    warm = asyncio.run(storm(server.url, clients, min(seconds / 4, 15.0), bodies, seed))
    assert not warm.failures, warm.failures[:5]
    server.wait_idle()
    before = memory(server)
    result = asyncio.run(storm(server.url, clients, seconds, bodies, seed))
    assert not result.failures, result.failures[:5]
    assert all(result.counts[kind] for kind in ("equal", "killed", "refused")), result.counts
    server.wait_idle()
    after = memory(server)
    for name, size in after.items():
        # A leak grows with the number of requests; allocators keep some tens of MiB.
        assert size - before[name] < (64 << 20), f"{name}: {before[name]} -> {size} bytes"
    assert len(server.engine().threads()) < 128
    return {"counts": dict(result.counts), "before": before, "after": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--bodies", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="of the server, behind --")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(
            Path(folder), (*FLAGS, *arguments.flags), env={"FD_DETERMINISTIC_MODE": "1"}
        ) as server,
    ):
        report = check(
            server,
            arguments.clients,
            arguments.seconds,
            arguments.bodies,
            arguments.seed,
        )
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
