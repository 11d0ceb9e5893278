"""The table of angles."""

from __future__ import annotations

import numpy as np

from fastdeploy_lite.model_executor.layers.rotary import cos_sin_table


def test_angles_of_small_positions() -> None:
    """Pair i of D = 4 turns by position / theta^(i / 2)."""
    table = cos_sin_table(3, 4, 100.0)
    assert table.dtype == np.float32
    expected = [[np.cos(p), np.cos(p / 10), np.sin(p), np.sin(p / 10)] for p in range(3)]
    assert np.allclose(table, expected, rtol=0, atol=1e-7)


def test_far_positions_are_on_the_circle_and_follow_float32_angles() -> None:
    """The distance from exact angles is float32's, as in training: below 0.01 at 131,072."""
    table = cos_sin_table(131072, 128, 500000.0)[100_000:]
    cos, sin = table[:, :64].astype(np.float64), table[:, 64:].astype(np.float64)
    assert np.abs(cos**2 + sin**2 - 1).max() < 1e-6
    exact = np.arange(100_000, 131072)[:, None] * 500000.0 ** (-np.arange(64) / 64)
    distance = np.hypot(cos - np.cos(exact), sin - np.sin(exact)).max()
    assert 0.001 < distance < 0.01
