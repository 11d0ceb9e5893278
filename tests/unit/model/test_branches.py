"""Shared experts beside the routed ones: what is queued where, and in which order."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.layers.moe import ROUTED_BESIDE, MoE
from fastdeploy_lite.model_executor.workspace import Workspace


class Recorded:
    """A branch, a router, shared experts and routed ones that note their turn."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.inside = False

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False

    def join(self) -> None:
        self.events.append("join")

    def branch(self, x: Any) -> Recorded:
        self.events.append("branch")
        return self

    def router(self, x: Any, workspace: Workspace) -> tuple[Any, Any]:
        self.events.append("router")
        assert not self.inside
        return None, None

    def shared(self, x: Any, workspace: Workspace) -> Any:
        self.events.append("shared")
        assert self.inside
        return x

    def routed(self, *_: Any) -> None:
        self.events.append("routed")
        assert not self.inside


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (ROUTED_BESIDE, ["branch", "shared", "router", "routed", "join"]),
        (ROUTED_BESIDE + 1, ["router", "branch", "shared", "routed", "join"]),
    ],
)
def test_order_of_a_layer(
    tokens: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded()
    monkeypatch.setattr(ops, "branch", recorded.branch)
    monkeypatch.setattr(ops, "routed_experts", recorded.routed)
    x, workspace = paddle.ones([tokens, 64]), Workspace(paddle.CPUPlace())
    weight: Any = object()
    router: Any = recorded.router
    shared: Any = recorded.shared
    _, found = MoE(router, weight, weight, shared)(x, workspace)
    assert recorded.events == expected
    assert found is x
    recorded.events.clear()
    _, found = MoE(router, weight, weight, None)(x, workspace)
    assert recorded.events == ["router", "routed"]
    assert found is None


def test_a_branch_on_the_cpu_is_done_in_order() -> None:
    x = paddle.ones([2, 64])
    branch = ops.branch(x)
    with branch:
        ops.add_inplace(x, paddle.ones([2, 64]))
    np.testing.assert_array_equal(x.numpy(), 2)
    branch.join()
