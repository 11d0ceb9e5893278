#!/usr/bin/env python3
"""Speed of a model whose routed experts stay in main memory beside a card (`--moe-device cpu`).

    python entrypoints/bench_offload.py --shape 300b --card-gib 24   # needs 100 GB of main memory
    python entrypoints/bench_offload.py --shape 21b --card-gib 4
    python entrypoints/bench_offload.py --shape 300b --layers 12     # a part of it, to try

Dummy weights, experts drawn uniformly (see bench_card.py). The card's weights, KV cache, workspace
and driver together take no more than `--card-gib`, however large the card is.

A decode step reads the chosen experts from main memory, and cannot be faster than that. So the
table has, for each batch size: milliseconds a step; of the card alone, when the host's work is left
out; gigabytes of experts that the step reads; their rate as a share of what the same threads reach
when they only read the same memory, in the same run. At batch 1 the tokens a second beside the
bound that this bandwidth sets.

Below each row: where the time of one layer goes, in microseconds, the mean over the layers of a
step and the median over the steps (`benchmarks/layer_times.py` says what the words mean). What
"handing on" and "waiting for the card" take together beyond the card alone is the crossings. First
of all, the same experts layer after layer without the card, with fewer and fewer threads: what the
kernels reach where nobody waits for anything.

--profile adds where a whole step goes (`benchmarks/step_times.py`), what each format's layers read
a second and how long each of their shared loops takes (up and gate projection, SwiGLU, down
projection, sum; small ones are not shared), the experts alone by two instruction sets and with
activations of 24 and of 16 bits, and a crossing alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_card import GB, SHAPES, Sequences, UniformRouting, runtime_config

from fastdeploy_lite import device, processor
from fastdeploy_lite.benchmarks import host_layers, layer_times, step_times
from fastdeploy_lite.benchmarks.host_layers import HostLayer
from fastdeploy_lite.benchmarks.layer_times import LayerClock, LayerTimes
from fastdeploy_lite.benchmarks.step_times import StepClock, StepTimes
from fastdeploy_lite.config import CacheConfig, ExpertOffloadConfig, RuntimeConfig
from fastdeploy_lite.model_executor import expert_placement

GIB = 1 << 30
READ_WEIGHTS = 4  # of the largest matrices; each is read as a whole
CROSSINGS = 200


def configured(args: argparse.Namespace) -> RuntimeConfig:
    """The run's configuration, with the memory of the card limited."""
    from fastdeploy_lite import _ops_cuda  # noqa: PLC0415

    share = min(args.card_gib * GIB / _ops_cuda.device_facts(0).total_bytes, 0.95)
    config = runtime_config(args)
    return dataclasses.replace(
        config,
        cache=CacheConfig(gpu_memory_utilization=share),
        expert_offload=ExpertOffloadConfig(args.cpu_moe_layers, args.moe_card_gib),
        activation_bits=args.activation_bits,
    )


def read_bandwidth(runner: Any) -> float:
    """Bytes a second that the CPU's threads reach when they only read experts' memory."""
    from fastdeploy_lite.benchmarks.ceilings import bandwidth_of  # noqa: PLC0415
    from fastdeploy_lite.model_executor.ops import HostWeight  # noqa: PLC0415

    kept = [w.weight for w in runner.model.weights()["experts"] if isinstance(w, HostWeight)]
    kept.sort(key=lambda weight: -weight.nbytes)
    data = [weight.tensors["data"] for weight in kept[:READ_WEIGHTS]]
    return statistics.median(bandwidth_of(int(t.data_ptr()), int(t.size)) for t in data)


def extent(seconds: list[float]) -> tuple[float, float]:
    """The longest, which gives the least rate, and the shortest."""
    return max(seconds), min(seconds)


def _chosen_bytes(layer: HostLayer) -> float:
    """Bytes of the experts that a layer reads."""
    weights = layer.up_gate, layer.down
    used = len(np.unique(layer.ids))
    return sum(used * weight.nbytes / weight.num_experts for weight in weights)


def _set_activation_bits(layers: Sequence[HostLayer], bits: int) -> None:
    from fastdeploy_lite.model_executor import ops  # noqa: PLC0415

    for layer in layers:
        ops.set_activation_bits(layer.up_gate, bits)
        ops.set_activation_bits(layer.down, bits)


