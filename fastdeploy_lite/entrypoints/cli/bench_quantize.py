"""Time the 2-bit encoders, for a million weights, and say how far off they are."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.benchmarks import encoding
from fastdeploy_lite.entrypoints.cli.argument_types import output_file, positive
from fastdeploy_lite.quantization import card
from fastdeploy_lite.utils import blas
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import ConfigError, quote

_ROWS_MULTIPLE = 128
_HEAD = ("shape", "method", "ms", "from", "to", "processor ms", "error", "error of products")


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group("benchmark")
    add = group.add_argument
    add("--shape", type=_shape, default=(2560, 3072), metavar="K,N", help="of the matrix")
    add("--experts-of", choices=tuple(encoding.MODELS), default=None,
        help="both shapes of this model's experts, and the time for all of them")  # fmt: skip
    add("--device", choices=card.CHOICES, default="cpu", help="where codes are searched")
    add("--methods", type=_methods, default=encoding.METHODS,
        help=f"of {', '.join(encoding.METHODS)}")  # fmt: skip
    add("--distribution", choices=tuple(encoding.DISTRIBUTIONS), default="gaussian",
        help="of the weights; student-t: 5 degrees of freedom")  # fmt: skip
    add("--rounds", type=positive, default=3, help="encodings of the same matrix")
    add("--num-threads", type=positive, default=None, help="default: all CPUs")
    add("--json", type=output_file, default=None, metavar="FILE", help="write the result here")


def _shape(text: str) -> tuple[int, int]:
    sizes = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if len(sizes) != 2 or min(sizes) < 1 or sizes[0] % _ROWS_MULTIPLE:
        raise argparse.ArgumentTypeError(
            f"{quote(text)} is no K,N with K a multiple of {_ROWS_MULTIPLE}"
        )
    return sizes[0], sizes[1]


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if wrong := [name for name in names if name not in encoding.METHODS]:
        raise argparse.ArgumentTypeError(
            f"{quote(wrong[0])} is none of {', '.join(encoding.METHODS)}"
        )
    return names


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.num_threads is not None:
        _ops_cpu.set_num_threads(args.num_threads)
        blas.set_num_threads(args.num_threads)
    found_card, _ = card.find(args.device)
    place = f"{_ops_cpu.num_threads()} threads ({_ops_cpu.current_isa()})"
    print(
        f"{args.distribution}, {found_card.name if found_card else place}: milliseconds for a "
        f"million weights, median, fastest and slowest of {args.rounds} rounds\n"
    )
    print(f"| {' | '.join(_HEAD)} |\n|{'---|' * len(_HEAD)}", flush=True)
    model = encoding.MODELS.get(args.experts_of)
    shapes = (args.shape,) if model is None else model.shapes
    found, totals = [], []
    for method in args.methods:
        rows = []
        for k, n in shapes:
            row = encoding.measure(method, k, n, args.distribution, args.rounds, card=found_card)
            rows.append(row)
            print(f"| {' | '.join(_cells(row))} |", flush=True)
        found += rows
        if model is not None:
            totals.append(f"{method} {model.seconds(rows):,.0f} s")
    if model is not None:
        print(f"\nAll {model.count} experts of {args.experts_of}: {', '.join(totals)}")
    if args.json:
        text = json.dumps([dataclasses.asdict(row) for row in found], indent=1)
        try:
            Path(args.json).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {args.json}: {error.strerror}") from None
    return 0


def _cells(row: encoding.Row) -> tuple[str, ...]:
    times = (row.ms, row.low_ms, row.high_ms, row.cpu_ms)
    errors = (row.error, row.product_error)
    return (
        str(list(row.shape)),
        row.method,
        *(f"{ms:,.{0 if ms >= 10 else 2}f}" for ms in times),
        *(f"{e:.5f}" for e in errors),
    )
