"""Token embedding and the logits head; one table serves both when the model ties them."""

from __future__ import annotations

from typing import Any

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.ops import PackedWeight
from fastdeploy_lite.model_executor.workspace import Workspace


class Embedding:
    """Rows of a table [V, H]."""

    def __init__(self, weight: PackedWeight, dtype: str) -> None:
        """Args: weight: dense [H, V]; dtype: of the activations."""
        self.weight = weight
        self.dtype = dtype

    def __call__(self, token_ids: Any, workspace: Workspace) -> Any:
        """Return [T, H] for int32 token_ids [T]."""
        shape = [token_ids.shape[0], self.weight.in_features]
        out = workspace.get("residual", shape, self.dtype)
        ops.embedding(token_ids, self.weight, out)
        return out


class LogitsHead:
    """hidden [R, H] -> logits float32 [R, V]."""

    def __init__(self, weight: PackedWeight) -> None:
        """Args: weight: dense [H, V]."""
        self.weight = weight

    def __call__(self, hidden: Any, workspace: Workspace) -> Any:
        """Return the logits of every row, in the workspace buffer "logits"."""
        shape = [hidden.shape[0], self.weight.out_features]
        logits = workspace.get("logits", shape, "float32")
        ops.linear(hidden, self.weight, logits)
        return logits
