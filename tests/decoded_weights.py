"""What the files of a checkpoint mean."""

from __future__ import annotations

import numpy as np

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import rank_linears, read_linear
from fastdeploy_lite.formats.ccq import to_true_order
from fastdeploy_lite.formats.tiles import unpack_int4, unpack_int8
from fastdeploy_lite.quantization.weight_only import dequantize
from fastdeploy_lite.utils.arrays import bfloat16_to_float32


def decoded(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Every linear of a checkpoint as the float32 matrix that its files mean."""
    result = {}
    for linear in rank_linears(checkpoint):
        read = read_linear(checkpoint, linear)
        a = read.arrays
        if read.kind == "ccq":
            order = checkpoint.config.quantization.row_order or "natural"
            result[linear.module] = to_true_order(formats.get("ccq").decode(a), order)
        elif read.kind == "dense":
            result[linear.module] = bfloat16_to_float32(a["weight"])
        else:
            unpack = unpack_int8 if read.kind == "int8" else unpack_int4
            result[linear.module] = dequantize(unpack(a["quant_weight"]), a["weight_scale"])
    return result
