#!/usr/bin/env python3
"""What a linear on the CPU makes of activations, beside other roundings of them, against float64.

    PYTHONPATH=tests python tests/oracles/activation_error.py

Random activations [64, 2560], also with one in a hundred 100 times as large, times random weights
[2560, 256]. Errors are shares of the results' standard deviation: root mean square, and largest.
"""

from __future__ import annotations

import numpy as np
import paddle
from oracles.ops import random_weight
from oracles.rowwise import nearest_bf16

from fastdeploy_lite.checkpoint.tensor import bfloat16_to_float32
from fastdeploy_lite.model_executor import ops

TOKENS, DEPTH, COLUMNS, BLOCK = 64, 2560, 256, 32


def int8_blocks(x: np.ndarray) -> np.ndarray:
    """Blocks of 32 as a scale times integers up to 127, as llama.cpp rounds activations."""
    blocks = x.astype(np.float64).reshape(len(x), -1, BLOCK)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / 127
    return (np.rint(blocks / scale) * scale).reshape(x.shape)


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    print(
        "| weights | large activations | rounding | error | largest error |\n|---|---|---|---|---|"
    )
    for share in (0.0, 0.01):
        x = rng.standard_normal((TOKENS, DEPTH))
        x = (x * np.where(rng.random(x.shape) < share, 100, 1)).astype(np.float32)
        for kind in ("int8", "ccq"):
            arrays, matrix = random_weight(kind, DEPTH, COLUMNS, rng)
            weight = ops.allocate_weight(kind, DEPTH, COLUMNS, paddle.CPUPlace())
            ops.fill_weight(weight, None, **arrays)
            exact, out = x.astype(np.float64) @ matrix, paddle.empty([TOKENS, COLUMNS])
            found = {
                "bf16": bfloat16_to_float32(nearest_bf16(x)).astype(np.float64) @ matrix,
                "int8 a block of 32": int8_blocks(x) @ matrix,
            }
            for bits in (24, 16):
                ops.set_activation_bits(weight, bits)
                ops.linear(paddle.to_tensor(x), weight, out)
                found[f"{bits} bits"] = out.numpy().astype(np.float64)
            for name, values in sorted(found.items()):
                error = np.abs(values - exact) / exact.std()
                rms = np.sqrt((error**2).mean())
                print(f"| {kind} | {share:.0%} | {name} | {rms:.1e} | {error.max():.1e} |")


if __name__ == "__main__":
    main()
