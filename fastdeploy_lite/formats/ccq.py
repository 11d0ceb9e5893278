"""The CCQ ("WINT2") code in numpy: the definition that every kernel is tested against.

One byte holds four weights of one output column. A per-column linear map turns the byte into a
15-bit string ``d``; four overlapping 6-bit fields of ``d`` are the weights before scaling::

    d        = floor(fma(byte, code_scale, code_zp + 0.5))       float32, one fused rounding
    v[j]     = ((d >> (9 - 3 * j)) & 63) - 32                    j = 0..3, in -32..31
    W[4r+j]  = v[j] * local_scale[(4r+j) // 64] * super_scale    4-bit local scale

Storage is 2 bits a weight, 4 bits per 64 rows and 80 bits per column. Source of the layout:
docs/checkpoint_format.md, section "2-bit experts"; of the method: arXiv 2507.07145.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.formats.base import (
    BYTES,
    GROUP,
    Arrays,
    Order,
    Range,
    TensorSpec,
    WeightFormat,
    check_boundaries,
    spread,
    take,
)
from fastdeploy_lite.utils.arrays import Array, bfloat16_to_float32

ArrayU8: TypeAlias = npt.NDArray[np.uint8]
ArrayF32: TypeAlias = npt.NDArray[np.float32]
ArrayI32: TypeAlias = npt.NDArray[np.int32]

WEIGHTS_PER_BYTE = 4
"""Consecutive rows of one column that share a byte."""
GROUP_ROWS = 64
"""Rows that share one 4-bit local scale."""
ROWS_PER_SCALE_BYTE = 2 * GROUP_ROWS
"""Rows covered by one byte of local scales: even group in the high nibble, odd in the low one."""
FIELD_SHIFTS = (9, 6, 3, 0)
"""Bit position in ``d`` of the weight in row 4r + j; neighbouring fields share three bits."""
FIELD_MASK = 63
FIELD_OFFSET = 32
CODE_MASK = (1 << 15) - 1
"""Bits of ``d`` that any field can see; higher bits are ignored, so ``d`` may wrap."""
MAX_LOCAL_SCALE = 15
NUM_CODEWORDS = 256
LARGEST_CODE = 2.0**31

RowOrder: TypeAlias = Literal["natural", "permuted"]
ROW_ORDERS: tuple[RowOrder, ...] = ("natural", "permuted")
_STORED = np.arange(GROUP_ROWS)
PERMUTED: Order = 8 * (_STORED // 2 % 8) + 2 * (_STORED // 16) + _STORED % 2
"""True row, inside a group, of every stored row of the permuted generation: stored row
16 t + 2 q + s is true row 8 q + 2 t + s. Newer kernels of FastDeploy (2.1 and later) need it."""
NATURAL: Order = np.argsort(PERMUTED)
"""Inverse of PERMUTED: the stored row of every true row."""


def to_stored_order(weight: Array, order: RowOrder) -> Array:
    """Return a matrix [K, ...] with its rows as a file of that row order stores them.

    K must be a multiple of 64 (ValueError); natural order returns the matrix itself.
    """
    return weight if order == "natural" else weight[spread(PERMUTED, weight.shape[0])]


def to_true_order(weight: Array, order: RowOrder) -> Array:
    """Return the true matrix [K, ...] of one whose rows are in a file's order."""
    return weight if order == "natural" else weight[spread(NATURAL, weight.shape[0])]


@dataclass(frozen=True, slots=True)
class CCQWeight:
    """One encoded matrix ``[K, N]``; field names and shapes as in a checkpoint.

    packed uint8 [K/4, N]; local_scale uint8 [K/128, N] (two 4-bit scales a byte); super_scale
    float32 [N], each value representable in bfloat16; code_scale and code_zp float32 [N].
    """

    packed: ArrayU8
    local_scale: ArrayU8
    super_scale: ArrayF32
    code_scale: ArrayF32
    code_zp: ArrayF32

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N) of the matrix that is encoded."""
        return self.packed.shape[0] * WEIGHTS_PER_BYTE, self.packed.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, the bfloat16 super scale counted as 16."""
        rows: int = self.shape[0]
        per_column: int = 8 * (self.packed.shape[0] + self.local_scale.shape[0]) + 16 + 32 + 32
        return per_column / rows

    def decode(self) -> ArrayF32:
        """The matrix that a reader of these five arrays sees, float32 [K, N]."""
        return decode(
            self.packed, self.local_scale, self.super_scale, self.code_scale, self.code_zp
        )


