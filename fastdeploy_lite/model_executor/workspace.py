"""Scratch memory of the model: named buffers that grow to the largest step and stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle

from fastdeploy_lite.model_executor.ops import fix, upload

MAX_VIEWS = 4096


class Workspace:
    """Named scratch tensors on one place.

    Each name owns one flat buffer; `get` returns its head in the shape asked for. A buffer grows
    when a step needs more and never shrinks, so after the largest step nothing is allocated and a
    CUDA graph may keep the addresses. `generation` counts the moves: a captured graph is stale when
    it differs from the value at capture.
    """

    def __init__(self, place: Any) -> None:
        """Args: place: Paddle place that all buffers live on."""
        self.place = place
        self.generation = 0
        self._buffers: dict[tuple[str, str], Any] = {}
        self._views: dict[tuple[str, str, tuple[int, ...]], Any] = {}

    def get(self, name: str, shape: Sequence[int], dtype: str) -> Any:
        """Return an uninitialised tensor; contents survive until `name` is asked for again.

        Args:
            name: what the buffer is for; two live tensors must have two names.
            shape: sizes, each at least 1; the leading elements of the flat buffer are used.
            dtype: Paddle dtype name such as "float32".

        Returns:
            Contiguous tensor of `shape`, the same object for the same arguments.
        """
        key = (name, dtype, tuple(shape))
        view = self._views.get(key)
        if view is None:
            view = self._view(key)
        return view

    def zeroed(self, name: str, shape: Sequence[int], dtype: str) -> Any:
        """Return a tensor that is zero when it is made; what ops leave in it stays.

        For counters and flags of kernels, which set them back themselves. One that grows is zero
        again. `name` is no name of `get`.
        """
        key = (name, dtype, tuple(shape))
        view = self._views.get(key)
        if view is None:
            size = math.prod(shape)
            buffer = self._buffers.get((name, dtype))
            fresh = buffer is None or buffer.size < size
            view = self._view(key)
            if fresh:
                upload(np.zeros(size, dtype), self._buffers[name, dtype])
        return view

    @property
    def nbytes(self) -> int:
        """Bytes held by all buffers."""
        return sum(int(b.size) * int(b.element_size()) for b in self._buffers.values())

    def _view(self, key: tuple[str, str, tuple[int, ...]]) -> Any:
        name, dtype, shape = key
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.size < count:
            buffer = self._grow(name, dtype, count)
        if len(self._views) >= MAX_VIEWS:  # ragged prefills make a shape per length
            self._views.clear()
        view = fix(buffer[:count].view(list(shape)))
        self._views[key] = view
        return view

    def _grow(self, name: str, dtype: str, count: int) -> Any:
        stale = [key for key in self._views if key[:2] == (name, dtype)]
        for key in stale:
            del self._views[key]
        self._buffers.pop((name, dtype), None)  # give the old memory back before taking the new
        buffer = paddle.empty([count], dtype=dtype, device=self.place)
        self._buffers[name, dtype] = buffer
        self.generation += 1
        return buffer
