"""Byte layouts of weight-only int8 and int4 linears in checkpoint files.

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

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.checkpoint.tensor import Array

TILE = 64  # rows of K that stay together
_COLUMNS = {"int8": 2, "int4": 4}  # columns interleaved per tile
_TILE_BYTES = 128  # bytes of one tile of 2 int8 or 4 int4 columns


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


def slice_columns(
    kind: str, arrays: dict[str, Array], ranges: list[tuple[int, int]]
) -> dict[str, Array]:
    """Return the output columns [start, stop) of each range, one after another.

    `arrays` are those of one linear in file layout (`fill_weight`'s keyword arguments); every
    boundary must be a multiple of 2 (int8) or 4 (int4) columns.
    """
    result: dict[str, Array] = {}
    for name, array in arrays.items():
        axis, per_item = -1, 1
        if kind in _COLUMNS and name == "quant_weight":
            _check_boundaries(kind, ranges, _COLUMNS[kind], "columns")
            axis, per_item = 0, 2 if kind == "int4" else 1
        cuts = [slice(start // per_item, stop // per_item) for start, stop in ranges]
        parts = [array[cut] if axis == 0 else array[..., cut] for cut in cuts]
        result[name] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
    return result


def slice_rows(kind: str, arrays: dict[str, Array], start: int, stop: int) -> dict[str, Array]:
    """Return the input rows [start, stop) of one linear in file layout.

    Boundaries must be multiples of 64 (int8, int4) or 128 (ccq). Per-column vectors stay whole.
    """
    result = dict(arrays)
    if kind == "dense":
        result["weight"] = arrays["weight"][start:stop]
        return result
    unit = 128 if kind == "ccq" else TILE
    _check_boundaries(kind, [(start, stop)], unit, "rows")
    if kind == "ccq":
        result["quant_weight"] = arrays["quant_weight"][start // 4 : stop // 4]
        result["weight_scale"] = arrays["weight_scale"][start // 128 : stop // 128]
        return result
    packed = arrays["quant_weight"]
    tiles = packed.reshape(-1, packed.shape[1] // TILE, _TILE_BYTES)
    kept = tiles[:, start // TILE : stop // TILE]
    result["quant_weight"] = np.ascontiguousarray(kept).reshape(packed.shape[0], stop - start)
    return result


def _check_boundaries(kind: str, ranges: list[tuple[int, int]], unit: int, what: str) -> None:
    for start, stop in ranges:
        if start % unit or stop % unit:
            raise ValueError(
                f"{kind}: cannot cut {what} [{start}, {stop}): boundaries must be multiples of"
                f" {unit}"
            )


def _bytes(packed: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(packed).view(np.uint8)
