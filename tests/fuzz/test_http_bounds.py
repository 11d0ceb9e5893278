"""Values at and beyond every bound, in every field, in bodies that a schema would never make.

Extreme numbers, text that is none (lone surrogates) or that looks like control tokens, lists and
bodies one below, at and one above each limit, on every route and every port. No 5xx but the
documented ones, no hang, no broken connection, and the same answer afterwards. The suite sends some
hundreds; `FD_LITE_FUZZ_REQUESTS=20000` that many, from number `FD_LITE_FUZZ_FIRST` on.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from http_messages import COMPLETION, message
from server_process import ServerProcess, free_port, running_server

REQUESTS = int(os.environ.get("FD_LITE_FUZZ_REQUESTS", "400"))
FIRST = int(os.environ.get("FD_LITE_FUZZ_FIRST", "0"))
DOCUMENTED = {501, 503}
SLOWEST_SECONDS = float(os.environ.get("FD_LITE_FUZZ_SLOWEST", "60"))  # on a busy machine: more
FLAGS = ("--max-model-len", "96", "--max-num-seqs", "16", "--enable-logprob",
         "--num-gpu-blocks-override", "64", "--reasoning-parser", "think",
         "--tool-call-parser", "hermes")  # fmt: skip
PROBE = {"prompt": "hello", "max_tokens": 12, "temperature": 0}


class Storm:
    """Sends requests by number and keeps what went wrong.

    Args:
        urls: Of the ports, by their names in a message.
    """

    def __init__(self, urls: dict[str, str]) -> None:
        self.statuses: Counter[int] = Counter()
        self.failures: list[str] = []
        self._urls = urls
        # Many threads, each request over a connection of its own: one may break.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(timeout=SLOWEST_SECONDS, limits=limits)

    def send(self, number: int) -> None:
        """Send the request of that number."""
        one = message(number)
        shown = f"request {number}: {one.method} {one.path[:80]} {one.data[:300]!r}"
        # Bytes, because some values are outside of ASCII.
        headers = [(name, value.encode("latin-1")) for name, value in one.headers.items()]
        started = time.monotonic()
        try:
            url = self._urls[one.port] + one.path
            answer = self._client.request(one.method, url, content=one.data, headers=headers)
        except httpx.HTTPError as error:
            self.failures.append(f"{shown}: {type(error).__name__}: {error}")
            return
        self.statuses[answer.status_code] += 1
        bad = answer.status_code >= 500 and answer.status_code not in DOCUMENTED
        # In a stream, too.
        if bad or "internal_error" in answer.text or time.monotonic() - started > SLOWEST_SECONDS:
            self.failures.append(f"{shown}: {answer.status_code} {answer.text[:300]}")


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    return {"metrics": free_port(), "controller": free_port()}


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, ports: dict[str, int]
) -> Iterator[ServerProcess]:
    """A server whose answers are short."""
    flags = (*FLAGS, "--metrics-port", str(ports["metrics"]),
             "--controller-port", str(ports["controller"]))  # fmt: skip
    with running_server(tmp_path_factory.mktemp("bounds"), flags) as process:
        process.metrics_port = ports["metrics"]
        yield process


@pytest.mark.timeout(14400)
def test_bounds(server: ServerProcess, ports: dict[str, int]) -> None:
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    before = httpx.post(f"{server.url}{COMPLETION}", json=PROBE, timeout=SLOWEST_SECONDS).json()[
        "choices"
    ]
    engine = server.engine().pid
    storm = Storm({"port": server.url, **urls})
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(storm.send, range(FIRST, FIRST + REQUESTS)):
            if len(storm.failures) > 20:
                pool.shutdown(cancel_futures=True)
                break
    print(dict(storm.statuses))
    assert not storm.failures, "\n".join([str(dict(storm.statuses)), *storm.failures])
    assert storm.statuses[200] > REQUESTS // 20, storm.statuses
    assert storm.statuses[400] > REQUESTS // 20, storm.statuses
    server.wait_idle()
    assert server.engine().pid == engine
    assert (
        httpx.post(f"{server.url}{COMPLETION}", json=PROBE, timeout=SLOWEST_SECONDS).json()[
            "choices"
        ]
        == before
    )
