"""Copies between numpy and tensors on the CPU."""

from __future__ import annotations

import gc

import numpy as np
import paddle
import pytest
from oracles.rowwise import nearest_bf16

from fastdeploy_lite.model_executor import ops


def test_host_array_is_the_tensors_own_memory() -> None:
    tensor = paddle.zeros([3, 4], dtype="int32")
    array = ops.host_array(tensor)
    array[1, 2] = 7
    assert int(tensor[1, 2]) == 7
    assert array.shape == (3, 4)


def test_host_array_keeps_its_tensor_alive() -> None:
    array = ops.host_array(paddle.full([1 << 20], 3, dtype="int32"))
    gc.collect()
    others = [paddle.zeros([1 << 20], dtype="int32") for _ in range(4)]
    assert len(others) == 4
    assert (array == 3).all()


def test_host_array_gives_bfloat16_as_bits() -> None:
    array = ops.host_array(paddle.ones([2], dtype="bfloat16"))
    assert array.dtype == np.uint16
    assert array.tolist() == [0x3F80, 0x3F80]


def test_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        ops.host_array(paddle.zeros([4, 4]).as_strided([2, 2], [4, 2]))


def test_upload_and_download() -> None:
    tensor = paddle.zeros([2, 3], dtype="float32")
    ops.upload(np.arange(4, dtype=np.float32), tensor)
    np.testing.assert_array_equal(ops.download(tensor), [[0, 1, 2], [3, 0, 0]])
    with pytest.raises(ValueError, match="7 elements do not fit"):
        ops.upload(np.zeros(7, np.float32), tensor)
    with pytest.raises(ValueError, match="dtype int32"):
        ops.upload(np.zeros(2, np.int32), tensor)


def test_widen_gives_the_value_of_every_bfloat16() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(64, 1024)
    out = paddle.zeros([64, 1024], dtype="float32")
    ops.widen(bits, out)
    np.testing.assert_array_equal(ops.host_array(out).view(np.uint32) >> 16, bits)
    np.testing.assert_array_equal(ops.host_array(out).view(np.uint32) & 0xFFFF, 0)


def test_narrow_rounds_to_nearest() -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, (300, 1000), dtype=np.uint32)
    bits[0, :8] = [0x00008000, 0x00018000, 0x80008000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 1, 0]
    bits[1:50] = bits[1:50] & 0xFFFF0000 | 0x8000  # ties
    values = bits.view(np.float32)
    found = np.zeros(values.shape, np.uint16)
    ops.narrow(paddle.to_tensor(values), found)
    expected = nearest_bf16(values)
    is_number = ~np.isnan(values)
    assert 1000 < (~is_number).sum() < values.size // 10
    np.testing.assert_array_equal(found[is_number], expected[is_number])
    wide = paddle.empty(list(values.shape), dtype="float32")
    ops.widen(found, wide)
    assert np.isnan(ops.host_array(wide)[~is_number]).all()


def test_rows_of_another_shape_or_dtype_are_refused() -> None:
    tensor = paddle.zeros([2, 4], dtype="float32")
    with pytest.raises(ValueError, match=r"widen: out has shape \[2, 4\], expected \[2, 3\]"):
        ops.widen(np.zeros((2, 3), np.uint16), tensor)
    with pytest.raises(ValueError, match=r"narrow: x has shape \[2, 4\], expected \[3, 4\]"):
        ops.narrow(tensor, np.zeros((3, 4), np.uint16))
    with pytest.raises(TypeError, match=r"narrow: the host array has dtype int16, expected uint16"):
        ops.narrow(tensor, np.zeros((2, 4), np.int16))  # type: ignore[arg-type]
