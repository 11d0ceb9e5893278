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
        self._ends: dict[str, int] = {}
        starts, end = {}, 0
        for name, (shape, dtype) in fields.items():
            starts[name] = end
            self._ends[name] = end + math.prod(shape) * np.dtype(dtype).itemsize
            end = -(-self._ends[name] // _ALIGNMENT) * _ALIGNMENT
        self._flat = paddle.empty([end], dtype="uint8", device=place)
        self._shared = self._flat.place.is_cpu_place()
        self._bytes: npt.NDArray[np.uint8] = np.empty(0 if self._shared else end, np.uint8)
        if self._shared:
            self._bytes = ops.host_array(self._flat)
        self._bytes.fill(0)
        self.host: dict[str, npt.NDArray[Any]] = {}
        self.device: dict[str, Any] = {}
        for name, (shape, dtype) in fields.items():
            self.host[name] = self._bytes[starts[name] : self._ends[name]].view(dtype)
            self.host[name] = self.host[name].reshape(shape)
            size = np.dtype(dtype).itemsize
            # Reinterpret before slicing: Paddle 3.3 loses the offset of a slice in view(dtype).
            whole = self._flat.view(dtype)
            part = whole[starts[name] // size : self._ends[name] // size]
            self.device[name] = ops.fix(part.view(list(shape)))

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return int(self._bytes.nbytes)

    def upload(self, last: str | None = None) -> None:
        """Copy host to device, all fields or those up to and including `last` in field order."""
        if not self._shared:
            end = self.nbytes if last is None else self._ends[last]
            ops.upload(self._bytes[:end], self._flat)

    def download(self, last: str | None = None) -> None:
        """Copy device to host and wait for it; fields as in `upload`."""
        if not self._shared:
            end = self.nbytes if last is None else self._ends[last]
            self._bytes[:end] = ops.download(self._flat[:end])
