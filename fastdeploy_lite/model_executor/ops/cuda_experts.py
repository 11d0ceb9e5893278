"""Quantised experts on a card: chunks that one bulk copy brings, and what decodes them.

The layout is described in custom_ops/cuda/gemm/expert_weight.h. Dense experts are tiles as those of
linear maps, see cuda_weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import _ops_cuda, envs
from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime
from fastdeploy_lite.model_executor.ops._view import Tensor
from fastdeploy_lite.model_executor.ops.packed_weight import PackedWeight

Array = npt.NDArray[Any]

BLOCK_COLUMNS = 16
CODINGS = {"ccq": 0, "int4": 1, "int8": 2}


@dataclass(slots=True)
class CudaExperts:
    """What the experts' kernels take in place of a PackedWeight.

    Attributes:
        native: sizes and addresses; made anew when the weight is finished.
        in_features, out_features, num_experts: as in PackedWeight.
        coding: value of the kernels' enum Coding.
        same_bits: a token's result may not depend on how many tokens a call has, though it be
            slower; read when the weight is allocated, so that a model's graphs, its prompts and its
            single steps agree.
        unproven: CCQ columns for which the fast decoder has no constants: kernels decode them, and
            those that they decode together with them, as the format's reference does.
        filled: the experts filled so far.
    """

    native: Any
    in_features: int
    out_features: int
    num_experts: int
    coding: int
    same_bits: bool
    unproven: int = 0
    filled: set[int] = field(default_factory=set)


def takes(weight: PackedWeight) -> bool:
    """Whether the weight is kept in chunks."""
    return weight.num_experts > 0 and weight.kind in CODINGS


@functools.lru_cache(maxsize=64)
def block_order(columns: int) -> npt.NDArray[np.intp]:
    """The file's column at each place of the blocks' columns."""
    place = np.arange(columns)
    in_block = place % BLOCK_COLUMNS
    half = np.where(in_block < BLOCK_COLUMNS // 2, 0, columns // 2)
    return place // BLOCK_COLUMNS * 8 + in_block % 8 + half


def allocate(weight: PackedWeight) -> None:
    """Allocate the tensors of all experts and make the handle.

    Raises:
        ValueError: sizes that the kernels do not take.
    """
    rows = 128 if weight.kind == "ccq" else 64
    if weight.in_features % rows or weight.out_features % BLOCK_COLUMNS:
        raise ValueError(
            f"allocate_weight: {weight.kind} experts are [{weight.in_features}, "
            f"{weight.out_features}], on a card K must be a multiple of {rows} and N of "
            f"{BLOCK_COLUMNS}"
        )
    coding = CODINGS[weight.kind]
    columns = weight.num_experts * weight.out_features
    chunks = -(-weight.in_features // _ops_cuda.chunk_rows) * columns // BLOCK_COLUMNS
    sizes = {"chunks": ([chunks * _ops_cuda.chunk_bytes(coding)], "uint8")}
    sizes["column_scale"] = ([columns], "float32")
    if weight.kind == "ccq":
        sizes["codes"] = ([columns, 4], "int32")
        sizes["exact"] = ([columns, 2], "float32")
        sizes["unproven"] = ([1], "int32")
    weight.tensors = {
        name: runtime.empty(shape, dtype, weight.place) for name, (shape, dtype) in sizes.items()
    }
    if weight.kind == "ccq":
        _upload(weight.tensors["unproven"], np.zeros(1, np.int32), 0)
    weight.handle = CudaExperts(
        None,
        weight.in_features,
        weight.out_features,
        weight.num_experts,
        coding,
        envs.FD_DETERMINISTIC_MODE,
    )
    _make_native(weight)


def _make_native(weight: PackedWeight) -> None:
    addresses = {name: int(tensor.data_ptr()) for name, tensor in weight.tensors.items()}
    weight.handle.native = _ops_cuda.ExpertWeight(
        coding=weight.handle.coding,
        chunks=addresses["chunks"],
        codes=addresses.get("codes", 0),
        exact=addresses.get("exact", 0),
        column_scale=addresses["column_scale"],
        experts=weight.num_experts,
        in_features=weight.in_features,
        out_features=weight.out_features,
        proven=weight.handle.unproven == 0,
    )


def _upload(tensor: Tensor, values: Array, offset_bytes: int) -> None:
    host = np.ascontiguousarray(values)
    to = int(tensor.data_ptr()) + offset_bytes
    _ops_cuda.upload(to, host.ctypes.data, host.nbytes, runtime.stream())


def set_columns(weight: PackedWeight, expert: int, vectors: dict[str, Array]) -> None:
    """Set one expert's numbers of columns, float32 [N] in the file's order.

    Args:
        weight: the weight.
        expert: which expert.
        vectors: `scale` of each column; for CCQ also `code_scale` and `code_bias`
            (code_zp + 0.5), from which the decoder's constants are found on the card.
    """
    order = block_order(weight.out_features)
    first = expert * weight.out_features
    _upload(weight.tensors["column_scale"], vectors["scale"][order], 4 * first)
    if weight.kind != "ccq":
        return
    exact = np.stack([vectors["code_scale"][order], vectors["code_bias"][order]], axis=1)
    _upload(weight.tensors["exact"], exact, 8 * first)
    _ops_cuda.fit_columns(
        int(weight.tensors["exact"].data_ptr()) + 8 * first,
        int(weight.tensors["codes"].data_ptr()) + 16 * first,
        weight.out_features,
        int(weight.tensors["unproven"].data_ptr()),
        runtime.stream(),
    )


def pack(weight: PackedWeight, expert: int, codes: int, local_scale: int) -> None:
    """Repack one expert from the file's layout.

    Args:
        weight: the weight.
        expert: which expert.
        codes, local_scale: addresses on the card; local scales are CCQ's, else 0.
    """
    chunks = weight.tensors["chunks"]
    _ops_cuda.pack_expert(
        weight.handle.coding,
        codes,
        local_scale,
        int(chunks.data_ptr()) + expert * (int(chunks.size) // weight.num_experts),
        weight.in_features,
        weight.out_features,
        runtime.stream(),
    )
    weight.handle.filled.add(expert)


def finish(weight: PackedWeight) -> None:
    """Read how many columns have no proven constants and choose the decoder.

    Raises:
        ValueError: some expert was never filled.
    """
    if len(weight.handle.filled) != weight.num_experts:
        raise ValueError(
            f"finish_weight: {len(weight.handle.filled)} fills of a weight with "
            f"{weight.num_experts} matrices"
        )
    if weight.kind == "ccq":
        count = np.empty(1, np.int32)
        source = int(weight.tensors["unproven"].data_ptr())
        _ops_cuda.download(count.ctypes.data, source, count.nbytes, runtime.stream())
        weight.handle.unproven = int(count[0])
    _make_native(weight)


def decoded(weight: PackedWeight, expert: int, scaled: bool) -> Array:
    """See cuda_weights.decoded."""
    shape = [weight.in_features, weight.out_features]
    out = runtime.empty(shape, "float32", weight.place)
    stream = runtime.stream()
    _ops_cuda.unpack_expert(weight.handle.native, expert, scaled, int(out.data_ptr()), stream)
    host = np.empty(shape, np.float32)
    _ops_cuda.download(host.ctypes.data, int(out.data_ptr()), host.nbytes, stream)
    return host
