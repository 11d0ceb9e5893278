"""What encoders of 2-bit weights are compared on, and how."""

from __future__ import annotations

import numpy as np

from fastdeploy_lite.formats.ccq import CCQWeight


def random_matrix(rows: int, columns: int, kind: str) -> np.ndarray:
    random = np.random.default_rng(rows + columns)
    if kind == "heavy tails":
        return random.standard_t(3, (rows, columns)).astype(np.float32)
    matrix = random.standard_normal((rows, columns), np.float32)
    if kind == "adversarial":
        matrix[:, 0] = 0
        matrix[:64, 1] = 0
        matrix[:, 2] *= 1e-30
        matrix[:, 3] *= 1e30
        matrix[5, 4] = 1e9
        matrix[64:128] *= 1e-6
        matrix[:, 5] = 1
    return matrix


def assert_same(found: CCQWeight, expected: CCQWeight) -> None:
    for name in CCQWeight.__slots__:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
