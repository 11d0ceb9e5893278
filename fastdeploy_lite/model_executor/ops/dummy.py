"""Random weights that are valid in every form, for runs of a model whose files are not there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.model_executor.ops._dispatch import native, place_kind
from fastdeploy_lite.model_executor.ops.weights import PackedWeight, fill_weight

_INTEGER_DEVIATION = {"int8": 73.3, "int4": 4.3}
"""Of uniform codes in -127..127 and -7..7."""


def randomize_weight(weight: PackedWeight, seed: int) -> None:
    """Fill a fresh weight, all experts, with elements of deviation about K^-0.5.

    That size keeps activations steady from layer to layer. On a card the codes are made there.

    Args:
        weight: from `allocate_weight`; `finish_weight` is still to be called.
        seed: equal seeds give equal weights on one kind of place.
    """
    if place_kind(weight.place) == "cuda":
        native("cuda", "randomize_weight")(weight, seed)
        return
    random = np.random.default_rng(seed)
    experts = range(weight.num_experts) if weight.num_experts else [None]
    for expert in experts:
        fill_weight(weight, expert, **_random_arrays(weight, random))


def _random_arrays(
    weight: PackedWeight, random: np.random.Generator
) -> dict[str, npt.NDArray[np.generic]]:
    rows, columns = weight.in_features, weight.out_features
    size = np.float32(rows**-0.5)
    if weight.kind == "dense":
        values = random.standard_normal((rows, columns), np.float32) * size
        return {"weight": (values.view(np.uint32) >> 16).astype(np.uint16)}
    if weight.kind == "ccq":
        # Codes spread over 15 bits give fields of deviation 18; local scales have a mean of 7.5.
        return {
            "quant_weight": random.integers(0, 256, (rows // 4, columns), np.uint8),
            "weight_scale": random.integers(0, 256, (rows // 128, columns), np.uint8),
            "super_scales": np.full(columns, size / (18 * 7.5), np.float32),
            "code_scale": random.uniform(100, 127, columns).astype(np.float32),
            "code_zp": random.uniform(0, 300, columns).astype(np.float32),
        }
    low, high = (1, 256) if weight.kind == "int8" else (0, 256)
    count = rows * columns // (1 if weight.kind == "int8" else 2)
    scale = np.full(columns, size / _INTEGER_DEVIATION[weight.kind], np.float32)
    return {
        "quant_weight": random.integers(low, high, count, np.uint8),
        "weight_scale": scale,
    }
