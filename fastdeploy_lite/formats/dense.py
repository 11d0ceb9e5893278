"""bf16 (or float32) weights as they are: one tensor `weight` [K, N]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.formats.base import (
    Arrays,
    Order,
    Range,
    TensorSpec,
    WeightFormat,
    spread,
    take,
)
from fastdeploy_lite.utils.arrays import bfloat16_to_float32


class Dense(WeightFormat):
    """Arrays: weight uint16 (bf16 bits) or float32 [K, N]."""

    name = "dense"
    title = "bf16"
    kernel = "dense"
    bits = 16

    def shape(self, arrays: Arrays) -> tuple[int, int]:
        """See WeightFormat."""
        rows, columns = arrays["weight"].shape
        return rows, columns

    def tensors(self, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        """See WeightFormat."""
        return (TensorSpec("weight", ("BF16", "F32"), ((rows, columns),)),)

    def slice_columns(self, arrays: Arrays, ranges: Sequence[Range]) -> Arrays:
        """See WeightFormat."""
        return {"weight": take(arrays["weight"], ranges, -1)}

    def slice_rows(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        """See WeightFormat."""
        return {"weight": arrays["weight"][start:stop]}

    def join_columns(self, parts: Sequence[Arrays]) -> Arrays:
        """See WeightFormat; parts of both types become float32."""
        return {"weight": np.concatenate(_of_one_type(parts), axis=1)}

    def join_rows(self, parts: Sequence[Arrays]) -> Arrays | None:
        """See WeightFormat; parts of both types become float32."""
        return {"weight": np.concatenate(_of_one_type(parts), axis=0)}

    def permute_columns(self, arrays: Arrays, order: Order) -> Arrays:
        """See WeightFormat."""
        weight = arrays["weight"]
        return {"weight": weight[:, spread(order, weight.shape[1])]}

    def permute_rows(self, arrays: Arrays, order: Order) -> Arrays:
        """See WeightFormat."""
        weight = arrays["weight"]
        return {"weight": weight[spread(order, weight.shape[0])]}

    def decode(self, arrays: Arrays) -> npt.NDArray[np.float32]:
        """See WeightFormat."""
        weight = arrays["weight"]
        return bfloat16_to_float32(weight) if weight.dtype == np.uint16 else weight

    def for_kernel(self, arrays: Arrays) -> dict[str, Any]:
        """See WeightFormat: the transposed view of a file's [N, K] goes in without a copy."""
        weight = arrays["weight"]
        if weight.flags.f_contiguous and not weight.flags.c_contiguous:
            return {"weight": weight.T, "transposed": True}
        return {"weight": weight}

    def random(self, random: np.random.Generator, rows: int, columns: int) -> Arrays:
        """See WeightFormat."""
        values = random.standard_normal((rows, columns), np.float32) * np.float32(rows**-0.5)
        return {"weight": (values.view(np.uint32) >> 16).astype(np.uint16)}


def _of_one_type(parts: Sequence[Arrays]) -> list[npt.NDArray[np.generic]]:
    weights = [part["weight"] for part in parts]
    if len({weight.dtype for weight in weights}) == 1:
        return weights
    return [Dense().decode(part) for part in parts]
