"""Rotary position embedding: the table of angles; the rotation itself is part of the KV write."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def cos_sin_table(max_positions: int, head_dim: int, theta: float) -> npt.NDArray[np.float32]:
    """Return float32 [max_positions, head_dim]: cosines of all pairs, then sines.

    Pair i turns by position * theta^(-2i / head_dim). Frequency and angle are float32 products as
    in the training code: near position 131,000 angles from float64 would differ by up to 0.009
    from those that the model has learnt.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequency = np.float32(1.0) / np.power(theta, exponent).astype(np.float32)
    angle = np.arange(max_positions, dtype=np.float32)[:, None] * frequency
    wide = angle.astype(np.float64)
    table: npt.NDArray[np.float32] = np.concatenate(
        [np.cos(wide), np.sin(wide)], 1, dtype=np.float32
    )
    return table
