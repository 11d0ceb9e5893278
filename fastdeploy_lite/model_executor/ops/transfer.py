"""Copies between numpy arrays and tensors, and the memory that is left for tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.model_executor.ops._dispatch import native, place_kind
from fastdeploy_lite.model_executor.ops._view import Tensor
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
    target = np.from_dlpack(out)
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
    return np.from_dlpack(tensor)


def memory_info(place: Any) -> tuple[int, int]:
    """Return the free and the total bytes of the memory that tensors on `place` come from."""
    if place_kind(place) == "cuda":
        free, total = native("cuda", "memory_info")(place)
        return int(free), int(total)
    return host_memory.available_bytes(), host_memory.total_bytes()
