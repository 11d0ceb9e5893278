"""All tests in two processes at a time, most of `tests/unit` and everything else, with one result.

    python tests/side_by_side.py

Tests of servers and ranks wait for processes that start and end: one pytest leaves half of two
cores idle. Each half is a whole pytest of its own; their outputs are shown one after the other, and
at the end what failed in either and the sum of both. Any signal that ends a program is handed on as
an interrupt, so that fixtures take down what they have started.

Products of numpy keep to a half's share of the cores: threads of OpenBLAS wait for one another in a
loop, which lasts where the other half runs on their core.

The exit status is 0 if both halves passed, 128 and the number of the signal that ended this
program, else that of the first half that did not pass, where a signal counts as in a shell.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import FrameType

UNIT = "tests/unit"
LENT = ("benchmarks", "deploy", "docs")
"""Folders of `tests/unit` that belong to the other half, so that both take about as long."""


def unit_tests() -> list[str]:
    """Files and folders of `tests/unit`, as pytest is to be told of them."""
    return sorted(f"{UNIT}/{path.name}" for path in Path(__file__).with_name("unit").iterdir())


HALVES = {
    "most of tests/unit": [UNIT, *(f"--ignore={UNIT}/{name}" for name in LENT)],
    "everything else": [
        "tests",
        *(f"--ignore={path}" for path in unit_tests() if Path(path).name not in LENT),
    ],
}
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_SECONDS = 0.2
BLAS_THREADS = "OPENBLAS_NUM_THREADS"
SHORT_SUMMARY = "short test summary info"
COLORS = re.compile(r"\x1b\[[\d;]*m")
LAST_LINE = re.compile(r"^=+ (\d+ \w+.*) in [\d.]+s\b.*=+$")
COUNT = re.compile(r"(\d+) ([a-z]+)")


class Half:
    """One pytest that writes to a file.

    Args:
        name: what its tests are called in the result.
        arguments: of pytest.
        log: written anew.
    """

    def __init__(self, name: str, arguments: list[str], log: Path) -> None:
        self.name = name
        self._log = log
        color = ["--color=yes"] if sys.stdout.isatty() else []
        command = [sys.executable, "-u", "-m", "pytest", *color, *arguments]
        share = max(1, len(os.sched_getaffinity(0)) // len(HALVES))
        with log.open("wb") as file:
            # A session of its own: Ctrl-C reaches it once, through this program.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, env={BLAS_THREADS: str(share), **os.environ},
            )  # fmt: skip

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def follow(self) -> None:
        """Show what it has written and go on to its end."""
        with self._log.open("rb") as file:
            while True:
                is_over = self._process.poll() is not None  # what it wrote last is read below
                shutil.copyfileobj(file, sys.stdout.buffer)
                sys.stdout.flush()
                if is_over:
                    return
                time.sleep(LOOK_SECONDS)

    @property
    def status(self) -> int:
        """The exit status as a shell has it; its process has ended."""
        code = self._process.returncode
        return 128 - code if code < 0 else code

    def lines(self) -> list[str]:
        """All it has written, without colors."""
        return COLORS.sub("", self._log.read_text(errors="replace")).splitlines()

    def counts(self) -> Counter[str] | None:
        """How many tests passed, failed and so on; None if it did not come to its last line."""
        found = LAST_LINE.match(next(filter(None, reversed(self.lines())), ""))
        if found is None:
            return None
        return Counter({word: int(count) for count, word in COUNT.findall(found[1])})

    def failures(self) -> list[str]:
        """Its lines about each test that failed."""
        lines = self.lines()
        starts = [i for i, line in enumerate(lines) if SHORT_SUMMARY in line]
        found = lines[starts[-1] :] if starts else []
        return [line for line in found if line.startswith(("FAILED ", "ERROR "))]


def told(counts: Counter[str]) -> str:
    """Counts in pytest's words, what went wrong first."""
    order = ("failed", "error", "errors", "passed")
    words = sorted(counts, key=lambda word: order.index(word) if word in order else len(order))
    return ", ".join(f"{counts[word]} {word}" for word in words)


def write_result(halves: list[Half], seconds: float) -> None:
    """What both found."""
    print(" both halves ".center(80, "="))
    total: Counter[str] = Counter()
    incomplete = []
    for half in halves:
        for line in half.failures():
            print(line)
        counts = half.counts()
        if counts is None:
            incomplete.append(f"no result of {half.name} (status {half.status})")
        else:
            print(f"{half.name}: {told(counts)}")
            total += counts
    result = ", ".join(filter(None, [*incomplete, told(total)]))
    print(f" {result} in {seconds:.0f}s ".center(80, "="), flush=True)


def main() -> int:
    """Run both halves; the exit status."""
    halves: list[Half] = []
    received: list[int] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        for half in halves:
            half.interrupt()

    for number in ENDINGS:
        # nohup ignores this one; a shell that starts a job ignores Ctrl-C, which tests need.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, hand_on)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, arguments) in enumerate(HALVES.items()):
            if not received:
                halves.append(Half(name, arguments, Path(folder) / f"{i}.log"))
        for half in halves:
            half.follow()
        write_result(halves, time.monotonic() - started)
    if received:
        return 128 + received[0]
    return next((half.status for half in halves if half.status), 0)


if __name__ == "__main__":
    sys.exit(main())
