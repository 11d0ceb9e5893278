"""Symmetric int8 and int4 weights with one bfloat16 scale per output column.

The arithmetic is that of Paddle's CPU operator `weight_quantize`, so that a checkpoint made here
equals, byte for byte, one made with `paddle.nn.quant.weight_quantize(arch=80)`:

    scale = bfloat16(max |W[:, n]| / qmax)                       float32 division
    q     = clip(round_half_away(float32(W / scale)), -qmax, qmax)

with qmax 127 or 7; -128 and -8 never occur. Where a scale rounds to zero (a column of zeros, or
below the smallest bfloat16) q is 0 here; Paddle stores whatever 0 / 0 converts to, which decodes
to the same zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.utils.arrays import bfloat16_to_float32, float32_to_bfloat16

if TYPE_CHECKING:
    from fastdeploy_lite.formats.ccq import ArrayF32

COLUMNS_AT_ONCE = 128
"""Columns are converted in blocks whose float32 values stay in the cache: 2.5 ns a weight for any
K of 1024 to 8192 on one core with AVX-512, four times as fast as whole matrices."""
_HALF = np.nextafter(np.float32(0.5), np.float32(0))
"""What is added before the fraction is cut off. With 0.5 itself, 0.49999997 would round up to 1;
with the number below it every tie still does, since the sum is rounded to even."""
_LARGEST = np.finfo(np.float32).max


@dataclass(frozen=True, slots=True)
class IntWeight:
    """A quantised matrix: quantized int8 [K, N] in natural order, scale float32 [N]."""

    quantized: npt.NDArray[np.int8]
    scale: ArrayF32

    def dequantize(self) -> ArrayF32:
        """The matrix that a reader sees, float32 [K, N]."""
        return dequantize(self.quantized, self.scale)


def quantize_int8(weight: npt.NDArray[Any]) -> IntWeight:
    """Quantise a finite matrix [K, N] to -127..127; ValueError or TypeError as for `encode`."""
    return _quantize(weight, 127)


def quantize_int4(weight: npt.NDArray[Any]) -> IntWeight:
    """Quantise a finite matrix [K, N] to -7..7 (held as int8); errors as for `quantize_int8`."""
    return _quantize(weight, 7)


def dequantize(quantized: npt.NDArray[Any], scale: npt.NDArray[np.float32]) -> ArrayF32:
    """q * scale as float32 [K, N]; exact for bfloat16 scales."""
    result: ArrayF32 = quantized.astype(np.float32)
    result *= scale
    return result


def check_finite(weight: npt.NDArray[Any], limit: float = np.inf) -> None:
    """Raise ValueError naming the first element that is NaN, infinite or above ``limit``."""
    # NaN fails every comparison. A numpy bound: a Python number would be squeezed into float16.
    magnitude = np.abs(weight)
    good = magnitude < np.inf if limit == np.inf else magnitude <= np.float64(limit)
    if not good.all():
        row, column = (int(i) for i in np.unravel_index(np.argmin(good), weight.shape))
        bound = "" if limit == np.inf else f" of magnitude at most {limit:.4g}"
        raise ValueError(
            f"weight[{row}, {column}]: found {weight[row, column]}, expected a finite number{bound}"
        )


def check_matrix(weight: npt.NDArray[Any]) -> None:
    """Raise TypeError or ValueError unless ``weight`` is a real floating-point matrix [K, N]."""
    if not np.issubdtype(weight.dtype, np.floating):
        raise TypeError(f"weight: found dtype {weight.dtype}, expected floating point")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight: found shape {list(weight.shape)}, expected a matrix [K, N]")


def _quantize(weight: npt.NDArray[Any], largest: int) -> IntWeight:
    matrix = np.asarray(weight)
    check_matrix(matrix)
    rows, columns = matrix.shape
    found = IntWeight(np.empty((rows, columns), np.int8), np.empty(columns, np.float32))
    for start in range(0, columns, COLUMNS_AT_ONCE):
        part = slice(start, start + COLUMNS_AT_ONCE)
        block = matrix[:, part]
        peak = np.maximum(block.max(axis=0), -block.min(axis=0))
        if not (peak <= _LARGEST).all():  # also NaN
            check_finite(matrix, float(_LARGEST))
        scale = bfloat16_to_float32(float32_to_bfloat16(peak.astype(np.float32) / largest))
        ratio = block.astype(np.float32)
        ratio /= np.where(scale > 0, scale, np.float32(np.inf))
        ratio += np.copysign(_HALF, ratio)
        found.quantized[:, part] = ratio.clip(-largest, largest, out=ratio)  # cut off by the cast
        found.scale[part] = scale
    return found
