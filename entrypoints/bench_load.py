#!/usr/bin/env python3
"""How long a 2-bit model of 21B-A3B's widths takes to load on the CPU, and how much memory.

    python entrypoints/bench_load.py --model FOLDER [--layers 28] [--rounds 3] [--packed-cache DIR]

The folder is written where none is: random weights, experts in 2 bits, other linears in int8. Every
round starts a new process twice: "cold" after the kernel was asked to forget the files' pages
(another process that maps them keeps them), "warm" right after that. With --packed-cache each round
does so also from packed weights in DIR, copied and mapped, which are written before the first. Peak
memory is the process's largest resident set, which counts the mapped pages of files; "weights" is
what is kept of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from bench_card import COMMON, SHAPES

from fastdeploy_lite.config import LoadConfig, ModelConfig, RuntimeConfig, SchedulerConfig
from fastdeploy_lite.quantization.random_model import random_model_config, write_random_model

CHILD = "--load-once"
ACCESSES = ("copy", "map")
QUANTIZATION = {
    "quantization": "wint2",
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4w2",
    "moe_quant_config": {
        "moe_w4_quant_config": {"quant_start_layer": 0, "quant_end_layer": 0},
        # Random bytes do not tell their order.
        "moe_w2_quant_config": {"quant_start_layer": 1, "row_order": "natural"},
    },
}


def write_model(folder: Path, layers: int) -> None:
    """Write the random checkpoint."""
    config = {**random_model_config(layers), **COMMON, **SHAPES["21b"]}
    config |= {"num_hidden_layers": layers, "moe_layer_end_index": layers - 1}
    write_random_model(folder, {**config, "quantization_config": QUANTIZATION})


def load_once(folder: Path, cache: Path | None, access: Literal["copy", "map"]) -> None:
    """Load in this process and print what it took."""
    from fastdeploy_lite.worker.model_runner import ModelRunner  # noqa: PLC0415

    config = RuntimeConfig(
        model_path=folder,
        model=ModelConfig.from_dir(folder),
        scheduler=SchedulerConfig(1, max_num_batched_tokens=512, max_model_len=512),
        load=LoadConfig(packed_cache=cache, packed_cache_access=access),
        use_cudagraph=False,
    )
    runner = ModelRunner(config)
    started = time.process_time()
    runner.load_model()
    weights = sum(runner.memory_report().weights.values())
    found = {"seconds": runner.load_seconds, "cpu": time.process_time() - started}
    print(json.dumps({**found, "peak": peak_bytes(), "weights": weights}))


def peak_bytes() -> int:
    """Largest resident set of this process; getrusage counts that of its parent before exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM: this needs Linux")


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files' pages; dirty ones have to be written first."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def in_new_process(folder: Path, cache: Path | None = None, access: str = "copy") -> dict[str, Any]:
    """One load; ends the run where it fails."""
    command = [sys.executable, __file__, CHILD, "--model", str(folder)]
    if cache is not None:
        command += ["--packed-cache", str(cache), "--access", access]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"loading {folder} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def spread(values: list[float]) -> str:
    """Median (least to greatest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Write what is missing, then load in rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder; written if not there")
    parser.add_argument("--layers", type=int, default=28, help="of a model that is written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--packed-cache", type=Path, help="folder for packed weights")
    parser.add_argument("--access", choices=ACCESSES, default="copy", help=argparse.SUPPRESS)
    parser.add_argument(CHILD, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_once:
        load_once(args.model, args.packed_cache, args.access)
        return
    if not args.model.exists():
        write_model(args.model, args.layers)
    nbytes = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    forms: dict[str, tuple[Path | None, str]] = {"": (None, "copy")}
    if args.packed_cache is not None:
        forms |= {f", packed, {access}": (args.packed_cache, access) for access in ACCESSES}
        first = in_new_process(args.model, args.packed_cache)
        print(f"first, packed weights written: {first['seconds']:.1f} s", file=sys.stderr)
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for form, (cache, access) in forms.items():
            for path in filter(None, (args.model, args.packed_cache)):
                forget(path)
            for kind in (f"cold{form}", f"warm{form}"):
                found = in_new_process(args.model, cache, access)
                runs.setdefault(kind, []).append(found)
                print(f"{kind}: {found['seconds']:.1f} s", file=sys.stderr)
    print("| | seconds | CPU seconds | GB/s of files | peak, GB | weights, GB |")
    print("|---|---|---|---|---|---|")
    for kind, all_runs in runs.items():
        seconds = [run["seconds"] for run in all_runs]
        print(
            f"| {kind} | {spread(seconds)} | {spread([run['cpu'] for run in all_runs])}"
            f" | {spread([nbytes / s / 1e9 for s in seconds])}"
            f" | {spread([run['peak'] / 1e9 for run in all_runs])}"
            f" | {all_runs[0]['weights'] / 1e9:.2f} |"
        )


if __name__ == "__main__":
    main()
