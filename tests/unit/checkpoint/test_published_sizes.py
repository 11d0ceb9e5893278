"""The 300B model's inventory: published shapes and total size, from config.json alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tiny_model import tiny_config

from fastdeploy_lite.checkpoint.inventory import (
    ExpectedTensor,
    expected_linear_tensors,
    expected_plain_tensors,
)
from fastdeploy_lite.checkpoint.linears import check_tensor_parallel, model_linears
from fastdeploy_lite.checkpoint.tensor import DTYPES
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.utils.errors import ConfigError


class NoFiles:
    """A checkpoint of which only config.json, the degree of its shards and its head are known."""

    rank = 0

    def __init__(self, config: ModelConfig, tensor_parallel_size: int) -> None:
        self.config = config
        self.tensor_parallel_size = tensor_parallel_size
        self.is_presharded = tensor_parallel_size > 1

    def __contains__(self, key: object) -> bool:
        return key == "lm_head.weight" and not self.config.tie_word_embeddings


def model_300b(tied: bool = False) -> ModelConfig:
    config = tiny_config(
        "2bits",
        layers=54,
        experts=64,
        tied=tied,
        shared_experts=0,
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=28672,
        vocab_size=103424,
        moe_k=8,
        moe_intermediate_size=3584,
        moe_layer_start_index=3,
    )
    moe: dict[str, Any] = config["quantization_config"]["moe_quant_config"]
    moe["moe_w4_quant_config"]["quant_end_layer"] = 6
    return ModelConfig.from_dict(config)


def inventory(config: ModelConfig, size: int = 1) -> dict[str, ExpectedTensor]:
    checkpoint: Any = NoFiles(config, size)
    tensors = {expected.key: expected for expected in expected_plain_tensors(checkpoint)}
    for linear in model_linears(config, size):
        for expected in expected_linear_tensors(checkpoint, linear, linear.kind):
            tensors[expected.key] = expected
    return tensors


def nbytes(expected: ExpectedTensor) -> int:
    """Bytes in the released dtypes: the router in float32, the first accepted one elsewhere."""
    is_router = ".gate." in expected.key or "e_score" in expected.key
    dtype = "F32" if is_router else expected.dtypes[0]
    return math.prod(expected.shapes[0]) * DTYPES[dtype].itemsize


@pytest.mark.parametrize(("tied", "gigabytes"), [(False, 93.8), (True, 92.1)])
def test_total_size(tied: bool, gigabytes: float) -> None:
    total = sum(map(nbytes, inventory(model_300b(tied)).values()))
    assert round(total / 1e9, 1) == gigabytes


LAYER, INT4_LAYER, CCQ_LAYER = "ernie.layers.0", "ernie.layers.6.mlp", "ernie.layers.7.mlp"
SHAPES = [
    (f"{LAYER}.self_attn.qkv_proj.quant_weight", [(10240, 8192), (5120, 8192), (2560, 8192)]),
    (f"{LAYER}.self_attn.o_proj.quant_weight", [(8192, 8192), (8192, 4096), (8192, 2048)]),
    (f"{LAYER}.mlp.up_gate_proj.quant_weight", [(57344, 8192), (28672, 8192), (14336, 8192)]),
    (f"{LAYER}.mlp.down_proj.quant_weight", [(8192, 28672), (8192, 14336), (8192, 7168)]),
    (
        f"{INT4_LAYER}.experts.0.up_gate_proj.quant_weight",
        [(3584, 8192), (1792, 8192), (896, 8192)],
    ),
    (f"{INT4_LAYER}.experts.0.up_gate_proj.weight_scale", [(7168,), (3584,), (1792,)]),
    (f"{INT4_LAYER}.experts.63.down_proj.quant_weight", [(4096, 3584), (4096, 1792), (4096, 896)]),
    (
        f"{CCQ_LAYER}.experts.0.up_gate_proj.quant_weight",
        [(2048, 7168), (2048, 3584), (2048, 1792)],
    ),
    (f"{CCQ_LAYER}.experts.0.up_gate_proj.weight_scale", [(64, 7168), (64, 3584), (64, 1792)]),
    (f"{CCQ_LAYER}.experts.0.up_gate_proj.code_zp", [(7168,), (3584,), (1792,)]),
    (f"{CCQ_LAYER}.experts.9.down_proj.quant_weight", [(896, 8192), (448, 8192), (224, 8192)]),
    (f"{CCQ_LAYER}.experts.9.down_proj.weight_scale", [(28, 8192), (14, 8192), (7, 8192)]),
    (f"{CCQ_LAYER}.experts.9.down_proj.super_scales", [(8192,), (8192,), (8192,)]),
    ("ernie.embed_tokens.weight", [(103424, 8192), (51712, 8192), (25856, 8192)]),
    ("lm_head.weight", [(8192, 103424), (8192, 51712), (8192, 25856)]),
]


@pytest.mark.parametrize(("index", "size"), [(0, 1), (1, 2), (2, 4)])
def test_shapes(index: int, size: int) -> None:
    config = model_300b()
    check_tensor_parallel(config, size)
    tensors = inventory(config, size)
    for key, shapes in SHAPES:
        assert tensors[key].shapes[0] == shapes[index], key


def test_one_expert_of_two_bits() -> None:
    module = "ernie.layers.30.mlp.experts.5."
    parts = [e for key, e in inventory(model_300b()).items() if key.startswith(module)]
    assert len(parts) == 10
    assert sum(map(nbytes, parts)) == 22_861_824


def test_eight_ranks_get_three_or_four_steps_of_128_rows() -> None:
    config = model_300b()
    check_tensor_parallel(config, 8)
    rows = []
    for rank in range(8):
        linears = {linear.module: linear for linear in model_linears(config, 8, rank)}
        down = linears[f"{CCQ_LAYER}.experts.9.down_proj"]
        gate, up = linears[f"{CCQ_LAYER}.experts.9.up_gate_proj"].column_ranges
        assert gate == down.row_range
        assert up == tuple(3584 + at for at in down.row_range)
        rows.append(down.in_features // 128)
    assert sorted(rows) == [3] * 4 + [4] * 4
    with pytest.raises(ConfigError, match=r"size 3: 8 KV heads neither divide nor can be repeated"):
        check_tensor_parallel(config, 3)
