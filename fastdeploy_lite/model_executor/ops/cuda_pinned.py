"""Page-locked main memory, which a card reads and writes while the host goes on."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import _ops_cuda
from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime
from fastdeploy_lite.model_executor.ops._view import Tensor


class Pinned:
    """A block of such memory, zeros at first."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = int(_ops_cuda.allocate_pinned(nbytes))
        ctypes.memset(self.address, 0, nbytes)

    def __del__(self) -> None:
        _ops_cuda.free_pinned(self.address)

    def array(self, shape: list[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The head of the memory, which the array keeps alive."""
        kind: np.dtype[Any] = np.dtype(dtype)
        memory: Any = (ctypes.c_uint8 * (math.prod(shape) * kind.itemsize)).from_address(
            self.address
        )
        memory.owner = self
        return np.frombuffer(memory, kind).reshape(shape)


class CudaMirror:
    """See ops.Mirror. Addresses are looked up once: a step crosses three times."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._device = int(tensor.data_ptr())
        memory = Pinned(int(tensor.size))
        self._host = memory.address
        self.array = memory.array([memory.nbytes], np.uint8)
        self._event = 0

    def upload(self, nbytes: int) -> None:
        """See Mirror."""
        _ops_cuda.upload(self._device, self._host, nbytes, runtime.stream())

    def fetch(self, nbytes: int) -> None:
        """See Mirror."""
        if not self._event:  # most mirrors only upload
            self._event = int(_ops_cuda.create_event())
        stream = runtime.stream()
        _ops_cuda.copy_to_pinned(self._host, self._device, nbytes, stream)
        _ops_cuda.record_event(self._event, stream)

    def wait(self) -> None:
        """See Mirror."""
        _ops_cuda.wait_event(self._event)
