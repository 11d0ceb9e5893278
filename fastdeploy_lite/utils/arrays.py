"""Arrays as files hold them: the type's alias, and bfloat16, which numpy lacks, as uint16 bits."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def bfloat16_to_float32(bits: Array) -> npt.NDArray[np.float32]:
    """Return the float32 values of bfloat16 bit patterns (uint16, any shape); exact."""
    values: npt.NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def float32_to_bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """Return bfloat16 bits (uint16) of float32 values, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)  # rounding could carry a NaN into infinity
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    result: npt.NDArray[np.uint16] = np.where(is_nan, quiet, rounded).astype(np.uint16)
    return result
