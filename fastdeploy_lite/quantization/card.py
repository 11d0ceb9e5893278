"""The CCQ encoders on an NVIDIA card: whole matrices in, their arrays out.

`encode` gives the bits of `ccq_search.encode`. `encode_hessian` searches as `ccq_hessian.encode`
does with the same bits where both are given the same numbers; but a library adds up the products
with the moments in an order of its own on the CPU, and here each sum runs through the rows in
order, on every card alike. So single bytes may differ, the error does not (docs/quantize.md).
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import device
from fastdeploy_lite.formats import ccq
from fastdeploy_lite.formats.ccq import ArrayF32, CCQWeight, RowOrder, to_stored_order
from fastdeploy_lite.quantization import ccq_hessian, ccq_search, hessian
from fastdeploy_lite.quantization.code_search import code_books
from fastdeploy_lite.quantization.weight_only import check_finite
from fastdeploy_lite.utils.arrays import bfloat16_to_float32
from fastdeploy_lite.utils.errors import ConfigError

Choice = str
CHOICES: tuple[Choice, ...] = ("auto", "cpu", "nvidia")
Array: TypeAlias = npt.NDArray[Any]
Codes: TypeAlias = Sequence[tuple[float, float]]
_NOT_FINITE = 1


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded matrix, and sums over its weights, float64."""

    weight: CCQWeight
    energy: float
    """Of the squares of the weights."""
    error: float
    """Of the squares of what was lost."""


def find(choice: Choice) -> tuple[Card | None, str]:
    """The card to encode on and half a sentence on why it is that, or none.

    Args:
        choice: of CHOICES; "auto" takes a card where there is one, and `FD_LITE_DEVICE=cpu` or
            `CUDA_VISIBLE_DEVICES` hide it.

    Raises:
        ConfigError: "nvidia" without a usable card.
    """
    if choice == "cpu":
        return None, "--device cpu"
    missing = _missing()
    if missing is None:
        try:
            card = _card()
        except RuntimeError as error:
            missing = f"the card cannot be used: {error}"
        else:
            return card, card.name
    if choice == "nvidia":
        raise ConfigError(f"--device nvidia: {missing}; --device auto takes the CPU then")
    return None, missing


def _missing() -> str | None:
    """What keeps this process from a card."""
    if device.wanted() == "cpu":
        return f"{device.DEVICE_VARIABLE}=cpu"
    if not device.visible_cards():
        return "no NVIDIA card is present"
    if not device.has_cuda_module():
        return "the CUDA module is not built: install again where nvcc is on PATH"
    return None


@functools.cache
def _card() -> Card:
    return Card(importlib.import_module(device.CUDA_MODULE))


