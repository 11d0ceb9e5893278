"""Byte layouts of weight-only int8 and int4 linears in checkpoint files, and what they share.

The files hold what Paddle's `weight_quantize` makes for its GPU kernels (sm75 to sm90), so the
nominal shapes ([N, K] for int8, [N/2, K] for int4) are labels on a permuted run of bytes:

* int8: columns in pairs, K in tiles of 64 rows, in each run of 16 rows the order 0, 8, 1, 9, ...;
  each value + 128 as an unsigned byte;
* int4: columns in fours, K in tiles of 64 rows, in each run of 32 rows the order 0, 8, 16, 24, 1,
  9, ...; each value + 8 as a nibble, the low nibble first.

docs/checkpoint_format.md has the position formulas; the tests compare with Paddle's operator.
W[k, n] = q[k, n] * weight_scale[n] in both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.formats.base import (
    BYTES,
    FLOATS,
    Arrays,
    Order,
    Range,
    TensorSpec,
    WeightFormat,
    check_boundaries,
    spread,
    take,
)
from fastdeploy_lite.utils.arrays import Array

TILE = 64  # rows of K that stay together
_TILE_BYTES = 128  # bytes of one tile of 2 int8 or 4 int4 columns


class TiledIntegers(WeightFormat):
    """Signed integers in Paddle's tile layout; W[k, n] = q[k, n] * weight_scale[n].

    Arrays: quant_weight uint8 or int8, nominal [N, K] or [N / 2, K]; weight_scale float32 [N].
    """

    row_unit = TILE
    column_unit = 16
    column_bits = 32
    vectors = ("weight_scale",)
    largest: int
    deviation: float
    """Of uniform codes in -largest..largest."""

    @abstractmethod
    def pack(self, quantized: Array) -> npt.NDArray[np.int8]:
        """Return the file layout of integers [K, N]."""

    @abstractmethod
    def unpack(self, packed: Array) -> npt.NDArray[np.int8]:
        """Return int8 [K, N] of the file layout in its nominal shape."""

    @abstractmethod
    def tile_order(self, order: Order) -> Order:
        """Return which byte (int8) or nibble (int4) of a column's tile goes where."""

    @property
    def per_item(self) -> int:
        """Columns that share a row of the nominal shape."""
        return 8 // int(self.bits)

    def packed_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the nominal shape of `quant_weight`."""
        return columns // self.per_item, rows

    def shape(self, arrays: Arrays) -> tuple[int, int]:
        """See WeightFormat."""
        rows = arrays["quant_weight"].shape[1]
        return rows, arrays["weight_scale"].shape[0]

    def tensors(self, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        """See WeightFormat."""
        return (
            TensorSpec("quant_weight", BYTES, (self.packed_shape(rows, columns),)),
            TensorSpec("weight_scale", FLOATS, ((columns,),)),
        )

    def slice_columns(self, arrays: Arrays, ranges: Sequence[Range]) -> Arrays:
        """See WeightFormat."""
        check_boundaries(self.name, ranges, self.column_cut, "columns")
        items = [(start // self.per_item, stop // self.per_item) for start, stop in ranges]
        return {
            "quant_weight": take(arrays["quant_weight"], items, 0),
            "weight_scale": take(arrays["weight_scale"], ranges, -1),
        }

    def slice_rows(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        """See WeightFormat."""
        check_boundaries(self.name, [(start, stop)], TILE, "rows")
        packed = arrays["quant_weight"]
        kept = _tiles(packed)[:, start // TILE : stop // TILE]
        shape = (packed.shape[0], stop - start)
        return {**arrays, "quant_weight": np.ascontiguousarray(kept).reshape(shape)}

    def join_columns(self, parts: Sequence[Arrays]) -> Arrays:
        """See WeightFormat."""
        names = ("quant_weight", "weight_scale")
        return {name: np.concatenate([_as_bytes(part[name]) for part in parts]) for name in names}

    def join_rows(self, parts: Sequence[Arrays]) -> Arrays | None:
        """See WeightFormat."""
        if not self.same_vectors(parts):
            return None
        packed = [_as_bytes(part["quant_weight"]) for part in parts]
        joined = np.concatenate([_tiles(part) for part in packed], axis=1)
        shape = (packed[0].shape[0], sum(part.shape[1] for part in packed))
        return {**parts[0], "quant_weight": joined.reshape(shape)}

    def permute_columns(self, arrays: Arrays, order: Order) -> Arrays:
        """See WeightFormat."""
        packed, scale = _bytes(arrays["quant_weight"]), arrays["weight_scale"]
        count, width = self.column_cut, _TILE_BYTES // self.column_cut
        index = spread(order, scale.shape[0])
        columns = packed.reshape(-1, packed.shape[1] // TILE, count, width).transpose(0, 2, 1, 3)
        moved = columns.reshape(scale.shape[0], -1, width)[index]
        tiles = moved.reshape(-1, count, moved.shape[1], width).transpose(0, 2, 1, 3)
        return {
            "quant_weight": np.ascontiguousarray(tiles).reshape(packed.shape),
            "weight_scale": scale[index],
        }

    def permute_rows(self, arrays: Arrays, order: Order) -> Arrays:
        """See WeightFormat."""
        packed = _bytes(arrays["quant_weight"])
        index = self.tile_order(order)
        if self.per_item == 1:
            moved = packed.reshape(-1, TILE)[:, index]
        else:
            pairs = packed.reshape(-1, TILE // 2)
            nibbles = np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=-1)
            ordered = nibbles.reshape(-1, TILE)[:, index]
            moved = ordered[:, 0::2] | ordered[:, 1::2] << np.uint8(4)
        return {**arrays, "quant_weight": moved.reshape(packed.shape)}

    def decode(self, arrays: Arrays) -> npt.NDArray[np.float32]:
        """See WeightFormat."""
        values: npt.NDArray[np.float32] = self.unpack(arrays["quant_weight"]).astype(np.float32)
        values *= arrays["weight_scale"]
        return values

    def random(self, random: np.random.Generator, rows: int, columns: int) -> Arrays:
        """See WeightFormat."""
        shape = self.packed_shape(rows, columns)
        low = 1 if self.per_item == 1 else 0  # a byte of 0 would be -128, which no file holds
        scale = np.full(columns, np.float32(rows**-0.5) / self.deviation, np.float32)
        return {"quant_weight": random.integers(low, 256, shape, np.uint8), "weight_scale": scale}


def packed_shape(kind: str, in_features: int, out_features: int) -> tuple[int, int]:
    """Return the nominal file shape of `quant_weight` for kind int8 or int4."""
    return (out_features if kind == "int8" else out_features // 2, in_features)


def check_sizes(kind: str, in_features: int, out_features: int) -> None:
    """Raise ValueError unless K is a multiple of 64 and N of 16, as Paddle's operator demands."""
    if in_features % TILE or out_features % 16:
        raise ValueError(
            f"{kind}: found K = {in_features}, N = {out_features},"
            " expected K a multiple of 64 and N a multiple of 16"
        )