class Bench:
    """Times the steps of one runner."""

    def __init__(self, args: argparse.Namespace, runner: Any) -> None:
        self.args, self.runner = args, runner
        self.routing = UniformRouting(runner)
        self.bandwidth = read_bandwidth(runner)
        self.experts = runner.memory_report().offloaded_experts

    def alone(self, batch: int) -> dict[str, Any]:
        """The experts of `batch` tokens without the card."""
        from fastdeploy_lite import _ops_cpu  # noqa: PLC0415

        layers, read = self._host_layers(batch), self.experts * self.routing.used(batch)
        workspace = next(iter(self.runner._host_links.values())).workspace
        row: dict[str, Any] = {"alone": batch, "gb_s_by_threads": {}}
        for threads in host_layers.thread_counts(_ops_cpu.num_threads()):
            seconds = host_layers.passes(layers, threads, workspace)
            rates = [read / each / GB for each in (statistics.median(seconds), *extent(seconds))]
            row["gb_s_by_threads"][threads] = rates
            print(
                f"experts alone, batch {batch}, {threads} threads: {rates[0]:.1f} GB/s"
                f" ({rates[1]:.1f} to {rates[2]:.1f})"
            )
        return row

    def _host_layers(self, batch: int) -> list[HostLayer]:
        from fastdeploy_lite.model_executor.layers.moe import MoE  # noqa: PLC0415
        from fastdeploy_lite.model_executor.ops import HostWeight  # noqa: PLC0415

        moes = [layer.mlp for layer in self.runner.model.layers if isinstance(layer.mlp, MoE)]
        return [
            HostLayer(
                moe.up_gate.weight,
                moe.down.weight,
                np.ascontiguousarray(self.routing.ids(number, batch)),
            )
            for number, moe in enumerate(moes)
            if isinstance(moe.up_gate, HostWeight)
        ]

    def prefill(self) -> dict[str, Any]:
        """One prompt as long as a step may be."""
        length = self.args.prefill
        Sequences(self.runner, 1, length, 1).prefill(length)  # warm up
        seconds = Sequences(self.runner, 1, length, 1).prefill(length)
        print(f"prefill of {length} tokens: {seconds:.2f} s, {length / seconds:.1f} tokens/s")
        return {"prefill": length, "s": seconds, "tokens_s": length / seconds}

    def decode(self, batch: int, use_graphs: bool) -> dict[str, Any]:
        """Steps of `batch` sequences, and the same without the host's work."""
        runner = self.runner
        runner._renew_graphs()
        if not use_graphs:
            runner._graphs = None
        sequences = Sequences(runner, batch, self.args.context, 3 * self.args.steps + 16)
        sequences.prefill(self.args.prefill)
        whole, layer = self._timed(sequences)
        with expert_placement.muted(runner._host_links):
            card = self._seconds(sequences)
        step, read = statistics.median(whole), self.experts * self.routing.used(batch)
        bound = self.bandwidth / read  # steps a second
        row = {
            "batch": batch,
            "graphs": use_graphs,
            "step_ms": step * 1e3,
            "step_ms_least_most": [min(whole) * 1e3, max(whole) * 1e3],
            "card_alone_ms": statistics.median(card) * 1e3,
            "tokens_s": batch / step,
            "bound_tokens_s": batch * bound,
            "expert_gb": read / GB,
            "share_of_read_bandwidth": 1 / (step * bound),
            "layer_us": dataclasses.asdict(layer),
        }
        print(
            f"batch {batch}, {'graphs' if use_graphs else 'eager '}: step {step * 1e3:.1f} ms"
            f" ({min(whole) * 1e3:.1f} to {max(whole) * 1e3:.1f}), card alone"
            f" {row['card_alone_ms']:.1f} ms, {batch / step:.2f} tokens/s of at most"
            f" {batch * bound:.2f} ({100 / (step * bound):.0f} %), {read / GB:.2f} GB of experts"
        )
        alone = row["card_alone_ms"] * 1e3 / len(runner._host_links)
        print(f"  a layer: {layer}; the card alone {alone:.0f}")
        if self.args.profile:
            row["profile"] = self._profile(sequences, batch)
        return row

    def _profile(self, sequences: Sequences, batch: int) -> dict[str, Any]:
        """Where a step's time goes."""
        from fastdeploy_lite import _ops_cuda  # noqa: PLC0415

        clock = LayerClock(next(iter(self.runner._host_links.values())))
        steps = []
        with clock.running():
            whole = StepClock(clock, _ops_cuda)
            for _ in range(self.args.steps):
                steps.append(whole.step(sequences.decode))
                clock.discard()
        times = step_times.median(steps)
        print(f"  profile: {times}")
        self._print_formats(times, batch)
        return dataclasses.asdict(times)

    def _print_formats(self, times: StepTimes, batch: int) -> None:
        """What layers of each format read a second, and their loops."""
        layers = self._host_layers(batch)
        for kind in sorted({layer.up_gate.kind for layer in layers}):
            chosen = [i for i, layer in enumerate(layers) if layer.up_gate.kind == kind]
            micros = statistics.fmean(times.layers[i] for i in chosen)
            rate = statistics.fmean(_chosen_bytes(layers[i]) for i in chosen) / micros / 1e3
            loops = step_times.mean_loops([times.loops[i] for i in chosen])
            parts = ", ".join(
                f"{wall / 1e3:.0f} (threads busy {mean / 1e3:.0f}, {fastest / 1e3:.0f} to"
                f" {slowest / 1e3:.0f})"
                for wall, slowest, fastest, mean in loops
            )
            print(f"  {len(chosen)} layers of {kind}: {micros:.0f} us, {rate:.1f} GB/s; {parts}")

    def kernels(self, batch: int) -> dict[str, Any]:
        """The experts without the card, by the two richest instruction sets, with activations of 24
        and of 16 bits."""
        from fastdeploy_lite import _ops_cpu  # noqa: PLC0415

        read, isa = self.experts * self.routing.used(batch), _ops_cpu.current_isa()
        workspace = next(iter(self.runner._host_links.values())).workspace
        row: dict[str, Any] = {"alone": batch, "gb_s_by_kernel": {}}
        try:
            for name, bits in itertools.product(_ops_cpu.available_isas()[:-3:-1], (24, 16)):
                _ops_cpu.set_isa(name)
                layers = self._host_layers(batch)
                _set_activation_bits(layers, bits)
                seconds = host_layers.passes(layers, _ops_cpu.num_threads(), workspace)
                rate = read / statistics.median(seconds) / GB
                row["gb_s_by_kernel"][f"{name}, {bits} bits"] = rate
                print(f"experts alone, batch {batch}, {name}, {bits} bits: {rate:.1f} GB/s")
        finally:
            _ops_cpu.set_isa(isa)
            _set_activation_bits(self._host_layers(batch), self.args.activation_bits)
        return row

    def crossing(self) -> float:
        """Microseconds of a layer's copies to and fro when nothing else is queued."""
        runner, model = self.runner, self.runner.config.model
        link = next(iter(runner._host_links.values()))
        extents = {"bfloat16": model.hidden_size, "int32": model.moe_k, "float32": model.moe_k}
        scratch = runner._scratch
        tensors = [scratch.get(f"crossing_{t}", [1, n], t) for t, n in extents.items()]
        seconds = []
        for _ in range(CROSSINGS):
            started = time.perf_counter()
            link.fetch(*tensors)
            link.on_host(lambda: None)
            link.send(link.answer(tensors[0]), tensors[0])
            seconds.append(time.perf_counter() - started)
        micros = statistics.median(seconds) * 1e6
        print(f"a crossing alone: {micros:.0f} us until its copy back is queued")
        return micros

    def _timed(self, sequences: Sequences) -> tuple[list[float], LayerTimes]:
        """Seconds of each step, and where a layer's go."""
        clock = LayerClock(next(iter(self.runner._host_links.values())))
        self._warm_up(sequences)
        seconds, layers = [], []
        with clock.running():
            for _ in range(self.args.steps):
                seconds.append(sequences.decode())
                layers.append(clock.step())
        return seconds, layer_times.median(layers)

    def _seconds(self, sequences: Sequences) -> list[float]:
        self._warm_up(sequences)
        return [sequences.decode() for _ in range(self.args.steps)]

    def _warm_up(self, sequences: Sequences) -> None:
        for _ in range(4):  # the first records the graphs
            sequences.decode()


