"""Token embedding and the logits head; one table serves both when the model ties them."""

from __future__ import annotations

from typing import Any

from fastdeploy_lite.distributed.communicator import Communicator
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.ops import PackedWeight
from fastdeploy_lite.model_executor.workspace import Workspace


class Embedding:
    """Rows of a table [V, H], of which each rank may hold its share."""

    def __init__(
        self, weight: PackedWeight, dtype: str, communicator: Communicator | None = None
    ) -> None:
        """Args: weight: dense [H, V / ranks]; dtype: of the activations."""
        self.weight = weight
        self.dtype = dtype
        self.communicator = communicator

    def __call__(self, token_ids: Any, workspace: Workspace) -> Any:
        """Return [T, H] for int32 token_ids [T]."""
        shape = [token_ids.shape[0], self.weight.in_features]
        out = workspace.get("residual", shape, self.dtype)
        if self.communicator is None:
            ops.embedding(token_ids, self.weight, out)
            return out
        # Each token's row comes from the rank that has it; the others add zeros.
        first = self.communicator.rank * self.weight.out_features
        ops.embedding_share(token_ids, self.weight, first, out)
        self.communicator.all_reduce(out)
        return out


class LogitsHead:
    """hidden [R, H] -> logits float32 [R, V], all of them on every rank."""

    def __init__(self, weight: PackedWeight, communicator: Communicator | None = None) -> None:
        """Args: weight: dense [H, V / ranks]."""
        self.weight = weight
        self.communicator = communicator

    def __call__(self, hidden: Any, workspace: Workspace) -> Any:
        """Return the logits of every row, in the workspace buffer "logits"."""
        if self.communicator is None:
            return self.own(hidden, workspace, "logits")
        rows, columns, size = hidden.shape[0], self.weight.out_features, self.communicator.size
        own = self.own(hidden, workspace)
        logits = workspace.get("logits", [rows, columns * size], "float32")
        self.communicator.all_gather(own, [columns] * size, logits)
        return logits

    def own(self, hidden: Any, workspace: Workspace, name: str = "own_logits") -> Any:
        """Return this rank's logits [R, V / ranks], in the workspace buffer `name`."""
        logits = workspace.get(name, [hidden.shape[0], self.weight.out_features], "float32")
        ops.linear(hidden, self.weight, logits)
        return logits
