"""Norms, SwiGLU, row copies and transfers."""

from __future__ import annotations

import cards
import numpy as np
import pytest
from oracles import rowwise

SHAPES = [(1, 128), (3, 384), (256, 2560), (7, 8192), (40, 12288)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_rms_norm(shape: tuple[int, int], weight_dtype: str) -> None:
    from fastdeploy_lite.model_executor import ops

    random = np.random.default_rng(shape[1])
    x = cards.round_bf16(random.standard_normal(shape) * 3)
    scale = cards.round_bf16(random.standard_normal(shape[1]))
    out = cards.poisoned(list(shape))
    ops.rms_norm(cards.put(x, "bfloat16"), cards.put(scale, weight_dtype), 1e-5, out)
    assert cards.error(cards.get(out), rowwise.rms_norm(x, scale, 1e-5)) < 4e-3

    residual = cards.round_bf16(random.standard_normal(shape))
    held = cards.put(residual, "bfloat16")
    out = cards.poisoned(list(shape))
    ops.add_rms_norm(cards.put(x, "bfloat16"), held, cards.put(scale, weight_dtype), 1e-5, out)
    total = cards.round_bf16(x + residual)
    np.testing.assert_array_equal(cards.get(held), total)
    assert cards.error(cards.get(out), rowwise.rms_norm(total, scale, 1e-5)) < 4e-3

    also = cards.round_bf16(random.standard_normal(shape) * 2)
    held, together = cards.put(residual, "bfloat16"), cards.poisoned(list(shape))
    parts = [cards.put(part, "bfloat16") for part in (x, also)]
    ops.add_rms_norm(parts[0], held, cards.put(scale, weight_dtype), 1e-5, together, parts[1])
    total = cards.round_bf16(cards.round_bf16(x + also) + residual)
    np.testing.assert_array_equal(cards.get(held), total)
    assert cards.error(cards.get(together), rowwise.rms_norm(total, scale, 1e-5)) < 4e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_silu_and_mul_and_add(shape: tuple[int, int]) -> None:
    from fastdeploy_lite.model_executor import ops

    random = np.random.default_rng(shape[1])
    x = cards.round_bf16(random.standard_normal((shape[0], 2 * shape[1])) * 4)
    out = cards.poisoned(list(shape))
    ops.silu_and_mul(cards.put(x, "bfloat16"), out)
    assert cards.error(cards.get(out), rowwise.silu_and_mul(x)) < 4e-3
    first, second = x[:, : shape[1]], x[:, shape[1] :]
    held = cards.put(first, "bfloat16")
    ops.add_inplace(held, cards.put(second, "bfloat16"))
    np.testing.assert_array_equal(cards.get(held), cards.round_bf16(first + second))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [8, 100, 2560, 8193])
def test_gather_rows(dtype: str, width: int) -> None:
    from fastdeploy_lite.model_executor import ops

    random = np.random.default_rng(width)
    x = cards.round_bf16(random.standard_normal((20, width)))
    rows = random.integers(0, 20, 33).astype(np.int32)
    out = cards.poisoned([33, width], dtype)
    ops.gather_rows(cards.put(x, dtype), cards.put(rows), out)
    np.testing.assert_array_equal(cards.get(out), x[rows])


@pytest.mark.parametrize("count", [1, 1000, (1 << 20) + 5, (40 << 20) + 3])
def test_uploads_survive_the_pinned_ring(count: int) -> None:
    random = np.random.default_rng(count)
    values = random.integers(0, 1 << 30, count, np.int32)
    np.testing.assert_array_equal(cards.get(cards.put(values)), values)


def test_upload_refuses_another_dtype() -> None:
    import paddle

    from fastdeploy_lite.model_executor import ops

    out = paddle.empty([4], dtype="float32", device=cards.place())
    with pytest.raises(ValueError, match="float64"):
        ops.upload(np.zeros(4), out)
