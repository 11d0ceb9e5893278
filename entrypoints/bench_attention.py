#!/usr/bin/env python3
"""Speed of paged attention on an NVIDIA card, next to cuDNN's and FlashAttention, through torch.

    python entrypoints/bench_attention.py

Decode steps and prompt chunks in the head shapes of ERNIE-4.5 21B-A3B and 300B-A47B: microseconds
a layer, and for a decode GB/s of keys and values read, for a prefill TFLOP/s of the products that
causal attention cannot avoid. Each time is that of a CUDA graph of many launches, each over another
part of the cache, so that no layer finds its keys in L2. The others read contiguous keys and values
of one length, i.e. without what paging and ragged batches cost. Needs torch, which nothing else in
this project does: for the others, and for device memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

try:
    from fastdeploy_lite import _ops_cuda
except ImportError:  # --help needs none
    _ops_cuda = None  # type: ignore[assignment]

View: TypeAlias = tuple[int, str, list[int], list[int]]

GB = 1e9
BLOCK_TOKENS = 64
HEAD_DIM = 128
SCRATCH_BYTES = 64 << 20
COPY_BYTES = 1 << 30
COLD_BYTES = 512 << 20  # launches of one graph touch at least this much, ten times an L2 cache
MOST_LAUNCHES = 64
DENSE = 0  # kind of weight whose random words are bf16
HEADS = {"21b": (20, 4), "300b": (64, 8)}
BATCHES = (1, 8, 32, 64)
CONTEXTS = (512, 4096, 32768)
PREFILLS = ((1024, 1024), (4096, 4096), (16384, 16384), (512, 16384 + 512))


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences of `context` tokens in the cache, of which the last `length` are queried."""

    heads: int
    kv_heads: int
    sequences: int
    length: int
    context: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values."""
        return self.sequences * self.context * self.kv_heads * HEAD_DIM * 4

    @property
    def flops(self) -> int:
        """Operations of both products over the pairs that a causal mask leaves."""
        pairs = self.length * self.context - self.length * (self.length - 1) // 2
        return 4 * self.sequences * self.heads * HEAD_DIM * pairs

    @property
    def launches(self) -> int:
        """Launches of one graph."""
        return max(2, min(MOST_LAUNCHES, COLD_BYTES // self.kv_bytes))

    def blocks(self) -> int:
        """Cache blocks of one launch."""
        return self.sequences * -(-self.context // BLOCK_TOKENS)


class Memory:
    """Device memory from torch; lives as long as this object."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    def allocate(self, nbytes: int) -> int:
        """Address of uninitialised memory."""
        import torch  # noqa: PLC0415 - optional

        self._held.append(torch.empty(nbytes, dtype=torch.uint8, device="cuda"))
        return int(self._held[-1].data_ptr())

    def random(self, nbytes: int, seed: int) -> int:
        """Address of bf16 values of standard deviation 1."""
        address = self.allocate(nbytes)
        _ops_cuda.randomize(DENSE, address, nbytes, seed, 1.0, 0)
        return address

    def put(self, values: np.ndarray) -> int:
        """Address of a copy of an array."""
        host = np.ascontiguousarray(values)
        address = self.allocate(host.nbytes)
        _ops_cuda.upload(address, host.ctypes.data, host.nbytes, 0)
        _ops_cuda.synchronize(0)
        return address

    def put_view(self, values: np.ndarray) -> View:
        """View of a copy of an array."""
        return view(self.put(values), values.dtype.name, list(values.shape))