def bench(args: argparse.Namespace) -> None:
    """Load, say what is where, measure, write --output."""
    from fastdeploy_lite import _ops_cpu, _ops_cuda  # noqa: PLC0415
    from fastdeploy_lite.worker.model_runner import ModelRunner  # noqa: PLC0415

    runner = ModelRunner(configured(args))
    started = time.perf_counter()
    runner.load_model(show_progress=True)
    runner.allocate_kv_cache(runner.profile_num_blocks())
    if args.patience_us is not None:
        _ops_cpu.set_loop_patience(args.patience_us)
    ready = time.perf_counter() - started
    report, facts = runner.memory_report(), _ops_cuda.device_facts(0)
    used = facts.total_bytes - facts.free_bytes
    print(f"{facts.name}; loaded in {runner.load_seconds:.1f} s, ready in {ready:.1f} s")
    print(
        f"card: {used / GIB:.2f} GiB in use by its driver's count, limit {args.card_gib:g} GiB:"
        f" weights {sum(report.weights.values()) / GIB:.2f}, KV cache {report.kv_cache / GIB:.2f}"
        f" ({runner.num_blocks} blocks), workspace {report.workspace / GIB:.2f}"
    )
    work = Bench(args, runner)
    print(
        f"main memory: {work.experts / GIB:.2f} GiB of experts of {len(runner._host_links)} layers,"
        f" read with {work.bandwidth / GB:.1f} GB/s by {_ops_cpu.num_threads()} threads"
        f" ({_ops_cpu.current_isa()}); {processor.describe()}"
    )
    result: dict[str, Any] = {
        "card": facts.name,
        "card_gib_limit": args.card_gib,
        "card_gib_used": used / GIB,
        "weights_on_card": report.weights,
        "kv_blocks": runner.num_blocks,
        "offloaded_experts": work.experts,
        "offloaded_layers": len(runner._host_links),
        "threads": _ops_cpu.num_threads(),
        "isa": _ops_cpu.current_isa(),
        "read_gb_s": work.bandwidth / GB,
        "load_s": runner.load_seconds,
        "rows": [],
    }
    result["rows"] += [work.alone(batch) for batch in args.batches]
    if args.profile:
        result["rows"] += [work.kernels(batch) for batch in args.batches]
        result["crossing_us"] = work.crossing()
    cases = [(batch, graphs) for batch in args.batches for graphs in (True, False)]
    for case in [*cases, None]:
        result["rows"].append(work.prefill() if case is None else work.decode(*case))
        if args.output:  # at once: a later case may fail, or time may run out
            Path(args.output).write_text(json.dumps(result, indent=1), encoding="utf-8")


