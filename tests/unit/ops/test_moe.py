"""route and fused_moe: against float64, and the same bits everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from native_ops import ISAS, assert_same_everywhere, bits, isa, tensor
from oracles import ops as oracle
from oracles.rowwise import nearest_bf16

from fastdeploy_lite.checkpoint.tensor import bfloat16_to_float32, float32_to_bfloat16
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.workspace import Workspace

CPU = paddle.CPUPlace()
HIDDEN, INNER, EXPERTS, TOP_K = 256, 128, 6, 3


def route(
    x: np.ndarray, gate: np.ndarray, bias: np.ndarray | None, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    ids = paddle.full([len(x), top_k], -1, dtype="int32")
    weights = paddle.empty([len(x), top_k])
    ops.route(tensor(x), tensor(gate), None if bias is None else tensor(bias), top_k, ids, weights)
    return ids.numpy(), weights.numpy()


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(
    ("hidden", "experts", "top_k"),
    [(1, 1, 1), (37, 5, 2), (384, 16, 4), (512, 64, 8), (64, 130, 7)],
)
@pytest.mark.parametrize("biased", [False, True])
def test_route_equals_float64(
    name: str, hidden: int, experts: int, top_k: int, biased: bool
) -> None:
    rng = np.random.default_rng(hidden)
    x = rng.standard_normal((20, hidden), dtype=np.float32)
    gate = (rng.standard_normal((hidden, experts)) * hidden**-0.5).astype(np.float32)
    bias = rng.uniform(-0.2, 0.2, experts).astype(np.float32) if biased else None
    with isa(name):
        ids, weights = route(x, gate, bias, top_k)
    expected_ids, expected_weights = oracle.route(x, gate, bias, top_k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)


def test_route_breaks_ties_by_the_lower_id() -> None:
    x, gate = np.ones((2, 8), np.float32), np.zeros((8, 20), np.float32)
    ids, weights = route(x, gate, None, 5)
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3, 4]] * 2)
    np.testing.assert_array_equal(weights, np.full((2, 5), 0.2, np.float32))


def test_the_bias_selects_but_does_not_weigh() -> None:
    x, gate = np.ones((1, 4), np.float32), np.zeros((4, 8), np.float32)
    bias = np.zeros(8, np.float32)
    bias[[6, 2]] = (9, 5)
    ids, weights = route(x, gate, bias, 2)
    np.testing.assert_array_equal(ids, [[6, 2]])
    np.testing.assert_array_equal(weights, [[0.5, 0.5]])


def test_route_keeps_ids_valid_when_a_row_is_not_a_number() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 16), dtype=np.float32)
    gate = rng.standard_normal((16, 8), dtype=np.float32)
    clean_ids, clean_weights = route(x, gate, None, 2)
    x[1, 3] = np.nan
    ids, weights = route(x, gate, None, 2)
    assert ((ids >= 0) & (ids < 8)).all()
    assert np.isnan(weights[1]).all()
    np.testing.assert_array_equal(ids[[0, 2]], clean_ids[[0, 2]])
    np.testing.assert_array_equal(bits(weights[[0, 2]]), bits(clean_weights[[0, 2]]))


def test_route_has_the_same_bits_everywhere() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((33, 384), dtype=np.float32)
    gate = rng.standard_normal((384, 40), dtype=np.float32)
    assert_same_everywhere(lambda: route(x, gate, None, 4)[1])
    assert_same_everywhere(lambda: route(x, gate, None, 4)[0])


@pytest.mark.parametrize("top_k", [0, 9])
def test_route_refuses_impossible_counts(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k} of 8 experts"):
        route(np.ones((1, 4), np.float32), np.zeros((4, 8), np.float32), None, top_k)


class Experts:
    """Random experts of one kind, packed and as float64 matrices."""

    def __init__(
        self, kind: str, hidden: int = HIDDEN, inner: int = INNER, activation_bits: int = 24
    ) -> None:
        self.up_gate, self.up_gate_matrices = self._make(kind, hidden, 2 * inner, 1)
        self.down, self.down_matrices = self._make(kind, inner, hidden, 2)
        self.workspace = Workspace(CPU)
        self.rounding = 2e-6 * 2.0 ** (24 - activation_bits)  # of the largest output
        for weight in (self.up_gate, self.down):
            ops.set_activation_bits(weight, activation_bits)

    @staticmethod
    def _make(kind: str, k: int, n: int, seed: int) -> tuple[ops.PackedWeight, np.ndarray]:
        rng = np.random.default_rng(seed)
        family: Any = "dense" if kind in ("bf16", "f32") else kind
        weight = ops.allocate_weight(family, k, n, CPU, num_experts=EXPERTS)
        matrices = []
        for expert in range(EXPERTS):
            arrays, matrix = oracle.random_weight(kind, k, n, rng)
            ops.fill_weight(weight, expert, **arrays)
            matrices.append(matrix)
        ops.finish_weight(weight)
        return weight, np.stack(matrices)

    def __call__(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        out = paddle.full([len(x), self.down.out_features], float("nan"))
        arguments = (tensor(x), tensor(ids), tensor(weights))
        ops.fused_moe(*arguments, self.up_gate, self.down, out, self.workspace)
        return out.numpy()


KINDS = [(kind, 24) for kind in ("bf16", "f32", "int8", "int4", "ccq")]
KINDS += [(kind, 16) for kind in ("int8", "int4", "ccq")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def experts(request: pytest.FixtureRequest) -> Experts:
    """Of each kind, and of activations of 24 and 16 bits."""
    kind, bits_ = request.param
    return Experts(kind, activation_bits=bits_)


def batch(tokens: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, ids and weights; experts are distinct in a row, some experts get many tokens."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, HIDDEN), dtype=np.float32) * np.float32(0.1)
    odds = np.array([8, 4, 2, 1, 1, 0.05])
    ids = [rng.choice(EXPERTS, TOP_K, replace=False, p=odds / odds.sum()) for _ in range(tokens)]
    weights = rng.dirichlet(np.ones(TOP_K), tokens).astype(np.float32)
    return x, np.array(ids, np.int32), weights


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_fused_moe_equals_float64(name: str, tokens: int, experts: Experts) -> None:
    x, ids, weights = batch(tokens)
    with isa(name):
        found = experts(x, ids, weights)
    expected = oracle.moe(x, ids, weights, experts.up_gate_matrices, experts.down_matrices)
    np.testing.assert_allclose(
        found, expected, rtol=2e-5, atol=experts.rounding * np.abs(expected).max()
    )


@pytest.mark.parametrize("tokens", [1, 13])
def test_fused_moe_has_the_same_bits_everywhere(tokens: int, experts: Experts) -> None:
    x, ids, weights = batch(tokens)
    assert_same_everywhere(lambda: experts(x, ids, weights))


def test_a_token_does_not_see_its_batch(experts: Experts) -> None:
    x, ids, weights = batch(300)  # more than are worked on at once
    whole = experts(x, ids, weights)
    for i in (0, 1, 77, 255, 256, 299):
        rows = slice(i, i + 1)
        alone = experts(x[rows], ids[rows], weights[rows])
        np.testing.assert_array_equal(bits(whole[rows]), bits(alone))
    for i, j in ((0, 5), (17, 87), (250, 262)):
        part = experts(x[i:j], ids[i:j], weights[i:j])
        np.testing.assert_array_equal(bits(whole[i:j]), bits(part))


def test_slots_are_summed_in_their_order() -> None:
    """The order of slots is part of the result: swapping two may change its last bits."""
    experts = Experts("f32", hidden=HIDDEN, inner=64)
    x, ids, weights = batch(64)
    single = [
        experts(x, ids[:, s : s + 1], np.ones((64, 1), np.float32)).astype(np.float64)
        for s in range(TOP_K)
    ]
    expected = (weights[:, :1].astype(np.float64) * single[0]).astype(np.float32)
    for s in (1, 2):  # float64 holds these products and sums of two float32 well enough
        term = weights[:, s : s + 1].astype(np.float64) * single[s]
        expected = (expected.astype(np.float64) + term).astype(np.float32)
    np.testing.assert_array_equal(experts(x, ids, weights), expected)


def test_the_same_expert_may_come_twice(experts: Experts) -> None:
    x, _, _ = batch(2)
    ids = np.array([[1, 1, 4], [5, 5, 5]], np.int32)
    weights = np.full((2, 3), 0.25, np.float32)
    expected = oracle.moe(x, ids, weights, experts.up_gate_matrices, experts.down_matrices)
    found = experts(x, ids, weights)
    np.testing.assert_allclose(
        found, expected, rtol=2e-5, atol=experts.rounding * np.abs(expected).max()
    )


@pytest.mark.parametrize("expert", [-1, EXPERTS])
def test_unknown_experts_are_refused(expert: int, experts: Experts) -> None:
    x, ids, weights = batch(2)
    ids[1, 2] = expert
    with pytest.raises(ValueError, match=rf"topk_ids\[1, 2\] is {expert}, expected 0 to 5"):
        experts(x, ids, weights)


def test_weights_must_fit_each_other() -> None:
    one, other = Experts("int8"), Experts("int8", inner=64)
    one.down = other.down
    with pytest.raises(ValueError, match="up_gate gives 256 columns of 6 experts, down takes 64"):
        one(*batch(1))


def test_wrong_arguments_are_named(experts: Experts) -> None:
    x, ids, weights = batch(2)
    with pytest.raises(TypeError, match=r"topk_ids has dtype .*int64, expected int32"):
        experts(x, ids.astype(np.int64), weights)
    with pytest.raises(ValueError, match=r"topk_weights has shape \[1, 3\], expected \[2, 3\]"):
        experts(x, ids, weights[:1])
    with pytest.raises(ValueError, match=r"x has shape \[2, 128\], expected \[any, 256\]"):
        experts(x[:, :128], ids, weights)


# -- bound to host arrays ------------------------------------------------------------------------


def bound(experts: Experts, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Any:
    """The call, and the array that it fills."""
    out = np.full((len(x), experts.down.out_features), 0x7FC0).astype(x.dtype)
    arguments = (x, ids, weights, experts.up_gate, experts.down, out, experts.workspace)
    return ops.BoundExperts(*arguments), out


@pytest.mark.parametrize("tokens", [1, 2, 40, 300])
def test_bound_experts_widen_exactly_and_round_once(tokens: int, experts: Experts) -> None:
    x, ids, weights = batch(tokens)
    half = float32_to_bfloat16(x)
    call, out = bound(experts, half, ids, weights)
    for scale in (1, 2):  # values change between calls
        half[...] = float32_to_bfloat16(x * np.float32(scale))
        call()
        expected = experts(bfloat16_to_float32(half), ids, weights)
        np.testing.assert_array_equal(out, nearest_bf16(expected))
    wide, out = bound(experts, x, ids, weights)
    experts(*batch(tokens + 1))  # whose workspace is larger and lies elsewhere
    wide()
    np.testing.assert_array_equal(bits(out), bits(experts(x, ids, weights)))


@pytest.mark.parametrize(("hidden", "inner"), [(200, 72), (1100, 40)])
def test_bound_experts_of_ragged_rows(hidden: int, inner: int) -> None:
    experts = Experts("bf16", hidden, inner)
    x = np.random.default_rng(1).standard_normal((3, hidden), dtype=np.float32)
    _, ids, weights = batch(3)
    half = float32_to_bfloat16(x)
    call, out = bound(experts, half, ids, weights)
    call()
    expected = experts(bfloat16_to_float32(half), ids, weights)
    np.testing.assert_array_equal(out, nearest_bf16(expected))


def test_bound_experts_have_the_same_bits_everywhere(experts: Experts) -> None:
    x, ids, weights = batch(5)

    def computed() -> np.ndarray:
        call, out = bound(experts, float32_to_bfloat16(x), ids, weights)
        call()
        return bfloat16_to_float32(out)

    assert_same_everywhere(computed)


def test_what_bound_experts_refuse(experts: Experts) -> None:
    x, ids, weights = batch(2)
    with pytest.raises(TypeError, match="x has dtype float64, expected float32 or uint16"):
        bound(experts, x.astype(np.float64), ids, weights)
    with pytest.raises(TypeError, match="topk_ids has dtype int64, expected int32"):
        bound(experts, x, ids.astype(np.int64), weights)
    with pytest.raises(ValueError, match=r"topk_weights has shape \[1, 3\], expected \[2, 3\]"):
        bound(experts, x, ids, weights[:1])
    with pytest.raises(ValueError, match=r"x has shape \[2, 256\], expected .* without gaps"):
        bound(experts, x[:, ::-1], ids, weights)
    call, _ = bound(experts, x, ids, weights)
    ids[1, 2] = EXPERTS
    with pytest.raises(ValueError, match=r"topk_ids\[1, 2\] is 6, expected 0 to 5"):
        call()
