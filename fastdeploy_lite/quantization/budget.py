"""Which layers a size allows to be int4.

The published rule is one number: routed experts are int4 up to a layer, 2-bit after it. Where what
each layer gains was measured, any layers may be chosen; only this project reads such a choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    sizes = _Sizes.of(config, bits)
    end = -1
    for layer in sorted(sizes.extra):
        if not sizes.take(layer):
            break
        end = layer
    return end


def w4_layers_for_bits(
    config: ModelConfig, bits: float, gains: Mapping[int, float]
) -> tuple[int, ...]:
    """Return the int4 layers that gain most at `bits` a weight of the routed experts or below.

    Args:
        config: the bf16 model's.
        bits: a weight, scales included.
        gains: of each MoE layer, in any unit; a layer without gain stays 2-bit.

    Raises:
        ConfigError: as `w4_end_layer_for_bits`.
    """
    sizes = _Sizes.of(config, bits)
    best_first = sorted(sizes.extra, key=lambda layer: (-gains[layer] / sizes.extra[layer], layer))
    return tuple(sorted(layer for layer in best_first if gains[layer] > 0 and sizes.take(layer)))


@dataclass
class _Sizes:
    """Bits that are left of a budget, and what each MoE layer takes more as int4."""

    left: float
    extra: dict[int, int]

    @classmethod
    def of(cls, config: ModelConfig, bits: float) -> _Sizes:
        extra: dict[int, int] = {}
        total = weights = 0
        for linear in model_linears(config):
            if linear.expert is None:
                continue
            shape = linear.in_features, linear.out_features
            weights += shape[0] * shape[1]
            least = file_bits("ccq", *shape)
            total += least
            extra[linear.layer] = extra.get(linear.layer, 0) + file_bits("int4", *shape) - least
        if not extra:
            raise ConfigError(f"{config.source}: moe_num_experts: found none, expected a MoE model")
        if not total <= bits * weights:  # also of bits that are no number
            raise ConfigError(
                f"--bits: found {bits:g}, expected at least {total / weights:.4f}, what 2-bit "
                "experts take in every layer"
            )
        return cls(bits * weights - total, extra)

    def take(self, layer: int) -> bool:
        """Make `layer` int4 if there is room for it; says whether there was."""
        fits = self.extra[layer] <= self.left
        if fits:
            self.left -= self.extra[layer]
        return fits
