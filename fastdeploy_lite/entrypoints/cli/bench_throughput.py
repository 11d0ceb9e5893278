"""Tokens per second of many requests, offline."""

from __future__ import annotations

import argparse
import time

from fastdeploy_lite.entrypoints.cli import bench_common, offline
from fastdeploy_lite.entrypoints.cli.argument_types import not_negative, output_file, positive
from fastdeploy_lite.request.params import SamplingParams
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    group = parser.add_argument_group("benchmark")
    add = group.add_argument
    add("--backend", default="fastdeploy", help="accepted, no effect")
    add("--dataset-name", default="random", choices=("random", "sharegpt"), help="prompts")
    add("--dataset-path", default=None, help="ShareGPT JSON file")
    add(
        "--input-len",
        type=positive,
        default=128,
        help="words of a prompt, of one to three tokens",
    )
    add("--output-len", type=positive, default=128, help="generated tokens")
    add("--prefix-len", type=not_negative, default=0, help="words that all prompts begin with")
    add("--n", type=positive, default=1, help="answers per prompt")
    add("--num-prompts", type=positive, default=50, help="requests")
    add("--output-json", type=output_file, default=None, help="write the result here")
    offline.add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.dataset_name == "sharegpt":
        requests = bench_common.sharegpt_requests(
            args.dataset_path or "", args.num_prompts, args.output_len
        )
    else:
        requests = bench_common.random_requests(
            args.num_prompts, args.input_len, args.output_len, args.prefix_len
        )
    llm = offline.load(args)
    requests = [request for request in requests for _ in range(args.n)]
    sampling = [
        SamplingParams(temperature=1.0, top_p=1.0, max_tokens=r.output_len,
                       min_tokens=max(r.output_len - 1, 1))
        for r in requests
    ]  # fmt: skip
    started = time.perf_counter()
    outputs = llm.generate([r.prompt for r in requests], sampling)
    seconds = time.perf_counter() - started
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(len(output.outputs.token_ids) for output in outputs)
    result = {
        "elapsed_time": seconds,
        "num_requests": len(requests),
        "requests_per_second": len(requests) / seconds,
        "prompt_tokens": prompt,
        "output_tokens": generated,
        "tokens_per_second": (prompt + generated) / seconds,
        "output_tokens_per_second": generated / seconds,
    }
    rows = [(n, f"{v:.3f}" if isinstance(v, float) else str(v)) for n, v in result.items()]
    bench_common.print_table(" throughput ", rows)
    bench_common.save(args.output_json, result)
    return 0
