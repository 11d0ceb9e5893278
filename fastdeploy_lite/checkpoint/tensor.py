"""Named arrays of a checkpoint on the host: what is known of them, and their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.utils.arrays import Array, bfloat16_to_float32, float32_to_bfloat16

__all__ = [
    "DTYPES",
    "Array",
    "HostTensor",
    "TensorInfo",
    "bfloat16_to_float32",
    "float32_to_bfloat16",
]

# safetensors name -> numpy type that holds its bits. bfloat16 and the 8-bit floats have no numpy
# type; their bits are held in unsigned integers. All files are little-endian.
DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "C64": np.dtype("<c8"),
}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor. `nbytes` is its size in the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path

    def describe(self) -> str:
        """Return dtype and shape as error messages quote them, such as `BF16 [384, 640]`."""
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, eq=False)
class HostTensor:
    """One tensor's bits. `data` is normally a read-only view of the mapped file: copy to keep.

    BF16 is held as uint16 bits; `float32()` gives the values.
    """

    data: Array
    dtype: str
    key: str
    file: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as the file states it."""
        return self.data.shape

    def float32(self) -> npt.NDArray[np.float32]:
        """Return the values as float32 (a new array unless the file holds F32)."""
        if self.dtype == "BF16":
            return bfloat16_to_float32(self.data)
        if self.dtype.startswith("F8"):
            raise TypeError(f"{self.key}: {self.dtype} cannot be converted to float32")
        return np.asarray(self.data, dtype=np.float32)
