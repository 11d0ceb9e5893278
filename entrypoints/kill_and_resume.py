#!/usr/bin/env python3
"""Kill `fastdeploy-lite quantize` in the middle and show that it goes on to the same bytes.

    python entrypoints/kill_and_resume.py --model DIR --work DIR --after 1 -- --scheme 2bits

What follows `--` goes to quantize. The model is quantised once undisturbed and once killed
(SIGKILL) as soon as decoder layer `--after` is kept, then started again. Printed are wall time,
processor time, peak memory and bytes written of every run; the exit status is 1 if a file differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Run:
    """One process: how it ended and what it took."""

    status: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    written_bytes: int

    def line(self, name: str) -> str:
        """A row of the table."""
        return (
            f"| {name} | {self.seconds:.0f} | {self.cpu_seconds:.0f} "
            f"| {self.peak_bytes / 2**30:.2f} | {self.written_bytes / 2**30:.2f} |"
        )


def quantize(model: Path, output: Path, options: list[str], kill_at: Path | None = None) -> Run:
    """Run quantize to its end, or until the file `kill_at` is there."""
    command = [
        *[sys.executable, "-m", "fastdeploy_lite", "quantize", "--quiet"],
        *["--model", str(model), "--output", str(output), *options],
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    written, status = 0, 0
    while True:
        written = max(written, _written(process.pid))
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        if kill_at is not None and kill_at.exists():
            os.kill(process.pid, signal.SIGKILL)
            kill_at = None
        time.sleep(POLL_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here
    return Run(
        process.returncode,
        time.perf_counter() - started,
        used.ru_utime + used.ru_stime,
        used.ru_maxrss * 1024,
        written,
    )


def _written(pid: int) -> int:
    """Bytes that a process has handed to `write`; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/io").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(fields[fields.index("wchar:") + 1])


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights and config.json of a model."""
    found = {}
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        found[path.name] = digest.hexdigest()
    return found


def main() -> int:
    """Run all three."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="bf16 model")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--after", type=int, default=1, metavar="LAYER", help="kept before it dies")
    parser.add_argument("options", nargs="*", help="of quantize, after --")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    whole, cut = args.work / "whole", args.work / "cut"
    kept = args.work / "cut.unfinished" / f"layer-{args.after:05d}.json"
    print("| run | s | processor s | peak GiB | written GiB |\n|---|---|---|---|---|")
    undisturbed = quantize(args.model, whole, args.options)
    print(undisturbed.line("undisturbed"), flush=True)
    killed = quantize(args.model, cut, args.options, kept)
    print(killed.line(f"killed after layer {args.after}"), flush=True)
    resumed = quantize(args.model, cut, args.options)
    print(resumed.line("started again"), flush=True)
    if (undisturbed.status, killed.status, resumed.status) != (0, -signal.SIGKILL, 0):
        print(f"status {undisturbed.status}, {killed.status}, {resumed.status}", file=sys.stderr)
        return 1
    same = digests(whole) == digests(cut)
    print(f"\n{'the same' if same else 'other'} bytes in {', '.join(digests(whole))}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
