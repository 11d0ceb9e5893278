"""Ways in which a card can multiply bf16 activations by 2-bit weights, stated in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from oracles.digit_product import GROUP, LARGEST, OFFSET, STEPS, digit_product

LARGEST_OF_DIGITS = {2: LARGEST, 3: LARGEST * 256 + 127}
"""The largest integer of so many signed bytes."""
STEP_ROWS = 16
"""Rows of K that one instruction of a tensor core adds to float32 sums."""
ROW_EXPONENT = 14
"""Of the largest element of a row as float16."""


@dataclass(frozen=True)
class Weight:
    """(fields - 32) * local_scale * column_scale; see digit_product for shapes and types."""

    fields: np.ndarray
    local_scale: np.ndarray
    column_scale: np.ndarray

    def integers(self) -> np.ndarray:
        """The weights without the column's scale: float64 [K, N], exact."""
        scale = self.local_scale.repeat(GROUP, axis=0)[: len(self.fields)]
        return (self.fields.astype(np.float64) - OFFSET) * scale

    def matrix(self) -> np.ndarray:
        """float64 [K, N], exact for scales that bf16 holds."""
        return self.integers() * self.column_scale.astype(np.float64)


Product = Callable[[np.ndarray, Weight], np.ndarray]
"""bf16 rows as float32 [T, K] times a weight: [T, N]."""


def exact(x: np.ndarray, weight: Weight) -> np.ndarray:
    """In float64."""
    return x.astype(np.float64) @ weight.matrix()


def half_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows as float16, and the power of two [T, 1] that each was multiplied by for it."""
    exponent = np.frexp(np.abs(x).max(axis=1, keepdims=True, initial=0).astype(np.float64))[1] - 1
    scale = np.ldexp(1.0, np.minimum(ROW_EXPONENT - exponent, 126))
    return (x * scale).astype(np.float16), scale


def float16_chain(x: np.ndarray, weight: Weight) -> np.ndarray:
    """float16 rows times exact float16 weights, in one chain of float32 sums along K.

    A step adds the exact sum of 16 products to what there is and cuts the result to float32, as
    tensor cores do instead of rounding (Fasi et al., "Numerical behavior of NVIDIA tensor cores",
    2021); that they cut the products too, some bits below the largest, is not modelled. Of 32
    rows, two steps take those of the later and of the earlier half of each byte.
    """
    halves, scale = half_rows(x)
    order = np.arange(x.shape[1]).reshape(-1, 8, 2, 2)[:, :, ::-1].transpose(0, 2, 1, 3)
    rows, integers = halves.astype(np.float64), weight.integers()
    sums = np.zeros((len(x), integers.shape[1]), np.float32)
    for step in order.reshape(-1, STEP_ROWS):
        sums = toward_zero(sums + rows[:, step] @ integers[step])
    return sums * weight.column_scale * (1 / scale).astype(np.float32)


def toward_zero(values: np.ndarray) -> np.ndarray:
    """float64 cut to float32."""
    nearest = values.astype(np.float32)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


def group_digits(x: np.ndarray, weight: Weight) -> np.ndarray:
    """Two digits and a unit for each 64 rows: the product of the digits' kernel, bit for bit."""
    return digit_product(x, weight.fields, weight.local_scale, weight.column_scale)


def row_digits(digits: int) -> Product:
    """So many digits and one unit for the whole row; sums are exact."""

    def product(x: np.ndarray, weight: Weight) -> np.ndarray:
        return integer_rows(x, digits) @ weight.matrix()

    return product


def integer_rows(x: np.ndarray, digits: int) -> np.ndarray:
    """Rows [T, K], K a multiple of 64, as integers of so many digits stand for them: float64."""
    exponent = np.frexp(np.abs(x).max(axis=1, keepdims=True).astype(np.float64))[1] - 1
    unit = np.ldexp(np.tile(STEPS, x.shape[1] // GROUP), 8 * digits - 4 - exponent)
    return np.minimum(np.rint(x * unit), LARGEST_OF_DIGITS[digits]) / unit


PRODUCTS: dict[str, Product] = {
    "float16": float16_chain,
    "digits": group_digits,
    "row digits": row_digits(2),
    "3 row digits": row_digits(3),
}
