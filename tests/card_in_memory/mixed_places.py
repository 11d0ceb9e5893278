"""Experts in main memory beside layers on the place `nvidia:0`; run by test_mixed_places.

What Paddle does with tensors of both places in one process is the point: weights and scratch of the
CPU's ops must be in main memory though the card is the current place.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from place import CARD, FakeCuda, memory, paddle

CUDA = sys.modules["fastdeploy_lite._ops_cuda"] = FakeCuda()

from oracles.rowwise import nearest_bf16  # noqa: E402

from fastdeploy_lite.model_executor import expert_placement, ops  # noqa: E402
from fastdeploy_lite.model_executor.layers.host_experts import HostExperts  # noqa: E402
from fastdeploy_lite.model_executor.ops import HostWeight  # noqa: E402
from fastdeploy_lite.model_executor.workspace import Workspace  # noqa: E402

HIDDEN, INNER, EXPERTS, TOP_K = 128, 256, 4, 2
CPU = paddle.CPUPlace()


def expert_weights(link: Any) -> list[ops.PackedWeight]:
    made = []
    for seed, (k, n) in enumerate([(HIDDEN, 2 * INNER), (INNER, HIDDEN)]):
        weight = ops.allocate_weight("ccq", k, n, link.place, num_experts=EXPERTS)
        ops.randomize_weight(weight, seed)
        ops.finish_weight(weight)
        made.append(weight)
    return made


def expected(x: np.ndarray, routes: list[np.ndarray], weights: list[Any]) -> np.ndarray:
    arrays = [(x.astype(np.uint32) << 16).view(np.float32), *routes]
    tensors = [paddle.to_tensor(array, place=CPU) for array in arrays]
    out = paddle.empty(list(x.shape), dtype="float32", device=CPU)
    ops.routed_experts(*tensors, *weights, out, Workspace(CPU))
    return nearest_bf16(ops.host_array(out))


def check_copies() -> None:
    """What Paddle copies is there when the copy returns: the project's kernels do not wait for it,
    as their stream does not wait for the one that such copies are made on."""
    values = np.arange(1, 1025, dtype=np.int32)
    copied = paddle.to_tensor(values, place=CARD)
    np.testing.assert_array_equal(memory(copied, "int32"), values)
    again = copied.clone()
    np.testing.assert_array_equal(memory(again, "int32"), values)


def main() -> None:
    check_copies()
    link: Any = expert_placement.open_link(CARD)
    weights = expert_weights(link)
    assert all(t.place.is_cpu_place() for weight in weights for t in weight.tensors.values())
    experts = HostExperts(*(HostWeight(weight, link) for weight in weights))
    card, random = Workspace(CARD), np.random.default_rng(0)
    for tokens in (1, 5, 3, 1):
        x, out = (card.get(name, [tokens, HIDDEN], "bfloat16") for name in ("x", "out"))
        ids = card.get("ids", [tokens, TOP_K], "int32")
        shares = card.get("shares", [tokens, TOP_K], "float32")
        assert x.place.is_custom_place()
        numbers = random.standard_normal((tokens, HIDDEN)).astype(np.float32)
        memory(x, "uint16")[...] = nearest_bf16(numbers)
        memory(ids, "int32")[...] = random.integers(0, EXPERTS, (tokens, TOP_K))
        memory(shares, "float32")[...] = random.dirichlet(np.ones(TOP_K), tokens)
        experts.begin(x, ids, shares)
        experts.finish(out)
        CUDA.synchronize()
        routes = [memory(ids, "int32").copy(), memory(shares, "float32").copy()]
        wanted = expected(memory(x, "uint16"), routes, weights)
        np.testing.assert_array_equal(memory(out, "uint16"), wanted)
        assert link.workspace.get("host_out", [tokens, HIDDEN], "float32").place.is_cpu_place()
    print("equal")


main()
