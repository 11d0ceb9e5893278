"""Copies between numpy arrays and tensors, and the memory that is left for tensors."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.model_executor.ops._dispatch import native, place_kind
from fastdeploy_lite.model_executor.ops._view import DTYPE_NAMES, Arguments, Tensor, View
from fastdeploy_lite.utils import host_memory


def upload(array: npt.NDArray[Any], out: Tensor) -> None:
    """Copy a host array to the first `array.size` elements of `out`.

    On a card the copy is ordered on the current stream and `array` may be reused on return.

    Args:
        array: contiguous, of the same dtype as `out`.
        out: contiguous tensor of any shape with at least as many elements.

    Raises:
        ValueError: `out` is too small, of another dtype, or has gaps.
    """
    if array.size > out.size or not out.is_contiguous():
        raise ValueError(
            f"upload: {array.size} elements do not fit in a tensor of {out.size} "
            f"(contiguous: {out.is_contiguous()})"
        )
    if place_kind(out.place) == "cuda":
        native("cuda", "upload")(array, out)
        return
    target = host_array(out)
    if target.dtype != array.dtype:
        raise ValueError(f"upload: array has dtype {array.dtype}, the tensor {target.dtype}")
    target.reshape(-1)[: array.size] = array.reshape(-1)


def download(tensor: Tensor) -> npt.NDArray[Any]:
    """Return the values of a contiguous tensor once all queued work on it is done.

    On the CPU this is the tensor's own memory, not a copy.
    """
    if place_kind(tensor.place) == "cuda":
        found: npt.NDArray[Any] = native("cuda", "download")(tensor)
        return found
    return host_array(tensor)


class Mirror(Protocol):
    """A tensor of bytes and main memory that is made to hold the same bytes, time and again.

    Attributes:
        array: that memory, as large as the tensor.
    """

    array: npt.NDArray[np.uint8]

    def upload(self, nbytes: int) -> None:
        """Copy the first bytes to the tensor, ordered on the current stream; `array` may be written
        again on return."""

    def fetch(self, nbytes: int) -> None:
        """Queue the copy of the tensor's first bytes to `array`."""

    def wait(self) -> None:
        """Return once what was fetched last is there."""


class _OneMemory:
    """The mirror of a tensor in main memory: itself."""

    def __init__(self, tensor: Tensor) -> None:
        self.array = host_array(tensor)

    def upload(self, nbytes: int) -> None:
        pass

    def fetch(self, nbytes: int) -> None:
        pass

    def wait(self) -> None:
        pass


def mirror(tensor: Tensor) -> Mirror:
    """Return the mirror of a contiguous uint8 tensor [n], which it keeps alive.

    On a card its memory is page-locked, so that the host goes on while it is fetched.
    """
    if place_kind(tensor.place) == "cuda":
        found: Mirror = native("cuda", "mirror")(tensor)
        return found
    return _OneMemory(tensor)


def clear(tensor: Tensor) -> None:
    """Fill a contiguous tensor with zeros, ordered on the current stream.

    Raises:
        ValueError: the tensor has gaps.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"clear: a tensor of shape {tensor.shape} has gaps")
    if place_kind(tensor.place) == "cuda":
        native("cuda", "clear")(tensor)
    else:
        host_array(tensor)[...] = 0


def host_array(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a contiguous CPU tensor's own memory as a writable array; bfloat16 as uint16 bits.

    By address, since DLPack views of Paddle 3.2's tensors are read-only in numpy. The array keeps
    the tensor alive.

    Raises:
        ValueError: the tensor is on a card or has gaps.
    """
    if not tensor.place.is_cpu_place() or not tensor.is_contiguous():
        raise ValueError(
            f"host_array: expected a contiguous CPU tensor, found one on {tensor.place} "
            f"(contiguous: {tensor.is_contiguous()})"
        )
    dtype = np.dtype(DTYPE_NAMES[tensor.dtype].replace("bfloat16", "uint16"))
    shape = list(tensor.shape)
    memory = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(tensor.data_ptr())
    memory.owner = tensor
    return np.frombuffer(memory, dtype).reshape(shape)


def widen(bits: npt.NDArray[np.uint16], out: Tensor) -> None:
    """Write bfloat16 rows as float32, exactly; on the CPU.

    Args:
        bits: [T, H], of a host array.
        out: float32 [T, H].

    Raises:
        TypeError, ValueError: wrong dtype or shape, or `out` on a card.
    """
    args = Arguments("widen", out)
    args.native()(_bits_view("widen", bits), args.view("out", out, "float32", *bits.shape))


def narrow(x: Tensor, out: npt.NDArray[np.uint16]) -> None:
    """Write float32 rows as bfloat16, rounded to nearest, ties to even; on the CPU.

    Args:
        x: float32 [T, H].
        out: bits [T, H], a host array.

    Raises:
        TypeError, ValueError: wrong dtype or shape, or `x` on a card.
    """
    args = Arguments("narrow", x)
    args.native()(args.view("x", x, "float32", *out.shape), _bits_view("narrow", out))


def _bits_view(op: str, bits: npt.NDArray[np.uint16]) -> View:
    """View of a host array of bfloat16 bits; the caller keeps it alive during the call."""
    if bits.dtype != np.uint16:
        raise TypeError(f"{op}: the host array has dtype {bits.dtype}, expected uint16 (bf16 bits)")
    address: int = bits.__array_interface__["data"][0]
    return address, "bfloat16", list(bits.shape), [step // 2 for step in bits.strides]


def memory_info(place: Any) -> tuple[int, int]:
    """Return the free and the total bytes of the memory that tensors on `place` come from."""
    if place_kind(place) == "cuda":
        free, total = native("cuda", "memory_info")(place)
        return int(free), int(total)
    return host_memory.available_bytes(), host_memory.total_bytes()


def own_scratch(place: Any) -> Callable[[], AbstractContextManager[None]]:
    """Return what puts the calling thread's ops on scratch memory of its own while it is entered.

    For each runner of a process: kernels of two may overlap on a card. On the CPU each thread has
    its own anyway.
    """
    if place_kind(place) == "cuda":
        use: Callable[[], AbstractContextManager[None]] = native("cuda", "own_scratch")(place)
        return use
    return nullcontext


class Branch(Protocol):
    """Work beside the stream; see `branch`."""

    def __enter__(self) -> None:
        """Queue ops on the branch."""

    def __exit__(self, *_: object) -> None:
        """Queue ops on the stream again."""

    def join(self) -> None:
        """Let what is queued from now on wait for the branch."""


class _InOrder:
    """A branch where there is but one queue."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def join(self) -> None:
        pass


_IN_ORDER = _InOrder()


def branch(x: Any) -> Branch:
    """Return a branch for work that a card may do beside what is queued outside of it until `join`.

    It begins behind what is queued so far. Ops inside and outside may not share buffers that one of
    them writes. On the CPU, outside of graphs, and for so many rows that they fill a card, the work
    is done in order.

    Args:
        x: what the branch works on, [T, H].
    """
    found = native("cuda", "branch")(x.shape[0]) if place_kind(x.place) == "cuda" else None
    return _IN_ORDER if found is None else found


def announce_step(place: Any, rows: int) -> None:
    """Tell a card how many tokens the kernels to come work on; for speed alone."""
    if place_kind(place) == "cuda":
        native("cuda", "announce_step")(rows)
