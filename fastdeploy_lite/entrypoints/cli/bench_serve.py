"""Throughput and latencies of a running server."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx

from fastdeploy_lite.entrypoints.cli import bench_common
from fastdeploy_lite.entrypoints.cli.argument_types import (
    not_negative,
    output_file,
    positive,
    positive_rate,
)
from fastdeploy_lite.entrypoints.cli.bench_common import BenchRequest
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import FastDeployError, quote
from fastdeploy_lite.utils.ports import in_url

UNNAMED_PROMPTS = 64
_TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token, first excluded",
    "itl": "time between tokens",
    "e2el": "end-to-end latency",
}


@dataclass(slots=True)
class Measured:
    """One request as the client saw it; times in seconds."""

    ttft: float = 0.0
    latency: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Add the flags."""
    add = parser.add_argument
    add("--backend", default="openai-chat", choices=("openai-chat", "openai"), help="interface")
    add("--base-url", default=None, help="server, for instance http://127.0.0.1:8000")
    add("--host", default="127.0.0.1", help="server, without --base-url")
    add("--port", type=int, default=8000, help="server, without --base-url")
    add("--endpoint", default=None, help="default: /v1/chat/completions, or /v1/completions")
    add("--model", default="default", help="model name in the requests")
    add("--dataset-name", default=None, choices=("sharegpt", "random"),
        help="prompts (default: sharegpt with --dataset-path, else random)")  # fmt: skip
    add("--dataset-path", default=None, help="ShareGPT JSON file")
    add(
        "--random-input-len",
        type=positive,
        default=128,
        help="words, of one to three tokens",
    )
    add("--random-output-len", type=positive, default=128, help="generated tokens")
    add(
        "--random-prefix-len",
        type=not_negative,
        default=0,
        help="words that all prompts begin with",
    )
    add(
        "--output-len",
        type=positive,
        default=None,
        help="overrides the data set's length",
    )
    add("--num-prompts", type=positive, default=None,
        help="requests (default: 1000; 64 of random words when no data set is named)")  # fmt: skip
    add(
        "--request-rate",
        type=positive_rate,
        default=math.inf,
        help="requests per second, Poisson",
    )
    add("--max-concurrency", type=positive, default=None, help="requests at the same time")
    add("--top-p", type=float, default=None, help="sampling")
    add("--top-k", type=int, default=None, help="sampling")
    add("--temperature", type=float, default=None, help="sampling")
    add("--seed", type=int, default=0, help="of prompts and arrivals")
    add("--percentile-metrics", type=_metrics, default=",".join(_TITLES), help="what to print")
    add("--metric-percentiles", type=_percentiles, default="50,90,99", help="which percentiles")
    add("--save-result", action="store_true", help="write bench-DATE.json")
    add("--result-filename", type=output_file, default=None, help="write here instead")


def _metrics(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if name not in _TITLES]:
        raise argparse.ArgumentTypeError(f"{quote(wrong[0])} is none of {', '.join(_TITLES)}")
    return names


def _percentiles(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number <= 100 for number in numbers):
        raise argparse.ArgumentTypeError(f"expected numbers from 0 to 100, got {quote(text)}")
    return numbers


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    _fill_in(args)
    requests = _requests(args)
    measured, seconds = asyncio.run(_measure(args, requests))
    result = summarize(args, measured, seconds)
    _print(args, result)
    name = args.result_filename
    if name is None and args.save_result:
        name = f"bench-{datetime.now():%Y%m%d-%H%M%S}.json"
    bench_common.save(name, result)
    return 0 if result["completed"] else 1


def _fill_in(args: argparse.Namespace) -> None:
    """What is measured when nobody says: few enough requests that an answer comes in minutes."""
    named = args.dataset_name is not None or args.dataset_path is not None
    if args.dataset_name is None:
        args.dataset_name = "sharegpt" if args.dataset_path else "random"
    if args.num_prompts is None:
        args.num_prompts = 1000 if named else UNNAMED_PROMPTS


def _requests(args: argparse.Namespace) -> list[BenchRequest]:
    if args.dataset_name == "random":
        return bench_common.random_requests(
            args.num_prompts, args.random_input_len, args.output_len or args.random_output_len,
            args.random_prefix_len, args.seed,
        )  # fmt: skip
    return bench_common.sharegpt_requests(
        args.dataset_path or "", args.num_prompts, args.output_len
    )


async def _measure(
    args: argparse.Namespace, requests: list[BenchRequest]
) -> tuple[list[Measured], float]:
    base = args.base_url or f"http://{in_url(args.host)}:{args.port}"
    limit = asyncio.Semaphore(args.max_concurrency or len(requests))
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'EMPTY')}"}
    pool = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=base, headers=headers, timeout=None, limits=pool
    ) as client:
        await _check(client, args)

        async def bounded(request: BenchRequest) -> Measured:
            async with limit:
                return await _one(client, args, request)

        rng, tasks, started = random.Random(args.seed), [], time.perf_counter()
        for request in requests:
            tasks.append(asyncio.create_task(bounded(request)))
            if args.request_rate != math.inf:
                await asyncio.sleep(rng.expovariate(args.request_rate))
        measured = await asyncio.gather(*tasks)
    return list(measured), time.perf_counter() - started


