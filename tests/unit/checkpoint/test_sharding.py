"""Which part of each matrix a rank has: all of it once, in whole steps, and nobody else's pages."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import KINDS, tiny_config, tiny_tensors, write_tensors

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import (
    rank_linears,
    read_embedding,
    read_linear,
    read_lm_head,
)
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.models.sharding import Shard, obstacle
from fastdeploy_lite.utils.errors import CheckpointError

NAN = np.uint16(0x7FC0)  # bf16


@given(
    kind=st.sampled_from(KINDS),
    steps=st.integers(1, 40),
    heads=st.sampled_from([(4, 2), (6, 2), (8, 1), (12, 4), (64, 8)]),
    size=st.sampled_from([1, 2, 3, 4, 6, 8, 16]),
)
def test_ranks_together_have_everything_once(
    kind: Any, steps: int, heads: tuple[int, int], size: int
) -> None:
    queries, pairs = heads
    config = ModelConfig.from_dict(
        tiny_config(
            kind,
            moe_intermediate_size=128 * steps,
            num_attention_heads=queries,
            num_key_value_heads=pairs,
            head_dim=64,
            vocab_size=48 * 64,
        )
    )
    if obstacle(config, size) is not None:
        return
    kind = config.expert_kind(config.num_hidden_layers - 1)
    unit, width = formats.get(kind).row_unit, 128 * steps
    parts = [Shard(config, size, rank).mlp("m", 2, width, kind, 0) for rank in range(size)]
    edges = [down.row_range for _, down in parts]
    assert [edge[0] for edge in edges] == [0, *(edge[1] for edge in edges[:-1])]
    assert edges[-1][1] == width
    assert all(start % unit == stop % unit == 0 for start, stop in edges)
    assert max(b - a for a, b in edges) - min(b - a for a, b in edges) <= unit
    for up_gate, down in parts:
        start, stop = down.row_range
        assert up_gate.column_ranges == ((start, stop), (width + start, width + stop))
    queries_of = []
    for rank in range(size):
        shard = Shard(config, size, rank)
        query, key, value = shard.qkv("a", 0).column_ranges
        assert query == shard.o_proj("a", 0).row_range
        first = key[0] - 64 * queries
        assert value[0] - key[0] == value[1] - key[1] == 64 * pairs
        # A rank's queries read its own keys, in the grouping of the whole model.
        group, own = queries // pairs, (query[1] - query[0]) // 64
        local = own // ((key[1] - key[0]) // 64)
        for at in range(own):
            assert (query[0] // 64 + at) // group == first // 64 + at // local
        queries_of.append(query)
    assert queries_of[0][0] == 0
    assert queries_of[-1][1] == 64 * queries
    assert all(a[1] == b[0] for a, b in pairwise(queries_of))


@given(steps=st.integers(1, 60), size=st.sampled_from([1, 2, 4, 8]), more=st.sampled_from([2, 4]))
def test_few_ranks_can_be_cut_further(steps: int, size: int, more: int) -> None:
    config = ModelConfig.from_dict(tiny_config("2bits"))
    few = {at for r in range(size) for at in Shard(config, size, r)._split(128 * steps, 128)}
    many = {
        at
        for r in range(size * more)
        for at in Shard(config, size * more, r)._split(128 * steps, 128)
    }
    assert few <= many


MODULES = ("ernie.layers.0.self_attn.qkv_proj", "ernie.layers.0.self_attn.o_proj",
           "ernie.layers.0.mlp.up_gate_proj", "ernie.layers.0.mlp.down_proj")  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_does_not_read_what_another_one_has(tmp_path: Path, rank: int) -> None:
    """Numbers that are none are found by the rank that has them, and by nobody else."""
    config = tiny_config("bf16", tied=False)
    tensors = tiny_tensors(config)
    model = ModelConfig.from_dict(config)
    other = {one.module: one for one in model.family.linears(model, 2, 1 - rank)}
    for module in MODULES:
        matrix, dtype = tensors[f"{module}.weight"]
        matrix = matrix.copy()
        rows, columns = slice(*other[module].row_range), slice(*other[module].column_ranges[0])
        matrix[rows, columns] = NAN
        tensors[f"{module}.weight"] = (matrix, dtype)
    half = slice((1 - rank) * model.vocab_size // 2, (2 - rank) * model.vocab_size // 2)
    table, head = (tensors[k][0].copy() for k in ("ernie.embed_tokens.weight", "lm_head.weight"))
    table[half], head[:, half] = NAN, NAN
    tensors |= {"ernie.embed_tokens.weight": (table, "BF16"), "lm_head.weight": (head, "BF16")}
    write_tensors(tmp_path, config, tensors)

    def reads(of: int) -> list[Any]:
        checkpoint = Checkpoint.open(tmp_path, 2, of)
        linears = {linear.module: linear for linear in rank_linears(checkpoint)}
        return [
            *(lambda m=m: read_linear(checkpoint, linears[m]) for m in MODULES),
            lambda: read_embedding(checkpoint),
            lambda: read_lm_head(checkpoint),
        ]

    for read in reads(rank):
        read()
    for read in reads(1 - rank):
        with pytest.raises(CheckpointError, match="expected finite values"):
            read()
