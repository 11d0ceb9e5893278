#!/usr/bin/env python3
"""Several cards for `bench_card.py`: a process each, and what their sums cost.

    python entrypoints/bench_ranks.py --tensor-parallel-size 2   # microseconds of a sum, alone

All ranks run the same script and the same steps; the first one prints.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdeploy_lite import device

ROWS = (1, 8, 64, 512, 4096)
SUMS = 20  # in one graph


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[Any]:
    """This rank's communicator, not yet opened, or None for one card; starts the other ranks.

    Args:
        args: with tensor_parallel_size, rank and memory_fd; the ranks beyond the first get the same
            command line with the last two.
    """
    size = args.tensor_parallel_size
    if size == 1:
        yield None
        return
    from fastdeploy_lite.distributed.communicator import (  # noqa: PLC0415
        SharedMemory,
        SharedMemoryCommunicator,
    )
    from fastdeploy_lite.distributed.nccl import NcclCommunicator  # noqa: PLC0415

    cards = device.visible_cards()
    if args.rank == 0 and len(cards) < size:
        raise SystemExit(f"{size} cards are needed, {len(cards)} can be seen")
    memory = SharedMemory(size, 1, args.memory_fd)
    others = []
    for rank in range(1, size if args.rank == 0 else 1):
        command = [sys.executable, *sys.argv, f"--rank={rank}", f"--memory-fd={memory.fd}"]
        env = {**os.environ, device.CARDS_VARIABLE: cards[rank]}
        env.pop("CUSTOM_DEVICE_ROOT", None)
        others.append(
            subprocess.Popen(command, env=env, pass_fds=(memory.fd,), stdout=subprocess.DEVNULL)
        )
    memory.close()
    try:
        yield Mute(NcclCommunicator(SharedMemoryCommunicator(memory, args.rank)))
        failed = [other.wait(60) for other in others]
        if any(failed):
            raise SystemExit(f"a rank ended with status {max(failed)}")
    finally:
        for other in others:
            other.kill()


class Mute:
    """A communicator that can be told to leave out every sum, for a step without them.

    Attributes:
        is_mute: whether sums and gathers do nothing.
    """

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.is_mute = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._communicator, name)

    def all_reduce(self, x: Any) -> None:
        """See Communicator."""
        if not self.is_mute:
            self._communicator.all_reduce(x)

    def all_gather(self, x: Any, widths: Sequence[int], out: Any) -> None:
        """See Communicator."""
        if not self.is_mute:
            self._communicator.all_gather(x, widths, out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `joined` reads."""
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1, help="cards")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--memory-fd", type=int, help=argparse.SUPPRESS)


def bench_sums(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds of one sum of [rows, hidden] bf16 in each way, see SumWay."""
    import numpy as np  # noqa: PLC0415

    from fastdeploy_lite.benchmarks.timing import graph_seconds, random_bf16  # noqa: PLC0415
    from fastdeploy_lite.model_executor import ops  # noqa: PLC0415
    from fastdeploy_lite.model_executor.ops import cuda_runtime  # noqa: PLC0415

    rows = []
    place = device.activate(0)
    with joined(args) as communicator:
        communicator.open(lambda: None)
        for count in ROWS:
            x = cuda_runtime.empty([count, args.hidden], "bfloat16", place)
            ops.upload(np.zeros_like(random_bf16(count * args.hidden)), x)

            def work(x: Any = x) -> None:
                for _ in range(SUMS):
                    communicator.all_reduce(x)

            row: dict[str, Any] = {"rows": count, "bytes": 2 * count * args.hidden}
            ways = ("shared memory", "NCCL", "gathered")
            for way in ways:
                communicator.set_way(way)
                seconds = graph_seconds(work, ready=lambda: communicator.agree(True))
                row[way] = statistics.median(seconds) / SUMS * 1e6
            rows.append(row)
            found = ", ".join(f"{way} {row[way]:.1f} us" for way in ways)
            print(f"{count:5d} x {args.hidden} bf16: {found}")
    return rows


def main() -> int:
    """Parse arguments, measure, print, and write --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    parser.add_argument("--hidden", type=int, default=8192, help="columns")
    parser.add_argument("--output", help="JSON file for the results")
    args = parser.parse_args()
    if not device.decide().is_cuda:
        print(f"no card to measure: {device.decide().reason}", file=sys.stderr)
        return 1
    rows = bench_sums(args)
    if args.output and args.rank == 0:
        Path(args.output).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
