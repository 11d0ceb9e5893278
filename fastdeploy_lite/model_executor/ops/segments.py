"""Products with weights in parts: each part multiplies its stretch of x, and results are added."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from fastdeploy_lite.model_executor.ops._view import ScratchSource, Tensor
from fastdeploy_lite.model_executor.ops.activation import add_inplace, gather_rows
from fastdeploy_lite.model_executor.ops.dense import linear
from fastdeploy_lite.model_executor.ops.moe import fused_moe
from fastdeploy_lite.model_executor.ops.packed_weight import (
    PackedWeight,
    SegmentedWeight,
    Weight,
)

_SMALLEST = 256
_rows: dict[tuple[str, int, int], list[Tensor]] = {}
"""Never dropped: a captured graph keeps their addresses."""


def segmented_linear(
    x: Tensor, weight: SegmentedWeight, out: Tensor, workspace: ScratchSource, name: str
) -> None:
    """out = x @ W for a weight in equal stretches of K.

    Args:
        x: contiguous [T, K], as for `linear`.
        weight: its parts [K / S, N].
        out: [T, N], dtype of x.
        workspace: scratch memory.
        name: of the scratch buffers, unique among those in use.

    Raises:
        TypeError, ValueError: as for `linear`.
    """
    count, tokens = len(weight.parts), x.shape[0]
    width = weight.parts[0].in_features
    stretches = x.view([tokens * count, width])
    part_x = workspace.get(f"{name}_stretch", [tokens, width], _name(x))
    part_out = workspace.get(f"{name}_part", [tokens, weight.out_features], _name(x))
    for i, part in enumerate(weight.parts):
        gather_rows(stretches, _stretch_rows(x.place, count, tokens)[i], part_x)
        linear(part_x, part, part_out if i else out)
        if i:
            add_inplace(out, part_out)


def routed_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up_gate: Weight,
    down: Weight,
    out: Tensor,
    workspace: ScratchSource,
) -> None:
    """`fused_moe` for experts in either form, whole or in parts.

    Raises:
        TypeError, ValueError: as for `fused_moe`.
    """
    if isinstance(up_gate, PackedWeight) and isinstance(down, PackedWeight):
        fused_moe(x, topk_ids, topk_weights, up_gate, down, out, workspace)
    else:
        segmented_moe(x, topk_ids, topk_weights, up_gate, down, out, workspace)


def segmented_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up_gate: Weight,
    down: Weight,
    out: Tensor,
    workspace: ScratchSource,
) -> None:
    """As `fused_moe`, for experts in parts: the outputs of all parts are added.

    Raises:
        TypeError, ValueError: as for `fused_moe`.
    """
    part_out = workspace.get("moe_part", list(out.shape), _name(x))
    if not isinstance(up_gate, SegmentedWeight) or not isinstance(down, SegmentedWeight):
        raise TypeError("segmented_moe: up_gate and down must both be in parts")
    for i, (first, second) in enumerate(zip(up_gate.parts, down.parts, strict=True)):
        target = part_out if i else out
        fused_moe(x, topk_ids, topk_weights, first, second, target, workspace)
        if i:
            add_inplace(out, part_out)


def _name(x: Tensor) -> str:
    return "float32" if x.dtype == paddle.float32 else "bfloat16"


def _stretch_rows(place: Any, count: int, tokens: int) -> list[Tensor]:
    """Row numbers of each stretch where [T, K] is seen as [T * count, K / count]."""
    size = max(_SMALLEST, 1 << (tokens - 1).bit_length())
    key = (str(place), count, size)
    found = _rows.get(key)
    if found is None:
        numbers = np.arange(size, dtype=np.int32) * count
        found = [paddle.to_tensor(numbers + np.int32(i), place=place) for i in range(count)]
        found = _rows.setdefault(key, found)  # another thread's graph may hold the first
    return [rows[:tokens] for rows in found]