def pack_int8(quantized: Array) -> npt.NDArray[np.int8]:
    """Pack int8 [K, N] into the file layout, nominal int8 [N, K]."""
    k, n = quantized.shape
    check_sizes("int8", k, n)
    # Values + 128 as unsigned bytes; on the bits this is a flip of the sign bit.
    biased = quantized.astype(np.int8, copy=False).view(np.uint8) ^ np.uint8(0x80)
    # Whole rows first, then the transposition: 0.6 instead of 1.8 ns a weight.
    rows = biased.reshape(k // 16, 2, 8, n).transpose(0, 2, 1, 3)
    return _interleave_columns(rows.reshape(k // TILE, TILE, n), 2).view(np.int8).reshape(n, k)


def unpack_int8(packed: Array) -> npt.NDArray[np.int8]:
    """Return int8 [K, N] from the file layout, nominal int8 or uint8 [N, K]."""
    n, k = packed.shape
    check_sizes("int8", k, n)
    axes = _bytes(packed).reshape(n // 2, k // TILE, 2, 4, 8, 2).transpose(1, 3, 5, 4, 0, 2)
    signed = np.ascontiguousarray(axes) ^ np.uint8(0x80)
    quantized: npt.NDArray[np.int8] = signed.view(np.int8).reshape(k, n)
    return quantized


def pack_int4(quantized: Array) -> npt.NDArray[np.int8]:
    """Pack integers -8..7 [K, N] into the file layout, nominal int8 [N/2, K]."""
    k, n = quantized.shape
    check_sizes("int4", k, n)
    if quantized.size and not -8 <= int(quantized.min()) <= int(quantized.max()) <= 7:
        raise ValueError("int4: found a value outside -8..7")
    biased = (quantized.astype(np.int8, copy=False) + np.int8(8)).view(np.uint8)
    quarters = biased.reshape(k // 32, 2, 2, 8, n)  # row 16 half + 8 high + at of each run of 32
    pairs = quarters[:, :, 0] | quarters[:, :, 1] << np.uint8(4)
    rows = pairs.transpose(0, 2, 1, 3).reshape(k // TILE, TILE // 2, n)
    return _interleave_columns(rows, 4).view(np.int8).reshape(n // 2, k)


def unpack_int4(packed: Array) -> npt.NDArray[np.int8]:
    """Return int8 [K, N] in -8..7 from the file layout, nominal int8 or uint8 [N/2, K]."""
    half, k = packed.shape
    n = half * 2
    check_sizes("int4", k, n)
    data = _bytes(packed).reshape(-1)
    nibbles = np.stack([data & np.uint8(15), data >> np.uint8(4)], axis=-1)
    axes = nibbles.reshape(n // 4, k // TILE, 4, 2, 8, 4).transpose(1, 3, 5, 4, 0, 2)
    quantized: npt.NDArray[np.int8] = np.ascontiguousarray(axes).view(np.int8).reshape(k, n)
    quantized -= np.int8(8)
    return quantized


def _interleave_columns(rows: Array, count: int) -> Array:
    """Return bytes [tiles, bytes of a tile, N] with `count` columns side by side in each tile."""
    tiles, size, _ = rows.shape
    return np.ascontiguousarray(rows.reshape(tiles, size, -1, count).transpose(2, 0, 3, 1))


def _bytes(packed: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(packed).view(np.uint8)


def _as_bytes(array: Array) -> Array:
    return array.view(np.uint8) if array.dtype == np.int8 else array


def _tiles(packed: Array) -> Array:
    return packed.reshape(-1, packed.shape[1] // TILE, _TILE_BYTES)
