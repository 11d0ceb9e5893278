"""The routed experts of a layer whose weights stay in main memory, computed by the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.ops import HostWeight, PackedWeight

Array = npt.NDArray[Any]


class HostExperts:
    """Experts beside the card that the rest of their layer runs on.

    A card's activations are bfloat16: widening them is exact, and the sum over a token's experts
    (and over their parts) is rounded once.
    """

    def __init__(self, up_gate: HostWeight, down: HostWeight) -> None:
        """Args: up_gate: E x [H, 2I]; down: E x [I, H], behind the same link."""
        self.link = up_gate.link
        self.up_gate = up_gate.weight
        self.down = down.weight
        self._fetched: Sequence[Array] = ()

    def begin(self, x: Any, topk_ids: Any, topk_weights: Any) -> None:
        """Queue the way of x [T, H] and its routes, as for `ops.fused_moe`, to main memory.

        What the caller queues between this and `finish` is computed beside the experts.
        """
        self._fetched = self.link.fetch(x, topk_ids, topk_weights)

    def finish(self, out: Any) -> None:
        """Compute what `begin` has queued, and queue the way of the result to out [T, H]."""
        answer = self.link.answer(out)
        self.link.on_host(self._work(self._fetched, answer))
        self.link.send(answer, out)

    def _work(self, fetched: Sequence[Array], answer: Array) -> Callable[[], None]:
        """What turns arrays that have been fetched into the answer."""
        up_gate, down = self.up_gate, self.down
        if isinstance(up_gate, PackedWeight) and isinstance(down, PackedWeight):
            x, ids, weights = fetched
            return ops.BoundExperts(x, ids, weights, up_gate, down, answer, self.link.workspace)
        return lambda: self._compute(fetched, answer)

    def _compute(self, fetched: Sequence[Array], answer: Array) -> None:
        """The same of experts in parts."""
        workspace = self.link.workspace
        x, ids, weights = (self._tensor(i, array) for i, array in enumerate(fetched))
        out = workspace.get("host_out", list(answer.shape), "float32")
        ops.routed_experts(x, ids, weights, self.up_gate, self.down, out, workspace)
        if answer.dtype == np.uint16:
            ops.narrow(out, answer)
        else:
            answer[...] = ops.host_array(out)

    def _tensor(self, number: int, array: Array) -> Any:
        """What was fetched, as the CPU's op takes it."""
        dtype = "int32" if array.dtype == np.int32 else "float32"
        tensor = self.link.workspace.get(f"host_in{number}", list(array.shape), dtype)
        if array.dtype == np.uint16:
            ops.widen(array, tensor)
        else:
            ops.host_array(tensor)[...] = array
        return tensor
