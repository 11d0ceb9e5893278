"""Weights on a card: tiles that the kernels read in one stream, filled through pinned buffers.

The tile layout is described in custom_ops/cuda/weight_tiles.cuh. A plain dense weight stays a
matrix bf16 [N, K]: cuBLASLt multiplies by it, and its rows serve as an embedding table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import _ops_cuda, formats
from fastdeploy_lite.model_executor.ops import cuda_experts
from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime
from fastdeploy_lite.model_executor.ops._view import Tensor
from fastdeploy_lite.model_executor.ops.packed_weight import PackedWeight

Array = npt.NDArray[Any]

TILE_COLUMNS = 16
TILE_ROWS = 128
KIND_CODES = {"dense": 0, "int8": 1, "int4": 2, "ccq": 3}
CCQ_WIDE = 4
FAST_CODE_LIMIT = float(1 << 18)
"""The fast decoder takes codes below this size for every byte; others take the wide one."""
_NIBBLES = KIND_CODES["int4"]


@dataclass(slots=True)
class CudaWeight:
    """What CUDA ops take in place of a PackedWeight.

    Attributes:
        native: sizes and addresses of the tiles; None for a plain dense weight.
        rows: address of bf16 [N, K] of a plain dense weight.
        in_features, out_features, num_experts: as in PackedWeight.
        kind: value of the kernels' enum Kind.
        filled: experts filled so far.
    """

    native: Any
    rows: int
    in_features: int
    out_features: int
    num_experts: int
    kind: int
    filled: int = 0


def is_plain_dense(weight: PackedWeight) -> bool:
    """Whether the weight is kept as a matrix for cuBLASLt."""
    return weight.kind == "dense" and weight.num_experts == 0


def _tiles(weight: PackedWeight) -> tuple[int, int]:
    """Column blocks and k tiles of one expert."""
    return -(-weight.out_features // TILE_COLUMNS), -(-weight.in_features // TILE_ROWS)


def allocate(weight: PackedWeight) -> None:
    """Allocate the tensors of a weight and make its handle.

    Raises:
        ValueError: sizes that the kernels do not take.
    """
    if cuda_experts.takes(weight):
        cuda_experts.allocate(weight)
        return
    _check_sizes(weight)
    if is_plain_dense(weight):
        shape = [weight.out_features, weight.in_features]
        weight.tensors = {"rows": runtime.empty(shape, "bfloat16", weight.place)}
    else:
        weight.tensors = _allocate_tiles(weight)
    _make_handle(weight, KIND_CODES[weight.kind])


def _check_sizes(weight: PackedWeight) -> None:
    format_ = formats.get(weight.kind)
    rows, columns = max(format_.row_unit, 8), format_.column_unit
    if weight.in_features % rows or weight.out_features % columns:
        raise ValueError(
            f"allocate_weight: a {weight.kind} weight is [{weight.in_features}, "
            f"{weight.out_features}], on a card K must be a multiple of {rows} and N of {columns}"
        )


def _allocate_tiles(weight: PackedWeight) -> dict[str, Tensor]:
    experts = max(weight.num_experts, 1)
    n_tiles, k_tiles = _tiles(weight)
    count = experts * n_tiles * k_tiles
    sizes = {"tiles": count * _ops_cuda.tile_bytes(KIND_CODES[weight.kind])}
    vectors: tuple[str, ...] = ("column_scale",)
    if weight.kind == "ccq":
        sizes["local_scale"] = count * TILE_COLUMNS
        vectors = ("column_scale", "code_scale", "code_bias")
    elif weight.kind == "dense":
        vectors = ()
    tensors = {name: runtime.empty([n], "uint8", weight.place) for name, n in sizes.items()}
    for name in vectors:
        shape = [experts, n_tiles * TILE_COLUMNS]
        tensors[name] = runtime.empty(shape, "float32", weight.place)
    return tensors


def _make_handle(weight: PackedWeight, kind: int) -> None:
    addresses = {name: int(tensor.data_ptr()) for name, tensor in weight.tensors.items()}
    native = None
    if "tiles" in addresses:
        names = ("tiles", "local_scale", "code_scale", "code_bias", "column_scale")
        native = _ops_cuda.Weight(
            kind=kind,
            in_features=weight.in_features,
            out_features=weight.out_features,
            **{name: addresses.get(name, 0) for name in names},
        )
    weight.handle = CudaWeight(
        native,
        addresses.get("rows", 0),
        weight.in_features,
        weight.out_features,
        weight.num_experts,
        kind,
    )


class Staging:
    """Device memory that holds one array of a file until it is repacked."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def upload(self, array: Array, place: Any) -> int:
        """Copy a host array to the card and return its address; valid until the next upload."""
        if self._buffer is None or self._buffer.size < array.nbytes:
            self._buffer = None
            self._buffer = runtime.empty([array.nbytes], "uint8", place)
        address = int(self._buffer.data_ptr())
        _ops_cuda.upload(address, array.ctypes.data, array.nbytes, runtime.stream())
        return address

    def release(self) -> None:
        """Give the memory back to Paddle's pool."""
        self._buffer = None


_staging = Staging()