async def _check(client: httpx.AsyncClient, args: argparse.Namespace) -> None:
    """One short request first: a wrong address should say so, not fill a table with failures."""
    result = await _one(client, args, BenchRequest("hello", 2))
    if result.error:
        raise FastDeployError(f"The server at {client.base_url}: {result.error}")


async def _one(
    client: httpx.AsyncClient, args: argparse.Namespace, request: BenchRequest
) -> Measured:
    result, started = Measured(), time.perf_counter()
    last = started
    try:
        path, body = _body(args, request)
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                answer = (await response.aread())[:300].decode(errors="replace")
                result.error = f"POST {path} was answered with {response.status_code} {answer}"
                return result
            async for line in response.aiter_lines():
                now = time.perf_counter()
                if _is_token(line):
                    if result.ttft:
                        result.gaps.append(now - last)
                    else:
                        result.ttft = now - started
                    last = now
                _read_usage(line, result)
    except (httpx.HTTPError, ValueError) as error:
        result.error = f"no answer, {type(error).__name__}: {error}"
    result.latency = last - started
    return result


def _body(args: argparse.Namespace, request: BenchRequest) -> tuple[str, dict[str, Any]]:
    chat = args.backend == "openai-chat"
    path = args.endpoint or ("/v1/chat/completions" if chat else "/v1/completions")
    prompt: dict[str, Any] = {"prompt": request.prompt}
    if chat:
        prompt = {"messages": [{"role": "user", "content": request.prompt}]}
    sampling = {"top_p": args.top_p, "top_k": args.top_k, "temperature": args.temperature}
    return path, {
        "model": args.model,
        **prompt,
        "max_tokens": request.output_len,
        # The closing token takes the last slot: ask for all others, so that lengths are equal.
        "min_tokens": max(request.output_len - 1, 1),
        "stream": True,
        "stream_options": {"include_usage": True},
        **{name: value for name, value in sampling.items() if value is not None},
    }


def _is_token(line: str) -> bool:
    """Whether an event carries a token: choices, but not the opening of a chat."""
    return '"choices":[{' in line and '"role":"assistant"' not in line


def _read_usage(line: str, result: Measured) -> None:
    if '"usage":{' in line:
        usage = json.loads(line[len("data: ") :])["usage"]
        result.prompt_tokens = usage["prompt_tokens"]
        result.output_tokens = usage["completion_tokens"]
    elif line.startswith('data: {"error"'):
        result.error = line


def summarize(args: argparse.Namespace, measured: list[Measured], seconds: float) -> dict[str, Any]:
    """The numbers of a run.

    Args:
        args: What was asked.
        measured: All requests.
        seconds: From the first request to the last answer.

    Returns:
        Counts, throughputs per second, and latencies in milliseconds.
    """
    good = [m for m in measured if m.error is None and m.ttft]
    values = {
        "ttft": [m.ttft for m in good],
        "tpot": [(m.latency - m.ttft) / (m.output_tokens - 1) for m in good if m.output_tokens > 1],
        "itl": [gap for m in good for gap in m.gaps],
        "e2el": [m.latency for m in good],
    }
    prompt, output = sum(m.prompt_tokens for m in good), sum(m.output_tokens for m in good)
    failures = [m.error for m in measured if m.error is not None]
    return {
        "completed": len(good),
        "failed": len(measured) - len(good),
        "errors": sorted(set(failures))[:5],
        "duration": seconds,
        "request_throughput": len(good) / seconds,
        "output_throughput": output / seconds,
        "total_token_throughput": (prompt + output) / seconds,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        **{
            f"{name}_ms": bench_common.percentiles(
                [1e3 * v for v in values[name]], args.metric_percentiles
            )
            for name in _TITLES
        },
    }


def _print(args: argparse.Namespace, result: dict[str, Any]) -> None:
    rows = [
        ("requests completed", str(result["completed"])),
        ("requests failed", str(result["failed"])),
        ("duration (s)", f"{result['duration']:.2f}"),
        ("requests/s", f"{result['request_throughput']:.2f}"),
        ("output tokens/s", f"{result['output_throughput']:.1f}"),
        ("all tokens/s", f"{result['total_token_throughput']:.1f}"),
    ]
    for name in args.percentile_metrics:
        rows.append((_TITLES[name], ""))
        rows += [(f"  {k} (ms)", f"{v:.2f}") for k, v in result[f"{name}_ms"].items()]
    bench_common.print_table(" serving benchmark ", rows)
    for error in result["errors"]:
        print(f"error: {error}")
