"""What every CUDA op shares: the stream it runs on, scratch memory, facts about the card.

A process computes on one card. Runners may share it: each thread says for itself which stream and
which scratch memory its ops take.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paddle

from fastdeploy_lite import _ops_cuda
from fastdeploy_lite.model_executor.ops._view import Tensor, View

SCRATCH_BYTES = 64 << 20
"""Partial results of split kernels take a few MiB, cuBLASLt is offered the whole."""

EARLY_START_ROWS = 16
"""Steps of up to so many tokens let kernels start before the ones ahead have ended.

At 64 tokens that makes a step 3 % slower, see docs/performance.md.
"""

BRANCH_ROWS = 64
"""Steps of up to so many tokens leave room on the card for a second kernel, see `Branch`."""


class Scratch:
    """Memory on a card that ops use in turn: partial results, and what kernels count with.

    Kernels of two streams may overlap, so each runner has its own and puts its ops on it with
    `use`. It is allocated when an op first needs it and keeps its addresses: CUDA graphs hold them.
    """

    def __init__(self, place: Any) -> None:
        """Args: place: the card."""
        self._place = place
        self._memory: Tensor | None = None
        self._counters: Tensor | None = None
        self._beside: tuple[int, Scratch] | None = None

    def memory(self) -> int:
        """Address of SCRATCH_BYTES."""
        if self._memory is None:
            self._memory = empty([SCRATCH_BYTES], "uint8", self._place)
        return int(self._memory.data_ptr())

    def counters(self) -> int:
        """Address of the attention kernels' counters, which they leave at zero."""
        if self._counters is None:
            nbytes = int(_ops_cuda.attention_counter_bytes)
            counters = empty([nbytes], "uint8", self._place)
            _ops_cuda.clear(int(counters.data_ptr()), nbytes, stream())
            _ops_cuda.synchronize(stream())  # a graph that zeroed them would do so at each replay
            self._counters = counters
        return int(self._counters.data_ptr())

    def beside(self) -> tuple[int, Scratch]:
        """Stream of a `Branch`, and the memory that its ops take."""
        if self._beside is None:
            self._beside = int(_ops_cuda.create_stream()), Scratch(self._place)
        return self._beside

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Let ops that this thread calls take this memory meanwhile."""
        _thread.scratches.append(self)
        try:
            yield
        finally:
            _thread.scratches.pop()


class _Thread(threading.local):
    """What was put in place of the usual, innermost last."""

    def __init__(self) -> None:
        self.streams: list[int] = []
        self.recorders: list[Callable[[Callable[[], None]], None]] = []
        self.scratches: list[Scratch] = []


_thread = _Thread()


@functools.cache
def _paddle_stream() -> int:
    """Address of the stream on which Paddle queues its own work on the current card."""
    stream = paddle.device.current_stream().stream_base
    for name in ("raw_stream", "cuda_stream"):  # pluggable device, CUDA build
        address = getattr(stream, name, None)
        if address is not None:
            return int(address)
    raise RuntimeError(f"Paddle's stream {type(stream).__name__} does not tell its address")


def stream() -> int:
    """Address of the CUDA stream that ops queue their work on."""
    return _thread.streams[-1] if _thread.streams else _paddle_stream()


@contextlib.contextmanager
def use_stream(address: int) -> Iterator[None]:
    """Queue this thread's ops on another stream meanwhile; for graph capture."""
    _thread.streams.append(address)
    try:
        yield
    finally:
        _thread.streams.pop()


def on_host(work: Callable[[], None]) -> None:
    """Run `work` of the host between what is queued before and after: now or, while a step is
    recorded, at each replay."""
    if _thread.recorders:
        _thread.recorders[-1](work)
    else:
        work()