def fill(weight: PackedWeight, expert: int | None, arrays: dict[str, Any]) -> None:
    """Repack one expert's host arrays (see ops.fill_weight) into the tiles.

    Raises:
        TypeError: an array of another dtype.
        ValueError: an array of another shape, an expert out of range, a scale that is not finite.
    """
    index = expert or 0
    if not 0 <= index < max(weight.num_experts, 1):
        raise ValueError(
            f"fill_weight: expert is {index}, the weight has {weight.num_experts} experts"
        )
    if weight.kind == "dense":
        _fill_dense(weight, index, **arrays)
    elif weight.kind == "ccq":
        _fill_ccq(weight, index, **arrays)
    else:
        _fill_integers(weight, index, **arrays)
    if not cuda_experts.takes(weight):
        weight.handle.filled += 1


def finish(weight: PackedWeight) -> None:
    """Check that all experts were filled and give the staging memory back.

    Raises:
        ValueError: some expert was never filled.
    """
    if cuda_experts.takes(weight):
        cuda_experts.finish(weight)
        _staging.release()
        return
    expected = max(weight.num_experts, 1)
    if weight.handle.filled != expected:
        raise ValueError(
            f"finish_weight: {weight.handle.filled} fills of a weight with {expected} matrices"
        )
    _staging.release()


def _checked(name: str, array: Any, dtypes: tuple[str, ...], size: int) -> Array:
    found = np.ascontiguousarray(array)
    if found.dtype.name not in dtypes:
        raise TypeError(
            f"fill_weight: {name} has dtype {found.dtype.name}, expected {' or '.join(dtypes)}"
        )
    if found.size != size:
        raise ValueError(f"fill_weight: {name} has {found.size} elements, expected {size}")
    return found


def _expert_address(weight: PackedWeight, name: str, expert: int) -> int:
    tensor = weight.tensors[name]
    nbytes = int(tensor.size) * int(tensor.element_size()) // max(weight.num_experts, 1)
    return int(tensor.data_ptr()) + expert * nbytes


def _check_finite(name: str, values: Array) -> None:
    if not np.isfinite(values).all():
        column = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"fill_weight: {name}[{column}] is {values[column]}, expected a number")


def _fill_vector(weight: PackedWeight, name: str, expert: int, values: Array) -> None:
    """Columns past N keep whatever they had: no result of theirs is ever written."""
    _check_finite(name, values)
    _ops_cuda.upload(
        _expert_address(weight, name, expert), values.ctypes.data, values.nbytes, runtime.stream()
    )


def _pack(weight: PackedWeight, expert: int, array: Array, transposed: bool = False) -> None:
    source = _staging.upload(array, weight.place)
    is_float = array.dtype == np.float32
    sizes = (weight.in_features, weight.out_features, runtime.stream())
    if "rows" in weight.tensors:
        target = int(weight.tensors["rows"].data_ptr())
        _ops_cuda.pack_rows(source, is_float, transposed, target, *sizes)
    else:
        target = _expert_address(weight, "tiles", expert)
        kind = KIND_CODES[weight.kind]
        _ops_cuda.pack_tiles(kind, source, is_float, transposed, target, *sizes)


def _fill_dense(packed: PackedWeight, expert: int, weight: Any, transposed: bool = False) -> None:
    size = packed.in_features * packed.out_features
    array = _checked("weight", weight, ("uint16", "float32"), size)
    shape = (packed.in_features, packed.out_features)
    if array.shape != (shape[::-1] if transposed else shape):
        raise ValueError(
            f"fill_weight: weight has shape {array.shape}, expected "
            f"{shape[::-1] if transposed else shape}"
        )
    if transposed and array.dtype == np.uint16 and "rows" in packed.tensors:
        # already as it is kept: no second copy on the card
        target = int(packed.tensors["rows"].data_ptr())
        _ops_cuda.upload(target, array.ctypes.data, array.nbytes, runtime.stream())
        return
    _pack(packed, expert, array, transposed)


def _fill_integers(
    weight: PackedWeight, expert: int, *, quant_weight: Any, weight_scale: Any
) -> None:
    size = weight.in_features * weight.out_features // (1 if weight.kind == "int8" else 2)
    codes = _checked("quant_weight", quant_weight, ("int8", "uint8"), size)
    scale = _checked("weight_scale", weight_scale, ("float32",), weight.out_features).reshape(-1)
    if cuda_experts.takes(weight):
        _check_finite("weight_scale", scale)
        cuda_experts.set_columns(weight, expert, {"scale": scale})
        cuda_experts.pack(weight, expert, _staging.upload(codes, weight.place), 0)
        return
    _fill_vector(weight, "column_scale", expert, scale)
    _pack(weight, expert, codes)


