"""Time the routed experts of a MoE layer beside what the machine can do at most."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdeploy_lite import device
from fastdeploy_lite.entrypoints.cli.argument_types import output_file
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import ConfigError, quote

if TYPE_CHECKING:
    from fastdeploy_lite.benchmarks.experts import Row

KINDS = ("ccq", "int4", "int8", "dense")
SHAPES = ("21b", "300b", "demo")
CARD_TOKENS = (1, 4, 8, 16, 64, 256, 1024, 4096)
CPU_TOKENS = (1, 4, 16, 64, 256)
_MAX_TOKENS = 1 << 16
_MODES = (
    "2-bit experts are timed with FD_DETERMINISTIC_MODE=0, the default, and as `ccq, deterministic`"
    " with 1 where results differ by it\n"
)
_COMPARED = (
    ("ccq", "int4"),
    ("ccq, deterministic", "int4"),
    ("ccq, deterministic", "ccq"),
)
_HEAD = ("weights", "tokens", "us", "from", "to", "GB/s", "of memory", "TFLOP/s", "of product")


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group("benchmark")
    add = group.add_argument
    add("--shape", choices=SHAPES, default="21b", help="whose MoE layer")
    add("--kinds", type=_kinds, default=("ccq", "int4"), help=f"of {', '.join(KINDS)}")
    add("--tokens", type=_tokens, default=None, help="sizes of the batch, for instance 1,16,256")
    add("--device", choices=("auto", "cpu"), default="auto", help="cpu leaves a card alone")
    add("--json", type=output_file, default=None, metavar="FILE", help="write the result here")
    add(
        "--plot",
        type=output_file,
        default=None,
        metavar="FILE",
        help="draw a roofline (.png, .svg, .pdf)",
    )


def _kinds(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if wrong := [name for name in names if name not in KINDS]:
        raise argparse.ArgumentTypeError(f"{quote(wrong[0])} is none of {', '.join(KINDS)}")
    return names


def _tokens(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
    if not all(0 < count <= _MAX_TOKENS for count in counts):
        raise argparse.ArgumentTypeError(f"{quote(text)} is no list of 1 to {_MAX_TOKENS} tokens")
    return counts


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    place = device.activate(0, args.device)
    from fastdeploy_lite.benchmarks import ceilings, experts, roofline  # noqa: PLC0415

    if args.plot:
        roofline.figure_class()  # missing: said before anything is measured
    most = ceilings.measure(place)
    shape = experts.SHAPES[args.shape]
    print(
        f"{most.device}: {most.bytes_per_second / 1e9:.1f} GB/s ({most.memory_kind}), "
        f"{most.flops_per_second / 1e12:.4g} TFLOP/s ({most.matmul_kind})\n"
        f"Routed experts of one {args.shape} layer ({shape.experts} of [{shape.hidden}, 2 x "
        f"{shape.inner}] and [{shape.inner}, {shape.hidden}], {shape.top_k} a token); uniform "
        "routing is given, new for every call, weights out of memory; median, fastest and slowest "
        "round\n"
    )
    if not place.is_cpu_place():
        print(_MODES)
    print(f"| {' | '.join(_HEAD)} |\n|{'---|' * len(_HEAD)}")
    rows: list[Row] = []
    tokens = args.tokens or (CPU_TOKENS if place.is_cpu_place() else CARD_TOKENS)
    for kind in args.kinds:
        for row in experts.measure(kind, shape, tokens, place, most):
            rows.append(row)
            print(f"| {' | '.join(_cells(row))} |", flush=True)
    _print_ratios(rows)
    if args.plot:
        roofline.draw(args.plot, f"{args.shape} experts, {most.device}", rows, most)
    _save(args.json, args.shape, most, rows)
    return 0


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        str(row.tokens),
        *(f"{us:,.1f}" for us in (row.us, row.low_us, row.high_us)),
        f"{row.nbytes / row.us / 1e3:,.1f}",
        f"{100 * row.memory_share:.0f} %",
        f"{row.flops / row.us / 1e6:.4g}",
        f"{100 * row.matmul_share:.0f} %",
    )


def _print_ratios(rows: Sequence[Row]) -> None:
    """2 bits against 4, and what their deterministic mode costs, where both were measured."""
    times = {(row.name, row.tokens): row.us for row in rows}
    for name, other in _COMPARED:
        ratios = [
            f"{us / times[other, tokens]:.2f} at {tokens}"
            for (found, tokens), us in times.items()
            if found == name and (other, tokens) in times
        ]
        if ratios:
            print(f"\n{name} over {other}: {', '.join(ratios)}")


def _save(path: str | None, shape: str, most: Any, rows: Sequence[Row]) -> None:
    if not path:
        return
    result = {
        "shape": shape,
        "ceilings": dataclasses.asdict(most),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    try:
        Path(path).write_text(json.dumps(result, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror}") from None
