"""Workspace, packed buffers and the arrays of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.input_batch import InputBatch
from fastdeploy_lite.model_executor.static_buffers import PackedBuffer
from fastdeploy_lite.model_executor.workspace import MAX_VIEWS, Workspace
from fastdeploy_lite.request.step import SamplerParams, SequenceSlice

CPU = paddle.CPUPlace()


def test_workspace_reuses_grows_and_never_shrinks() -> None:
    workspace = Workspace(CPU)
    small = workspace.get("x", [2, 3], "float32")
    assert workspace.get("x", [2, 3], "float32") is small
    assert workspace.generation == 1
    large = workspace.get("x", [5, 3], "float32")
    assert (workspace.generation, workspace.nbytes) == (2, 60)
    again = workspace.get("x", [2, 3], "float32")
    assert again.data_ptr() == large.data_ptr()
    assert workspace.generation == 2


def test_workspace_names_and_dtypes_do_not_share_memory() -> None:
    workspace = Workspace(CPU)
    tensors = [
        workspace.get("x", [4], "float32"),
        workspace.get("y", [4], "float32"),
        workspace.get("x", [4], "int32"),
    ]
    for value, tensor in enumerate(tensors):
        np.from_dlpack(tensor)[:] = value
    assert [tensor.numpy().tolist() for tensor in tensors] == [[0.0] * 4, [1.0] * 4, [2] * 4]


def test_workspace_forgets_views_not_memory() -> None:
    """Ragged prefills ask for thousands of shapes; only the table of views may be dropped."""
    workspace = Workspace(CPU)
    first = workspace.get("x", [MAX_VIEWS + 5], "float32").data_ptr()
    for size in range(1, MAX_VIEWS + 5):
        assert workspace.get("x", [size], "float32").data_ptr() == first
    assert workspace.generation == 1


def test_packed_buffer_shares_host_and_device_memory_on_cpu() -> None:
    fields: dict[str, tuple[list[int], str]] = {
        "a": ([3], "int32"),
        "b": ([2, 2], "float32"),
        "c": ([5], "int64"),
    }
    buffer = PackedBuffer(fields, CPU)
    for value, name in enumerate(fields, start=1):
        buffer.host[name][...] = value
    buffer.upload()
    buffer.download("a")
    for value, (name, (shape, dtype)) in enumerate(fields.items(), start=1):
        found = buffer.device[name].numpy()
        assert found.dtype == dtype
        assert found.tolist() == np.full(shape, value).tolist()


def make_batch(**limits: int) -> InputBatch:
    values = {"max_tokens": 256, "max_seqs": 4, "max_model_len": 256, "vocab_size": 1000}
    batch = InputBatch(**(values | limits), place=CPU)
    batch.num_blocks = 16
    return batch


def make_slice(
    slot: int, tokens: int, start: int, blocks: list[int], fresh: bool = True, **fields: Any
) -> SequenceSlice:
    values: dict[str, Any] = {"token_ids": list(range(tokens)), "sample": True}
    return SequenceSlice(
        request_id=f"request-{slot}",
        slot=slot,
        fresh=fresh,
        start=start,
        block_table=blocks,
        prompt_token_ids=[],
        output_token_ids=[],
        sampling=SamplerParams(),
        **(values | fields),
    )


def test_mixed_step() -> None:
    """A chunk that starts inside a block and crosses into the next, beside a decode."""
    batch = make_batch()
    shape = batch.prepare([make_slice(2, 5, 62, [7, 3]), make_slice(0, 1, 128, [1, 2, 9])])
    host = batch.buffer.host
    assert (shape.num_tokens, shape.num_seqs, shape.decode_only) == (6, 2, False)
    assert host["token_ids"][:6].tolist() == [0, 1, 2, 3, 4, 0]
    assert host["positions"][:6].tolist() == [62, 63, 64, 65, 66, 128]
    expected = [7 * 64 + 62, 7 * 64 + 63, 3 * 64, 3 * 64 + 1, 3 * 64 + 2, 9 * 64]
    assert host["slot_mapping"][:6].tolist() == expected
    assert host["cu_seqlens_q"][:3].tolist() == [0, 5, 6]
    assert host["context_lens"][:2].tolist() == [67, 129]
    assert host["block_tables"][0, :2].tolist() == [7, 3]
    assert host["block_tables"][1, :3].tolist() == [1, 2, 9]


def test_block_tables_grow_and_are_replaced_when_fresh() -> None:
    batch = make_batch()
    batch.prepare([make_slice(1, 64, 0, [5])])
    shape = batch.prepare([make_slice(1, 1, 64, [5, 8], fresh=False)])
    assert shape.decode_only
    assert batch.buffer.host["slot_mapping"][0] == 8 * 64
    batch.prepare([make_slice(1, 1, 0, [4])])
    assert batch.buffer.host["slot_mapping"][0] == 4 * 64
    with pytest.raises(ValueError, match="slot 1: its block table is too short"):
        batch.prepare([make_slice(1, 1, 64, [4], fresh=False)])


def test_a_spread_step_has_a_sequence_a_token() -> None:
    batch = make_batch(max_seqs=2, max_spread=8)
    batch.spread(batch.prepare([make_slice(1, 3, 62, [7, 3]), make_slice(0, 2, 10, [4])]))
    batch.pad_decode(5, 8)
    host = batch.buffer.host
    assert host["token_ids"][:8].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert host["positions"][:8].tolist() == [62, 63, 64, 10, 11, 0, 0, 0]
    assert host["context_lens"].tolist() == [63, 64, 65, 11, 12, 1, 1, 1]
    assert host["cu_seqlens_q"].tolist() == list(range(9))
    assert host["block_tables"][:, 0].tolist() == [7, 7, 7, 4, 4, 0, 0, 0]
    expected = [7 * 64 + 62, 7 * 64 + 63, 3 * 64, 4 * 64 + 10, 4 * 64 + 11, -1, -1, -1]
    assert host["slot_mapping"][:8].tolist() == expected
    assert batch.prepare([make_slice(1, 1, 65, [7, 3], fresh=False)]).decode_only


def test_padding_of_decode_steps() -> None:
    batch = make_batch()
    slices = [make_slice(slot, 1, 10, [slot]) for slot in range(3)]
    batch.prepare(slices)
    batch.pad_decode(3, 4)
    host = batch.buffer.host
    assert host["cu_seqlens_q"].tolist() == [0, 1, 2, 3, 4]
    assert (host["slot_mapping"][3], host["context_lens"][3], host["positions"][3]) == (-1, 1, 0)
    assert host["slot_mapping"][:3].tolist() == [10, 74, 138]


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([], "a step has 0 sequences, the limit is 4"),
        ([make_slice(i, 1, 0, [0]) for i in range(5)], "a step has 5 sequences"),
        ([make_slice(0, 257, 0, [0, 1, 2, 3, 4])], "a step has 257 tokens, the limit is 256"),
        ([make_slice(0, 0, 0, [0]), make_slice(1, 1, 0, [0])], "a step has 1 tokens"),
        ([make_slice(0, 65, 0, [0])], "slot 0: its block table is too short"),
        ([make_slice(0, 1, 0, [16])], "request request-0: block table of 1 blocks"),
        ([make_slice(0, 1, 0, [-1])], "request request-0: block table"),
        ([make_slice(0, 1, 0, [0, 1, 2, 3, 4])], "block table of 5 blocks, at most 4"),
        ([make_slice(0, 1, 0, [0], token_ids=[1000])], "token id 1000 is outside the vocabulary"),
        ([make_slice(0, 1, 0, [0], token_ids=[-3])], "token id -3 is outside the vocabulary"),
    ],
)
def test_steps_that_would_touch_foreign_memory_are_refused(
    slices: list[SequenceSlice], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_batch().prepare(slices)


def test_fixed_tensors_are_still_checked() -> None:
    """Remembering a view must not let another shape, dtype or later value slip through."""
    x, out = (ops.fix(paddle.ones([2, 4], "float32")) for _ in range(2))
    norm = ops.fix(paddle.ones([4], "float32"))
    for value in (1.0, 5.0):
        np.from_dlpack(norm)[:] = value
        ops.rms_norm(x, norm, 0.0, out)
        assert out.numpy().tolist() == [[value] * 4] * 2
    with pytest.raises(ValueError, match="weight has shape"):
        ops.rms_norm(x, ops.fix(paddle.ones([5], "float32")), 0.0, out)
    with pytest.raises(TypeError, match="out has dtype"):
        ops.rms_norm(x, norm, 0.0, ops.fix(paddle.ones([2, 4], "int32")))
    ops.rms_norm(x, norm, 0.0, out)


class RandomDecodes:
    """Up to four sequences that come, leave, change places and get new blocks."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.free = self.random.permutation(64).tolist()
        self.lengths: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}

    def admit(self) -> SequenceSlice | None:
        """The prompt of a new sequence, now and then."""
        if len(self.lengths) == 4 or self.random.random() > 0.05:
            return None
        slot = min(set(range(4)) - set(self.lengths))
        length = int(self.random.integers(1, 200))
        self.lengths[slot] = length
        self.blocks[slot] = [self.free.pop() for _ in range(-(-length // 64))]
        return make_slice(slot, length, 0, list(self.blocks[slot]))

    def leave(self) -> None:
        for slot, length in list(self.lengths.items()):
            if length >= 600 or self.random.random() < 0.01:
                self.free += self.blocks.pop(slot)
                del self.lengths[slot]

    def step(self) -> list[SequenceSlice]:
        order = [slot for slot in self.lengths if self.random.random() < 0.97]
        if self.random.random() < 0.05:
            order.reverse()
        return [self._decode(slot) for slot in order]

    def _decode(self, slot: int) -> SequenceSlice:
        start, blocks = self.lengths[slot], self.blocks[slot]
        if start // 64 >= len(blocks):
            blocks += [self.free.pop() for _ in range(int(self.random.integers(1, 3)))]
        self.lengths[slot] += 1
        token = int(self.random.integers(0, 1000))
        return make_slice(slot, 1, start, list(blocks), False, token_ids=[token])


def test_steps_prepared_ahead_equal_those_prepared_anew() -> None:
    limits = {"max_model_len": 640}
    sequences, ahead = RandomDecodes(3), make_batch(**limits)
    ahead.num_blocks, continued = 64, 0
    for _ in range(400):
        prompt = sequences.admit()
        if prompt is not None:
            ahead.prepare([prompt])
        sequences.leave()
        slices = sequences.step()
        if not slices:
            continue
        expected = [entry[:2] for entry in ahead._expected]
        continued += expected == [(part.slot, part.start) for part in slices]
        anew = make_batch(**limits)
        anew.num_blocks = 64
        shape = anew.prepare([replace(part, fresh=True) for part in slices])
        assert ahead.prepare(slices) == shape
        for batch in (ahead, anew):
            batch.pad_decode(len(slices), 4)
        for name in ("cu_seqlens_q", "context_lens", "token_ids", "positions", "slot_mapping"):
            count = 5 if name == "cu_seqlens_q" else 4
            found, wanted = (batch.buffer.host[name][:count] for batch in (ahead, anew))
            np.testing.assert_array_equal(found, wanted, name)
        for row, part in enumerate(slices):
            found = ahead.buffer.host["block_tables"][row, : len(part.block_table)]
            assert found.tolist() == list(part.block_table)
        ahead.prepare_next()
    assert continued > 200


@pytest.mark.parametrize(
    "change",
    [{"token_ids": [1000]}, {"token_ids": [-1]}, {"start": 64}, {"block_table": [3, 16]}],
)
def test_a_bad_step_is_refused_when_a_good_one_was_expected(change: dict[str, Any]) -> None:
    batch = make_batch()
    batch.prepare([make_slice(0, 62, 0, [3])])
    batch.prepare([make_slice(0, 1, 62, [3], fresh=False)])
    batch.prepare_next()
    bad = replace(make_slice(0, 1, 63, [3], fresh=False), **change)
    with pytest.raises(ValueError, match=r"token id|block table"):
        batch.prepare([bad])
    batch.prepare([make_slice(0, 1, 63, [3], fresh=False)])
    assert batch.buffer.host["slot_mapping"][0] == 3 * 64 + 63