class Card:
    """The first visible card: its memory for one matrix at a time, kept between calls."""

    def __init__(self, native: Any) -> None:
        """Make a stream. Raises RuntimeError of the driver.

        Args:
            native: the module `_ops_cuda`.
        """
        self._native = native
        self.name: str = native.device_facts(0).name
        self._stream: int = native.create_stream()
        self._rooms: dict[str, tuple[int, int]] = {}

    def encode(
        self, weight: Array, *, codes: Codes | None = None, row_order: RowOrder = "natural"
    ) -> Encoded:
        """Encode [K, N], K a multiple of 128, as `ccq_search.encode` does, to the same bits.

        Args:
            weight: in true row order, float32 or the bits of bfloat16 as uint16.
            codes: see `ccq_search.encode`.
            row_order: of the result.

        Raises:
            ValueError: a wrong shape, or a value that is not finite or above 2**126.
            TypeError: another dtype.
        """
        rows = _checked(weight)
        table = _table(ccq_search.default_codes(rows) if codes is None else codes)
        given = self._input(weight, table, row_order)
        scratch = self._room("scratch", self._native.encode_plain_bytes(*weight.shape, len(table)))
        results = self._results(*weight.shape)
        self._native.encode_plain(given, ccq_search.REFINEMENTS, results, scratch, self._stream)
        return self._encoded(weight, table, results)

    def encode_hessian(
        self,
        weight: Array,
        moments: ArrayF32,
        *,
        codes: Codes | None = None,
        candidates: int = 2,
        descents: int = ccq_hessian.DESCENTS,
        row_order: RowOrder = "natural",
    ) -> Encoded:
        """Encode [K, N] for inputs whose moments are [K, K], as `ccq_hessian.encode` does.

        Args:
            weight: as for `encode`.
            moments: float32, symmetric and positive definite, rows in true order.
            codes, candidates, descents: see `ccq_hessian.encode`.
            row_order: of the result.

        Raises:
            ValueError: as `encode`, and for moments that do not fit or are not positive definite.
            TypeError: another dtype.
        """
        rows = _checked(weight)
        if moments.shape != (rows, rows):
            raise ValueError(f"hessian: found shape {list(moments.shape)}, expected {[rows, rows]}")
        table = _table(ccq_hessian.default_codes(rows) if codes is None else codes)
        terms = self._terms(_stored_moments(moments, row_order))
        given = self._input(weight, table, row_order)
        scratch = self._room(
            "scratch", self._native.encode_hessian_bytes(*weight.shape, len(table))
        )
        results = self._results(*weight.shape)
        self._native.encode_hessian(
            given, terms, min(candidates, len(table)), descents, results, scratch, self._stream
        )
        return self._encoded(weight, table, results)

    def multiply(self, left: ArrayF32, right: ArrayF32) -> ArrayF32:
        """left [M, K] times right [K, N] in float32, every sum through K in order.

        Sizes of which 4 is no divisor, and matrices without elements, are left to numpy.
        """
        (rows, depth), columns = left.shape, right.shape[1]
        if depth % 4 or columns % 4 or not rows:
            return np.asarray(left @ right, np.float32)
        return self._multiply(left, right, False, rows, depth)

    def second_moment(self, x: ArrayF32, weight: ArrayF32 | None = None) -> ArrayF32:
        """What `hessian.second_moment` says of x [T, K]."""
        if x.shape[1] % 4 or not len(x):
            return hessian.second_moment(x, weight)
        scaled = x if weight is None else x * weight[:, None]
        return self._multiply(scaled, None, True, x.shape[1], len(x))

    def _multiply(
        self, left: ArrayF32, right: ArrayF32 | None, transposed: bool, rows: int, depth: int
    ) -> ArrayF32:
        a = self._upload("left", np.ascontiguousarray(left, np.float32))
        b = a if right is None else self._upload("right", np.ascontiguousarray(right, np.float32))
        columns = left.shape[1] if right is None else right.shape[1]
        c = self._room("product", 4 * rows * columns)
        self._native.multiply(
            a, left.shape[1], transposed, b, columns, c, columns, rows, columns, depth, False,
            self._stream,
        )  # fmt: skip
        product: ArrayF32 = self._download(c, (rows, columns), np.float32)
        return product

    def _terms(self, moments: ArrayF32) -> list[int]:
        size = len(moments)
        blocks, inner = 4 * 4 * size, 4 * ccq.GROUP_ROWS * size
        terms = [
            self._upload("hessian", np.ascontiguousarray(moments, np.float32)),
            self._room("elimination metric", blocks),
            self._room("feedback", 4 * size * size),
            self._room("descent metric", blocks),
            self._room("descent inverse", blocks),
            self._room("descent feedback", inner),
        ]
        wide, status = self._room("wide", 8 * size * size), self._room("status", 4)
        self._native.clear(status, 4, self._stream)
        self._native.hessian_terms(terms, size, wide, status, self._stream)
        if self._download(status, (1,), np.int32)[0]:
            raise ValueError("moments of the activations are not positive definite")
        return terms

    def _input(self, weight: Array, table: ArrayF32, row_order: RowOrder) -> Any:
        rows, columns = weight.shape
        order = to_stored_order(np.arange(ccq.GROUP_ROWS, dtype=np.int32), row_order)
        books = np.ascontiguousarray(code_books(table).transpose(0, 2, 1))
        return self._native.EncodeInput(
            self._upload("weight", np.ascontiguousarray(weight)),
            weight.dtype == np.float32,
            self._upload("row order", np.ascontiguousarray(order)),
            rows,
            columns,
            self._upload("books", books),
            len(table),
            ccq_search.SCALE_FACTORS,
        )

    def _results(self, rows: int, columns: int) -> list[int]:
        sizes = {
            "packed": rows // ccq.WEIGHTS_PER_BYTE * columns,
            "local": columns * (rows // ccq.GROUP_ROWS),
            "super": 4 * columns,
            "code": 4 * columns,
            "exponent": 4 * columns,
            "sums": 16 * columns,
        }
        return [self._room(name, nbytes) for name, nbytes in sizes.items()]

    def _encoded(self, weight: Array, table: ArrayF32, results: Sequence[int]) -> Encoded:
        rows, columns = weight.shape
        packed, local, super_scale, code, exponent, sums = (
            self._download(address, shape, dtype)
            for address, (shape, dtype) in zip(
                results,
                (
                    ((rows // ccq.WEIGHTS_PER_BYTE, columns), np.uint8),
                    ((columns, rows // ccq.GROUP_ROWS), np.uint8),
                    ((columns,), np.float32),
                    ((columns,), np.int32),
                    ((columns,), np.int32),
                    ((columns, 2), np.float64),
                ),
                strict=True,
            )
        )
        if (exponent == self._native.bad_column).any():
            values = weight if weight.dtype == np.float32 else bfloat16_to_float32(weight)
            check_finite(values, ccq_search.MAX_MAGNITUDE)
        # A column may have ended with all local scales zero: its super scale is then irrelevant.
        used = local.any(axis=1)
        energy, error = np.ldexp(sums, 2 * exponent[:, None]).sum(axis=0)
        found = CCQWeight(
            packed=packed,
            local_scale=ccq.pack_local_scale(local.T),
            super_scale=np.where(used, np.ldexp(super_scale, exponent), 0).astype(np.float32),
            code_scale=table[code, 0],
            code_zp=table[code, 1],
        )
        return Encoded(found, float(energy), float(error))

    def _room(self, name: str, nbytes: int) -> int:
        """Memory of the card that grows and stays."""
        address, size = self._rooms.get(name, (0, 0))
        if size < nbytes or not address:
            if address:
                self._native.synchronize(self._stream)
                self._native.release(address)
            self._rooms.pop(name, None)
            address = self._native.allocate(max(nbytes, 1))
            self._rooms[name] = address, nbytes
        return address

    def _upload(self, name: str, array: Array) -> int:
        address = self._room(name, array.nbytes)
        self._native.upload(address, array.ctypes.data, array.nbytes, self._stream)
        return address

    def _download(self, address: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        array: Array = np.empty(shape, dtype)
        self._native.download(array.ctypes.data, address, array.nbytes, self._stream)
        return array


def _checked(weight: Array) -> int:
    """Rows of a matrix that the card takes."""
    if weight.dtype not in (np.float32, np.uint16):
        raise TypeError(
            f"weight: found dtype {weight.dtype}, expected float32 or bfloat16's uint16"
        )
    if weight.ndim != 2 or not weight.size:
        raise ValueError(f"weight: found shape {list(weight.shape)}, expected [K, N]")
    rows, columns = map(int, weight.shape)
    if rows % ccq.ROWS_PER_SCALE_BYTE:
        raise ValueError(
            f"weight: found K = {rows} rows, expected a multiple of {ccq.ROWS_PER_SCALE_BYTE} "
            f"(two groups of {ccq.GROUP_ROWS} share a scale byte)"
        )
    if columns * (rows // ccq.GROUP_ROWS) >= 2**31 // 4:
        raise ValueError(f"weight: found {math.prod(weight.shape)} values, too many for a card")
    return rows


def _table(codes: Codes) -> ArrayF32:
    table = np.asarray(codes, np.float32)
    if table.ndim != 2 or table.shape[1] != 2 or len(table) == 0:
        raise ValueError(f"codes: found shape {list(table.shape)}, expected [number of codes, 2]")
    return table


def _stored_moments(moments: ArrayF32, row_order: RowOrder) -> ArrayF32:
    return to_stored_order(to_stored_order(moments, row_order).T, row_order)