def main() -> int:
    """Parse arguments and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="300b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--card-gib", type=float, default=24.0, help="memory of the card to use")
    parser.add_argument("--cpu-moe-layers", type=int, help="experts of so many layers alone")
    parser.add_argument("--moe-card-gib", type=float, help="GiB of experts on the card")
    parser.add_argument("--batches", default="1,4", help="sizes of decode steps, with commas")
    parser.add_argument("--context", type=int, default=128, help="tokens before decoding starts")
    parser.add_argument("--steps", type=int, default=16, help="decode steps to time")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of a prefill step")
    parser.add_argument(
        "--patience-us", type=int, help="of the CPU's idle threads, see cuda_host_link"
    )
    parser.add_argument(
        "--activation-bits", type=int, choices=(16, 24), default=24, help="of the CPU's products"
    )
    parser.add_argument("--profile", action="store_true", help="where a step's time goes")
    parser.add_argument("--output", help="JSON file for the results")
    args = parser.parse_args()
    args.batches = [int(batch) for batch in args.batches.split(",")]
    args.model, args.experts, args.eager = None, "w4w2", False
    args.tensor_parallel_size, args.rank = 1, 0
    args.gpu_memory_utilization = 0.9  # replaced by --card-gib
    if not device.decide().is_cuda:
        print(f"no card to measure: {device.decide().reason}", file=sys.stderr)
        return 1
    device.activate(0)
    bench(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
