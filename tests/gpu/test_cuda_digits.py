"""The digits' kernel against its oracle, bit for bit: what is rounded, and in which order."""

from __future__ import annotations

import cards
import mirrored
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("fast")  # for cards that have such a kernel
DIGITS = 3
"""Of the kernels' enum ExpertsPath."""
TOKENS = (1, 2, 3, 5, 8, 9, 13, 16)
SHAPES = [(8, 1, 2560 + 128, 1536), (16, 4, 1792 + 128, 1024), (4, 2, 4096 + 128, 1792)]
"""Experts, top_k, hidden and inner; the halves of a row are of 8 to 32 groups of K, some of them no
multiple of four, so that turned groups meet on their own chain of sums or on another one."""


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdeploy_lite.model_executor.ops import cuda_moe

    monkeypatch.setattr(cuda_moe, "CHOSEN_PATH", DIGITS)


def on_card(layer: mirrored.Layer) -> list[object]:
    from fastdeploy_lite.model_executor import ops

    weights = []
    for experts in (layer.up, layer.down):
        rows, columns = experts[0]["quant_weight"].shape
        weight = ops.allocate_weight(
            "ccq", 4 * rows, columns, cards.place(), num_experts=len(experts)
        )
        for index, arrays in enumerate(experts):
            ops.fill_weight(weight, index, **arrays)
        ops.finish_weight(weight)
        weights.append(weight)
    return weights


def run(weights: list[object], x: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> np.ndarray:
    from fastdeploy_lite.model_executor import ops

    out = cards.poisoned(list(x.shape))
    tensors = (cards.put(x, "bfloat16"), cards.put(ids), cards.put(shares))
    ops.fused_moe(*tensors, *weights, out, cards.Workspace())
    return cards.get(out)


def routes(
    random: np.random.Generator, tokens: int, experts: int, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Experts, every third token's first one a crowded one, and their shares."""
    ids = np.argsort(random.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    ids[::3, 0] = 3
    return ids, random.dirichlet(np.ones(top_k), tokens).astype(np.float32)


@pytest.mark.parametrize("kind", ["ccq", "ccq_wide", "ccq_mixed"])
@pytest.mark.parametrize(("experts", "top_k", "hidden", "inner"), SHAPES)
def test_every_bit_is_the_oracles(
    kind: str, experts: int, top_k: int, hidden: int, inner: int
) -> None:
    random = np.random.default_rng(hidden)
    layer = mirrored.mirrored_layer(kind, random, experts, hidden, inner)
    weights = on_card(layer)
    for tokens in TOKENS:
        x = mirrored.mirrored_rows(random, tokens, hidden)
        ids, shares = routes(random, tokens, experts, top_k)
        np.testing.assert_array_equal(
            run(weights, x, ids, shares), layer.outputs(x, ids, shares), f"{tokens} tokens"
        )


@pytest.mark.parametrize("crowded", [1, 7, 8, 9, 16])
def test_rows_of_one_expert(crowded: int) -> None:
    random = np.random.default_rng(crowded)
    layer = mirrored.mirrored_layer("ccq", random, 2, 2176, 1024)
    x, ids = mirrored.mirrored_rows(random, crowded, 2176), np.ones((crowded, 1), np.int32)
    shares = np.ones((crowded, 1), np.float32)
    found = run(on_card(layer), x, ids, shares)
    np.testing.assert_array_equal(found, layer.outputs(x, ids, shares))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_touches_its_own_row_only(value: float) -> None:
    random = np.random.default_rng(2)
    layer = mirrored.mirrored_layer("ccq", random, 4, 1152, 1024)
    x = mirrored.mirrored_rows(random, 9, 1152)
    x[4, 300] = value
    ids, shares = routes(random, 9, 4, 2)
    found = run(on_card(layer), x, ids, shares)
    assert np.isnan(found).all(axis=1).nonzero()[0].tolist() == [4]
    np.testing.assert_array_equal(found, layer.outputs(x, ids, shares))


def test_any_gates_but_for_the_last_bits_of_the_exponential_function() -> None:
    """A bf16 between the products may round the other way, one in thousands."""
    random = np.random.default_rng(9)
    layer = mirrored.random_layer("ccq", random, 16, 1024, 512)
    x = cards.round_bf16(random.standard_normal((16, 1024)))
    ids, shares = routes(random, 16, 16, 4)
    found, expected = run(on_card(layer), x, ids, shares), layer.outputs(x, ids, shares)
    assert (found == expected).mean() > 0.99
    assert cards.error(found, expected) < 5e-4
