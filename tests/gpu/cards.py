"""Helpers of the card's tests: arrays to tensors and back, bf16 on the host, error measures."""

from __future__ import annotations

from typing import Any

import numpy as np

NAN_BITS = 0x7FC0


def round_bf16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest bf16, ties to even."""
    return widen(bf16_bits(values))


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """uint16 bits of the nearest bf16."""
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def place() -> Any:
    import paddle

    return paddle.framework._current_expected_place()


def put(values: np.ndarray, dtype: str | None = None) -> Any:
    """A tensor on the card with a copy of the values; dtype "bfloat16" rounds."""
    import paddle

    from fastdeploy_lite.model_executor import ops

    array = np.ascontiguousarray(values)
    name = dtype or array.dtype.name
    out = paddle.empty(list(array.shape), dtype=name, device=place())
    ops.upload(bf16_bits(array) if name == "bfloat16" else array.astype(name), out)
    return out


def poisoned(shape: list[int], dtype: str = "bfloat16") -> Any:
    """A tensor of NaN (or of -77 for integers): what a kernel does not write shows."""
    if dtype == "bfloat16":
        return put(np.full(shape, np.nan, np.float32), dtype)
    if dtype == "uint8":  # untyped memory: NaN as bf16 and float32, negative as integers
        return put(np.full(shape, 0xFF, np.uint8))
    return put(np.full(shape, np.nan if dtype == "float32" else -77, dtype))


def get(tensor: Any) -> np.ndarray:
    """Values on the host; bf16 as float32."""
    from fastdeploy_lite.model_executor import ops

    found = ops.download(tensor)
    return widen(found) if found.dtype == np.uint16 else found


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected; NaN anywhere gives infinity."""
    if np.isnan(found).any():
        return float("inf")
    wide = expected.astype(np.float64)
    scale = np.linalg.norm(wide) or 1.0
    return float(np.linalg.norm(found.astype(np.float64) - wide) / scale)


class Workspace:
    """Fresh poisoned scratch for every call: results must not depend on old contents."""

    def get(self, name: str, shape: list[int], dtype: str) -> Any:
        return poisoned(list(shape), dtype)

    def zeroed(self, name: str, shape: list[int], dtype: str) -> Any:
        return put(np.zeros(shape, dtype))
