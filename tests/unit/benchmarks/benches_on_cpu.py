"""Runs bench_card.py, bench_ranks.py or bench_offload.py of entrypoints/ over CPU processes.

    python benches_on_cpu.py bench_card ARGUMENTS     # used by test_bench_cards

Cards, NCCL and graphs are replaced, shapes are small; what the ranks do is the benchmark's own. The
ranks beyond the first run this very command line again, with more arguments.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "entrypoints")]

from fake_cuda import FakeCuda  # noqa: E402
from model_driver import PaddedSteps  # noqa: E402

from fastdeploy_lite import device  # noqa: E402
from fastdeploy_lite.benchmarks import ceilings, timing  # noqa: E402
from fastdeploy_lite.distributed.communicator import SharedMemoryCommunicator  # noqa: E402
from fastdeploy_lite.model_executor import expert_placement  # noqa: E402
from fastdeploy_lite.model_executor.workspace import Workspace  # noqa: E402
from fastdeploy_lite.worker.model_runner import ModelRunner  # noqa: E402

SMALL: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "moe_num_experts": 8,
    "moe_k": 2,
    "vocab_size": 1024,
}


class Graphs(PaddedSteps):
    """Steps that are computed, and timed, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self._forward: dict[int, Callable[[], Any]] = {}

    def run(self, size: int, forward: Callable[[], Any]) -> Any:
        self._forward[size] = forward
        return super().run(size, forward)

    def replay_seconds(self, size: int, repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            self._forward[size]()
        return (time.perf_counter() - started) / repeats


class Nccl(SharedMemoryCommunicator):
    """Sums through main memory, behind NcclCommunicator's names, and slow.

    Steps of small shapes differ by more than a real sum takes. What leaves its sums out must show.
    """

    def __init__(self, ranks: SharedMemoryCommunicator, seconds: float = 30.0) -> None:
        super().__init__(ranks._memory, ranks.rank, seconds)

    def all_reduce(self, x: Any) -> None:
        time.sleep(0.002)
        super().all_reduce(x.cast("float32") if "bfloat16" in str(x.dtype) else x)

    def set_way(self, way: str) -> None:
        """There is one."""


class Cuda(FakeCuda):
    """And what the benchmarks ask of the module themselves."""

    def device_facts(self, index: int) -> Any:
        memory = {"total_bytes": 64 << 30, "free_bytes": 60 << 30}
        return SimpleNamespace(name=f"no card {index}", multiprocessors=1, **memory)


def new_graphs(runner: Any) -> None:
    runner._graphs = Graphs() if runner._kv_caches else None


def open_link(place: Any) -> Any:
    link = importlib.import_module("fastdeploy_lite.model_executor.cuda_host_link")
    return link.CudaHostLink(Workspace(place))


def graph_seconds(work: Callable[[], Any], ready: Callable[[], Any]) -> list[float]:
    work()
    ready()
    return timing.call_seconds(work, 3)


def main() -> int:
    cpu = device.activate(0, "cpu")
    device.decide.cache_clear()
    sys.modules["fastdeploy_lite._ops_cuda"] = Cuda()
    nccl = ModuleType("fastdeploy_lite.distributed.nccl")
    nccl.NcclCommunicator = Nccl  # type: ignore[attr-defined]
    sys.modules[nccl.__name__] = nccl
    device.decide = lambda: device.Device("gpu", "a test")  # type: ignore[assignment]
    device.activate = lambda index=0, wanted=None: cpu
    device.visible_cards = lambda: ["0", "1"]
    ceilings.copy_bandwidth = lambda: 1e9
    timing.graph_seconds = graph_seconds  # type: ignore[assignment]
    expert_placement.open_link = open_link
    ModelRunner._renew_graphs = new_graphs  # type: ignore[method-assign]
    runtime = importlib.import_module("fastdeploy_lite.model_executor.ops.cuda_runtime")
    runtime._paddle_stream = lambda: 0
    bench = importlib.import_module(sys.argv[1])
    for shape in getattr(bench, "SHAPES", {}).values():
        shape.update(SMALL)
    start_with(sys.argv.pop(1))
    return int(bench.main())


def start_with(name: str) -> None:
    """Start the ranks with the name of the benchmark in front of their arguments."""
    ranks = importlib.import_module("bench_ranks")
    popen = ranks.subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return popen([*command[:2], name, *command[2:]], **options)

    ranks.subprocess = SimpleNamespace(Popen=start, DEVNULL=ranks.subprocess.DEVNULL)


if __name__ == "__main__":
    os.environ["FD_LITE_DEVICE"] = "cpu"
    sys.exit(main())
