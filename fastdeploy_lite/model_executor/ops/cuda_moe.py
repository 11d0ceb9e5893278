"""The experts of a MoE layer on a card: quantised ones by their own kernels, bf16 ones by tiles."""

from __future__ import annotations

from typing import Any

from fastdeploy_lite import _ops_cuda
from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime
from fastdeploy_lite.model_executor.ops._view import Arguments, ScratchSource, Tensor
from fastdeploy_lite.model_executor.ops.cuda_experts import CudaExperts
from fastdeploy_lite.model_executor.ops.packed_weight import PackedWeight

DIRECT_TOKENS = 2
"""Up to this batch experts hardly ever coincide: every slot is read as its own tile, unsorted."""
CHOSEN_PATH = -1
"""Which kernels serve quantised experts: the plan decides (custom_ops/cuda/gemm/plan.h)."""


def tile_rows(tokens: int, top_k: int, experts: int) -> int:
    """Rows of one tile of sorted slots; 0 for a tile of its own for every slot, unsorted.

    For bf16 experts, and for speed only: a row's result is the same in any tile. An expert has at
    most `tokens` rows, on average tokens * top_k / experts: the tile should hold those of most
    experts, so that their weights are read once.
    """
    if tokens <= DIRECT_TOKENS:
        return 0
    mean = tokens * top_k / experts
    for rows, most in ((8, 6), (16, 12), (32, 32)):
        if tokens <= rows or mean <= most:
            return rows
    return 64


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
    memory_bytes, state_bytes = _ops_cuda.experts_bytes(up.native, down.native, *sizes, CHOSEN_PATH)
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
    tokens, top_k = sizes
    slots = tokens * top_k
    rows = tile_rows(tokens, top_k, up.num_experts)
    tiles = slots if rows == 0 else slots // rows + min(up.num_experts, slots)
    order = workspace.get("moe_slots", [slots], "int32")
    plan = workspace.get("moe_tiles", [tiles * 4], "int32")
    inside = workspace.get("moe_inner", [slots, down.in_features], "bfloat16")
    outputs = workspace.get("moe_outputs", [slots, down.out_features], "bfloat16")
    _ops_cuda.dense_experts(
        *addresses,
        up.native,
        down.native,
        up.num_experts,
        inside.data_ptr(),
        outputs.data_ptr(),
        order.data_ptr(),
        plan.data_ptr(),
        out,
        *sizes,
        rows,
        tiles,
        runtime.stream(),
    )
