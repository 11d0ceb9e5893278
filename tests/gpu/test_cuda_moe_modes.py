"""Experts with FD_DETERMINISTIC_MODE=0, the default.

Calls of few tokens sum products with 2-bit weights in integer digits of the activations, larger
ones in floats. Bits are the same among calls of few tokens; what the other mode promises of all
calls is tested in test_cuda_moe.py.
"""

from __future__ import annotations

from typing import Any

import cards
import matrices
import numpy as np
import pytest
from test_cuda_moe import silu

pytestmark = pytest.mark.usefixtures("fast")
FEW = 16
"""Most tokens of a call that takes digits: stream_tokens in custom_ops/cuda/gemm/plan_cards.h."""
CHOSEN, DIGITS = -1, 3
"""The plan's choice, and a value of the kernels' enum ExpertsPath."""
SHAPES = [(16, 4, 384, 256), (8, 1, 256, 128), (64, 6, 640, 384), (64, 8, 2048, 896)]
WIDEST = (4, 2, 8192, 128)
"""Rows as long as those of 300B: a block holds few of them."""
KINDS = ["ccq", "ccq_mixed", "ccq_wide"]
"""Columns with constants for the fast decoder: all of them, most of them, none."""


class Batch:
    """Rows of x [T, H], the experts of each [T, k] and their shares."""

    def __init__(self, x: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> None:
        self.x, self.ids, self.shares = x, ids, shares

    @classmethod
    def random(
        cls, random: np.random.Generator, tokens: int, hidden: int, experts: int, top_k: int
    ) -> Batch:
        ids = np.argsort(random.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
        x = cards.round_bf16(random.standard_normal((tokens, hidden)))
        return cls(x, ids, random.dirichlet(np.ones(top_k), tokens).astype(np.float32))

    def rows(self, chosen: Any) -> Batch:
        return Batch(self.x[chosen], self.ids[chosen], self.shares[chosen])


class Layer:
    """The experts of a layer and the float64 matrices that they stand for."""

    def __init__(
        self, kind: str, random: np.random.Generator, experts: int, hidden: int, inner: int
    ) -> None:
        self._up, self.up = matrices.make(kind, random, hidden, 2 * inner, experts)
        self._down, self.down = matrices.make(kind, random, inner, hidden, experts)

    def run(self, batch: Batch, path: int = CHOSEN) -> np.ndarray:
        """float32 [T, H] that holds bf16."""
        from fastdeploy_lite.model_executor import ops
        from fastdeploy_lite.model_executor.ops import cuda_moe

        out = cards.poisoned(list(batch.x.shape))
        given = cards.put(batch.x, "bfloat16"), cards.put(batch.ids), cards.put(batch.shares)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_moe, "CHOSEN_PATH", path)
            ops.fused_moe(*given, self._up, self._down, out, cards.Workspace())
        return cards.get(out)

    def alone(self, batch: Batch) -> np.ndarray:
        """The same, of each token in a call of its own."""
        return np.concatenate([self.run(batch.rows([row])) for row in range(len(batch.x))])

    def expected(self, batch: Batch) -> np.ndarray:
        """Float64 products and sums, rounded to bf16 where the kernels store."""
        x, out = batch.x.astype(np.float64), np.zeros(batch.x.shape)
        for expert in np.unique(batch.ids):
            tokens, slots = np.nonzero(batch.ids == expert)
            gate, rest = np.split(x[tokens] @ self.up[expert], 2, axis=1)
            inner = cards.round_bf16(silu(gate) * rest).astype(np.float64)
            rows = cards.round_bf16(inner @ self.down[expert])
            np.add.at(out, tokens, batch.shares[tokens, slots, None] * rows)
        return out


# -- bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("experts", "top_k", "hidden", "inner"), [*SHAPES, WIDEST])
def test_a_token_has_the_same_bits_in_any_call_of_few(
    kind: str, experts: int, top_k: int, hidden: int, inner: int
) -> None:
    random = np.random.default_rng(experts + hidden)
    layer = Layer(kind, random, experts, hidden, inner)
    pool = Batch.random(random, 40, hidden, experts, top_k)
    pool.ids[::3, 0] = 3  # a crowded expert, for some tokens twice
    alone = layer.alone(pool)
    assert np.isfinite(alone).all()
    for tokens in range(1, FEW + 1):
        for path in (CHOSEN, DIGITS):
            rows = random.permutation(len(pool.x))[:tokens]
            np.testing.assert_array_equal(
                layer.run(pool.rows(rows), path), alone[rows], f"{tokens} tokens, path {path}"
            )


@pytest.fixture(scope="module", params=KINDS)
def layer(request: pytest.FixtureRequest) -> Layer:
    """Of 16 experts [640, 2 x 384] and [384, 640]."""
    return Layer(request.param, np.random.default_rng(7), 16, 640, 384)


def test_an_expert_of_any_number_of_rows(layer: Layer) -> None:
    """More than eight are taken in parts."""
    random = np.random.default_rng(1)
    batch = Batch.random(random, FEW, 640, 15, 3)
    for rows in range(1, FEW + 1):
        crowded = batch.rows(slice(None))
        crowded.ids = np.where(batch.ids == 5, 15, batch.ids).astype(np.int32)
        crowded.ids[random.permutation(FEW)[:rows], random.integers(0, 3)] = 5
        np.testing.assert_array_equal(layer.run(crowded), layer.alone(crowded), f"{rows} rows")


def test_experts_of_different_numbers_of_rows_in_one_call(layer: Layer) -> None:
    counts = [1, 2, 3, 4, 5, 8, 9]
    random = np.random.default_rng(2)
    batch = Batch.random(random, FEW, 640, 16, 2)
    for _ in range(4):
        slots = np.repeat(random.permutation(16)[: len(counts)], counts)
        batch.ids = np.ascontiguousarray(slots.reshape(2, FEW).T.astype(np.int32))
        batch = batch.rows(random.permutation(FEW))
        np.testing.assert_array_equal(layer.run(batch), layer.alone(batch))


def odd_rows() -> Batch:
    """Among ordinary rows some that must not touch their neighbours; all of the same experts."""
    random = np.random.default_rng(3)
    batch = Batch.random(random, FEW, 640, 16, 3)
    batch.ids[:] = [4, 9, 2]
    x = batch.x
    x[1] = 0
    x[2] = -0.0
    x[3, 17] = np.nan
    x[4, 200], x[4, 500] = np.inf, -np.inf
    x[5] *= np.float32(2.0**120)
    x[6] *= np.float32(2.0**-120)
    x[7] = cards.round_bf16(x[7] * np.float32(2.0**-130))  # denormal
    x[8, ::64] *= 2.0**20  # each group has an outlier
    x[9, 64:] = 0  # groups of zeros
    x[10, :320] = cards.round_bf16(x[10, :320] * np.float32(2.0**-130))
    x[11] = np.where(np.arange(640) % 64 == 63, 1, 0)
    return batch


def test_a_row_that_is_not_finite_costs_itself_alone(layer: Layer) -> None:
    batch = odd_rows()
    together, alone = layer.run(batch), layer.alone(batch)
    np.testing.assert_array_equal(together, alone)
    assert np.isnan(together[[3, 4]]).all()
    assert (together[[1, 2]] == 0).all()
    others = [row for row in range(FEW) if row not in (3, 4, 5)]  # 5 is beyond bf16 in the end
    assert np.isfinite(together[others]).all()


def test_more_tokens_have_the_bits_of_the_other_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = []
    for mode in "01":
        monkeypatch.setenv("FD_DETERMINISTIC_MODE", mode)
        layers.append(Layer("ccq", np.random.default_rng(4), 16, 640, 384))
    for tokens in (FEW + 1, 64, 300):
        batch = Batch.random(np.random.default_rng(tokens), tokens, 640, 16, 3)
        found, wanted = (layer.run(batch) for layer in layers)
        np.testing.assert_array_equal(found, wanted, str(tokens))


@pytest.mark.parametrize("kind", ["int4", "int8", "dense"])
def test_other_weights_keep_their_bits_in_any_call(kind: str) -> None:
    random = np.random.default_rng(5)
    layer = Layer(kind, random, 16, 640, 384)
    batch = Batch.random(random, 200, 640, 16, 4)
    whole = layer.run(batch)
    np.testing.assert_array_equal(layer.alone(batch.rows(slice(20))), whole[:20])
    np.testing.assert_array_equal(layer.run(batch.rows(slice(FEW))), whole[:FEW])


# -- numbers --------------------------------------------------------------------------------------


def with_tails(x: np.ndarray, random: np.random.Generator, factor: int) -> np.ndarray:
    """Every hundredth element, by chance, is so much larger."""
    return cards.round_bf16(np.where(random.random(x.shape) < 0.01, factor, 1) * x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("experts", "top_k", "hidden", "inner"), [*SHAPES[:3], WIDEST])
def test_digits_are_near_float64(
    kind: str, experts: int, top_k: int, hidden: int, inner: int
) -> None:
    """Ordinary activations, heavy tails, and scales far from 1."""
    random = np.random.default_rng(hidden)
    layer = Layer(kind, random, experts, hidden, inner)
    for tokens in (1, 2, 5, 8, 9, FEW):
        batch = Batch.random(random, tokens, hidden, experts, top_k)
        plain = batch.x
        cases = {f"tails {factor}": with_tails(plain, random, factor) for factor in (100, 1000)}
        cases |= {f"2^{exponent}": plain * np.float32(2.0**exponent) for exponent in (-12, 0, 4)}
        for name, x in cases.items():
            batch.x = x
            error = cards.error(layer.run(batch, DIGITS), layer.expected(batch))
            # where few numbers make a result, one that is rounded to bf16 the other way shows
            assert error < (8e-3 if name.startswith("tails") else 4e-3), f"{tokens} tokens, {name}"


# -- the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tokens"), [("ccq", 300), ("int4", 4), ("int8", 1)])
def test_digits_are_refused_where_they_cannot_serve(kind: str, tokens: int) -> None:
    random = np.random.default_rng(6)
    layer = Layer(kind, random, 16, 640, 384)
    batch = Batch.random(random, tokens, 640, 16, 4)
    with pytest.raises(ValueError, match=f"path {DIGITS} cannot serve {tokens} tokens"):
        layer.run(batch, DIGITS)
    layer.run(batch)
