"""The product of a row of bf16 and 2-bit weights as the digits' kernel rounds it, bit for bit.

Activations enter as integers of two signed bytes, in units of a power of two for every 64 rows of
K; sums inside such a group are exact. What is rounded, and in which order, is all that is stated
here: how a kernel comes to it is its own affair.
"""

from __future__ import annotations

import numpy as np

GROUP = 64
PADDED = 512
"""Rows of K are filled up with zeros to a multiple of this, which no result shows."""
CHAINS = 4
"""Sums of float32 that the groups of K go to in turn."""
OFFSET = 32
"""What a field of the code stands for is that much less."""
LARGEST = 32639
"""The largest integer of two signed bytes, 127 * 256 + 127."""
STEPS = np.tile([4, 4, 1, 1], GROUP // 4)
"""Integers per unit for each row of a group: the other two of a byte's four fields are read from
it as four times their value, so that these activations have two bits less."""


def activation_digits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and units' reciprocals of float32 rows [T, K] that hold bf16 values.

    Returns float64 [T, G, 64], integers of magnitude 32640 at most and 32639 at most above, and
    float64 [T, G], powers of two; x is near integer / (STEPS * reciprocal). G counts the groups of
    K filled up to a multiple of 512. A group that holds an infinity or a NaN is NaN throughout.
    """
    filled = np.pad(x.astype(np.float64), ((0, 0), (0, -x.shape[1] % PADDED)))
    groups = filled.reshape(len(x), -1, GROUP)
    top = np.abs(groups).max(axis=2)
    finite = np.isfinite(top)
    exponent = np.frexp(np.where(finite, top, 1))[1] - 1  # top = 1.m * 2**exponent
    normal = top >= 2.0**-126
    reciprocal = np.where(normal, np.ldexp(1.0, np.minimum(12 - exponent, 124)), 1.0)
    scaled = np.where(finite[..., None], groups, np.nan) * reciprocal[..., None] * STEPS
    return np.minimum(np.rint(scaled), LARGEST), reciprocal


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32 arrays, a and b finite, with one rounding to float32, ties to even.

    In float64 the product is exact and the sum may be not; rounding an inexact one again could
    take a tie for one that the first rounding made. It is replaced by whichever of its two
    neighbours in float64 has an odd last bit, which is never a tie of float32, nor beyond one.
    """
    product = a.astype(np.float64) * b
    total = np.asarray(product + c)
    with np.errstate(over="ignore", invalid="ignore"):
        virtual = total - product
        error = (product - (total - virtual)) + (c - virtual)  # of the sum, exact (Knuth)
        even = total.view(np.int64) & 1 == 0
        neighbour = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
        return np.where(even & (error != 0), neighbour, total).astype(np.float32)


def digit_product(
    x: np.ndarray, fields: np.ndarray, local_scale: np.ndarray, column_scale: np.ndarray
) -> np.ndarray:
    """Rows x [T, K] times weights [K, N], float32 [T, N] before anything else rounds it.

    x: float32 that holds bf16 values. A weight is (fields - 32) * local_scale * column_scale of
    fields uint8 [K, N] in 0..63, local_scale uint8 [ceil(K / 64), N] in 0..15 and column_scale
    float32 [N]. A row that holds an infinity or a NaN is NaN throughout.
    """
    rows, columns = fields.shape
    integers, reciprocal = activation_digits(x)
    weights = np.full((integers.shape[1] * GROUP, columns), OFFSET, np.float64)
    weights[:rows] = fields
    weights = (weights - OFFSET).reshape(-1, GROUP, columns) * (4 / STEPS)[:, None]
    finite = np.isfinite(integers).all(axis=(1, 2))
    sums = np.zeros((CHAINS, len(x), columns), np.float32)
    for group, scale in enumerate(local_scale):
        total = np.nan_to_num(integers[:, group]) @ weights[group]  # below 2**27, so exact
        unit = (scale / (4 * reciprocal[:, group, None])).astype(np.float32)
        chain = group % CHAINS
        sums[chain] = fused_multiply_add(unit, total.astype(np.float32), sums[chain])
    with np.errstate(over="ignore", invalid="ignore"):
        result = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * column_scale
    return np.where(finite[:, None], result, np.float32(np.nan))
