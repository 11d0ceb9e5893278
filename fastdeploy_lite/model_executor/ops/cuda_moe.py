"""The experts of a MoE layer on a card: sort by expert, gate and up with SwiGLU, down, combine."""

from __future__ import annotations

from fastdeploy_lite import _ops_cuda
from fastdeploy_lite.model_executor.ops import cuda_runtime as runtime
from fastdeploy_lite.model_executor.ops._view import Arguments, ScratchSource, Tensor
from fastdeploy_lite.model_executor.ops.weights import PackedWeight

DIRECT_TOKENS = 2
"""Up to this batch experts hardly ever coincide: every slot is read as its own tile, unsorted."""


def tile_rows(tokens: int, top_k: int, experts: int) -> int:
    """Rows of one tile of sorted slots; 0 for a tile of its own for every slot, unsorted.

    For speed only: a row's result is the same in any tile. An expert has at most `tokens` rows, on
    average tokens * top_k / experts: the tile should hold those of most experts, so that their
    weights are decoded once.
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
    tokens, top_k = topk_ids.shape
    experts, inner, hidden = up.num_experts, up.out_features // 2, up.in_features
    if lower.num_experts != experts or lower.in_features != inner or inner % 16 or hidden % 16:
        raise ValueError(
            f"fused_moe: up_gate [{hidden}, {2 * inner}] of {experts} experts and down "
            f"[{lower.in_features}, {lower.out_features}] of {lower.num_experts} do not fit, or "
            "their sizes are no multiples of 16"
        )
    slots = tokens * top_k
    rows = tile_rows(tokens, top_k, experts)
    tiles = slots if rows == 0 else slots // rows + min(experts, slots)
    # held until the call: a workspace may hand out memory that goes with its tensor
    order = workspace.get("moe_slots", [slots], "int32")
    plan = workspace.get("moe_tiles", [tiles * 4], "int32")
    inside = workspace.get("moe_inner", [slots, inner], "bfloat16")
    outputs = workspace.get("moe_outputs", [slots, lower.out_features], "bfloat16")
    _ops_cuda.fused_moe(
        runtime.address(args.view("x", x, "bfloat16", tokens, hidden)),
        runtime.address(args.view("topk_ids", topk_ids, "int32", tokens, top_k)),
        runtime.address(args.view("topk_weights", topk_weights, "float32", tokens, top_k)),
        up.native,
        lower.native,
        experts,
        inside.data_ptr(),
        outputs.data_ptr(),
        order.data_ptr(),
        plan.data_ptr(),
        runtime.address(args.view("out", out, "bfloat16", tokens, lower.out_features)),
        tokens,
        top_k,
        rows,
        tiles,
        runtime.stream(),
    )
