"""Token embedding and the logits head; one table serves both when the model ties them."""

from __future__ import annotations

from typing import Any

import numpy as np

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
        else:
            self._look_up_share(self.communicator, token_ids, out, workspace)
        return out

    def _look_up_share(
        self, communicator: Communicator, token_ids: Any, out: Any, workspace: Workspace
    ) -> None:
        """Each token's row comes from the rank that has it; the others add zeros."""
        count = self.weight.out_features
        ids = ops.host_array(token_ids) - communicator.rank * count
        own = (ids >= 0) & (ids < count)
        local = workspace.get("local_ids", token_ids.shape, "int32")
        ops.upload(np.where(own, ids, 0).astype(np.int32), local)
        ops.embedding(local, self.weight, out)
        ops.host_array(out)[~own] = 0
        communicator.all_reduce(out)


class LogitsHead:
    """hidden [R, H] -> logits float32 [R, V], all of them on every rank."""

    def __init__(self, weight: PackedWeight, communicator: Communicator | None = None) -> None:
        """Args: weight: dense [H, V / ranks]."""
        self.weight = weight
        self.communicator = communicator

    def __call__(self, hidden: Any, workspace: Workspace) -> Any:
        """Return the logits of every row, in the workspace buffer "logits"."""
        rows, columns = hidden.shape[0], self.weight.out_features
        if self.communicator is None:
            logits = workspace.get("logits", [rows, columns], "float32")
            ops.linear(hidden, self.weight, logits)
            return logits
        own = workspace.get("own_logits", [rows, columns], "float32")
        ops.linear(hidden, self.weight, own)
        size = self.communicator.size
        logits = workspace.get("logits", [rows, columns * size], "float32")
        self.communicator.all_gather(own, [columns] * size, logits)
        return logits