def _fill_ccq(
    weight: PackedWeight,
    expert: int,
    *,
    quant_weight: Any,
    weight_scale: Any,
    super_scales: Any,
    code_scale: Any,
    code_zp: Any,
) -> None:
    rows, columns = weight.in_features, weight.out_features
    codes = _checked("quant_weight", quant_weight, ("uint8",), rows // 4 * columns)
    local = _checked("weight_scale", weight_scale, ("uint8",), rows // 128 * columns)
    vectors = {
        name: _checked(name, value, ("float32",), columns).reshape(-1)
        for name, value in (
            ("super_scales", super_scales),
            ("code_scale", code_scale),
            ("code_zp", code_zp),
        )
    }
    bias = vectors["code_zp"] + np.float32(0.5)
    if cuda_experts.takes(weight):
        for name, values in vectors.items():
            _check_finite(name, values)
        _needs_wide(vectors["code_scale"], bias)  # refuses codes that do not fit
        columns_of = {"scale": vectors["super_scales"], "code_scale": vectors["code_scale"]}
        cuda_experts.set_columns(weight, expert, {**columns_of, "code_bias": bias})
        both = np.concatenate([codes.reshape(-1), local.reshape(-1)])
        source = _staging.upload(both, weight.place)
        cuda_experts.pack(weight, expert, source, source + codes.nbytes)
        return
    _fill_vector(weight, "column_scale", expert, vectors["super_scales"])
    _fill_vector(weight, "code_scale", expert, vectors["code_scale"])
    _fill_vector(weight, "code_bias", expert, bias)
    if _needs_wide(vectors["code_scale"], bias) and weight.handle.kind != CCQ_WIDE:
        filled = weight.handle.filled
        _make_handle(weight, CCQ_WIDE)
        weight.handle.filled = filled
    _pack(weight, expert, codes)
    source = _staging.upload(local, weight.place)
    target = _expert_address(weight, "local_scale", expert)
    _ops_cuda.pack_local_scales(source, target, rows, columns, runtime.stream())


def _needs_wide(code_scale: Array, bias: Array) -> bool:
    """Whether some byte's code leaves the fast decoder's range; the map is monotone in the byte.

    Raises:
        ValueError: a code does not fit 32 bits.
    """
    low = bias.astype(np.float64)
    high = low + 255.0 * code_scale.astype(np.float64)
    largest = np.maximum(np.abs(low), np.abs(high))
    if largest.max() >= 2.0**31:
        column = int(largest.argmax())
        raise ValueError(
            f"fill_weight: code_scale[{column}] {code_scale[column]} and code_zp give codes of "
            f"{largest[column]:.3g}, expected less than 2^31"
        )
    return bool(largest.max() >= FAST_CODE_LIMIT - 1)


def randomize(weight: PackedWeight, seed: int) -> None:
    """Fill a weight with valid random codes made on the card; elements deviate by about K^-0.5."""
    stream, size = runtime.stream(), weight.in_features**-0.5
    random = np.random.default_rng(seed)
    for name in ("rows", "tiles", "chunks", "local_scale"):
        if name not in weight.tensors:
            continue
        tensor = weight.tensors[name]
        kind = _NIBBLES if name == "local_scale" else KIND_CODES[weight.kind]
        nbytes = int(tensor.size) * int(tensor.element_size())
        _ops_cuda.randomize(kind, int(tensor.data_ptr()), nbytes, seed & (2**63 - 1), size, stream)
    # of the bare codes: int8 bytes, nibbles, CCQ fields (18) times a mean local scale of 8
    deviation = {"int8": 73.3, "int4": 4.3, "ccq": 18 * 8.0, "dense": 1.0}[weight.kind]
    ranges = (
        ("column_scale", size / deviation, size / deviation),
        ("code_scale", 100.0, 127.0),
        ("code_bias", 0.5, 300.5),
    )
    if cuda_experts.takes(weight):
        for expert in range(weight.num_experts):
            vectors = {
                name.removeprefix("column_"): random.uniform(low, high, weight.out_features)
                for name, low, high in ranges
            }
            single = {name: values.astype(np.float32) for name, values in vectors.items()}
            cuda_experts.set_columns(weight, expert, single)
        weight.handle.filled = set(range(weight.num_experts))
        return
    for expert in range(max(weight.num_experts, 1)):
        for name, low, high in ranges:
            if name in weight.tensors:
                values = random.uniform(low, high, weight.out_features).astype(np.float32)
                _fill_vector(weight, name, expert, values)
    weight.handle.filled = max(weight.num_experts, 1)


def decoded(weight: PackedWeight, expert: int = 0, *, scaled: bool = True) -> Array:
    """What the kernels decode, as host float32 [K, N]; for tests and inspection.

    Args:
        weight: any weight with tiles.
        expert: which matrix.
        scaled: False leaves the bare integers, for CCQ the fields minus 32.

    Raises:
        ValueError: a plain dense weight, which has no tiles.
    """
    if weight.handle.native is None:
        raise ValueError("decoded: a plain dense weight is not coded")
    if cuda_experts.takes(weight):
        return cuda_experts.decoded(weight, expert, scaled)
    shape = [weight.in_features, weight.out_features]
    out = runtime.empty(shape, "float32", weight.place)
    _ops_cuda.unpack_tiles(
        weight.handle.native, expert, scaled, int(out.data_ptr()), runtime.stream()
    )
    host = np.empty(shape, np.float32)
    _ops_cuda.download(host.ctypes.data, int(out.data_ptr()), host.nbytes, runtime.stream())
    return host
