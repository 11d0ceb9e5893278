"""Kernels beside each other give the bits of the same kernels one after the other."""

from __future__ import annotations

from typing import Any

import cards
import matrices
import numpy as np
import pytest


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("kind", ["int8", "dense"])
@pytest.mark.parametrize("tokens", [1, 4, 16, 40])
@pytest.mark.parametrize("mode", ["0", "1"])
def test_shared_experts_beside_the_routed_ones(
    mode: str, tokens: int, kind: str, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both branches read one x; what follows the join sees both, at every replay of a graph."""
    from fastdeploy_lite.model_executor import ops
    from fastdeploy_lite.model_executor.cuda_graph import CudaDecodeGraphs
    from fastdeploy_lite.model_executor.layers.linear import GatedMLP
    from fastdeploy_lite.model_executor.layers.moe import MoE, Router
    from fastdeploy_lite.model_executor.ops import cuda_runtime
    from fastdeploy_lite.model_executor.workspace import Workspace

    monkeypatch.setenv("FD_DETERMINISTIC_MODE", mode)
    random = np.random.default_rng(5)
    hidden, inner, experts, top_k = 1024, 512, 16, 4
    gate = cards.put(random.standard_normal((hidden, experts)).astype(np.float32) * hidden**-0.5)
    up, down = (
        matrices.make("ccq", random, *shape, experts)[0]
        for shape in ((hidden, 2 * inner), (inner, hidden))
    )
    shared = GatedMLP(
        matrices.make(kind, random, hidden, 4 * inner)[0],
        matrices.make(kind, random, 2 * inner, hidden)[0],
    )
    moe = MoE(Router(gate, None, top_k), up, down, shared)
    x = cards.put(cards.round_bf16(random.standard_normal((tokens, hidden))), "bfloat16")
    rows = cards.put(np.arange(tokens, dtype=np.int32))
    workspace, total = Workspace(cards.place()), cards.poisoned([tokens, hidden])

    def forward() -> Any:
        routed, other = moe(x, workspace)
        ops.add_inplace(routed, other)
        ops.gather_rows(routed, rows, total)
        return total

    with monkeypatch.context() as one_after_the_other:
        one_after_the_other.setattr(cuda_runtime, "BRANCH_ROWS", 0)
        expected = cards.get(forward()).copy()
    graphs = CudaDecodeGraphs(workspace, tokens)
    for _ in range(30):
        ops.upload(np.zeros((tokens, hidden), np.uint16), total)
        found = graphs.run(tokens, forward) if captured else forward()
        np.testing.assert_array_equal(cards.get(found), expected)
