"""An int8 output head, made of the bf16 one (or of the tied table) while a model is loaded.

A decode step reads the whole head for every token. In bf16 that is a quarter of what a 21B model
with 2-bit experts reads; int8 halves it, at the price of a second copy where the embedding is tied.
"""

from __future__ import annotations

from typing import Any

from fastdeploy_lite import formats
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.ops import PackedWeight
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.quantization.online import OnlineQuantizer
from fastdeploy_lite.utils.arrays import Array
from fastdeploy_lite.utils.errors import ConfigError


def check_head(model: ModelConfig, ranks: int, place: Any) -> None:
    """Raise ConfigError if this model's head cannot be int8 at `place`."""
    if not place.is_cpu_place():
        raise ConfigError("lm_head_quantization: wint8 is for the CPU, found a card: leave it out")
    format_, rows, columns = formats.get("int8"), model.hidden_size, model.vocab_size // ranks
    if not format_.fits(rows, columns):
        raise ConfigError(
            f"lm_head_quantization: the head of a rank is {rows} x {columns}, wint8 needs multiples"
            f" of {format_.row_unit} and {format_.column_unit}"
        )


def head_nbytes(model: ModelConfig, ranks: int) -> int:
    """Bytes of the int8 heads of all ranks."""
    columns = model.vocab_size // ranks
    return formats.get("int8").nbytes(model.hidden_size, columns) * ranks


def int8_head(matrix: Array, place: Any) -> PackedWeight:
    """Return the int8 form of a head [H, V], bf16 bits or float32; not yet finished.

    Raises:
        ValueError: an element is not finite.
    """
    rows, columns = matrix.shape
    weight = ops.allocate_weight(formats.get("int8").kernel, rows, columns, place)
    with OnlineQuantizer() as quantizer:
        arrays = quantizer.quantize("int8", matrix)
    ops.fill_weight(weight, None, **formats.get("int8").for_kernel(arrays))
    return weight
