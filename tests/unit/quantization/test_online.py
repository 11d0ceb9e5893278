"""Quantisation of a matrix while it is loaded: bits, memory, independence of threads."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fastdeploy_lite.checkpoint.tensor import bfloat16_to_float32, float32_to_bfloat16
from fastdeploy_lite.quantization import online
from fastdeploy_lite.quantization.online import OnlineQuantizer

KINDS = ("int8", "int4")


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bfloat16 bits [K, N]."""
    values = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    return float32_to_bfloat16(values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("shared", [0, 1 << 20])
@pytest.mark.parametrize(("rows", "columns"), [(64, 16), (192, 400), (128, 1040)])
def test_arrays_equal_those_of_paddles_operator(
    kind: str, workers: int, shared: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "SMALLEST_SHARED", shared)
    paddle = pytest.importorskip("paddle")
    from paddle.nn.quant import weight_quantize

    bits = matrix(rows, columns)
    tensor = paddle.to_tensor(bfloat16_to_float32(bits), place=paddle.CPUPlace())
    packed, scale = weight_quantize(tensor.astype("bfloat16"), algo=f"weight_only_{kind}", arch=80)
    with OnlineQuantizer(workers) as quantizer:
        found = quantizer.quantize(kind, bits)
        of_float32 = quantizer.quantize(kind, bfloat16_to_float32(bits))
    for arrays in (found, of_float32):
        assert set(arrays) == {"quant_weight", "weight_scale"}
        np.testing.assert_array_equal(arrays["quant_weight"], packed.numpy())
        np.testing.assert_array_equal(arrays["weight_scale"], scale.astype("float32").numpy())


def test_a_column_slice_of_a_file_needs_no_copy() -> None:
    """A rank's part of a mapped tensor: rows with gaps, read-only."""
    whole = matrix(128, 512)
    whole.flags.writeable = False
    with OnlineQuantizer(2) as quantizer:
        part = quantizer.quantize("int8", whole[:, 64:320])
        alone = quantizer.quantize("int8", whole[:, 64:320].copy())
    np.testing.assert_array_equal(part["quant_weight"], alone["quant_weight"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 2, 16])
def test_temporaries_are_smaller_than_the_matrix_in_float32(kind: str, workers: int) -> None:
    bits = matrix(1024, 2048)
    with OnlineQuantizer(workers) as quantizer:
        quantizer.quantize(kind, matrix(64, 2048))  # the threads are there
        peak = peak_bytes(lambda: quantizer.quantize(kind, bits))
    result = bits.size if kind == "int8" else bits.size // 2
    assert peak < result + 4 * bits.size


def peak_bytes(call: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shared", [0, 1 << 20])
def test_a_failed_block_is_raised(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "SMALLEST_SHARED", shared)
    bits = matrix(64, 512)
    bits[5, 300] = 0x7FC0
    with pytest.raises(ValueError, match="found nan"), OnlineQuantizer(2) as quantizer:
        quantizer.quantize("int4", bits)


def test_threads_end_with_the_quantizer() -> None:
    with OnlineQuantizer(2) as quantizer:
        quantizer.quantize("int8", matrix(512, 2048))
    pool = quantizer._pool
    assert isinstance(pool, ThreadPoolExecutor)
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(print)
