"""A captured decode step gives what the step itself gives, after buffers moved too."""

from __future__ import annotations

import cards
import matrices
import numpy as np
import pytest


def test_default_sizes() -> None:
    from fastdeploy_lite.model_executor.cuda_graph import default_sizes

    assert default_sizes(1) == [1]
    assert default_sizes(8) == [1, 2, 4, 8]
    assert default_sizes(50) == [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 48, 50]


def test_replays_follow_the_inputs_and_moved_buffers() -> None:
    from fastdeploy_lite.model_executor import ops
    from fastdeploy_lite.model_executor.cuda_graph import CudaDecodeGraphs
    from fastdeploy_lite.model_executor.workspace import Workspace

    random = np.random.default_rng(4)
    weight, dense = matrices.make("ccq", random, 512, 256)
    head, head_dense = matrices.make("dense", random, 256, 400)
    workspace = Workspace(cards.place())
    graphs = CudaDecodeGraphs(workspace, 8)
    inputs = cards.put(np.zeros((8, 512), np.float32), "bfloat16")

    def step(size: int) -> object:
        inner = workspace.get("inner", [size, 256], "bfloat16")
        ops.linear(inputs[:size], weight, inner)
        logits = workspace.get("logits", [size, 400], "float32")
        ops.linear(inner, head, logits)
        return logits

    for count in (1, 3, 8, 3, 1, 2, 8, 8):
        x = cards.round_bf16(random.standard_normal((8, 512)))
        ops.upload(cards.bf16_bits(x), inputs)
        size = graphs.bucket(count)
        assert size is not None and size >= count
        found = cards.get(graphs.run(size, lambda size=size: step(size)))
        expected = cards.round_bf16(x[:size].astype(np.float64) @ dense).astype(np.float64)
        assert cards.error(found, expected @ head_dense) < 5e-3
    workspace.get("inner", [512, 256], "bfloat16")
    x = cards.round_bf16(random.standard_normal((8, 512)))
    ops.upload(cards.bf16_bits(x), inputs)
    for _ in range(3):
        found = cards.get(graphs.run(1, lambda: step(1)))
        expected = cards.round_bf16(x[:1].astype(np.float64) @ dense) @ head_dense
        assert cards.error(found, expected) < 5e-3


def test_a_batch_beyond_the_largest_size_has_no_graph() -> None:
    from fastdeploy_lite.model_executor.cuda_graph import CudaDecodeGraphs
    from fastdeploy_lite.model_executor.workspace import Workspace

    graphs = CudaDecodeGraphs(Workspace(cards.place()), 16, [4, 8])
    assert graphs.bucket(3) == 4
    assert graphs.bucket(9) is None


def test_a_failing_capture_leaves_the_stream_usable() -> None:
    from fastdeploy_lite.model_executor.cuda_graph import CudaDecodeGraphs
    from fastdeploy_lite.model_executor.workspace import Workspace

    graphs = CudaDecodeGraphs(Workspace(cards.place()), 4)
    calls = []

    def step() -> object:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no second time")
        return None

    with pytest.raises(RuntimeError, match="no second time"):
        graphs.run(1, step)
    values = np.arange(7, dtype=np.int32)
    np.testing.assert_array_equal(cards.get(cards.put(values)), values)
