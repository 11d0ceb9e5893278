"""How fast this machine is just now: limits in seconds are stated for an idle core of a server.

A test that holds a limit which its machine cannot change says nothing about the code: a core shared
with strangers may run at a third of its speed for minutes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

WORK_SECONDS = 0.2e-3  # of `work` on an idle core of a server of 2023, Python 3.11


def work() -> None:
    """Plain Python as an engine step is made of: objects, dictionaries, lists, small integers."""
    table = {number: [number] for number in range(1000)}
    for number in range(1000):
        table[number].append(len(table[number]) + number)
    sorted(table.values(), key=lambda item: -item[1])


def work_seconds() -> float:
    """One measurement of `work`: take the same quantile of many as of what it is compared with."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def handicap(seconds: float | None = None) -> float:
    """How many times slower than stated this machine is, at least 1; `seconds` are of `work`."""
    if seconds is None:
        seconds = sorted(work_seconds() for _ in range(30))[15]
    return max(seconds / WORK_SECONDS, 1.0)


def slowdown() -> float:
    """How much longer than its own time a computation takes here, because others compute too."""
    wall, own = time.perf_counter(), time.thread_time()
    while time.thread_time() - own < 0.05:
        sum(range(1000))
    return max((time.perf_counter() - wall) / (time.thread_time() - own), 1.0)


@contextlib.contextmanager
def promised(seconds: float) -> Iterator[None]:
    """Hold a block to what is promised for a machine of one's own, as far as others leave it so."""
    busy, started = slowdown(), time.monotonic()
    yield
    spent = time.monotonic() - started
    assert spent < seconds * max(busy, slowdown()), f"{spent:.2f} s instead of {seconds:g} s"