def fused_multiply_add(
    byte: npt.NDArray[Any], scale: npt.NDArray[Any], addend: npt.NDArray[Any]
) -> ArrayF32:
    """``byte * scale + addend`` with one rounding to float32, as a hardware FMA gives it.

    ``byte`` holds integers 0..255; ``scale`` and ``addend`` are finite float32; shapes broadcast.
    The product has at most 32 significant bits, hence is exact in float64. The float64 sum may be
    inexact, and rounding it a second time could then land on the wrong float32: a tie of the
    second rounding may have been made by the first. So the first rounding is turned into
    round-to-odd (an inexact sum gets its last bit set), which a later rounding to at most 51 bits
    cannot tell from the exact sum (Boldo and Melquiond, 2008).
    """
    product = np.multiply(byte, scale, dtype=np.float64)
    addend = np.asarray(addend, dtype=np.float64)
    total = np.asarray(product + addend)
    # Knuth's TwoSum: `error` is exactly (product + addend) - total.
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(np.int64)
    even_and_inexact = (error != 0) & ((bits & 1) == 0)
    # Incrementing the bit pattern moves away from zero, whatever the sign.
    step = np.where((error > 0) == (total > 0), 1, -1)
    odd = (bits + np.where(even_and_inexact, step, 0)).view(np.float64)
    rounded: ArrayF32 = odd.astype(np.float32)
    return rounded


def codebook(code_scale: npt.ArrayLike, code_zp: npt.ArrayLike) -> ArrayI32:
    """``d`` of all 256 bytes for each column: int32 [256, N] from two float32 arrays [N].

    Raises ValueError for a non-finite scale and for one whose ``d`` leaves the int32 range, where
    processors disagree about the conversion.
    """
    scale = _column_vector("code_scale", code_scale)
    zero = _column_vector("code_zp", code_zp, columns=scale.shape[0])
    with np.errstate(over="ignore"):
        addend = zero + np.float32(0.5)  # rounded to float32 before the multiply-add
        value = fused_multiply_add(np.arange(NUM_CODEWORDS)[:, None], scale, addend)
    code = np.floor(value)
    outside = ~(np.abs(code) < 2.0**31).all(axis=0)
    if outside.any():
        column = int(np.argmax(outside))
        raise ValueError(
            f"code_scale[{column}] = {scale[column]:.9g} with code_zp[{column}] = "
            f"{zero[column]:.9g} gives codes outside int32: expected 255 * |code_scale| + "
            "|code_zp| below 2**31"
        )
    return code.astype(np.int32)


def decode_codes(
    packed: npt.ArrayLike, code_scale: npt.ArrayLike, code_zp: npt.ArrayLike
) -> ArrayI32:
    """The integer ``d`` of every byte: int32 [K/4, N], not masked to 15 bits.

    ``packed`` is uint8 [K/4, N], the scales float32 [N]. Raises ValueError as ``codebook`` does
    and for shapes that do not fit, TypeError for another dtype.
    """
    bytes_ = _matrix("packed", packed)
    table = codebook(code_scale, code_zp)
    if table.shape[1] != bytes_.shape[1]:
        raise ValueError(
            f"code_scale: found {table.shape[1]} columns, expected {bytes_.shape[1]} as in packed"
        )
    codes: ArrayI32 = table[bytes_, np.arange(bytes_.shape[1])]
    return codes