def view(address: int, dtype: str, shape: list[int]) -> View:
    """What an op takes for contiguous memory."""
    return address, dtype, shape, [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def replay_seconds(launch: Callable[[], None], repeats: int = 7) -> float:
    """Median seconds of one run of `launch`, which replays a graph."""
    times = []
    for _ in range(repeats + 1):
        _ops_cuda.synchronize(0)
        started = time.perf_counter()
        launch()
        _ops_cuda.synchronize(0)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


class Ours:
    """paged_attention over one pool of cache blocks."""

    def __init__(self, most_blocks: dict[int, int]) -> None:
        """Args: most_blocks: blocks that some case needs, by KV heads."""
        memory = self._memory = Memory()
        self._capture = int(_ops_cuda.create_stream())
        nbytes = max(n * heads for heads, n in most_blocks.items()) * BLOCK_TOKENS * HEAD_DIM * 2
        self._pool_bytes = nbytes
        self._keys, self._values = memory.random(nbytes, 1), memory.random(nbytes, 2)
        self._scratch = memory.allocate(SCRATCH_BYTES)
        counters = np.zeros(_ops_cuda.attention_counter_bytes, np.uint8)
        self._counters = memory.put(counters)

    def seconds(self, case: Case) -> float:
        """Seconds of one launch."""
        memory = Memory()
        tokens = case.sequences * case.length
        rows = [tokens, case.heads * HEAD_DIM]
        q_bytes = math.prod(rows) * 2
        q = view(memory.random(q_bytes, 3), "bfloat16", rows)
        out = view(memory.allocate(q_bytes), "bfloat16", rows)
        ends = np.arange(case.sequences + 1, dtype=np.int32) * case.length
        lengths = np.full(case.sequences, case.context, np.int32)
        cu_seqlens, contexts = (memory.put_view(array) for array in (ends, lengths))
        tables = [memory.put_view(table) for table in self._tables(case)]
        pool = self._pool_bytes // (BLOCK_TOKENS * HEAD_DIM * 2 * case.kv_heads)
        blocks = [pool, case.kv_heads, BLOCK_TOKENS, HEAD_DIM]
        keys, values = (view(a, "bfloat16", blocks) for a in (self._keys, self._values))
        room = (self._scratch, SCRATCH_BYTES, self._counters)

        def work(stream: int) -> None:
            for table in tables:
                batch = (table, cu_seqlens, contexts)
                _ops_cuda.paged_attention(
                    q, keys, values, *batch, HEAD_DIM**-0.5, *room, out, stream
                )

        work(0)
        _ops_cuda.synchronize(0)
        _ops_cuda.begin_capture(self._capture)
        work(self._capture)
        graph = int(_ops_cuda.end_capture(self._capture, False))
        seconds = replay_seconds(lambda: _ops_cuda.launch_graph(graph, 0))
        _ops_cuda.destroy_graph(graph)
        return seconds / len(tables)

    def _tables(self, case: Case) -> list[np.ndarray]:
        """Shuffled block tables, disjoint as far as the pool goes."""
        pool = self._pool_bytes // (BLOCK_TOKENS * HEAD_DIM * 2 * case.kv_heads)
        order = np.random.default_rng(0).permutation(pool).astype(np.int32)
        need = case.blocks()
        parts = [np.take(order, np.arange(need) + i * need, mode="wrap") for i in range(64)]
        return [part.reshape(case.sequences, -1) for part in parts[: case.launches]]


class Theirs:
    """torch's scaled_dot_product_attention under one backend."""

    def __init__(self, backend: str) -> None:
        import torch  # noqa: PLC0415 - optional
        from torch.nn.attention import SDPBackend  # noqa: PLC0415

        self._torch, self._backend = torch, getattr(SDPBackend, backend)

    def seconds(self, case: Case) -> float | None:
        """Seconds of one launch; None when the backend refuses the shape."""
        torch = self._torch
        copies = min(case.launches, max(2, (8 << 30) // case.kv_bytes))
        kv_shape = (case.sequences, case.kv_heads, case.context, HEAD_DIM)

        def random(*shape: int) -> Any:
            return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

        q = random(case.sequences, case.heads, case.length, HEAD_DIM)
        pairs = [(random(*kv_shape), random(*kv_shape)) for _ in range(copies)]
        # a chunk behind a prefix is timed without its mask, which hides 1.5 % of the pairs
        causal = case.length == case.context

        def work() -> None:
            for k, v in pairs:
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=True
                )

        try:
            return self._graph_seconds(work) / len(pairs)
        except RuntimeError as error:
            print(f"  {self._backend}: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()
            return None

    def _graph_seconds(self, work: Callable[[], None]) -> float:
        torch, graph = self._torch, self._torch.cuda.CUDAGraph()
        with torch.nn.attention.sdpa_kernel(self._backend):
            work()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                work()
        stream = int(torch.cuda.current_stream().cuda_stream)
        assert stream == 0, "replay_seconds waits for the default stream"
        return replay_seconds(graph.replay)


def cases(shapes: list[str]) -> list[tuple[str, Case]]:
    """What is timed, with the name of the head shape."""
    found = []
    for shape in shapes:
        heads, kv_heads = HEADS[shape]
        for context in CONTEXTS:
            found += [(shape, Case(heads, kv_heads, n, 1, context)) for n in BATCHES]
        found += [(shape, Case(heads, kv_heads, 1, *prefill)) for prefill in PREFILLS]
    return found


def describe(case: Case) -> str:
    """The row's name."""
    if case.length == 1:
        return f"decode {case.sequences:2d} x {case.context}"
    behind = case.context - case.length
    return f"prefill {case.length}" + (f" after {behind}" if behind else "")


def rate(case: Case, seconds: float) -> str:
    """GB/s of a decode, TFLOP/s of a prefill."""
    if case.length == 1:
        return f"{case.kv_bytes / seconds / GB:6.0f} GB/s"
    return f"{case.flops / seconds / 1e12:6.1f} TFLOP/s"


def main() -> int:
    """Measure, print a table, write --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=sorted(HEADS), default=sorted(HEADS))
    parser.add_argument("--ours-only", action="store_true", help="leave torch's backends out")
    parser.add_argument("--output", help="JSON file for the results")
    args = parser.parse_args()
    if _ops_cuda is None:
        print("the CUDA module is not built: this benchmark needs a card", file=sys.stderr)
        return 1
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: this benchmark takes its memory from it", file=sys.stderr)
        return 1
    wanted = cases(args.shapes)
    most: dict[int, int] = {}
    for _, case in wanted:
        need = case.blocks() * (1 if case.sequences > 1 else case.launches)
        most[case.kv_heads] = max(most.get(case.kv_heads, 0), need)
    ours = Ours(most)
    columns: dict[str, Any] = {"ours": ours}
    if not args.ours_only:
        columns["cuDNN"] = Theirs("CUDNN_ATTENTION")
        columns["flash"] = Theirs("FLASH_ATTENTION")
    memory = Memory()
    to, source = memory.allocate(COPY_BYTES), memory.random(COPY_BYTES, 4)
    copy = 2 * COPY_BYTES / _ops_cuda.time_copy(to, source, COPY_BYTES, 10, 0)
    print(f"{_ops_cuda.device_facts(0).name}, copy {copy / GB:.0f} GB/s (read and written)")
    rows = []
    for shape, case in wanted:
        row: dict[str, Any] = {"shape": shape, "case": describe(case)}
        line = f"{shape:5s} {row['case']:26s}"
        for name, column in columns.items():
            seconds = column.seconds(case)
            row[name] = None if seconds is None else seconds * 1e6
            text = (
                "refused" if seconds is None else f"{seconds * 1e6:9.1f} us {rate(case, seconds)}"
            )
            line += f" | {name} {text:>26s}"
        rows.append(row)
        print(line, flush=True)
    if args.output:
        result = {"copy_gb_s": copy / GB, "rows": rows}
        Path(args.output).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
