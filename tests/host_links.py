"""A link between layers and main memory where both are main memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.workspace import Workspace


class MemoryLink:
    """See ops.HostLink. Arrays are used again by every layer, as a card's pinned ones are, and
    hold nonsense until something arrives.

    Attributes:
        crossings: rows of every `fetch`.
    """

    def __init__(self) -> None:
        self.place = paddle.CPUPlace()
        self.workspace = Workspace(self.place)
        self.is_mute = False
        self.crossings: list[int] = []
        self._arrays: dict[Any, np.ndarray] = {}
        self._is_answered = False

    def fetch(self, *tensors: Any) -> Sequence[np.ndarray]:
        arrays = [self._array(i, tensor) for i, tensor in enumerate(tensors)]
        for array, tensor in zip(arrays, tensors, strict=True):
            array[...] = ops.host_array(tensor)
        self.crossings.append(len(arrays[0]))
        return arrays

    def on_host(self, work: Callable[[], None]) -> None:
        if not self.is_mute:
            work()
        self._is_answered = True

    def answer(self, like: Any) -> np.ndarray:
        array = self._array("out", like)
        array.view(np.uint8)[...] = 0xFF  # NaN
        self._is_answered = False
        return array

    def send(self, array: np.ndarray, tensor: Any) -> None:
        assert self._is_answered
        ops.host_array(tensor)[...] = array

    def _array(self, name: Any, like: Any) -> np.ndarray:
        values = ops.host_array(like)
        key = (name, values.dtype, values.shape)
        return self._arrays.setdefault(key, np.empty_like(values))
