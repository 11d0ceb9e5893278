"""Linear maps of every kind against float64, for every tile height and awkward sizes."""

from __future__ import annotations

import cards
import matrices
import numpy as np
import pytest

TOKENS = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 256, 300]
BATCHES = [1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 64, 65, 100, 128, 129, 300, 1000]
HEIGHTS = ((8, 16, 32, 64, 128), (8, 16, 32, 64))
"""Of the kernels' tiles, and of those for CCQ: 8 and 16 stream weights, the others work in shared
memory."""


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
        # weights are exact and sums float32; cuBLASLt's are one chain through K (4.1e-6 at 4,096)
        exact = 1e-5 if kind == "dense" else 3e-6
        assert cards.error(run(weight, x, columns, "float32"), expected) < exact, tokens
        assert cards.error(run(weight, x, columns, "bfloat16"), expected) < 4e-3, tokens


@pytest.mark.parametrize(("kind", "rows"), [("int8", 192), ("int4", 320)])
def test_k_that_is_no_multiple_of_a_tile(kind: str, rows: int) -> None:
    random = np.random.default_rng(rows)
    weight, dense = matrices.make(kind, random, rows, 48)
    for tokens in (1, 20, 70, 200):
        x = cards.round_bf16(random.standard_normal((tokens, rows)))
        assert cards.error(run(weight, x, 48, "float32"), x.astype(np.float64) @ dense) < 3e-6


@pytest.mark.parametrize("kind", ["int8", "int4", "ccq", "ccq_wide"])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (128, 16),
        (384, 144),
        (1280, 48),
        (1536, 2560),
        (4096, 80),
        (2560, 1040),
        (8192, 256),
        (3584, 3072),
    ],
)
def test_a_row_has_the_same_bits_in_any_batch_and_tile(
    kind: str, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(rows * columns)
    weight, _ = matrices.make(kind, random, rows, columns)
    assert_rows_stand_alone(kind, weight, random, rows, columns, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "rows", "columns"), [("int8", 192, 48), ("int4", 1088, 144), ("int8", 320, 272)]
)
def test_bits_where_k_is_no_multiple_of_a_tile(
    kind: str, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(rows)
    weight, _ = matrices.make(kind, random, rows, columns)
    assert_rows_stand_alone(kind, weight, random, rows, columns, monkeypatch)


def assert_rows_stand_alone(
    kind: str,
    weight: object,
    random: np.random.Generator,
    rows: int,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row i of any product equals the product of row i alone, whatever the tile's height."""
    from fastdeploy_lite.model_executor.ops import cuda_ops

    x = cards.round_bf16(random.standard_normal((BATCHES[-1], rows)))
    alone = np.concatenate([run(weight, x[i : i + 1], columns, "float32") for i in range(len(x))])
    for tokens in BATCHES:
        last = x[len(x) - tokens :]
        for height in (0, *HEIGHTS[kind.startswith("ccq")], *hopper_tiles(weight)):
            monkeypatch.setattr(cuda_ops, "CHOSEN_TILE", height)  # 0: the plan's
            found = run(weight, last, columns, "float32")
            np.testing.assert_array_equal(
                found, alone[len(x) - tokens :], err_msg=f"{tokens} tokens, tiles of {height}"
            )
        rounded = run(weight, last, columns, "bfloat16")
        np.testing.assert_array_equal(rounded, cards.round_bf16(alone[len(x) - tokens :]))


def hopper_tiles(weight: object) -> list[int]:
    """What stands for Hopper's kernel, where it serves."""
    from fastdeploy_lite import _ops_cuda
    from fastdeploy_lite.model_executor.ops import cuda_runtime

    native = weight.handle.native
    serves = native is not None and native.hopper_serves(cuda_runtime.SCRATCH_BYTES)
    return [_ops_cuda.hopper_tile] if serves else []


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_many_rows_in_slices_that_the_scratch_can_hold(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdeploy_lite.model_executor.ops import cuda_runtime

    random = np.random.default_rng(5)
    weight, _ = matrices.make(kind, random, 2560, 1040)
    if not hopper_tiles(weight):
        pytest.skip("no kernel of Hopper's")
    x = cards.round_bf16(random.standard_normal((1000, 2560)))
    whole = run(weight, x, 1040, "bfloat16")
    monkeypatch.setattr(cuda_runtime, "SCRATCH_BYTES", 1 << 20)  # 160 rows of 2,560 at once
    np.testing.assert_array_equal(run(weight, x, 1040, "bfloat16"), whole)
    monkeypatch.setattr(cuda_runtime, "SCRATCH_BYTES", 1 << 19)  # no room for a tile
    assert not hopper_tiles(weight)
    np.testing.assert_array_equal(run(weight, x, 1040, "bfloat16"), whole)


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
