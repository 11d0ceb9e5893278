"""Weights in the layout that the kernels read: allocated once, filled expert by expert.

A checkpoint's tensors are repacked while they are copied, so a weight exists once in memory. The
CPU layout (tiles of 16 columns, read in one stream) is described in
custom_ops/cpu/linear_kernels.h, the file layouts in docs/checkpoint_format.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt
import paddle

from fastdeploy_lite import formats, processor
from fastdeploy_lite.model_executor.ops._dispatch import native, place_kind
from fastdeploy_lite.model_executor.ops._view import Tensor, View, intern_place
from fastdeploy_lite.model_executor.ops.packed_weight import (
    ExpertWeight,
    HostWeight,
    PackedWeight,
    SegmentedWeight,
    WeightKind,
)
from fastdeploy_lite.model_executor.ops.transfer import host_array

Array: TypeAlias = npt.NDArray[Any]

_ELEMENT_KINDS = {"uint16": "bf16", "float32": "f32"}


def allocate_weight(
    kind: str,
    in_features: int,
    out_features: int,
    place: Any,
    num_experts: int = 0,
    element: str | None = None,
) -> PackedWeight:
    """Allocate a weight without contents; `fill_weight` must follow for every expert.

    Args:
        kind: "dense" (bf16 or float32, decided by the first fill), "int8", "int4" or "ccq".
        in_features: K; a multiple of 64 for int8 and int4, of 128 for ccq.
        out_features: N; a multiple of 16 for int8 and int4, of 8 for ccq.
        place: Paddle place.
        num_experts: 0 for a plain linear map.
        element: bf16 or f32, of a dense weight on the CPU that no fill will decide: see
            `packed_arrays`.

    Raises:
        ValueError: unknown kind, or sizes that the kind does not allow.
    """
    if kind not in get_args(WeightKind):
        raise ValueError(f"allocate_weight: kind is {kind!r}, expected dense, int8, int4 or ccq")
    weight = PackedWeight(
        cast(WeightKind, kind), in_features, out_features, num_experts, intern_place(place)
    )
    if place_kind(place) == "cuda":
        from fastdeploy_lite.model_executor.ops import cuda_weights  # noqa: PLC0415

        cuda_weights.allocate(weight)
    else:
        _make_handle(weight, "bf16" if kind == "dense" else kind, {})  # checks the sizes
        if kind != "dense" or element is not None:
            _allocate_cpu(weight, element or kind)
    return weight


def fill_weight(weight: PackedWeight, expert: int | None, /, **arrays: Any) -> None:
    """Repack host arrays in file layout into the weight; they may be read-only views of a file.

    Args:
        weight: from `allocate_weight`.
        expert: which expert, None for a plain linear map.
        arrays: by kind (K inputs, N outputs):
            dense: `weight` uint16 (bf16 bits) or float32 [K, N], or [N, K] with `transposed=True`;
            int8, int4: `quant_weight` int8 or uint8 in the permuted file layout, any shape with
            the right number of bytes; `weight_scale` float32 [N];
            ccq: `quant_weight` uint8 [K/4, N], `weight_scale` uint8 [K/128, N], `super_scales`,
            `code_scale`, `code_zp` float32 [N].

    Raises:
        TypeError: an array is missing or unknown, or has another dtype.
        ValueError: wrong shape, expert out of range, a scale that is not finite.
    """
    if (expert is None) != (weight.num_experts == 0):
        raise ValueError(
            f"fill_weight: expert is {expert} for a weight with {weight.num_experts} experts"
        )
    _check_names(weight.kind, arrays)
    if place_kind(weight.place) == "cuda":
        from fastdeploy_lite.model_executor.ops import cuda_weights  # noqa: PLC0415

        cuda_weights.fill(weight, expert, arrays)
        return
    index = expert or 0
    if weight.kind == "dense":
        _fill_dense(weight, index, **arrays)
    elif weight.kind == "ccq":
        _fill_ccq(weight, index, **arrays)
    else:
        _fill_integers(weight, index, **arrays)


def finish_weight(weight: PackedWeight) -> None:
    """Do what needs the whole weight, once, after the last fill.

    Raises:
        ValueError: a dense weight was never filled.
    """
    if place_kind(weight.place) == "cuda":
        from fastdeploy_lite.model_executor.ops import cuda_weights  # noqa: PLC0415

        cuda_weights.finish(weight)
    elif not weight.tensors:
        raise ValueError("finish_weight: the dense weight was never filled")


def set_activation_bits(weight: ExpertWeight, bits: int) -> None:
    """Choose how finely activations are rounded before they are multiplied by a quantised weight.

    They become integers per group of 64: of 24 bits, as every weight begins, or of 16, with an
    error of at most 2^-14.99 of the group's largest element, for fewer multiplications. For the
    CPU: a dense weight takes activations as they are, one on a card takes bfloat16 all the same.

    Args:
        weight: finished; one that shares its memory is not concerned.
        bits: 16 or 24.

    Raises:
        ValueError: other bits.
    """
    if isinstance(weight, HostWeight):
        set_activation_bits(weight.weight, bits)
    elif isinstance(weight, SegmentedWeight):
        for part in weight.parts:
            set_activation_bits(part, bits)
    elif place_kind(weight.place) == "cpu":
        weight.handle.activation_bits = bits


def packed_arrays(weight: PackedWeight) -> dict[str, Array]:
    """Return all memory of a weight on the CPU, uint8 without gaps: what fills and kernels share.

    Bytes of an equal weight (kind, sizes, `element_of`) may be written there instead of filling it,
    if its `layout_probe` was the same.
    """
    return {
        name: host_array(tensor).reshape(-1).view(np.uint8)
        for name, tensor in weight.tensors.items()
    }


def adopt_weight(
    kind: str,
    in_features: int,
    out_features: int,
    num_experts: int,
    element: str | None,
    arrays: Mapping[str, Array],
) -> PackedWeight:
    """Return a weight on the CPU whose memory is the caller's: `packed_arrays` of an equal one.

    Args:
        kind, in_features, out_features, num_experts, element: as `allocate_weight`.
        arrays: aligned to 4 bytes at least; kept alive, never written.

    Raises:
        ValueError: arrays are missing, or have other sizes.
    """
    sizes = (in_features, out_features, num_experts)
    weight = PackedWeight(cast(WeightKind, kind), *sizes, intern_place(paddle.CPUPlace()))
    plan = _make_handle(weight, element or kind, {})
    expected = {"data": plan.data_bytes}
    if kind != "dense":
        expected["scale"] = 4 * max(num_experts, 1) * plan.padded_columns
    if kind == "ccq":
        expected["codes"] = plan.codes_bytes
    found = {name: array.nbytes for name, array in arrays.items()}
    if found != expected:
        raise ValueError(f"adopt_weight: arrays have {found} bytes, expected {expected}")
    weight.tensors = {name: paddle.utils.dlpack.from_dlpack(a) for name, a in arrays.items()}
    weight.handle = _make_handle(weight, element or kind, weight.tensors)
    return weight


def element_of(weight: PackedWeight) -> str | None:
    """Return what `allocate_weight` takes as `element` for a weight like this one on the CPU."""
    if weight.kind != "dense":
        return None
    count = weight.in_features * weight.handle.padded_columns * max(weight.num_experts, 1)
    return "f32" if weight.handle.data_bytes == 4 * count else "bf16"


def layout_probe() -> str:
    """Return a number that differs between builds which pack weights for the CPU in different ways.

    It is a checksum of packed weights, so that nobody has to remember a version of the layout.
    """
    crc = 0
    for kind in get_args(WeightKind):
        weight = allocate_weight(kind, 256, 48, paddle.CPUPlace(), num_experts=2)
        for expert in range(2):
            random = np.random.default_rng(expert)
            fill_weight(weight, expert, **formats.get(kind).random(random, 256, 48))
        for array in packed_arrays(weight).values():
            crc = zlib.crc32(array.data, crc)
    return f"{crc:08x}"


def _check_names(kind: str, arrays: dict[str, Any]) -> None:
    found = set(arrays) - ({"transposed"} if kind == "dense" else set())
    required = {spec.suffix for spec in formats.get(kind).tensors(0, 0)}
    if found != required:
        raise TypeError(
            f"fill_weight: a {kind} weight takes {', '.join(sorted(required))}, "
            f"found {', '.join(sorted(found)) or 'nothing'}"
        )


def _make_handle(weight: PackedWeight, native_kind: str, tensors: dict[str, Tensor]) -> Any:
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    sizes = (weight.in_features, weight.out_features, max(weight.num_experts, 1))
    return native("cpu", "PackedWeight")(native_kind, *sizes, **addresses)


def _allocate_cpu(weight: PackedWeight, native_kind: str) -> None:
    plan = _make_handle(weight, native_kind, {})
    tensors = {"data": paddle.empty([plan.data_bytes], dtype="uint8", device=weight.place)}
    processor.place_weights(tensors["data"].data_ptr(), plan.data_bytes)
    if weight.kind != "dense":
        columns = max(weight.num_experts, 1) * plan.padded_columns
        tensors["scale"] = paddle.empty([columns], dtype="float32", device=weight.place)
    if weight.kind == "ccq":
        tensors["codes"] = paddle.empty([plan.codes_bytes], dtype="uint8", device=weight.place)
    weight.tensors = tensors
    weight.handle = _make_handle(weight, native_kind, tensors)


def _view(name: str, array: Any, *dtypes: str) -> View:
    """View of a host array; the caller keeps the array alive during the native call."""
    found = np.asarray(array)
    if found.dtype.name not in dtypes:
        raise TypeError(
            f"fill_weight: {name} has dtype {found.dtype.name}, expected {' or '.join(dtypes)}"
        )
    address: int = found.__array_interface__["data"][0]
    strides = [step // found.itemsize for step in found.strides]
    return address, found.dtype.name, list(found.shape), strides


def _rows(array: Any) -> Array:
    """The array itself if its rows have no gaps (a slice of columns is fine), else a copy."""
    found = np.asarray(array)
    gapless = found.ndim == 0 or found.strides[-1] == found.itemsize or found.shape[-1] == 1
    return found if gapless else np.ascontiguousarray(found)


def _fill_dense(packed: PackedWeight, expert: int, weight: Any, transposed: bool = False) -> None:
    source = _rows(weight)
    native_kind = _ELEMENT_KINDS.get(source.dtype.name)
    if native_kind is None:
        raise TypeError(
            f"fill_weight: weight has dtype {source.dtype.name}, expected uint16 (bf16 bits) "
            "or float32"
        )
    if not packed.tensors:
        _allocate_cpu(packed, native_kind)
    view = _view("weight", source, "uint16", "float32")
    native("cpu", "pack_dense")(packed.handle, expert, view, transposed)


def _fill_integers(
    weight: PackedWeight, expert: int, *, quant_weight: Any, weight_scale: Any
) -> None:
    packed, scale = np.ascontiguousarray(quant_weight), np.ascontiguousarray(weight_scale)
    native("cpu", f"pack_{weight.kind}")(
        weight.handle,
        expert,
        _view("quant_weight", packed, "int8", "uint8"),
        _view("weight_scale", scale, "float32"),
    )


def _fill_ccq(weight: PackedWeight, expert: int, **arrays: Any) -> None:
    rows = {name: _rows(array) for name, array in arrays.items()}
    native("cpu", "pack_ccq")(
        weight.handle,
        expert,
        _view("quant_weight", rows["quant_weight"], "uint8"),
        _view("weight_scale", rows["weight_scale"], "uint8"),
        _view("super_scales", rows["super_scales"], "float32"),
        _view("code_scale", rows["code_scale"], "float32"),
        _view("code_zp", rows["code_zp"], "float32"),
    )