def code_values(codes: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """The four unscaled weights of each code: int8 [..., 4] in -32..31 from integers [...]."""
    shifts = np.array(FIELD_SHIFTS, dtype=np.int32)
    fields = (np.asarray(codes, dtype=np.int32)[..., None] >> shifts) & FIELD_MASK
    return (fields - FIELD_OFFSET).astype(np.int8)


def unpack_local_scale(local_scale: npt.NDArray[np.uint8]) -> ArrayU8:
    """Nibbles to one 0..15 value per group: uint8 [K/128, N] -> uint8 [K/64, N]."""
    both: ArrayU8 = np.stack([local_scale >> np.uint8(4), local_scale & np.uint8(15)], axis=1)
    groups: ArrayU8 = both.reshape(2 * local_scale.shape[0], *local_scale.shape[1:])
    return groups


def pack_local_scale(scale: npt.NDArray[Any]) -> ArrayU8:
    """Inverse of ``unpack_local_scale``: integers 0..15 [K/64, N] -> uint8 [K/128, N]."""
    pairs = np.asarray(scale, dtype=np.uint8)
    packed: ArrayU8 = (pairs[0::2] << np.uint8(4)) | pairs[1::2]
    return packed


def decode(
    packed: npt.ArrayLike,
    local_scale: npt.ArrayLike,
    super_scale: npt.ArrayLike,
    code_scale: npt.ArrayLike,
    code_zp: npt.ArrayLike,
) -> ArrayF32:
    """Decode one matrix to float32 [K, N], W = v * (local_scale * super_scale).

    packed uint8 [K/4, N]; local_scale uint8 [K/128, N]; super_scale float32 [N], or uint16 [N]
    holding bfloat16 bit patterns; code_scale, code_zp float32 [N]. With a super scale that
    bfloat16 can hold every product is exact (6 + 4 + 8 significant bits). K must be a multiple
    of 128. Raises ValueError (shapes, non-finite scales) and TypeError (dtypes), one line each.
    """
    bytes_ = _matrix("packed", packed)
    rows, columns = bytes_.shape
    if rows == 0 or rows % (ROWS_PER_SCALE_BYTE // WEIGHTS_PER_BYTE):
        raise ValueError(
            f"packed: found {rows} rows, that is K = {rows * WEIGHTS_PER_BYTE}; "
            f"K must be a positive multiple of {ROWS_PER_SCALE_BYTE}"
        )
    nibbles = _matrix("local_scale", local_scale)
    expected = (rows * WEIGHTS_PER_BYTE // ROWS_PER_SCALE_BYTE, columns)
    if nibbles.shape != expected:
        raise ValueError(f"local_scale: found shape {nibbles.shape}, expected {expected}")
    column_scale = _column_vector("super_scale", _widen(super_scale), columns=columns)

    values = code_values(decode_codes(bytes_, code_scale, code_zp))
    fields = values.transpose(0, 2, 1).reshape(-1, GROUP_ROWS, columns)
    weight: ArrayF32 = fields.astype(np.float32)
    weight *= (unpack_local_scale(nibbles) * column_scale)[:, None, :]
    return weight.reshape(-1, columns)


def _widen(super_scale: npt.ArrayLike) -> npt.NDArray[Any]:
    """bfloat16 bit patterns (uint16) as the float32 they stand for; anything else unchanged."""
    array = np.asarray(super_scale)
    if array.dtype == np.uint16:
        return bfloat16_to_float32(array)
    return array


def _matrix(name: str, array: npt.ArrayLike) -> ArrayU8:
    result = np.asarray(array)
    if result.dtype != np.uint8:
        raise TypeError(f"{name}: found dtype {result.dtype}, expected uint8")
    if result.ndim != 2:
        raise ValueError(f"{name}: found shape {result.shape}, expected two dimensions")
    return result


def _column_vector(name: str, array: npt.ArrayLike, columns: int | None = None) -> ArrayF32:
    result = np.asarray(array)
    if result.dtype != np.float32:
        raise TypeError(f"{name}: found dtype {result.dtype}, expected float32")
    if result.ndim != 1 or (columns is not None and result.shape[0] != columns):
        wanted = f"[{'N' if columns is None else columns}]"
        raise ValueError(f"{name}: found shape {list(result.shape)}, expected {wanted}")
    finite = np.isfinite(result)
    if not finite.all():
        column = int(np.argmin(finite))
        raise ValueError(f"{name}[{column}]: found {result[column]}, expected a finite number")
    return result


class CCQ(WeightFormat):
    """The code as a weight format; rows as they are stored, in either row order.

    Arrays: quant_weight uint8 [K/4, N], weight_scale uint8 [K/128, N], super_scales, code_scale,
    code_zp float32 [N].
    """

    name = title = kernel = "ccq"
    row_unit = ROWS_PER_SCALE_BYTE
    column_unit = 8
    vectors = ("super_scales", "code_scale", "code_zp")
    bits = 2 + 4 / GROUP_ROWS
    column_bits = 96  # as kept; 80 in a file, whose super scales are bfloat16

    def shape(self, arrays: Arrays) -> tuple[int, int]:
        """See WeightFormat."""
        rows, columns = arrays["quant_weight"].shape
        return rows * WEIGHTS_PER_BYTE, columns

    def tensors(self, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        """See WeightFormat."""
        vector = ((columns,),)
        return (
            TensorSpec("quant_weight", BYTES, ((rows // WEIGHTS_PER_BYTE, columns),)),
            TensorSpec("weight_scale", BYTES, ((rows // ROWS_PER_SCALE_BYTE, columns),)),
            TensorSpec("super_scales", ("BF16", "F32"), vector, ("super_scale",)),
            TensorSpec("code_scale", ("F32",), vector),
            TensorSpec("code_zp", ("F32",), vector),
        )

    def check(self, arrays: Arrays) -> None:
        """Refuse maps from byte to code that leave int32, where kernels could differ."""
        reach = 255.0 * np.abs(arrays["code_scale"].astype(np.float64)) + np.abs(arrays["code_zp"])
        if reach.size and float(reach.max()) >= LARGEST_CODE:
            raise ValueError(
                f"code_scale: found a code of {reach.max():.3g} in column {int(reach.argmax())},"
                f" expected less than {LARGEST_CODE:.0f}"
            )

    def slice_columns(self, arrays: Arrays, ranges: Sequence[Range]) -> Arrays:
        """See WeightFormat."""
        return {name: take(array, ranges, -1) for name, array in arrays.items()}

    def slice_rows(self, arrays: Arrays, start: int, stop: int) -> Arrays:
        """See WeightFormat."""
        check_boundaries(self.name, [(start, stop)], self.row_unit, "rows")
        return {
            **arrays,
            "quant_weight": arrays["quant_weight"][
                start // WEIGHTS_PER_BYTE : stop // WEIGHTS_PER_BYTE
            ],
            "weight_scale": arrays["weight_scale"][
                start // ROWS_PER_SCALE_BYTE : stop // ROWS_PER_SCALE_BYTE
            ],
        }

    def join_columns(self, parts: Sequence[Arrays]) -> Arrays:
        """See WeightFormat."""
        return {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}

    def join_rows(self, parts: Sequence[Arrays]) -> Arrays | None:
        """See WeightFormat."""
        if not self.same_vectors(parts):
            return None
        stacked = ("quant_weight", "weight_scale")
        return {
            **parts[0],
            **{name: np.concatenate([part[name] for part in parts]) for name in stacked},
        }

    def permute_columns(self, arrays: Arrays, order: Order) -> Arrays:
        """See WeightFormat."""
        index = spread(order, arrays["super_scales"].shape[0])
        return {name: np.take(array, index, axis=-1) for name, array in arrays.items()}

    def permute_rows(self, arrays: Arrays, order: Order) -> Arrays:
        """See WeightFormat: four rows share a byte, so theirs can't be moved."""
        if np.array_equal(order, np.arange(GROUP)):
            return arrays
        raise ValueError("ccq: rows can't be reordered, because four of them share a byte")

    def decode(self, arrays: Arrays) -> ArrayF32:
        """See WeightFormat; `to_true_order` makes the true matrix of it."""
        return decode(
            arrays["quant_weight"],
            arrays["weight_scale"],
            arrays["super_scales"],
            arrays["code_scale"],
            arrays["code_zp"],
        )

    def random(self, random: np.random.Generator, rows: int, columns: int) -> Arrays:
        """See WeightFormat."""
        # Codes spread over 15 bits give fields of deviation 18; local scales have a mean of 7.5.
        size = np.float32(rows**-0.5)
        return {
            "quant_weight": random.integers(0, 256, (rows // 4, columns), np.uint8),
            "weight_scale": random.integers(0, 256, (rows // 128, columns), np.uint8),
            "super_scales": np.full(columns, size / (18 * 7.5), np.float32),
            "code_scale": random.uniform(100, 127, columns).astype(np.float32),
            "code_zp": random.uniform(0, 300, columns).astype(np.float32),
        }
