#!/usr/bin/env python3
"""Quantise a bf16 model in many ways and measure each: the tables of docs/quantize.md.

    python entrypoints/quantization_table.py --model BF16 --text heldout.jsonl \
        --calibration calibration.jsonl --work DIR --every 7 -- --row-order natural

What follows `--` goes to every `quantize`. A row is named SCHEME-METHOD or SCHEME-METHOD-tune:
SCHEME is 2bits, w4w2 or wint4 (int4 experts), with -dense4 where the other linears are int4 instead
of int8; METHOD `nearest` (round to nearest, 2-bit in groups of 64 rows, kept as bf16), `data-free`,
or one of `--calibration-method`. Folders and figures stay in --work: what is there is not made
again, so rows can be added by starting it again with --rows. `--pair A,B` prints what B has less
than A, token by token on the same text. Intervals are 95 %, a bootstrap over windows; seconds are
those of processors, with the start of the program.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.calibration.encoder import METHODS, read_dense
from fastdeploy_lite.calibration.text import read_stream, windows
from fastdeploy_lite.checkpoint import Checkpoint, CheckpointWriter
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.entrypoints.evaluation import diverge_all, load_runner, mean_interval
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.quantization.convert import plan, target_config
from fastdeploy_lite.quantization.nearest import round_to_nearest
from fastdeploy_lite.quantization.output_folder import copy_companions
from fastdeploy_lite.utils.arrays import float32_to_bfloat16
from fastdeploy_lite.utils.errors import FastDeployError

SCHEMES: dict[str, tuple[Any, Any]] = {
    "2bits": ("2bits", "wint8"),
    "w4w2": ("w4w2", "wint8"),
    "wint4": ("wint4", "wint8"),
    "2bits-dense4": ("2bits", "wint4"),
    "w4w2-dense4": ("w4w2", "wint4"),
    "wint4-dense4": ("wint4", "wint4"),
}
"""Of a row's name: --scheme and --dense."""
NEAREST = "nearest"
NEAREST_BITS = 2 + 32 / 64
"""Two bits, and two bfloat16 for 64 rows."""
EXTRAS = ("hessian-tune", "corrected-tune")
DEFAULT_ROWS = [
    *(f"2bits-{method}" for method in (NEAREST, *METHODS, *EXTRAS)),
    *(f"{scheme}-{method}" for scheme in ("w4w2", "wint4-dense4") for method in METHODS),
]
HEAD = "| row | bits | nats over bf16 | KL | same top token | s |\n|---|---|---|---|---|---|"
VALUES = ("loss", "kl", "same")
Values = dict[str, list[npt.NDArray[np.float64]]]
"""Of every window, of every token: nats over bf16, nats from its distribution, same likeliest."""


@dataclass(frozen=True)
class Row:
    """One way to quantise."""

    scheme: str
    method: str
    tune: bool

    @classmethod
    def parse(cls, name: str) -> Row:
        """Of its name. Raises ArgumentTypeError."""
        methods = "|".join((NEAREST, *METHODS))
        found = re.fullmatch(f"({'|'.join(SCHEMES)})-({methods})(-tune)?", name)
        if found is None or (found[3] and found[2] in (NEAREST, METHODS[0])):
            raise argparse.ArgumentTypeError(f"found {name!r}, expected such as {DEFAULT_ROWS[-1]}")
        return cls(found[1], found[2], found[3] is not None)

    @property
    def name(self) -> str:
        """Also of its folder."""
        return f"{self.scheme}-{self.method}{'-tune' if self.tune else ''}"

    def options(self, args: argparse.Namespace) -> list[str]:
        """Of `quantize`, beside model and output."""
        scheme, dense = SCHEMES[self.scheme]
        found = ["--scheme", scheme, "--dense", dense]
        if scheme == "w4w2" and args.moe_w4_end_layer is not None:
            found += ["--moe-w4-end-layer", str(args.moe_w4_end_layer)]
        if self.method != METHODS[0]:
            found += ["--calibration", args.calibration, "--calibration-method", self.method]
            found += ["--calibration-tokens", str(args.calibration_tokens)]
            found += ["--seed", str(args.seed)]
        return [*found, *(["--tune"] if self.tune else []), *args.options]


