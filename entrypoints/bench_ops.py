#!/usr/bin/env python3
"""Speed of the CPU's linear ops next to the speed of its memory.

    python entrypoints/bench_ops.py [--threads 1,2] [--kinds ccq,int8] [--tokens 1,16]

For every instruction set of this machine, kind of weight and number of tokens: milliseconds a call,
GB/s of packed weights, the share of the read bandwidth, and G multiply-adds a second, each the
median of rounds in which all of a kind and thread count take turns, reading memory among them, so
that whatever else the machine does disturbs all alike; the spread stands in parentheses.
Weights are random and larger than the caches (--megabytes a kind, walked through in turn).
FD_LITE_CPU_ISA and FD_LITE_NUM_THREADS force one instruction set or thread count elsewhere.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.benchmarks.ceilings import read_bandwidth
from fastdeploy_lite.model_executor import ops

KINDS = ("ccq", "int4", "int8", "bf16", "f32")
ROUND_SECONDS = 0.15


def random_arrays(kind: str, k: int, n: int, rng: np.random.Generator) -> dict[str, Any]:
    """Host arrays of one random weight [k, n], as `fill_weight` takes them."""
    if kind == "bf16":
        return {"weight": rng.integers(0x3C00, 0x3E00, (k, n), dtype=np.uint16)}
    if kind == "f32":
        return {"weight": rng.standard_normal((k, n), dtype=np.float32)}
    ones = np.ones(n, np.float32)
    if kind != "ccq":
        size = k * n // (1 if kind == "int8" else 2)
        return {
            "quant_weight": rng.integers(0, 256, size, dtype=np.uint8),
            "weight_scale": ones,
        }
    return {
        "quant_weight": rng.integers(0, 256, (k // 4, n), dtype=np.uint8),
        "weight_scale": rng.integers(0, 256, (k // 128, n), dtype=np.uint8),
        "super_scales": ones,
        "code_scale": rng.uniform(100, 128, n).astype(np.float32),
        "code_zp": rng.uniform(-50, 50, n).astype(np.float32),
    }


def make_weights(
    kind: str, k: int, n: int, megabytes: int, activation_bits: int = 24
) -> list[ops.PackedWeight]:
    """Equal weights in different memory, at least two and `megabytes` together."""
    import paddle  # noqa: PLC0415 - after fastdeploy_lite, which chooses its plug-ins

    arrays = random_arrays(kind, k, n, np.random.default_rng(0))
    weights: list[ops.PackedWeight] = []
    while len(weights) < 2 or sum(w.nbytes for w in weights) < megabytes << 20:
        native_kind: Any = "dense" if kind in ("bf16", "f32") else kind
        weight = ops.allocate_weight(native_kind, k, n, paddle.CPUPlace())
        ops.fill_weight(weight, None, **arrays)
        ops.finish_weight(weight)
        ops.set_activation_bits(weight, activation_bits)
        weights.append(weight)
    return weights


def mean_seconds(call: Callable[[], None]) -> float:
    """Seconds of one call, from as many as fill a round's share of time."""
    call()
    calls, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < ROUND_SECONDS:
        call()
        calls += 1
    return spent / calls


def spread(values: Sequence[float], digits: int) -> str:
    """Median (least to greatest)."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def rows(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """The table's rows."""
    k, n = options.in_features, options.out_features
    for kind in options.kinds:
        weights = make_weights(kind, k, n, options.megabytes, options.activation_bits)
        for threads in options.threads:
            _ops_cpu.set_num_threads(threads)
            cases = list(itertools.product(options.isas, options.tokens))
            found: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
            bandwidth = []
            for _ in range(options.rounds):
                bandwidth.append(read_bandwidth(options.megabytes << 20) / 1e9)
                for isa, tokens in cases:
                    _ops_cpu.set_isa(isa)
                    found[isa, tokens].append(linear_seconds(weights, tokens))
            for (isa, tokens), seconds in found.items():
                speeds = [weights[0].nbytes / s / 1e9 for s in seconds]
                share = statistics.median(speeds) / statistics.median(bandwidth)
                yield (
                    *(kind, isa, str(threads), str(tokens)),
                    f"{statistics.median(seconds) * 1e3:.3f}",
                    *(spread(speeds, 1), spread(bandwidth, 1), f"{100 * share:.0f} %"),
                    spread([tokens * k * n / s / 1e9 for s in seconds], 1),
                )


def linear_seconds(weights: Sequence[ops.PackedWeight], tokens: int) -> float:
    """Seconds of one linear over `tokens` rows, walking through the weights."""
    import paddle  # noqa: PLC0415

    k, n = weights[0].in_features, weights[0].out_features
    x, out = paddle.randn([tokens, k]), paddle.empty([tokens, n])
    turn = 0

    def call() -> None:
        nonlocal turn
        ops.linear(x, weights[turn % len(weights)], out)
        turn += 1

    return mean_seconds(call)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    names, numbers = (lambda s: s.split(",")), (lambda s: [int(part) for part in s.split(",")])
    parser.add_argument("--kinds", type=names, default=list(KINDS))
    parser.add_argument("--isas", type=names, default=_ops_cpu.available_isas()[::-1])
    parser.add_argument("--threads", type=numbers, default=[1])
    parser.add_argument("--tokens", type=numbers, default=[1, 4, 16, 256])
    parser.add_argument("--in-features", type=int, default=8192)
    parser.add_argument("--out-features", type=int, default=7168)
    parser.add_argument("--activation-bits", type=int, choices=(16, 24), default=24)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    """Print the table, a row as soon as it is known."""
    import paddle  # noqa: PLC0415

    options = parse_options()
    paddle.set_device("cpu")
    print(f"linear [{options.in_features}, {options.out_features}], float32 activations\n")
    head = ("weights", "ISA", "threads", "tokens", "ms", "GB/s", "read GB/s", "share", "GMAC/s")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows(options):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
