"""The link between a card and main memory: pinned arrays, copies on the stream of the ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import _ops_cpu, _ops_cuda
from fastdeploy_lite.model_executor.backend import paddle
from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime
from fastdeploy_lite.model_executor.ops.cuda_pinned import Pinned
from fastdeploy_lite.model_executor.workspace import MAX_VIEWS, Workspace

Array = npt.NDArray[Any]
PATIENCE_US = 300
"""How long the CPU's threads stay awake between two layers' experts. The card's part of a layer
takes 90 to 140 us, and waking 15 threads from sleep about as long again."""


class CudaHostLink:
    """See ops.HostLink.

    A recorded step keeps its arrays: where a later and larger one makes them move, the recorded
    copies still go to where the recorded work reads.

    Attributes:
        place, workspace, is_mute: see HostLink.
        mark: called before the host waits for what was fetched, when it has arrived, and when the
            work is done; for measurements.
    """

    def __init__(self, workspace: Workspace) -> None:
        """Args: workspace: of main memory."""
        _ops_cpu.set_loop_patience(PATIENCE_US)
        self.place = workspace.place
        self.workspace = workspace
        self.is_mute = False
        self.mark: Callable[[], None] = _nothing
        self._event = int(_ops_cuda.create_event())
        self._memory: dict[str, Pinned] = {}
        self._arrays: dict[tuple[str, tuple[int, ...], str], Array] = {}

    def fetch(self, *tensors: Any) -> Sequence[Array]:
        """See HostLink."""
        arrays = [self._array(f"in{i}", tensor) for i, tensor in enumerate(tensors)]
        for tensor, array in zip(tensors, arrays, strict=True):
            source, to = int(tensor.data_ptr()), array.ctypes.data
            _ops_cuda.copy_to_pinned(to, source, array.nbytes, runtime.stream())
        runtime.on_host(lambda: _ops_cuda.record_event(self._event, runtime.stream()))
        return arrays

    def on_host(self, work: Callable[[], None]) -> None:
        """See HostLink."""

        def when_arrived() -> None:
            if not self.is_mute:
                self.mark()
                _ops_cuda.wait_event(self._event)
                self.mark()
                work()
                self.mark()

        runtime.on_host(when_arrived)

    def answer(self, like: Any) -> Array:
        """See HostLink."""
        return self._array("out", like)

    def send(self, array: Array, tensor: Any) -> None:
        """See HostLink."""
        to, source = int(tensor.data_ptr()), array.ctypes.data
        _ops_cuda.copy_from_pinned(to, source, array.nbytes, runtime.stream())

    def _array(self, name: str, like: Any) -> Array:
        dtype = _HOST_DTYPES[like.dtype]
        key = (name, tuple(like.shape), dtype)
        array = self._arrays.get(key)
        if array is None:
            memory = self._memory_of(name, int(like.size) * np.dtype(dtype).itemsize)
            if len(self._arrays) >= MAX_VIEWS:  # ragged prefills make a shape per length
                self._arrays.clear()
            array = self._arrays[key] = memory.array(list(like.shape), dtype)
        return array

    def _memory_of(self, name: str, nbytes: int) -> Pinned:
        found = self._memory.get(name)
        if found is None or found.nbytes < nbytes:
            self._arrays = {key: array for key, array in self._arrays.items() if key[0] != name}
            found = self._memory[name] = Pinned(nbytes)
        return found


def _nothing() -> None:
    pass


_HOST_DTYPES = {
    paddle.bfloat16: "uint16",
    paddle.float32: "float32",
    paddle.int32: "int32",
}
