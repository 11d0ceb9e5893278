"""Experts layer after layer without a card: every layer in every pass, and threads given back."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.benchmarks import host_layers
from fastdeploy_lite.benchmarks.host_layers import HostLayer
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.workspace import Workspace

CPU = paddle.CPUPlace()


def layer(seed: int, highest: int = 3) -> HostLayer:
    made = []
    for k, n in ((128, 512), (256, 128)):
        weight = ops.allocate_weight("ccq", k, n, CPU, num_experts=4)
        ops.randomize_weight(weight, seed)
        ops.finish_weight(weight)
        made.append(weight)
    ids = np.array([[0, highest], [1, 2]], np.int32)
    return HostLayer(made[0], made[1], ids)


def test_all_layers_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[Any, int]] = []

    class Watched(ops.BoundExperts):
        def __init__(self, x: Any, ids: Any, *more: Any) -> None:
            super().__init__(x, ids, *more)
            self.ids = ids

        def __call__(self) -> None:
            super().__call__()
            computed.append((self.ids, _ops_cpu.num_threads()))

    monkeypatch.setattr(ops, "BoundExperts", Watched)
    layers, before = [layer(1), layer(2)], _ops_cpu.num_threads()
    seconds = host_layers.passes(layers, before + 1, Workspace(CPU))
    assert len(seconds) == host_layers.ROUNDS
    assert min(seconds) > 0
    assert len(computed) == 2 * (1 + host_layers.ROUNDS)
    for number, (ids, threads) in enumerate(computed):
        assert ids is layers[number % 2].ids
        assert threads == before + 1
    assert _ops_cpu.num_threads() == before


def test_threads_are_given_back_when_a_pass_fails() -> None:
    before = _ops_cpu.num_threads()
    with pytest.raises(ValueError, match="is 4, expected 0 to 3"):
        host_layers.passes([layer(1, highest=4)], before + 1, Workspace(CPU))
    assert _ops_cpu.num_threads() == before


@pytest.mark.parametrize(
    ("threads", "counts"), [(16, [16, 8, 4, 1]), (2, [2, 1]), (1, [1]), (6, [6, 3, 1])]
)
def test_fewer_and_fewer_threads(threads: int, counts: list[int]) -> None:
    assert host_layers.thread_counts(threads) == counts
