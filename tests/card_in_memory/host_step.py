"""What the host takes for a decode step of a card, without a card: kernels take no time here.

    python tests/card_in_memory/host_step.py [--batches 1,8,64] [--steps 400] [--sampling penalties]
        [--speculation]

The engine's process as it is, from messages received to messages sent, over Paddle's place of the
card; neither model nor sampling compute anything, a graph is one call. Microseconds of the thread's
CPU time, the slowest of the fastest fifth of the steps (the others were disturbed):

    gap     from the tokens of a step to the launch of the next: the card has nothing to do
    beside  from a launch to the wait for its tokens: the card computes

`python` is what a fixed piece of Python takes meanwhile, 200 on an idle core of a server.

`--speculation` lets three engines take turns, step by step: without speculation, and with "ngram"
and "suffix" that may not look for guesses, as they do most of the time where nothing repeats. Its
times are means of 16 steps on end, of which one keeps the accounts.
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
        self._gaps: list[int] = []
        self._beside: list[int] = []
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
        self._note(self._gaps)

    def download(self, host: int, device: int, nbytes: int, stream: int) -> None:
        self._note(self._beside)
        ctypes.memset(host, 0, nbytes)

    def wait_event(self, event: int) -> None:
        self._note(self._beside)

    def resume(self, passed: int, gaps: list[int], beside: list[int]) -> None:
        """Note into these lists from now on, `passed` nanoseconds after the last note."""
        self._gaps, self._beside = gaps, beside
        self._since = time.thread_time_ns() - passed

    def pause(self) -> int:
        """Nanoseconds since the last note, for `resume`."""
        return time.thread_time_ns() - self._since

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
from fastdeploy_lite.speculation.config import SpeculativeConfig  # noqa: E402
from fastdeploy_lite.speculation.rates import Purse  # noqa: E402

METHODS = ("ngram", "suffix")
PROMPT = list(range(10, 510))
TOGETHER = 16  # steps of speculation that are timed as one: its accounts are not kept in every one
WARM_UP = 40  # steps: prefill, the graph's capture, caches
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "seed": 3},
    "penalties": {"temperature": 0.8, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.1},
}


class Overdrawn(Purse):
    """Guessing owes so much that nobody looks."""

    def can_pay(self, on_credit: bool = False) -> bool:
        """Never."""
        return False

    def steps_to_wait(self, seconds: float, on_credit: bool = False) -> int:
        """For ever."""
        return 1 << 30


class Process:
    """The engine's process with requests that go on, and a reader of its messages.

    Args:
        batch, steps: Sequences, and how many tokens of each are answered.
        sampling: A key of SAMPLING.
        method: Of guessing, which has spent what it may; None guesses nothing.

    Attributes:
        times: Nanoseconds of steps, by what took them.
    """

    def __init__(self, batch: int, steps: int, sampling: str, method: str | None = None) -> None:
        limits = {"max_num_seqs": max(batch, 64), "max_num_batched_tokens": 8192}
        longest = len(PROMPT) + WARM_UP + steps + 64
        core = create(
            batch * (longest // 64 + 2) + 600,
            {**limits, "max_model_len": 32_768},
            speculative=SpeculativeConfig(method) if method else None,
        )
        if core._speculator is not None:
            core._speculator._purse = Overdrawn(0.01, 2.0)
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
        self.times: dict[str, list[int]] = {name: [] for name in ("step", "gap", "beside")}
        self._passed = 0

    def step(self) -> None:
        """One turn of the loop, timed, and what a server does meanwhile."""
        CUDA.resume(self._passed, self.times["gap"], self.times["beside"])
        started = time.thread_time_ns()
        self._loop.turn()
        self.times["step"].append(time.thread_time_ns() - started)
        self._passed = CUDA.pause()
        while self._reader.poll(0):
            self._reader.recv()


def measure(processes: list[Process], steps: int) -> list[dict[str, float]]:
    """Microseconds of a step of each, which take turns."""
    for process in processes:
        for _ in range(WARM_UP):
            process.step()
        for times in process.times.values():
            times.clear()
    gc.collect()
    yardsticks = []
    for turn in range(steps - 1):
        first = turn % len(processes)
        for process in processes[first:] + processes[:first]:
            process.step()
        begin = time.thread_time_ns()
        work()
        yardsticks.append(time.thread_time_ns() - begin)
    assert min(len(times) for each in processes for times in each.times.values()) > 0.9 * steps
    together = TOGETHER if len(processes) > 1 else 1
    return [_micros({**each.times, "python": yardsticks}, together) for each in processes]


def _micros(times: dict[str, list[int]], together: int) -> dict[str, float]:
    found = {}
    for name, each in times.items():
        sums = [sum(each[i : i + together]) for i in range(0, len(each) - together + 1, together)]
        found[name] = sorted(sums)[len(sums) // 5] / (1e3 * together)
    return found


def main() -> None:
    """Measure and print, a JSON object a line with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sampling", choices=SAMPLING, default="greedy")
    parser.add_argument("--speculation", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    methods = (None, *METHODS) if args.speculation else (None,)
    for batch in map(int, args.batches.split(",")):
        processes = [Process(batch, args.steps, args.sampling, method) for method in methods]
        for method, found in zip(methods, measure(processes, args.steps), strict=True):
            if args.json:
                print(json.dumps({"batch": batch, "speculation": method, **found}))
                continue
            numbers = ", ".join(f"{name} {value:.0f}" for name, value in found.items())
            name = f", {method or 'plain'}" if args.speculation else ""
            print(f"batch {batch}{name}: {numbers} us")


main()
