"""Copies between numpy and tensors on the CPU."""

from __future__ import annotations

import gc

import numpy as np
import paddle
import pytest

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
