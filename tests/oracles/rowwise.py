"""Norms and activations in float64 numpy."""

from __future__ import annotations

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps) * weight.astype(np.float64)


def silu_and_mul(x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


def nearest_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the bfloat16 that is nearest to each float32, ties to even; of NaN, some."""
    bits = x.view(np.uint32)
    below = bits & np.uint32(0xFFFF0000)
    above = below + np.uint32(0x10000)  # the next in magnitude
    with np.errstate(invalid="ignore"):
        down = np.abs(x.astype(np.float64) - below.view(np.float32))
        up = np.abs(_beyond(below).astype(np.float64) - x)
    odd = (below >> 16) & 1 == 1
    nearest = np.where((up < down) | ((up == down) & odd), above, below) >> 16
    return np.where(np.isfinite(x), nearest, below >> 16).astype(np.uint16)


def _beyond(below: np.ndarray) -> np.ndarray:
    """The bfloat16 after `below` in magnitude, also where it is out of float32's range."""
    value = below.view(np.float32).astype(np.float64)
    exponent = np.maximum((below >> 23) & 0xFF, 1).astype(np.int64) - 127
    return value + np.copysign(np.ldexp(1.0, exponent - 7), value)
