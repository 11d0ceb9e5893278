"""Linear maps and the SwiGLU block made of two of them."""

from __future__ import annotations

from typing import Any

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.ops import SegmentedWeight, Weight
from fastdeploy_lite.model_executor.workspace import Workspace


class Linear:
    """y = x W for a weight in any form; the result lies in the workspace buffer `name`."""

    def __init__(self, weight: Weight, name: str) -> None:
        """Args: weight: [K, N]; name: role of the output, unique among buffers in use at once."""
        self.weight = weight
        self.name = name

    def __call__(self, x: Any, workspace: Workspace) -> Any:
        """Return [T, N] for x [T, K]."""
        out = workspace.get(self.name, [x.shape[0], self.weight.out_features], x.dtype)
        if isinstance(self.weight, SegmentedWeight):
            ops.segmented_linear(x, self.weight, out, workspace, self.name)
        else:
            ops.linear(x, self.weight, out)
        return out


class GatedMLP:
    """(silu(x Wg) * (x Wu)) Wd, gate and up fused in one matrix, gate first."""

    def __init__(self, up_gate: Weight, down: Weight) -> None:
        """Args: up_gate: [H, 2I]; down: [I, H]."""
        self.up_gate = Linear(up_gate, "up_gate")
        self.down = Linear(down, "mlp")

    def __call__(self, x: Any, workspace: Workspace) -> Any:
        """Return [T, H] for x [T, H]."""
        both = self.up_gate(x, workspace)
        inner = workspace.get("swiglu", [both.shape[0], both.shape[1] // 2], both.dtype)
        ops.silu_and_mul(both, inner)
        return self.down(inner, workspace)