def make(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Quantise one row where its folder is not complete: seconds by the clock and of processors.

    Raises CalledProcessError if quantize fails.
    """
    folder = args.work / row.name
    if (folder / "config.json").exists():
        return {}
    before, started = os.times(), time.perf_counter()
    if row.method == NEAREST:
        write_nearest(row, args.model, folder, args.moe_w4_end_layer)
    else:
        command = [sys.executable, "-m", "fastdeploy_lite", "quantize", "--quiet"]
        where = ["--model", str(args.model), "--output", str(folder)]
        subprocess.run([*command, *where, *row.options(args)], check=True)
    after = os.times()
    return {
        "seconds": time.perf_counter() - started,
        "processor": sum(after[:4]) - sum(before[:4]),
    }


def write_nearest(row: Row, model: Path, output: Path, w4_end_layer: int | None) -> None:
    """Write the bf16 model with every linear rounded to the nearest value of its format."""
    checkpoint = Checkpoint.open(model)
    scheme, dense = SCHEMES[row.scheme]
    end = w4_end_layer if scheme == "w4w2" else None
    config = target_config(checkpoint.config, scheme, end, "natural", None, dense)
    with CheckpointWriter(output, dict(checkpoint.config.raw)) as writer:
        for item in plan(checkpoint, config):
            if isinstance(item, str):
                source = checkpoint.get(item)
                writer.add(item, source.data, source.dtype)
                continue
            for linear in item:
                rounded = round_to_nearest(read_dense(checkpoint, linear), linear.kind)
                writer.add(f"{linear.module}.weight", float32_to_bfloat16(rounded), "BF16")
        copy_companions(model, output)  # before config.json, with which the folder is complete


def expert_bits(row: Row, folder: Path) -> float | None:
    """Bits that a weight of a routed expert takes in the files, scales included."""
    if row.method == NEAREST:
        return NEAREST_BITS if SCHEMES[row.scheme][0] == "2bits" else None
    checkpoint = Checkpoint.open(folder)
    modules = {
        linear.module: linear
        for linear in model_linears(checkpoint.config)
        if linear.expert is not None
    }
    keys = [key for key in checkpoint if key.rpartition(".")[0] in modules]
    nbytes = sum(checkpoint.get(key).data.nbytes for key in keys)
    checkpoint.release()
    weights = sum(linear.whole_in * sum(linear.segments) for linear in modules.values())
    return 8 * nbytes / weights


def measure(rows: Sequence[Row], args: argparse.Namespace) -> list[Values]:
    """Compare rows with bf16 on every token of the text; all are in memory at once."""
    tokenizer = Ernie4_5Tokenizer.from_pretrained(str(args.model))
    stream = read_stream(tokenizer, args.text, args.every)
    models = [args.model, *(args.work / row.name for row in rows)]
    reference, *runners = (load_runner(model, args.context, "cpu") for model in models)
    found: list[Values] = [{name: [] for name in VALUES} for _ in rows]
    for window in windows(stream, args.context, args.limit):
        for values, part in zip(found, diverge_all(runners, reference, window), strict=True):
            values["loss"].append(part.reference_logprobs - part.logprobs)
            values["kl"].append(part.kl)
            values["same"].append(part.same_top.astype(np.float64))
    return found


def complete(args: argparse.Namespace) -> None:
    """Make and measure in --work what is not there, or was measured on other text."""
    wanted = {name: str(getattr(args, name)) for name in ("text", "every", "limit", "context")}
    missing = []
    for row in args.rows:
        notes = read_notes(row, args) | make(row, args)
        write_notes(row, args, notes)
        if notes.get("measured") != wanted:
            missing.append(row)
    if not missing:
        return
    for row, values in zip(missing, measure(missing, args), strict=True):
        lengths = np.array([len(part) for part in values["kl"]])
        loss, kl, same = (np.concatenate(values[name]) for name in VALUES)
        np.savez(args.work / f"{row.name}.npz", lengths=lengths, loss=loss, kl=kl, same=same)
        bits = expert_bits(row, args.work / row.name)
        write_notes(row, args, read_notes(row, args) | {"measured": wanted, "bits": bits})


def read_notes(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """What --work knows of a row: seconds, bits, and the text that it was measured on."""
    file = args.work / f"{row.name}.json"
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return found


def write_notes(row: Row, args: argparse.Namespace, notes: dict[str, Any]) -> None:
    """Keep what `read_notes` gives, where it is something new."""
    if notes != read_notes(row, args):
        file = args.work / f"{row.name}.json"
        file.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def load_values(file: Path) -> Values:
    """What `complete` has kept."""
    with np.load(file) as kept:
        ends = np.cumsum(kept["lengths"])[:-1]
        return {name: np.split(kept[name], ends) for name in VALUES}


def line(row: Row, notes: dict[str, Any], values: Values) -> str:
    """A row of the table."""
    bits, seconds = notes.get("bits"), notes.get("processor")
    loss, kl, same = (mean_interval(values[name]) for name in VALUES)
    cells = [
        row.name,
        "" if bits is None else f"{bits:.3f}",
        interval(*loss),
        interval(*kl),
        f"{100 * same[0]:.1f} %",
        "" if seconds is None else f"{seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def interval(mean: float, ends: tuple[float, float]) -> str:
    """As the tables have it."""
    return f"{mean:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"


def pair_line(first: str, second: str, values: dict[str, Values]) -> str:
    """What the second row has less than the first."""
    cells = [
        interval(*mean_interval([a - b for a, b in zip(*parts, strict=True)]))
        for parts in ((values[first][name], values[second][name]) for name in ("loss", "kl"))
    ]
    return f"| {first} less {second} | {' | '.join(cells)} |"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="bf16 model")
    parser.add_argument("--text", required=True, metavar="FILE", help="held-out text")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="calibration text")
    parser.add_argument("--calibration-tokens", type=int, default=65536, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of calibration text")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="kept between runs")
    parser.add_argument("--rows", default=",".join(DEFAULT_ROWS), help="separated by commas")
    parser.add_argument("--pair", action="append", default=[], metavar="ROW,ROW")
    parser.add_argument("--moe-w4-end-layer", type=int, metavar="N", help="of w4w2 rows")
    parser.add_argument("--context", type=int, default=1024, help="tokens a window (default 1024)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each Nth document only")
    parser.add_argument("--limit", type=int, metavar="TOKENS", help="only the text's first tokens")
    parser.add_argument("options", nargs="*", help="of quantize, after --")
    args = parser.parse_args(arguments)
    try:
        args.rows = [Row.parse(name) for name in args.rows.split(",")]
        args.pair = [tuple(Row.parse(name).name for name in pair.split(",")) for pair in args.pair]
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    names = {row.name for row in args.rows}
    if any(len(pair) != 2 or not names.issuperset(pair) for pair in args.pair):
        parser.error("--pair: expected two names of --rows, separated by a comma")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; 1 if a row cannot be made."""
    args = parse_arguments(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        complete(args)
    except (FastDeployError, OSError, subprocess.CalledProcessError) as error:
        print(f"quantization_table: {error}", file=sys.stderr)
        return 1
    values = {row.name: load_values(args.work / f"{row.name}.npz") for row in args.rows}
    print(HEAD)
    for row in args.rows:
        print(line(row, read_notes(row, args), values[row.name]))
    if args.pair:
        print("\n| pair | nats | KL |\n|---|---|---|")
    for first, second in args.pair:
        print(pair_line(first, second, values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
