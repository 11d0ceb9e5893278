"""Rotary embedding and attention in float64 numpy, over plain (unpaged) keys and values."""

from __future__ import annotations

import numpy as np


def cos_sin_table(max_positions: int, head_dim: int, theta: float = 10000.0) -> np.ndarray:
    """float32 [max_positions, head_dim]: cosines, then sines, of position * theta^(-2i / D)."""
    inv_freq = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(max_positions)[:, None] * inv_freq
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def rotate(x: np.ndarray, positions: np.ndarray, table: np.ndarray) -> np.ndarray:
    """x [T, heads, D] turned as complex numbers: pairs (2i, 2i + 1) times e^(i angle)."""
    half = x.shape[-1] // 2
    rows = table[positions].astype(np.float64)
    turn = rows[:, None, :half] + 1j * rows[:, None, half:]
    turned = (x[..., 0::2].astype(np.float64) + 1j * x[..., 1::2]) * turn
    out = np.empty(x.shape)
    out[..., 0::2], out[..., 1::2] = turned.real, turned.imag
    return out


def attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """The last tokens' attention: query [q, Hq, D], keys and values [n, Hkv, D]; causal."""
    count, heads, _ = query.shape
    group = heads // keys.shape[1]
    out = np.empty(query.shape)
    for i in range(count):
        seen = len(keys) - count + i + 1
        for h in range(heads):
            scores = keys[:seen, h // group].astype(np.float64) @ query[i, h] * scale
            weights = np.exp(scores - scores.max())
            out[i, h] = weights @ values[:seen, h // group].astype(np.float64) / weights.sum()
    return out
