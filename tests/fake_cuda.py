"""The host's side of CUDA without a card: a stream whose work waits until it is asked for.

For the Python code around it alone. Device memory is main memory; nothing queued has happened
before an event is waited for or the stream is synchronised, so whoever looks too early sees what
was there before.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from itertools import count
from types import ModuleType
from typing import Any

import numpy as np

Work = Callable[[], object]
EXECUTOR = "fastdeploy_lite.model_executor"
MODULES = (
    f"{EXECUTOR}.ops.cuda_runtime",
    f"{EXECUTOR}.ops.cuda_pinned",
    f"{EXECUTOR}.cuda_host_link",
    f"{EXECUTOR}.cuda_graph",
)


class FakeCuda(ModuleType):
    """Stands for fastdeploy_lite._ops_cuda."""

    attention_counter_bytes = 16

    def __init__(self) -> None:
        super().__init__("fastdeploy_lite._ops_cuda")
        self.recorded: list[Work] | None = None
        self.graphs: dict[int, list[Work]] = {}
        self._queue: list[Work] = []
        self._done = 0
        self._events: dict[int, int] = {}
        self._pinned: dict[int, np.ndarray] = {}
        self._handles = count(1)

    def put(self, work: Work) -> None:
        """Queue a kernel, or record it."""
        (self._queue if self.recorded is None else self.recorded).append(work)

    def synchronize(self, stream: int = 0) -> None:
        self._run(len(self._queue))

    def _run(self, number: int) -> None:
        for work in self._queue[:number]:
            work()
        del self._queue[:number]
        self._done += number

    def allocate_pinned(self, nbytes: int) -> int:
        assert self.recorded is None, "the driver refuses this during a capture"
        memory = np.full(nbytes, 0xFF, np.uint8)
        self._pinned[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free_pinned(self, address: int) -> None:
        self._pinned[address][...] = 0xFF  # and kept: whoever still uses it shall read nonsense

    def copy_to_pinned(self, pinned: int, device: int, nbytes: int, stream: int) -> None:
        self.put(lambda: ctypes.memmove(pinned, device, nbytes))

    def copy_from_pinned(self, device: int, pinned: int, nbytes: int, stream: int) -> None:
        self.put(lambda: ctypes.memmove(device, pinned, nbytes))

    def upload(self, device: int, host: int, nbytes: int, stream: int) -> None:
        staged = ctypes.string_at(host, nbytes)  # the host may write there again at once
        self.put(lambda: ctypes.memmove(device, staged, nbytes))

    def download(self, host: int, device: int, nbytes: int, stream: int) -> None:
        self.synchronize(stream)
        ctypes.memmove(host, device, nbytes)

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self.put(lambda: ctypes.memmove(to, source, nbytes))

    def clear(self, device: int, nbytes: int, stream: int) -> None:
        self.put(lambda: ctypes.memset(device, 0, nbytes))

    def create_event(self) -> int:
        return next(self._handles)

    def record_event(self, event: int, stream: int) -> None:
        assert self.recorded is None
        self._events[event] = self._done + len(self._queue)

    def wait_event(self, event: int) -> None:
        assert self.recorded is None
        self._run(max(0, self._events[event] - self._done))

    def create_stream(self) -> int:
        return next(self._handles)

    def begin_capture(self, stream: int) -> None:
        assert self.recorded is None
        self.recorded = []

    def end_capture(self, stream: int, discard: bool) -> int:
        assert self.recorded is not None
        work, self.recorded = self.recorded, None
        if discard or not work:
            return 0
        handle = next(self._handles)
        self.graphs[handle] = work
        return handle

    def launch_graph(self, graph: int, stream: int) -> None:
        for work in self.graphs[graph]:
            self.put(work)

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]


class Card:
    """A fresh CUDA, and the modules that were imported over it."""

    def __init__(self) -> None:
        from fastdeploy_lite.model_executor.backend import paddle
        from fastdeploy_lite.model_executor.workspace import Workspace

        self.cuda = FakeCuda()
        sys.modules["fastdeploy_lite._ops_cuda"] = self.cuda
        modules: tuple[Any, ...] = tuple(map(importlib.import_module, MODULES))
        self.runtime, _, link, graph = modules
        self.runtime._paddle_stream = lambda: 0
        self.workspace = Workspace(paddle.CPUPlace())
        self.link = link.CudaHostLink(Workspace(paddle.CPUPlace()))
        self.graphs = graph.CudaDecodeGraphs(self.workspace, 8, range(1, 9))

    def forget(self) -> None:
        """Let the modules be imported anew."""
        for name in (*MODULES, "fastdeploy_lite._ops_cuda"):
            sys.modules.pop(name, None)
            parent, _, child = name.rpartition(".")
            vars(sys.modules[parent]).pop(child, None)
