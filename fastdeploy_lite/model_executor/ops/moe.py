"""Mixture of experts: which experts a token goes to, and the experts themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.model_executor.ops._view import Arguments, ScratchSource, Tensor, View
from fastdeploy_lite.model_executor.ops.packed_weight import PackedWeight


def route(
    x: Tensor,
    gate_weight: Tensor,
    bias: Tensor | None,
    top_k: int,
    topk_ids: Tensor,
    topk_weights: Tensor,
) -> None:
    """Choose the experts of each token.

    p = softmax(x @ gate_weight) in float32; the top_k experts by p + bias, ties to the lower id;
    their weights are p divided by the sum of the chosen p (the bias only selects). Source:
    docs/checkpoint_format.md, model semantics.

    Args:
        x: [T, H], float32 on CPU, bfloat16 on a card.
        gate_weight: float32 [H, E].
        bias: float32 [E] or None.
        top_k: 1 to E.
        topk_ids: int32 [T, top_k], written, best first.
        topk_weights: float32 [T, top_k], written.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or place, top_k out of range.
    """
    args = Arguments("route", x)
    hidden, experts = gate_weight.shape
    tokens = x.shape[0]
    args.native()(
        args.view("x", x, args.activation, None, hidden),
        args.view("gate_weight", gate_weight, "float32", hidden, experts),
        None if bias is None else args.view("bias", bias, "float32", experts),
        args.view("topk_ids", topk_ids, "int32", tokens, top_k),
        args.view("topk_weights", topk_weights, "float32", tokens, top_k),
    )


def fused_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up_gate: PackedWeight,
    down: PackedWeight,
    out: Tensor,
    workspace: ScratchSource,
) -> None:
    """out[t] = sum over slots s of topk_weights[t, s] * expert topk_ids[t, s] (x[t]).

    An expert is (silu(x @ G) * (x @ U)) @ D with [G | U] = up_gate, D = down. On CPU the sum runs
    in slot order and a token's result does not depend on the rest of the batch.

    Args:
        x: [T, H], float32 on CPU, bfloat16 on a card.
        topk_ids: int32 [T, k], each 0 to E - 1.
        topk_weights: float32 [T, k].
        up_gate: packed [H, 2 * I] with E experts, gate columns first.
        down: packed [I, H] with E experts.
        out: [T, H], dtype of x; must not overlap x.
        workspace: scratch memory on the same place.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or place, weights that do not fit each other, an id out of range
            (on CPU).
    """
    args = Arguments("fused_moe", x)
    if args.kind == "cuda":
        from fastdeploy_lite.model_executor.ops import cuda_moe  # noqa: PLC0415

        cuda_moe.fused_moe(x, topk_ids, topk_weights, up_gate, down, out, workspace)
        return
    tokens, top_k = topk_ids.shape
    weights = args.weight("up_gate", up_gate, True), args.weight("down", down, True)
    needed = args.native("moe_workspace_bytes")(tokens, top_k, *weights)
    scratch = workspace.get("fused_moe", [max(needed // 4, 1)], "float32")
    args.native()(
        args.view("x", x, "float32", None, up_gate.in_features),
        args.view("topk_ids", topk_ids, "int32", x.shape[0], None),
        args.view("topk_weights", topk_weights, "float32", tokens, top_k),
        *weights,
        args.view("out", out, "float32", tokens, down.out_features),
        args.view("workspace", scratch, "float32", None),
    )


class BoundExperts:
    """`fused_moe` over host arrays, checked once and computed at every call, on the CPU.

    What a call takes beside its work is some microseconds, a tenth of what the checks take: a model
    whose experts stay in main memory makes one call a layer.
    """

    def __init__(
        self,
        x: npt.NDArray[Any],
        topk_ids: npt.NDArray[np.int32],
        topk_weights: npt.NDArray[np.float32],
        up_gate: PackedWeight,
        down: PackedWeight,
        out: npt.NDArray[Any],
        workspace: ScratchSource,
    ) -> None:
        """Keep the arrays, whose values each call reads anew.

        Args:
            x: [T, H], float32 or bfloat16 as its bits in uint16, which is widened exactly.
            topk_ids, topk_weights, up_gate, down: see `fused_moe`.
            out: [T, H], dtype of x: bfloat16 is rounded once, from the sum over the experts.
            workspace: scratch memory on the CPU.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or weights on a card. What `fused_moe` refuses besides, a call
                does.
        """
        args = Arguments("bound_experts", up_gate.tensors["data"])
        weights = args.weight("up_gate", up_gate, True), args.weight("down", down, True)
        (tokens, top_k), kind = topk_ids.shape, str(x.dtype)
        self._arrays = (x, topk_ids, topk_weights, out)
        self._call = args.native("ExpertsCall")(
            _rows_view("x", x, (tokens, up_gate.in_features), "float32", "uint16"),
            _rows_view("topk_ids", topk_ids, (tokens, top_k), "int32"),
            _rows_view("topk_weights", topk_weights, (tokens, top_k), "float32"),
            *weights,
            _rows_view("out", out, (tokens, down.out_features), kind),
        )
        self._bytes = int(args.native("moe_workspace_bytes")(tokens, top_k, *weights))
        self._floats = [max(self._bytes // 4, 1)]
        self._workspace = workspace

    def __call__(self) -> None:
        """Compute.

        Raises:
            ValueError: an id is out of range, or the weights do not fit each other.
        """
        scratch = self._workspace.get("fused_moe", self._floats, "float32")
        self._call(scratch.data_ptr(), self._bytes)


def _rows_view(name: str, array: npt.NDArray[Any], shape: tuple[int, int], *dtypes: str) -> View:
    """View of a host array that the caller keeps alive."""
    if array.dtype.name not in dtypes:
        raise TypeError(
            f"bound_experts: {name} has dtype {array.dtype}, expected {' or '.join(dtypes)}"
        )
    if array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"bound_experts: {name} has shape {list(array.shape)}, expected {list(shape)} without"
            " gaps"
        )
    address: int = array.__array_interface__["data"][0]
    dtype = "bfloat16" if array.dtype == np.uint16 else array.dtype.name
    return address, dtype, list(shape), [shape[1], 1]
