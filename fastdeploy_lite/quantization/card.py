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
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import device
from fastdeploy_lite.formats import ccq
from fastdeploy_lite.formats.ccq import ArrayF32, CCQWeight, RowOrder, to_stored_order
from fastdeploy_lite.quantization import ccq_hessian, ccq_search, hessian
from fastdeploy_lite.quantization.code_search import code_books
from fastdeploy_lite.quantization.products import HostProducts
from fastdeploy_lite.quantization.weight_only import check_finite
from fastdeploy_lite.utils.arrays import bfloat16_to_float32
from fastdeploy_lite.utils.errors import ConfigError

Choice = str
CHOICES: tuple[Choice, ...] = ("auto", "cpu", "nvidia")
Array: TypeAlias = npt.NDArray[Any]
Codes: TypeAlias = Sequence[tuple[float, float]]
_Method = TypeVar("_Method", bound=Callable[..., Any])
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


def _one_at_a_time(method: _Method) -> _Method:
    """Calls share the card's memory: threads take turns, and the host's work goes on beside."""

    @functools.wraps(method)
    def locked(self: Card, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast(_Method, locked)


class Card(HostProducts):
    """The first visible card: its memory for one matrix at a time, kept between calls.

    Products are those of `products.Products`; sizes that the kernels do not take are left to numpy.
    Any thread may call.
    """

    workers = min(8, len(os.sched_getaffinity(0)))
    """Experts of a layer under way at once in calibration; each holds some 200 MB."""

    def __init__(self, native: Any) -> None:
        """Make a stream. Raises RuntimeError of the driver.

        Args:
            native: the module `_ops_cuda`.
        """
        self._native = native
        self.lock = threading.RLock()
        self.name: str = native.device_facts(0).name
        self._stream: int = native.create_stream()
        self._rooms: dict[str, tuple[int, int]] = {}

    @_one_at_a_time
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

    @_one_at_a_time
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
        terms = self._terms(moments, row_order)
        given = self._input(weight, table, row_order)
        scratch = self._room(
            "scratch", self._native.encode_hessian_bytes(*weight.shape, len(table))
        )
        results = self._results(*weight.shape)
        self._native.encode_hessian(
            given, terms, min(candidates, len(table)), descents, results, scratch, self._stream
        )
        return self._encoded(weight, table, results)

    @_one_at_a_time
    def multiply(self, left: ArrayF32, right: ArrayF32) -> ArrayF32:
        """left [M, K] times right [K, N] in float32, every sum through K in order."""
        if _is_odd(left.shape[1], right.shape[1], left.size):
            return super().multiply(left, right)
        rows, columns = left.shape[0], right.shape[1]
        out = self._room("product", 4 * rows * columns)
        self._multiply(self._floats("left", left), left.shape, self._floats("right", right),
                       columns, out)  # fmt: skip
        return self._download_floats(out, (rows, columns))

    def second_moment(self, x: ArrayF32, weight: ArrayF32 | None = None) -> ArrayF32:
        """What `hessian.second_moment` says of x [T, K]."""
        scaled = x if weight is None else x * weight[:, None]
        return self.cross_moment(scaled, scaled)

    @_one_at_a_time
    def cross_moment(self, x: ArrayF32, y: ArrayF32) -> ArrayF32:
        """x' y of x [T, K] and y [T, N], as `multiply` takes products."""
        columns = y.shape[1]
        if _is_odd(x.shape[1], columns, x.size):
            return super().cross_moment(x, y)
        a = self._floats("left", x)
        b = a if y is x else self._floats("right", y)
        out = self._room("product", 4 * x.shape[1] * columns)
        self._multiply(a, x.shape, b, columns, out, transposed=True)
        return self._download_floats(out, (x.shape[1], columns))

    @_one_at_a_time
    def blend(
        self, moment: ArrayF32, tokens: int, pooled: ArrayF32 | None = None, pooled_tokens: int = 0
    ) -> ArrayF32:
        """`hessian.blend`, to the same bits but for the order in which the diagonal is summed."""
        size, damping = len(moment), hessian.DAMPING
        prior = hessian.PRIOR_TOKENS_PER_ROW * size
        shares = [1.0 if tokens > 0 else 0.0, 0.0]
        parts = [self._floats("left", moment) if tokens > 0 else 0, 0]
        if pooled is not None and pooled_tokens > 0:
            shares[1] = prior / pooled_tokens
            parts[1] = self._floats("right", pooled)
        out = self._blended(parts, shares, size, damping)
        return self._download_floats(out, moment.shape)

    @_one_at_a_time
    def losses(self, errors: Sequence[ArrayF32], moments: ArrayF32) -> list[float]:
        """Sums of e' H e over the columns of errors [K, N] under moments [K, K]."""
        size, columns = errors[0].shape
        if _is_odd(size, columns, 1):
            return super().losses(errors, moments)
        total = self._room("total", 8)
        parts = self._room("parts", 8 * self._native.inner_parts)
        left, found = self._floats("left", moments), []
        for error in errors:
            right, out = self._floats("right", error), self._room("product", error.nbytes)
            self._multiply(left, moments.shape, right, columns, out)
            self._native.inner_product(out, right, error.size, parts, total, self._stream)
            found.append(float(self._download(total, (1,), np.float64)[0]))
        return found

    @_one_at_a_time
    def ridge(self, moments: ArrayF32, cross: ArrayF32, share: float) -> ArrayF32:
        """(M + share mean(M) 1)^-1 cross of M [K, K] and cross [K, N]; zeros where M is."""
        (size, columns), status = cross.shape, self._room("status", 4)
        if size % ccq.GROUP_ROWS:
            return super().ridge(moments, cross, share)
        right = self._floats("right", cross)
        damped = self._blended([self._floats("left", moments), 0], [1.0, 0.0], size, share)
        mean = float(self._download(self._room("mean", 8), (1,), np.float64)[0])
        if mean <= 0:
            return np.zeros_like(cross)
        upper = self._room("wide", 8 * size * size)
        self._native.factorize(damped, size, upper, status, self._stream)
        self._check(status)
        wide = self._room("wide right", 8 * size * columns)
        out = self._room("product", 4 * size * columns)
        self._native.solve(upper, size, right, mean, columns, wide, out, self._stream)
        return self._download_floats(out, cross.shape)

    @_one_at_a_time
    def activations(self, x: ArrayF32, up_gate: ArrayF32, weight: ArrayF32) -> ArrayF32:
        """swiglu(x up_gate) [T, I] of x [T, K] and up_gate [K, 2 I], rows times weight [T]."""
        if _is_odd(x.shape[1], up_gate.shape[1], x.size):
            return super().activations(x, up_gate, weight)
        width = up_gate.shape[1] // 2
        return self._download_floats(self._activations(x, up_gate, weight), (len(x), width))

    @_one_at_a_time
    def outputs(self, x: ArrayF32, up_gate: ArrayF32, weight: ArrayF32, down: ArrayF32) -> ArrayF32:
        """`activations` times down [I, N]."""
        if _is_odd(x.shape[1], up_gate.shape[1], x.size) or _is_odd(
            down.shape[0], down.shape[1], 1
        ):
            return super().outputs(x, up_gate, weight, down)
        inner = self._activations(x, up_gate, weight)
        (depth, columns), shape = down.shape, (len(x), down.shape[1])
        out = self._room("product", 4 * len(x) * columns)
        self._multiply(inner, (len(x), depth), self._floats("right", down), columns, out)
        return self._download_floats(out, shape)

    def _activations(self, x: ArrayF32, up_gate: ArrayF32, weight: ArrayF32) -> int:
        tokens, both = len(x), up_gate.shape[1]
        product = self._room("product", 4 * tokens * both)
        out = self._room("activations", 2 * tokens * both)
        left, right = self._floats("left", x), self._floats("right", up_gate)
        self._multiply(left, x.shape, right, both, product)
        weights = self._floats("weights", weight)
        self._native.swiglu(product, weights, tokens, both // 2, out, self._stream)
        return out

    def _multiply(
        self,
        left: int,
        shape: tuple[int, ...],
        right: int,
        columns: int,
        out: int,
        transposed: bool = False,
    ) -> None:
        """left, or its transpose, times right [K, columns]; `shape` is left's."""
        rows, depth = reversed(shape) if transposed else shape
        self._native.multiply(
            left, shape[1], transposed, right, columns, out, columns, rows, columns, depth, False,
            self._stream,
        )  # fmt: skip

    def _blended(
        self, parts: Sequence[int], shares: Sequence[float], size: int, damping: float
    ) -> int:
        """Moments [K, K] on the card whose mean diagonal is 1 + damping; the identity of none."""
        out, status = self._room("blended", 4 * size * size), self._room("status", 4)
        self._native.clear(status, 4, self._stream)
        self._native.blend_moments(
            parts[0], shares[0], parts[1], shares[1], size, damping, self._room("mean", 8), out,
            status, self._stream,
        )  # fmt: skip
        self._check(status)
        return out

    def _check(self, status: int) -> None:
        found = int(self._download(status, (1,), np.int32)[0])
        if found:
            said = "finite" if found == _NOT_FINITE else "positive definite"
            raise ValueError(f"moments of the activations are not {said}")

    def _floats(self, name: str, array: ArrayF32) -> int:
        return self._upload(name, np.ascontiguousarray(array, np.float32))

    def _terms(self, moments: ArrayF32, row_order: RowOrder) -> list[int]:
        """Terms of moments in true order for rows in `row_order`."""
        size = len(moments)
        blocks, inner = 4 * 4 * size, 4 * ccq.GROUP_ROWS * size
        terms = [
            self._floats("hessian", moments),
            self._room("elimination metric", blocks),
            self._room("feedback", 4 * size * size),
            self._room("descent metric", blocks),
            self._room("descent inverse", blocks),
            self._room("descent feedback", inner),
        ]
        if row_order != "natural":
            stored = self._room("stored hessian", 4 * size * size)
            self._native.permute_moments(
                terms[0], self._row_order(row_order), size, stored, self._stream
            )
            terms[0] = stored
        wide, status = self._room("wide", 8 * size * size), self._room("status", 4)
        self._native.clear(status, 4, self._stream)
        self._native.hessian_terms(terms, size, wide, status, self._stream)
        self._check(status)
        return terms

    def _row_order(self, row_order: RowOrder) -> int:
        """Where a stored row of a group comes from, int32 [64]."""
        rows = to_stored_order(np.arange(ccq.GROUP_ROWS, dtype=np.int32), row_order)
        return self._upload("row order", np.ascontiguousarray(rows))

    def _input(self, weight: Array, table: ArrayF32, row_order: RowOrder) -> Any:
        rows, columns = weight.shape
        books = np.ascontiguousarray(code_books(table).transpose(0, 2, 1))
        return self._native.EncodeInput(
            self._upload("weight", np.ascontiguousarray(weight)),
            weight.dtype == np.float32,
            self._row_order(row_order),
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

    def _download_floats(self, address: int, shape: tuple[int, ...]) -> ArrayF32:
        return np.asarray(self._download(address, shape, np.float32))

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


def _is_odd(inner: int, columns: int, size: int) -> bool:
    """Whether a product's rows are not whole runs of 16 bytes, or there is none."""
    return bool(inner % 4 or columns % 4 or not size)
