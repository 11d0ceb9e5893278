#!/usr/bin/env python3
"""Speed of a model, or of single ops, on an NVIDIA card next to its measured copy bandwidth.

    python entrypoints/bench_card.py --shape 21b   # dummy weights in the shape of 21B-A3B
    python entrypoints/bench_card.py --shape 300b  # 300B-A47B, needs a 141 GB card
    python entrypoints/bench_card.py --shape 21b --experts wint4   # the same, experts in int4
    python entrypoints/bench_card.py --model DIR   # real weights
    python entrypoints/bench_card.py --ops         # linear maps, each kind, no model
    python entrypoints/bench_card.py --shape 300b --layers 27 --tensor-parallel-size 2   # two cards
    python entrypoints/bench_card.py --shape 21b --deterministic   # with FD_DETERMINISTIC_MODE=1

For each batch size: milliseconds a step (whole engine step and graph alone), tokens a second, bytes
that the step has to read and their rate as a share of the copy bandwidth measured in the same run.
Bytes are weights (every dense one and the experts that the batch uses) and the KV cache at that
context. With dummy weights all tokens come to look alike and would share their experts; trained
routers spread them, so the chosen experts are replaced by uniformly drawn ones.

Over several cards the bytes are those of one of them, and the share of the sums is what a step's
graph takes less without them (the other card is then not waited for, either).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import bench_ranks

from fastdeploy_lite import device, envs
from fastdeploy_lite.config import (
    BLOCK_SIZE,
    CacheConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
)

GB = 1e9
QUANTIZATION = {
    "quantization": "wint2",
    "dense_quant_type": "wint8",
    "moe_quant_type": "w4w2",
    "moe_quant_config": {
        "moe_w4_quant_config": {
            "quant_type": "wint4",
            "quant_granularity": "per_channel",
            "quant_start_layer": 0,
            "quant_end_layer": 6,
        },
        "moe_w2_quant_config": {
            "quant_type": "wint2",
            "quant_granularity": "pp_acc",
            "quant_group_size": 64,
            "quant_start_layer": 7,
            "quant_end_layer": 53,
        },
    },
}
EXPERTS: dict[str, dict[str, Any]] = {
    "w4w2": QUANTIZATION,
    "wint4": {
        "quantization": "mix_quant",
        "dense_quant_type": "wint8",
        "moe_quant_type": "wint4",
    },
}
COMMON: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 103424,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "moe_use_aux_free": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_quantized": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "300b": {
        "num_hidden_layers": 54,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "moe_intermediate_size": 3584,
        "moe_num_experts": 64,
        "moe_k": 8,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 3,
        "tie_word_embeddings": False,
    },
    "21b": {
        "num_hidden_layers": 28,
        "hidden_size": 2560,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "tie_word_embeddings": True,
    },
}


# -- a model -------------------------------------------------------------------------------------


def runtime_config(args: argparse.Namespace) -> RuntimeConfig:
    """Configuration of the run: a shape with dummy weights, or a model folder."""
    if args.model:
        model, load = ModelConfig.from_dir(Path(args.model)), "default"
    else:
        shape = {**COMMON, **SHAPES[args.shape]}
        shape["num_hidden_layers"] = args.layers or shape["num_hidden_layers"]
        shape["quantization_config"] = EXPERTS[args.experts]
        model = ModelConfig.from_dict(shape, args.shape)
        load = "dummy"
    longest = args.context + args.steps + 2 * BLOCK_SIZE
    longest = max(longest, args.prefill + BLOCK_SIZE)
    return RuntimeConfig(
        model_path=Path(args.model or "."),
        model=model,
        cache=CacheConfig(gpu_memory_utilization=args.gpu_memory_utilization),
        scheduler=SchedulerConfig(
            max_num_seqs=max(args.batches),
            max_num_batched_tokens=args.prefill,
            max_model_len=longest,
        ),
        parallel=ParallelConfig(args.tensor_parallel_size, args.rank),
        load=LoadConfig(load_choices=load),
        use_cudagraph=not args.eager,
    )


class Sequences:
    """Random prompts in blocks of their own, and the slices of their steps."""

    def __init__(
        self, runner: Any, count: int, context: int, room: int, communicator: Any = None
    ) -> None:
        import numpy as np  # noqa: PLC0415

        from fastdeploy_lite.request.step import SamplerParams, SequenceSlice  # noqa: PLC0415

        random = np.random.default_rng(count)
        vocab = runner.config.model.vocab_size
        per_sequence = -(-(context + room) // BLOCK_SIZE)
        if count * per_sequence > runner.num_blocks:
            raise SystemExit(f"{count} sequences of {context + room} tokens exceed the KV cache")
        self._runner, self._slice, self._communicator = runner, SequenceSlice, communicator
        self._sampling = SamplerParams(temperature=0.0)
        self._prompts = [random.integers(3, vocab, context).tolist() for _ in range(count)]
        self._outputs: list[list[int]] = [[] for _ in range(count)]
        self._tables = [list(range(i * per_sequence, (i + 1) * per_sequence)) for i in range(count)]

    def part(self, index: int, tokens: list[int], start: int, sample: bool) -> Any:
        """One sequence's slice of a step."""
        end = -(-(start + len(tokens)) // BLOCK_SIZE)
        return self._slice(
            request_id=str(index),
            slot=index,
            fresh=start == 0,
            token_ids=tokens,
            start=start,
            block_table=self._tables[index][:end],
            sample=sample,
            prompt_token_ids=self._prompts[index],
            output_token_ids=self._outputs[index],
            sampling=self._sampling,
            step=len(self._outputs[index]),
        )

    def prefill(self, budget: int) -> float:
        """Compute all prompts in steps of up to `budget` tokens; returns seconds."""
        started = time.perf_counter()
        step: list[Any] = []
        room = budget
        for index, prompt in enumerate(self._prompts):
            done = 0
            while done < len(prompt):
                chunk = prompt[done : done + room]
                step.append(self.part(index, chunk, done, done + len(chunk) == len(prompt)))
                done, room = done + len(chunk), room - len(chunk)
                if room == 0 or (done == len(prompt) and index == len(self._prompts) - 1):
                    self._prefill_step(step)
                    step, room = [], budget
        return time.perf_counter() - started

    def _prefill_step(self, step: list[Any]) -> None:
        for part, result in zip(step, self._step(step), strict=True):
            if part.sample:
                self._outputs[part.slot] += self._token(part.slot, result)

    def decode(self) -> float:
        """One step of all sequences; returns seconds."""
        parts = []
        for index, output in enumerate(self._outputs):
            start = len(self._prompts[index]) + len(output) - 1
            parts.append(self.part(index, [output[-1]], start, True))
        started = time.perf_counter()
        results = self._step(parts)
        seconds = time.perf_counter() - started
        for index, result in enumerate(results):
            self._outputs[index] += self._token(index, result)
        return seconds

    def _step(self, parts: list[Any]) -> list[Any]:
        if self._communicator is None:
            return self._runner.execute(parts)
        self._communicator.begin()
        results = self._runner.execute(parts)
        self._communicator.agree(True)
        return results

    def _token(self, index: int, result: Any) -> list[int]:
        """What follows; over several ranks, of which one samples, the same on each."""
        if self._communicator is not None:
            return [3 + (len(self._outputs[index]) * 7 + index) % 1000]
        if not result.token_ids:
            raise SystemExit(f"a step failed: {result.error}")
        return result.token_ids


class UniformRouting:
    """Hands fixed random expert ids to every MoE layer in place of the router's.

    The router itself still runs, and nothing is added to a step.
    """

    def __init__(self, runner: Any) -> None:
        import numpy as np  # noqa: PLC0415

        from fastdeploy_lite.model_executor.layers.moe import Router  # noqa: PLC0415

        model, limits = runner.config.model, runner.config.scheduler
        random = np.random.default_rng(7)
        self._layers = sum(model.is_moe_layer(i) for i in range(model.num_hidden_layers))
        shape = (self._layers, limits.max_num_batched_tokens, model.moe_num_experts)
        scores = random.random(shape, np.float32)
        self._ids = np.argsort(scores, axis=2)[:, :, : model.moe_k].astype(np.int32)
        self._tables = [_device_array(ids, runner.place) for ids in self._ids]
        self._calls, self._held = 0, {}
        choose = Router.__call__

        def uniform(router: Any, x: Any, workspace: Any) -> Any:
            return self._replaced(choose(router, x, workspace))

        Router.__call__ = uniform

    def _replaced(self, routes: tuple[Any, Any]) -> tuple[Any, Any]:
        from fastdeploy_lite.model_executor import ops  # noqa: PLC0415

        layer, count = self._calls % self._layers, routes[0].shape[0]
        self._calls += 1
        if (layer, count) not in self._held:  # graphs keep its address
            self._held[layer, count] = ops.fix(self._tables[layer][:count])
        return self._held[layer, count], routes[1]

    def ids(self, layer: int, batch: int) -> Any:
        """int32 [batch, k]: the experts of the first tokens in the layer of that number among those
        that have experts."""
        return self._ids[layer, :batch]

    def used(self, batch: int) -> float:
        """Mean share of a layer's experts that a decode step of `batch` tokens reads."""
        distinct = [len(set(ids[:batch].ravel().tolist())) for ids in self._ids]
        return statistics.mean(distinct) / (self._ids.max() + 1)


def _device_array(values: Any, place: Any) -> Any:
    import paddle  # noqa: PLC0415

    return paddle.to_tensor(values, place=place)


def bytes_per_step(
    config: RuntimeConfig, weights: dict[str, int], batch: int, context: int, chosen: float
) -> float:
    """Bytes that a card has to read at least for one decode step; chosen: share of the experts."""
    from fastdeploy_lite.worker.kv_budget import local_kv_heads  # noqa: PLC0415

    model = config.model
    head = weights["head"] or weights["embedding"]
    moe_layers = sum(model.is_moe_layer(i) for i in range(model.num_hidden_layers))
    router = moe_layers * model.hidden_size * model.moe_num_experts * 4
    kv = 4 * model.num_hidden_layers * local_kv_heads(config) * model.head_dim
    dense = weights["attention"] + weights["mlp"] + head + router
    return dense + chosen * weights["experts"] + batch * context * kv


def bench_model(args: argparse.Namespace, bandwidth: float, communicator: Any) -> dict[str, Any]:
    """Load, measure prefill and decode, print the table."""
    from fastdeploy_lite.worker.model_runner import ModelRunner  # noqa: PLC0415

    config = runtime_config(args)
    runner = ModelRunner(config, communicator)
    started = time.perf_counter()
    runner.load_model(show_progress=args.rank == 0)
    blocks = runner.profile_num_blocks()
    runner.allocate_kv_cache(blocks)
    ready = time.perf_counter() - started
    memory = runner.memory_report()
    routing = None if args.model else UniformRouting(runner)
    print(f"loaded in {runner.load_seconds:.1f} s, ready in {ready:.1f} s; {blocks} KV blocks")
    print(f"  of {args.tensor_parallel_size} cards, each:")
    total = sum(memory.weights.values())
    for role, held in {**memory.weights, "weights": total, "kv cache": memory.kv_cache}.items():
        print(f"  {role:10s} {held / GB:8.2f} GB")
    print(f"  {'workspace':10s} {memory.workspace / GB:8.2f} GB")
    bench = _Bench(args, runner, communicator, memory.weights, bandwidth, routing)
    rows = [bench.prefill(), *(bench.decode(batch) for batch in args.batches)]
    held = {"weights": memory.weights, "kv_cache": memory.kv_cache, "workspace": memory.workspace}
    return {"load_s": runner.load_seconds, "ready_s": ready, "memory": held, "rows": rows}


@dataclasses.dataclass
class _Bench:
    """Times the steps of one runner."""

    args: argparse.Namespace
    runner: Any
    communicator: Any
    weights: dict[str, int]
    bandwidth: float
    routing: UniformRouting | None

    def _sequences(self, count: int, context: int, room: int) -> Sequences:
        return Sequences(self.runner, count, context, room, self.communicator)

    def prefill(self) -> dict[str, Any]:
        """One prompt as long as a step may be."""
        length = self.args.prefill
        self._sequences(1, length, 1).prefill(length)  # warm up
        seconds = self._sequences(1, length, 1).prefill(length)
        rate = length / seconds
        print(f"prefill of {length} tokens: {seconds * 1e3:.1f} ms, {rate:.0f} tokens/s")
        return {"prefill": length, "ms": seconds * 1e3, "tokens_s": rate}

    def decode(self, batch: int) -> dict[str, Any]:
        """Steps of `batch` sequences, the graph alone, and the graph without sums."""
        args, runner = self.args, self.runner
        sequences = self._sequences(batch, args.context, args.steps + 24)
        sequences.prefill(args.prefill)
        for _ in range(4):  # the first captures the graph
            sequences.decode()
        step = statistics.median(sequences.decode() for _ in range(args.steps))
        graph = mute = float("nan")
        if not args.eager:
            graph = runner._graphs.replay_seconds(runner._graphs.bucket(batch), 20)
        if not args.eager and self.communicator is not None:
            mute = self._without_sums(sequences, batch)
        model = runner.config.model
        uniform = 1 - (1 - model.moe_k / model.moe_num_experts) ** batch
        chosen = self.routing.used(batch) if self.routing else uniform
        read = bytes_per_step(runner.config, self.weights, batch, args.context, chosen)
        share = read / (step if args.eager else graph) / self.bandwidth
        sums = "" if math.isnan(mute) else f", {100 * (1 - mute / graph):4.1f} % of it sums"
        print(
            f"batch {batch:3d}: step {step * 1e3:7.2f} ms, graph {graph * 1e3:7.2f} ms{sums}, "
            f"{batch / step:7.1f} tokens/s, {read / GB:6.2f} GB a step, {100 * share:5.1f} % of"
            " copy"
        )
        return {
            "batch": batch,
            "step_ms": step * 1e3,
            "graph_ms": graph * 1e3,
            "graph_without_sums_ms": mute * 1e3,
            "tokens_s": batch / step,
            "gb": read / GB,
            "experts": chosen,
            "share": share,
        }

    def _without_sums(self, sequences: Sequences, batch: int) -> float:
        whole = self.runner._graphs
        self.communicator.is_mute = True
        self.runner._renew_graphs()
        for _ in range(2):
            sequences.decode()
        graphs = self.runner._graphs
        seconds: float = graphs.replay_seconds(graphs.bucket(batch), 20)
        self.communicator.is_mute, self.runner._graphs = False, whole
        return seconds


# -- single ops ----------------------------------------------------------------------------------


def bench_ops(args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """Time linear maps of every kind, many weights in turn so that no cache holds them."""
    from fastdeploy_lite.benchmarks.timing import graph_seconds  # noqa: PLC0415
    from fastdeploy_lite.model_executor import ops  # noqa: PLC0415
    from fastdeploy_lite.model_executor.ops import cuda_runtime  # noqa: PLC0415

    rows = []
    place = device.activate(0)
    for kind in ("ccq", "int4", "int8", "dense"):
        k, n, count = 8192, 8192, 16
        weights = []
        for seed in range(count):
            weight = ops.allocate_weight(kind, k, n, place)
            ops.randomize_weight(weight, seed)
            ops.finish_weight(weight)
            weights.append(weight)
        for tokens in (1, 8, 16, 32, 64, 128, 512, 4096):
            x = cuda_runtime.empty([tokens, k], "bfloat16", place)
            ops.embedding(
                _zeros(tokens, place), _table(ops, k, place), x
            )  # ordinary numbers, not what memory held
            out = cuda_runtime.empty([tokens, n], "bfloat16", place)
            work = functools.partial(_products, weights, x, out)
            seconds = statistics.median(graph_seconds(work)) / count
            read = weights[0].nbytes + 2 * tokens * (k + n)
            row = {
                "kind": kind,
                "tokens": tokens,
                "us": seconds * 1e6,
                "gb_s": read / seconds / GB,
                "share": read / seconds / bandwidth,
                "tflops": 2 * tokens * k * n / seconds / 1e12,
            }
            rows.append(row)
            print(
                f"{kind:6s} {tokens:5d} tokens: {row['us']:8.1f} us {row['gb_s']:7.0f} GB/s "
                f"{100 * row['share']:5.1f} % of copy {row['tflops']:7.1f} TFLOP/s"
            )
    return {"rows": rows}


def _products(weights: list[Any], x: Any, out: Any) -> None:
    from fastdeploy_lite.model_executor import ops  # noqa: PLC0415

    for weight in weights:
        ops.linear(x, weight, out)


def _table(ops: Any, width: int, place: Any) -> Any:
    weight = ops.allocate_weight("dense", width, 8, place)
    ops.randomize_weight(weight, 1)
    ops.finish_weight(weight)
    return weight


def _zeros(count: int, place: Any) -> Any:
    import numpy as np  # noqa: PLC0415
    import paddle  # noqa: PLC0415

    return paddle.to_tensor(np.arange(count, dtype=np.int32) % 8, place=place)


def main() -> int:
    """Parse arguments, measure, print, and write --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="21b")
    parser.add_argument(
        "--experts", choices=sorted(EXPERTS), default="w4w2", help="of dummy weights"
    )
    parser.add_argument("--model", help="a checkpoint folder instead of dummy weights")
    parser.add_argument("--ops", action="store_true", help="time single linear maps")
    parser.add_argument(
        "--batches", type=lambda s: [int(b) for b in s.split(",")], default="1,8,32,64"
    )
    parser.add_argument("--context", type=int, default=512, help="tokens before decoding starts")
    parser.add_argument("--steps", type=int, default=32, help="decode steps to time")
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of a prefill step")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument(
        "--early-start-rows",
        type=int,
        help="largest step in which kernels start before the ones ahead have ended; 0: never",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="set FD_DETERMINISTIC_MODE=1: the same bits in any company",
    )
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    bench_ranks.add_arguments(parser)
    parser.add_argument("--output", help="JSON file for the results")
    args = parser.parse_args()
    if isinstance(args.batches, str):
        args.batches = [int(b) for b in args.batches.split(",")]
    if args.deterministic:  # the other ranks begin with the same arguments
        os.environ["FD_DETERMINISTIC_MODE"] = "1"
    if not device.decide().is_cuda:
        print(f"no card to measure: {device.decide().reason}", file=sys.stderr)
        return 1
    device.activate(0)
    from fastdeploy_lite import _ops_cuda  # noqa: PLC0415
    from fastdeploy_lite.benchmarks.ceilings import copy_bandwidth  # noqa: PLC0415
    from fastdeploy_lite.model_executor.ops import cuda_runtime  # noqa: PLC0415

    if args.early_start_rows is not None:
        cuda_runtime.EARLY_START_ROWS = args.early_start_rows
    facts = _ops_cuda.device_facts(0)
    bandwidth = copy_bandwidth()
    print(
        f"{facts.name}, copy bandwidth {bandwidth / GB:.0f} GB/s (read and written); "
        f"FD_DETERMINISTIC_MODE={int(envs.FD_DETERMINISTIC_MODE)}"
    )
    if args.ops:
        result = bench_ops(args, bandwidth)
    else:
        with bench_ranks.joined(args) as communicator:
            result = bench_model(args, bandwidth, communicator)
    result.update(
        card=facts.name,
        cards=args.tensor_parallel_size,
        copy_gb_s=bandwidth / GB,
        deterministic=envs.FD_DETERMINISTIC_MODE,
    )
    if args.output and args.rank == 0:
        Path(args.output).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
