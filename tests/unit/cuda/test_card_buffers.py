"""Arrays that cross to a card and back, on a card that works late."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from fake_cuda import Card

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.input_batch import InputBatch
from fastdeploy_lite.model_executor.static_buffers import PackedBuffer

CPU = paddle.CPUPlace()


@pytest.fixture
def late(card: Card, monkeypatch: pytest.MonkeyPatch) -> Card:
    """Main memory whose mirrors are those of a card."""
    from fastdeploy_lite.model_executor.ops.cuda_pinned import CudaMirror

    monkeypatch.setattr(ops, "mirror", CudaMirror)
    return card


def test_what_was_uploaded_is_what_the_host_had_then(late: Card) -> None:
    buffer = PackedBuffer({"a": ([3], "int32"), "b": ([2, 2], "float32")}, CPU)
    for value in (1, 2):
        buffer.host["a"][...] = value
        buffer.upload()
        seen: list[Any] = []
        late.cuda.put(lambda seen=seen: seen.append(ops.host_array(buffer.device["a"]).copy()))
        buffer.host["a"][...] = 9
        late.cuda.synchronize()
        assert seen[0].tolist() == [value] * 3


def test_a_download_waits_for_what_was_queued_and_no_longer(late: Card) -> None:
    buffer = PackedBuffer({"a": ([3], "int32"), "b": ([2], "int32")}, CPU)
    for value in (4, 5):
        late.cuda.put(lambda value=value: ops.host_array(buffer.device["a"]).fill(value))
        buffer.download("a")
        assert buffer.host["a"].tolist() == [value] * 3
    late.cuda.put(lambda: ops.host_array(buffer.device["b"]).fill(7))
    buffer.download("a")
    assert buffer.host["b"].tolist() == [0, 0]  # not asked for
    buffer.download()
    assert buffer.host["b"].tolist() == [7, 7]


def test_only_the_block_tables_of_a_step_cross(late: Card) -> None:
    batch = InputBatch(16, 4, 640, 100, CPU)
    tables = batch.buffer.host["block_tables"]
    tables[...] = np.arange(tables.size).reshape(tables.shape)
    batch.buffer.host["slot_mapping"][...] = 3
    device = batch.buffer.device
    ops.host_array(device["block_tables"]).fill(-1)
    batch.upload(2)
    late.cuda.synchronize()
    assert (ops.host_array(device["slot_mapping"]) == 3).all()
    np.testing.assert_array_equal(ops.host_array(device["block_tables"])[:2], tables[:2])
    assert (ops.host_array(device["block_tables"])[2:] == -1).all()
