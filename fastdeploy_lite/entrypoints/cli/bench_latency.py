"""Seconds that one batch takes, offline."""

from __future__ import annotations

import argparse
import cProfile
import time

import numpy as np

from fastdeploy_lite.entrypoints.cli import bench_common, offline
from fastdeploy_lite.entrypoints.cli.argument_types import not_negative, output_file, positive
from fastdeploy_lite.request.params import SamplingParams
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser

_PERCENTILES = (10, 25, 50, 75, 90, 99)


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group("benchmark")
    add = group.add_argument
    add("--input-len", type=positive, default=32, help="prompt tokens")
    add("--output-len", type=positive, default=128, help="generated tokens")
    add("--batch-size", type=positive, default=8, help="sequences")
    add("--n", type=positive, default=1, help="answers per prompt")
    add("--num-iters-warmup", type=not_negative, default=10, help="batches before measuring")
    add("--num-iters", type=positive, default=30, help="measured batches")
    add("--profile", action="store_true", help="profile one batch instead")
    add("--output-json", type=output_file, default=None, help="write the result here")
    add("--disable-detokenize", action="store_true", help="accepted, no effect")
    offline.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    llm = offline.load(args)
    rng = np.random.default_rng(0)
    size, length = args.batch_size * args.n, args.input_len
    # The lowest ids are special tokens; the next thousand exist in every vocabulary.
    prompts = rng.integers(300, 1300, (size, length)).tolist()
    count = args.output_len
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=count, min_tokens=count - 1)

    def batch() -> float:
        started = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - started

    for _ in range(args.num_iters_warmup):
        batch()
    if args.profile:
        cProfile.runctx("batch()", {}, {"batch": batch}, sort="cumulative")
        return 0
    seconds = [batch() for _ in range(args.num_iters)]
    report = bench_common.percentiles(seconds, _PERCENTILES)
    rows = [(f"latency {name} (s)", f"{value:.4f}") for name, value in report.items()]
    rows.append(("generated tokens/s", f"{size * count / report['mean']:.1f}"))
    bench_common.print_table(" latency ", rows)
    result = {"latencies": seconds, **report, "batch_size": size, "output_len": count}
    bench_common.save(args.output_json, result)
    return 0
