"""How many int4 layers a size allows, in the form that the original's rule reads.

The published rule is one number: routed experts are int4 up to a layer, 2-bit after it.
"""

from __future__ import annotations

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.utils.errors import ConfigError

SCALE_BITS = 16
"""Of a column in a file: int4 has one bfloat16 scale, ccq two float32 numbers more."""


def file_bits(kind: str, rows: int, columns: int) -> int:
    """Bits of a matrix [rows, columns] in a file."""
    per_column = SCALE_BITS + (64 if kind == "ccq" else 0)
    return int(rows * columns * formats.get(kind).bits) + columns * per_column


def w4_end_layer_for_bits(config: ModelConfig, bits: float) -> int:
    """Return the last int4 layer that keeps the routed experts at `bits` a weight or below.

    Returns:
        A decoder layer, or -1 where the budget has room for no int4 layer.

    Raises:
        ConfigError: even with 2 bits everywhere they need more; names how much.
    """
    sizes: dict[int, dict[str, int]] = {}
    weights = 0
    for linear in model_linears(config):
        if linear.expert is None:
            continue
        shape = linear.in_features, linear.out_features
        weights += shape[0] * shape[1]
        part = sizes.setdefault(linear.layer, {"int4": 0, "ccq": 0})
        for kind in part:
            part[kind] += file_bits(kind, *shape)
    if not sizes:
        raise ConfigError(f"{config.source}: moe_num_experts: found none, expected a MoE model")
    total = sum(part["ccq"] for part in sizes.values())
    if total > bits * weights:
        raise ConfigError(
            f"--bits: found {bits:g}, expected at least {total / weights:.4f}, what 2-bit experts "
            "take in every layer"
        )
    end = -1
    for layer, part in sorted(sizes.items()):
        total += part["int4"] - part["ccq"]
        if total > bits * weights:
            break
        end = layer
    return end
