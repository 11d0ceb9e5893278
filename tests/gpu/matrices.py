"""Random packed weights with the float64 matrices that they stand for."""

from __future__ import annotations

from typing import Any

import cards
import numpy as np

from fastdeploy_lite.formats import tiles as weight_layout
from fastdeploy_lite.quantization import ccq


def ccq_arrays(random: np.random.Generator, rows: int, columns: int) -> dict[str, np.ndarray]:
    return {
        "quant_weight": random.integers(0, 256, (rows // 4, columns), np.uint8),
        "weight_scale": random.integers(0, 256, (rows // 128, columns), np.uint8),
        "super_scales": random.uniform(0.5, 2, columns).astype(np.float32) / 4096,
        "code_scale": random.uniform(90, 130, columns).astype(np.float32),
        "code_zp": random.uniform(-40, 300, columns).astype(np.float32),
    }


def arrays(kind: str, random: np.random.Generator, rows: int, columns: int) -> dict[str, Any]:
    """Keyword arguments of fill_weight."""
    if kind.startswith("ccq"):
        found = ccq_arrays(random, rows, columns)
        if kind == "ccq_wide":  # codes past the fast decoder's range
            found["code_scale"] *= np.float32(16)
        if kind == "ccq_mixed":  # some of them
            found["code_scale"][random.random(columns) < 0.01] *= np.float32(16)
        return found
    if kind == "dense":
        return {"weight": cards.bf16_bits(random.standard_normal((rows, columns)) / rows**0.5)}
    low, pack = (-127, weight_layout.pack_int8) if kind == "int8" else (-7, weight_layout.pack_int4)
    codes = random.integers(low, -low + 1, (rows, columns)).astype(np.int8)
    scale = cards.round_bf16(random.uniform(0.5, 2, columns).astype(np.float32) / 1000)
    return {"quant_weight": pack(codes), "weight_scale": scale}


def matrix(kind: str, found: dict[str, Any], rows: int, columns: int) -> np.ndarray:
    """float64 [K, N] of those arguments."""
    if kind.startswith("ccq"):
        named = [found[n] for n in ("quant_weight", "weight_scale", "super_scales")]
        return ccq.decode(*named, found["code_scale"], found["code_zp"]).astype(np.float64)
    if kind == "dense":
        return cards.widen(found["weight"]).astype(np.float64)
    unpack = weight_layout.unpack_int8 if kind == "int8" else weight_layout.unpack_int4
    codes = unpack(found["quant_weight"]).reshape(rows, columns)
    return codes.astype(np.float64) * found["weight_scale"]


def make(
    kind: str, random: np.random.Generator, rows: int, columns: int, experts: int = 0
) -> tuple[Any, np.ndarray]:
    """A weight on the card and float64 [K, N], or [E, K, N] with experts.

    Kinds are those of allocate_weight, "ccq_wide": CCQ that takes the slower decoder, and
    "ccq_mixed": CCQ of which a column in a hundred takes it.
    """
    from fastdeploy_lite.model_executor import ops

    weight = ops.allocate_weight(
        kind.removesuffix("_wide").removesuffix("_mixed"),
        rows,
        columns,
        cards.place(),
        num_experts=experts,
    )
    dense = []
    for expert in range(max(experts, 1)):
        found = arrays(kind, random, rows, columns)
        ops.fill_weight(weight, expert if experts else None, **found)
        dense.append(matrix(kind, found, rows, columns))
    ops.finish_weight(weight)
    return weight, np.stack(dense) if experts else dense[0]
