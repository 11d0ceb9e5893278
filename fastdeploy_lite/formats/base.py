"""What a weight format is: everything that the host knows of one way to store a matrix.

A matrix W [K, N] maps K inputs to N outputs. In memory it is a dictionary of arrays in file layout,
whose keys are the suffixes of the file's tensors; these are what `ops.fill_weight` takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.utils.arrays import Array

Arrays: TypeAlias = dict[str, Array]
Range: TypeAlias = tuple[int, int]
Shape: TypeAlias = tuple[int, ...]
Order: TypeAlias = npt.NDArray[np.intp]
"""Element i of the result is element order[i] of what is permuted, inside every GROUP."""

GROUP = 64
"""Rows or columns inside which an order may move things; every quantised size is a multiple."""
FLOATS = ("BF16", "F16", "F32", "F64")
BYTES = ("U8", "I8")  # public notes and files disagree about the sign; the bits are the same
Vectors: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a linear in a file: its suffix, allowed safetensors dtypes and shapes."""

    suffix: str
    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    aliases: tuple[str, ...] = ()

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All spellings of the suffix, the one that is written first."""
        return (self.suffix, *self.aliases)


class WeightFormat(ABC):
    """One way to store a matrix; instances are stateless.

    Attributes:
        name: what the project calls it, such as `int8`.
        title: what start-up lines call it.
        config_name: what config.json calls it as `dense_quant_type` and `moe_quant_type`; None
            where those cannot name it.
        kernel: name of the layout that native ops keep it in; `for_kernel` makes its arrays.
        row_unit, column_unit: what K and N must be multiples of.
        column_cut: what the boundaries of column ranges must be multiples of.
        vectors: names of arrays [N]; two parts of one K can be joined where these are equal.
        bits: of storage a weight, without what every column costs (`column_bits`).
    """

    name: str
    title: str
    config_name: str | None = None
    kernel: str
    row_unit: int = 1
    column_unit: int = 1
    column_cut: int = 1
    vectors: Vectors = ()
    bits: float
    column_bits: int = 0

    # -- sizes and files --------------------------------------------------------------------------

    def fits(self, rows: int, columns: int) -> bool:
        """Whether a matrix [rows, columns] can be stored."""
        return rows % self.row_unit == 0 and columns % self.column_unit == 0

    def check_sizes(self, rows: int, columns: int) -> None:
        """Raise ValueError unless the matrix can be stored."""
        if not self.fits(rows, columns):
            raise ValueError(
                f"{self.name}: found K = {rows}, N = {columns}, expected K a multiple of"
                f" {self.row_unit} and N a multiple of {self.column_unit}"
            )

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of one matrix in memory, without padding."""
        return int(rows * columns * self.bits + columns * self.column_bits) // 8

    @abstractmethod
    def shape(self, arrays: Arrays) -> tuple[int, int]:
        """Return K and N of a matrix in memory."""

    @abstractmethod
    def tensors(self, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        """What a file holds of a matrix."""

    def check(self, arrays: Arrays) -> None:  # noqa: B027 - most formats allow every value
        """Raise ValueError for values that no kernel may meet; finite scales are checked before."""

    # -- parts -------------------------------------------------------------------------------------

    @abstractmethod
    def slice_columns(self, arrays: Arrays, ranges: Sequence[Range]) -> Arrays:
        """Return the columns [start, stop) of each range, one after another.

        Raises:
            ValueError: a boundary is not a multiple of `column_cut`.
        """

    @abstractmethod
    def slice_rows(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        """Return the rows [start, stop), boundaries multiples of `row_unit` (else ValueError)."""

    @abstractmethod
    def join_columns(self, parts: Sequence[Arrays]) -> Arrays:
        """Return matrices of one K side by side."""

    @abstractmethod
    def join_rows(self, parts: Sequence[Arrays]) -> Arrays | None:
        """Return matrices of one N below each other; None where their columns differ in scale."""

    # -- orders ------------------------------------------------------------------------------------

    @abstractmethod
    def permute_columns(self, arrays: Arrays, order: Order) -> Arrays:
        """Return the matrix with its columns in `order` inside every 64."""

    @abstractmethod
    def permute_rows(self, arrays: Arrays, order: Order) -> Arrays:
        """Return the matrix with its rows in `order` inside every 64.

        Raises:
            ValueError: the format ties rows together.
        """

    # -- values ------------------------------------------------------------------------------------

    @abstractmethod
    def decode(self, arrays: Arrays) -> npt.NDArray[np.float32]:
        """Return the matrix float32 [K, N], rows as they are stored."""

    def for_kernel(self, arrays: Arrays) -> dict[str, Any]:
        """Return what `ops.fill_weight` takes for a weight of kind `kernel`."""
        return dict(arrays)

    @abstractmethod
    def random(self, random: np.random.Generator, rows: int, columns: int) -> Arrays:
        """Return a valid matrix whose elements deviate by about rows ** -0.5."""

    def same_vectors(self, parts: Sequence[Arrays]) -> bool:
        """Whether all parts have the same values per column, so that they may share them."""
        first, *others = parts
        return all(
            np.array_equal(first[name], other[name]) for name in self.vectors for other in others
        )


def check_boundaries(name: str, ranges: Sequence[Range], unit: int, what: str) -> None:
    """Raise ValueError unless every boundary is a multiple of `unit`."""
    for start, stop in ranges:
        if start % unit or stop % unit:
            raise ValueError(
                f"{name}: cannot cut {what} [{start}, {stop}): boundaries must be multiples of"
                f" {unit}"
            )


def take(array: Array, ranges: Sequence[Range], axis: int) -> Array:
    """Return ranges along axis 0 or -1, one after another; a view where there is one only."""
    parts = [array[start:stop] if axis == 0 else array[..., start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def spread(order: Order, size: int) -> Order:
    """Return `order` (of GROUP elements) as an index over `size`, a multiple of GROUP."""
    if size % GROUP:
        raise ValueError(f"cannot reorder {size} elements, expected a multiple of {GROUP}")
    index: Order = (np.arange(0, size, GROUP)[:, None] + order).reshape(-1)
    return index
