"""Linear maps of every kind against float64, for every tile height and awkward sizes."""

from __future__ import annotations

import cards
import matrices
import numpy as np
import pytest

TOKENS = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 256, 300]


def run(weight: object, x: np.ndarray, columns: int, dtype: str) -> np.ndarray:
    from fastdeploy_lite.model_executor import ops

    out = cards.poisoned([len(x), columns], dtype)
    ops.linear(cards.put(x, "bfloat16"), weight, out)
    return cards.get(out)


@pytest.mark.parametrize("kind", ["int8", "int4", "ccq", "dense"])
@pytest.mark.parametrize(("rows", "columns"), [(128, 16), (384, 144), (1536, 2560), (4096, 80)])
def test_linear_equals_float64(kind: str, rows: int, columns: int) -> None:
    random = np.random.default_rng(rows + columns)
    weight, dense = matrices.make(kind, random, rows, columns)
    for tokens in TOKENS:
        x = cards.round_bf16(random.standard_normal((tokens, rows)))
        expected = x.astype(np.float64) @ dense
        # sums are float32 and weights exact, but for CCQ with more than 8 tokens: code times local
        # scale is rounded to bf16
        exact = 3e-3 if kind == "ccq" and tokens > 8 else 3e-6
        assert cards.error(run(weight, x, columns, "float32"), expected) < exact, tokens
        assert cards.error(run(weight, x, columns, "bfloat16"), expected) < 4e-3, tokens


@pytest.mark.parametrize(("kind", "rows"), [("int8", 192), ("int4", 320)])
def test_k_that_is_no_multiple_of_a_tile(kind: str, rows: int) -> None:
    random = np.random.default_rng(rows)
    weight, dense = matrices.make(kind, random, rows, 48)
    for tokens in (1, 20, 70, 200):
        x = cards.round_bf16(random.standard_normal((tokens, rows)))
        assert cards.error(run(weight, x, 48, "float32"), x.astype(np.float64) @ dense) < 3e-6


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    random = np.random.default_rng(5)
    weight, _ = matrices.make("ccq", random, 1024, 256)
    x = cards.round_bf16(random.standard_normal((40, 1024)))
    together = run(weight, x[:8], 256, "float32")
    for i in range(8):
        np.testing.assert_array_equal(run(weight, x[i : i + 1], 256, "float32")[0], together[i])


def test_tied_table_serves_as_embedding_and_head() -> None:
    from fastdeploy_lite.model_executor import ops

    random = np.random.default_rng(9)
    table = cards.bf16_bits(random.standard_normal((300, 128)))
    weight = ops.allocate_weight("dense", 128, 300, cards.place())
    ops.fill_weight(weight, None, weight=table, transposed=True)
    ops.finish_weight(weight)
    ids = random.integers(0, 300, 50).astype(np.int32)
    out = cards.poisoned([50, 128])
    ops.embedding(cards.put(ids), weight, out)
    np.testing.assert_array_equal(cards.get(out), cards.widen(table)[ids])
    x = cards.round_bf16(random.standard_normal((5, 128)))
    expected = x.astype(np.float64) @ cards.widen(table).T
    assert cards.error(run(weight, x, 300, "float32"), expected) < 3e-6
