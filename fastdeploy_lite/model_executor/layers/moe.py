"""Mixture of experts: softmax router, routed experts, un-gated shared experts."""

from __future__ import annotations

from typing import Any

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.layers.host_experts import HostExperts
from fastdeploy_lite.model_executor.layers.linear import GatedMLP
from fastdeploy_lite.model_executor.ops import ExpertWeight, HostWeight
from fastdeploy_lite.model_executor.workspace import Workspace

ROUTED_BESIDE = 16
"""Up to so many tokens the router leaves the card room for the shared experts; for more they begin
behind it, which measures faster."""


class Router:
    """Choice of top_k experts: by probability plus bias; weighted by probability alone."""

    def __init__(self, gate: Any, bias: Any | None, top_k: int) -> None:
        """Args: gate: float32 [H, E]; bias: float32 [E] or None; top_k: experts per token."""
        self.gate = gate
        self.bias = bias
        self.top_k = top_k

    def __call__(self, x: Any, workspace: Workspace) -> tuple[Any, Any]:
        """Return expert ids int32 [T, k] and weights float32 [T, k] for x [T, H]."""
        shape = [x.shape[0], self.top_k]
        ids = workspace.get("topk_ids", shape, "int32")
        weights = workspace.get("topk_weights", shape, "float32")
        ops.route(x, self.gate, self.bias, self.top_k, ids, weights)
        return ids, weights


class MoE:
    """Sum of the chosen experts' SwiGLU outputs and of the shared experts."""

    def __init__(
        self,
        router: Router,
        up_gate: ExpertWeight | None,
        down: ExpertWeight | None,
        shared: GatedMLP | None,
    ) -> None:
        """Args: up_gate: E x [H, 2I]; down: E x [I, H]; both None on a rank that has no part of
        the experts, both in main memory or both beside the other layers; shared: one fused MLP or
        None."""
        self.router = router
        self.up_gate = up_gate
        self.down = down
        self.shared = shared
        self._host: HostExperts | None = None
        if isinstance(up_gate, HostWeight) and isinstance(down, HostWeight):
            self._host = HostExperts(up_gate, down)

    def __call__(self, x: Any, workspace: Workspace) -> tuple[Any, Any | None]:
        """Return the routed experts' part and the shared experts', each [T, H], for x [T, H].

        Whoever takes the sum adds them on its way: a kernel for that alone would cost a small step
        more than the sum.
        """
        out = workspace.get("moe", x.shape, x.dtype)
        if self.up_gate is None or self.down is None:
            ops.clear(out)
            return out, self._shared(x, workspace)
        if isinstance(self.up_gate, HostWeight) or isinstance(self.down, HostWeight):
            assert self._host is not None
            self._host.begin(x, *self.router(x, workspace))
            shared = self._shared(x, workspace)  # on the card, beside the CPU's work
            self._host.finish(out)
            return out, shared
        beside = _Beside(self.shared, x, workspace)
        if x.shape[0] <= ROUTED_BESIDE:
            beside.begin()
        ids, weights = self.router(x, workspace)
        beside.begin()
        ops.routed_experts(x, ids, weights, self.up_gate, self.down, out, workspace)
        return out, beside.result()

    def _shared(self, x: Any, workspace: Workspace) -> Any | None:
        return None if self.shared is None else self.shared(x, workspace)


class _Beside:
    """The shared experts on a branch of their own."""

    def __init__(self, mlp: GatedMLP | None, x: Any, workspace: Workspace) -> None:
        self._mlp, self._x, self._workspace = mlp, x, workspace
        self._branch: ops.Branch | None = None
        self._out: Any | None = None

    def begin(self) -> None:
        """Queue them, unless that has been done."""
        if self._mlp is None or self._branch is not None:
            return
        self._branch = ops.branch(self._x)
        with self._branch:
            self._out = self._mlp(self._x, self._workspace)

    def result(self) -> Any | None:
        """What they give, for what is queued from now on; None without any."""
        if self._branch is not None:
            self._branch.join()
        return self._out
