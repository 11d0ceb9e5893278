"""What the host takes for a decode step of a card, without a card: kernels take no time here.

    python tests/card_in_memory/host_step.py [--batches 1,8,64] [--steps 400] [--sampling penalties]

The engine's process as it is, from messages received to messages sent, over Paddle's place of the
card; neither model nor sampling compute anything, a graph is one call. Microseconds of the thread's
CPU time, the slowest of the fastest fifth of the steps (the others were disturbed):

    gap     from the tokens of a step to the launch of the next: the card has nothing to do
    beside  from a launch to the wait for its tokens: the card computes

`python` is what a fixed piece of Python takes meanwhile, 200 on an idle core of a server.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import time
from types import ModuleType
from typing import Any

TOKEN = 11


class Stopwatch(ModuleType):
    """Stands for fastdeploy_lite._ops_cuda: does nothing, and notes when it is asked for what."""

    attention_counter_bytes = 16
    max_top_logprobs = 20

    def __init__(self) -> None:
        super().__init__("fastdeploy_lite._ops_cuda")
        self.gaps: list[int] = []
        self.beside: list[int] = []
        self._since = 0
        self._memory: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    def allocate_pinned(self, nbytes: int) -> int:
        self._memory.append((ctypes.c_uint8 * nbytes)())
        return ctypes.addressof(self._memory[-1])

    def end_capture(self, stream: int, discard: bool) -> int:
        return 1

    def launch_graph(self, graph: int, stream: int) -> None:
        self._note(self.gaps)

    def download(self, host: int, device: int, nbytes: int, stream: int) -> None:
        self._note(self.beside)
        ctypes.memset(host, 0, nbytes)

    def wait_event(self, event: int) -> None:
        self._note(self.beside)

    def skip(self, nanoseconds: int) -> None:
        """Leave out what the measurement itself took."""
        self._since += nanoseconds

    def _note(self, times: list[int]) -> None:
        times.append(time.thread_time_ns() - self._since)
        self._since = time.thread_time_ns()


def _nothing(*_: Any) -> int:
    return 0


CUDA = sys.modules["fastdeploy_lite._ops_cuda"] = Stopwatch()

import zmq  # noqa: E402
from engine import create  # noqa: E402
from machine import work  # noqa: E402

from fastdeploy_lite.engine.core_process import CoreLoop  # noqa: E402
from fastdeploy_lite.request.messages import EngineRequest, EngineSampling  # noqa: E402
from fastdeploy_lite.request.step import SamplerParams  # noqa: E402

PROMPT = list(range(10, 510))
WARM_UP = 40  # steps: prefill, the graph's capture, caches
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    "penalties": {"temperature": 0.8, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.1},
}


class Process:
    """The engine's process with requests that go on, and a reader of its messages."""

    def __init__(self, batch: int, steps: int, sampling: str) -> None:
        limits = {"max_num_seqs": max(batch, 64), "max_num_batched_tokens": 8192}
        longest = len(PROMPT) + WARM_UP + steps + 64
        core = create(batch * (longest // 64 + 2) + 600, {**limits, "max_model_len": 32_768})
        context = zmq.Context.instance()
        self._folder = tempfile.TemporaryDirectory()
        inbox, outbox, self._reader = map(context.socket, (zmq.PULL, zmq.PUSH, zmq.PULL))
        inbox.bind(f"ipc://{self._folder.name}/in")
        outbox.bind(f"ipc://{self._folder.name}/out")
        self._reader.connect(f"ipc://{self._folder.name}/out")
        self._loop = CoreLoop(core, inbox, outbox)
        params = SamplerParams(**SAMPLING[sampling])
        answer = EngineSampling(params, WARM_UP + steps + 1, (2, 7))
        for number in range(batch):
            core.add(EngineRequest(f"chatcmpl-{number:032x}", PROMPT, answer))

    def step(self) -> int:
        """One turn of the loop; nanoseconds of the thread."""
        started = time.thread_time_ns()
        self._loop.turn()
        return time.thread_time_ns() - started

    def read(self) -> None:
        """What a server does meanwhile."""
        while self._reader.poll(0):
            self._reader.recv()


def measure(batch: int, steps: int, sampling: str) -> dict[str, float]:
    """Microseconds of a step of so many sequences."""
    process = Process(batch, steps, sampling)
    for _ in range(WARM_UP):
        process.step()
    CUDA.gaps.clear()
    CUDA.beside.clear()
    gc.collect()
    whole, yardsticks = [], []
    for _ in range(steps - 1):
        whole.append(process.step())
        begin = time.thread_time_ns()
        work()
        yardsticks.append(time.thread_time_ns() - begin)
        process.read()
        CUDA.skip(time.thread_time_ns() - begin)
    times = {"step": whole, "gap": CUDA.gaps, "beside": CUDA.beside, "python": yardsticks}
    assert min(len(CUDA.gaps), len(CUDA.beside)) > 0.9 * steps
    return {name: sorted(each)[len(each) // 5] / 1e3 for name, each in times.items()}


def main() -> None:
    """Measure and print, a JSON object a line with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sampling", choices=SAMPLING, default="greedy")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for batch in map(int, args.batches.split(",")):
        found = measure(batch, args.steps, args.sampling)
        if args.json:
            print(json.dumps({"batch": batch, **found}))
            continue
        numbers = ", ".join(f"{name} {value:.0f}" for name, value in found.items())
        print(f"batch {batch}: {numbers} us")


main()
