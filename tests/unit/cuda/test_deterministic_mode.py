"""FD_DETERMINISTIC_MODE on its way to the card's experts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import paddle
import pytest
from fake_cuda import EXECUTOR, Card

from fastdeploy_lite.model_executor.ops.packed_weight import PackedWeight
from fastdeploy_lite.model_executor.workspace import Workspace

CPU = paddle.CPUPlace()
NAMES = ("cuda_experts", "cuda_moe")


class Experts:
    """The modules of the card's experts over a CUDA that notes what it is asked for."""

    def __init__(self, card: Card) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        card.cuda.chunk_rows = 512
        card.cuda.chunk_bytes = lambda coding: 2112
        card.cuda.ExpertWeight = lambda **fields: fields
        card.cuda.experts_bytes = lambda *given: self._note("experts_bytes", given)
        card.cuda.experts = lambda *given: self._note("experts", given)
        self.weights, self.moe = (
            importlib.import_module(f"{EXECUTOR}.ops.{name}") for name in NAMES
        )

    def _note(self, name: str, given: tuple[Any, ...]) -> tuple[int, int]:
        self.calls.append((name, given))
        return 64, 64

    def layer(self) -> tuple[Any, Any]:
        """What the kernels take of a layer's two weights."""
        made = [PackedWeight("int4", *shape, 4, CPU) for shape in ((128, 256), (128, 128))]
        for weight in made:
            self.weights.allocate(weight)
        return made[0].handle, made[1].handle

    def run(self, layer: tuple[Any, Any]) -> list[tuple[str, Any, Any]]:
        """Of each native call its name, its path and whether bits have to be the same."""
        self.calls.clear()
        self.moe._quantised((1, 2, 3), *layer, 4, (5, 2), Workspace(CPU))
        places = {"experts_bytes": (4, 5), "experts": (8, 9)}
        return [(name, *(given[i] for i in places[name])) for name, given in self.calls]


@pytest.fixture
def experts(card: Card) -> Iterator[Experts]:
    yield Experts(card)
    ops = sys.modules[f"{EXECUTOR}.ops"]
    for name in NAMES:
        sys.modules.pop(f"{EXECUTOR}.ops.{name}", None)
        vars(ops).pop(name, None)


@pytest.mark.parametrize(("value", "same_bits"), [(None, False), ("0", False), ("1", True)])
def test_plan_and_call_are_told(
    value: str | None, same_bits: bool, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FD_DETERMINISTIC_MODE", raising=False)
    if value is not None:
        monkeypatch.setenv("FD_DETERMINISTIC_MODE", value)
    assert experts.run(experts.layer()) == [
        ("experts_bytes", -1, same_bits), ("experts", -1, same_bits),
    ]  # fmt: skip


def test_a_loaded_model_keeps_its_mode(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graphs were captured in it."""
    monkeypatch.setenv("FD_DETERMINISTIC_MODE", "1")
    layer = experts.layer()
    monkeypatch.delenv("FD_DETERMINISTIC_MODE")
    assert [told for *_, told in experts.run(layer)] == [True, True]
    assert [told for *_, told in experts.run(experts.layer())] == [False, False]
