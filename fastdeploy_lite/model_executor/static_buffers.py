"""Small arrays that cross between host and device once per step, packed into one block of bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from fastdeploy_lite.model_executor import ops

_ALIGNMENT = 256  # bytes; satisfies every dtype and keeps fields on separate cache lines


class PackedBuffer:
    """Named arrays at fixed addresses, each with a host view and a device view.

    On the CPU both views are one memory and the transfers do nothing. On a card `upload` and
    `download` are one copy each, whatever the number of fields, and CUDA graphs may keep the
    addresses.

    Attributes:
        host: numpy views by name.
        device: tensor views by name, of the same shapes.
    """

    def __init__(self, fields: Mapping[str, tuple[Sequence[int], str]], place: Any) -> None:
        """Args: fields: name -> (shape, dtype name); place: Paddle place of the device views."""
        self._spans: dict[str, slice] = {}  # in bytes
        end = 0
        for name, (shape, dtype) in fields.items():
            start, size = end, math.prod(shape) * np.dtype(dtype).itemsize
            self._spans[name] = slice(start, start + size)
            end = -(-(start + size) // _ALIGNMENT) * _ALIGNMENT
        self._flat = paddle.empty([end], dtype="uint8", device=place)
        self._mirror = ops.mirror(self._flat)
        self._mirror.array.fill(0)
        self.host: dict[str, npt.NDArray[Any]] = {}
        self.device: dict[str, Any] = {}
        for name, (shape, dtype) in fields.items():
            span, size = self._spans[name], np.dtype(dtype).itemsize
            self.host[name] = self._mirror.array[span].view(dtype).reshape(shape)
            # Reinterpret before slicing: Paddle 3.3 loses the offset of a slice in view(dtype).
            part = self._flat.view(dtype)[span.start // size : span.stop // size]
            self.device[name] = ops.fix(part.view(list(shape)))

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return int(self._mirror.array.nbytes)

    def upload(self, last: str | None = None, rows: int | None = None) -> None:
        """Copy host to device: all fields or, in field order, those up to and including `last`, of
        which the first `rows` are enough (None: all)."""
        self._mirror.upload(self._end(last, rows))

    def download(self, last: str | None = None) -> None:
        """Copy device to host and wait for it; fields as in `upload`."""
        self._mirror.fetch(self._end(last))
        self._mirror.wait()

    def _end(self, last: str | None, rows: int | None = None) -> int:
        if last is None:
            return self.nbytes
        span = self._spans[last]
        return int(span.stop if rows is None else span.start + rows * self.host[last].strides[0])