@contextlib.contextmanager
def recording(cut: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Hand the work of `on_host` to `cut` meanwhile."""
    _thread.recorders.append(cut)
    try:
        yield
    finally:
        _thread.recorders.pop()


def _scratch() -> Scratch:
    if not _thread.scratches:  # ops outside of any runner, as tests call them
        _thread.scratches.append(Scratch(paddle.framework._current_expected_place()))
    return _thread.scratches[-1]


def records_branches() -> bool:
    """Whether a step is being recorded; if not, take the memory that its branches will need, which
    cannot be had then. Kernels launched one by one gain nothing from a branch."""
    if _thread.recorders:
        return True
    _scratch().beside()[1].memory()
    return False


class Branch:
    """See ops.branch. What it queues has scratch memory of its own."""

    def __init__(self) -> None:
        """Begin behind what the stream has queued so far."""
        self._stream, self._scratch = _scratch().beside()
        _ops_cuda.follow(self._stream, stream())

    def __enter__(self) -> None:
        """Queue this thread's ops on the branch."""
        _thread.streams.append(self._stream)
        _thread.scratches.append(self._scratch)

    def __exit__(self, *_: object) -> None:
        """Queue them on the stream again."""
        _thread.streams.pop()
        _thread.scratches.pop()

    def join(self) -> None:
        """See ops.branch."""
        _ops_cuda.follow(stream(), self._stream)


def attention_counters() -> int:
    """Address of what attention kernels count with, see `Scratch`."""
    return _scratch().counters()


def scratch(nbytes: int) -> int:
    """Address of scratch memory that is free until the next op that asks for some.

    Raises:
        ValueError: more than SCRATCH_BYTES.
    """
    if nbytes > SCRATCH_BYTES:
        raise ValueError(
            f"an op asks for {nbytes} bytes of scratch memory, there are {SCRATCH_BYTES}: "
            "lower max_num_batched_tokens or max_num_seqs"
        )
    return _scratch().memory()


@functools.cache
def device_index() -> int:
    """Number of the card this process computes on."""
    place = paddle.framework._current_expected_place()
    return int(place.gpu_device_id() if place.is_gpu_place() else place.custom_device_id())


def address(view: View | None) -> int:
    """Address of a checked tensor, 0 for None.

    Raises:
        ValueError: its rows have gaps; kernels take contiguous tensors.
    """
    if view is None:
        return 0
    pointer, _, shape, strides = view
    expected = math.prod(shape)
    for extent, step in zip(shape, strides, strict=True):
        expected = expected // extent if extent else 0
        if extent > 1 and step != expected:
            raise ValueError(
                f"a tensor of shape {shape} has strides {strides}, CUDA ops need contiguous rows: "
                "call contiguous() on it"
            )
    return pointer


@functools.cache
def open_blas() -> None:
    """Load cuBLASLt, once: from the loader's path, the toolkit, or the nvidia-cublas wheel.

    Raises:
        RuntimeError: it is nowhere; the message says what to install.
    """
    names = ["libcublasLt.so.13", "libcublasLt.so.12"]
    names += [f"/usr/local/cuda/lib64/{name}" for name in names]
    tried = _open_first(_ops_cuda.blas_open, "libcublasLt.so.*", names)
    if tried:
        raise RuntimeError(
            "linear: cuBLASLt was not found, `pip install nvidia-cublas` or install the CUDA"
            f" toolkit ({tried})"
        )


@functools.cache
def open_nccl() -> None:
    """Load NCCL, once: from its wheel or the loader's path.

    NVLink multicast stays off unless the environment says otherwise: sums are made on the cards.

    Raises:
        RuntimeError: it is nowhere; the message says what to install.
    """
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    tried = _open_first(_ops_cuda.nccl_open, "libnccl.so.2", ["libnccl.so.2"])
    if tried:
        raise RuntimeError(
            "several cards need NCCL 2, which was not found: `pip install nvidia-nccl-cu13`"
            f" (nvidia-nccl-cu12 for a driver of CUDA 12) ({tried})"
        )


def _open_first(load: Callable[[str], None], pattern: str, names: Sequence[str]) -> str:
    """Load the first library that can be; "" or, if there is none, why not."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    wheels: list[str] = []
    for folder in folders:
        wheels += map(str, sorted(Path(folder).glob(f"*/lib/{pattern}"), reverse=True))
    tried: list[str] = []
    for candidate in (*wheels, *names):
        try:
            load(candidate)
            return ""
        except RuntimeError as error:
            tried.append(str(error))
    return "; ".join(tried)


def empty(shape: list[int], dtype: str, place: Any) -> Tensor:
    """An uninitialised tensor on `place`."""
    return paddle.empty(shape, dtype=dtype, device=place)
