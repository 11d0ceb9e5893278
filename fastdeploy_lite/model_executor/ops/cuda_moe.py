"""The experts of a MoE layer on a card: quantised ones by their own kernels, bf16 ones by tiles."""

from __future__ import annotations

from typing import Any

from fastdeploy_lite import _ops_cuda
from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime
from fastdeploy_lite.model_executor.ops._view import Arguments, ScratchSource, Tensor
from fastdeploy_lite.model_executor.ops.cuda_experts import CudaExperts
from fastdeploy_lite.model_executor.ops.packed_weight import PackedWeight

CHOSEN_PATH = -1
"""Which kernels serve quantised experts: the plan decides (custom_ops/cuda/gemm/plan.h)."""
CHOSEN_TILE = -1
"""Rows of a tile of bf16 experts: the plan decides (custom_ops/cuda/gemm/plan_moe.h)."""


def fused_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up_gate: PackedWeight,
    down: PackedWeight,
    out: Tensor,
    workspace: ScratchSource,
) -> None:
    """See ops.moe.fused_moe."""
    args = Arguments("fused_moe", x)
    up, lower = args.weight("up_gate", up_gate, True), args.weight("down", down, True)
    experts, inner, hidden = up.num_experts, up.out_features // 2, up.in_features
    if (
        lower.num_experts != experts
        or lower.in_features != inner
        or lower.out_features != hidden
        or inner % 16
        or hidden % 16
        or isinstance(up, CudaExperts) != isinstance(lower, CudaExperts)
    ):
        raise ValueError(
            f"fused_moe: up_gate {up_gate.kind} [{hidden}, {2 * inner}] of {experts} experts and "
            f"down {down.kind} [{lower.in_features}, {lower.out_features}] of "
            f"{lower.num_experts} do not fit, or their sizes are no multiples of 16"
        )
    tokens, top_k = topk_ids.shape
    addresses = (
        runtime.address(args.view("x", x, "bfloat16", tokens, hidden)),
        runtime.address(args.view("topk_ids", topk_ids, "int32", tokens, top_k)),
        runtime.address(args.view("topk_weights", topk_weights, "float32", tokens, top_k)),
    )
    target = runtime.address(args.view("out", out, "bfloat16", tokens, hidden))
    if isinstance(up, CudaExperts):
        _quantised(addresses, up, lower, target, (tokens, top_k), workspace)
    else:
        _dense(addresses, up, lower, target, (tokens, top_k), workspace)


def _quantised(
    addresses: tuple[int, int, int],
    up: CudaExperts,
    down: CudaExperts,
    out: int,
    sizes: tuple[int, int],
    workspace: ScratchSource,
) -> None:
    memory_bytes, state_bytes = _ops_cuda.experts_bytes(
        up.native, down.native, *sizes, CHOSEN_PATH, up.same_bits
    )
    # held until the call: a workspace may hand out memory that goes with its tensor
    memory = workspace.get("experts", [memory_bytes], "uint8")
    state = workspace.zeroed("experts_state", [state_bytes], "uint8")
    _ops_cuda.experts(
        *addresses,
        up.native,
        down.native,
        out,
        *sizes,
        CHOSEN_PATH,
        up.same_bits,
        memory.data_ptr(),
        state.data_ptr(),
        runtime.stream(),
    )


def _dense(
    addresses: tuple[int, int, int],
    up: Any,
    down: Any,
    out: int,
    sizes: tuple[int, int],
    workspace: ScratchSource,
) -> None:
    shape = (up.num_experts, *sizes, CHOSEN_TILE)
    # held until the call: a workspace may hand out memory that goes with its tensor
    memory = workspace.get("experts", [_ops_cuda.dense_experts_bytes(down.native, *shape)], "uint8")
    _ops_cuda.dense_experts(
        *addresses,
        up.native,
        down.native,
        out,
        *shape,
        memory.data_ptr(),
        runtime.stream(),
    )
