"""Every form of a checkpoint reads to the same numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import (
    KINDS,
    Kind,
    split_fused,
    tiny_config,
    tiny_tensors,
    write_tensors,
    write_tiny_model,
)

from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import (
    LinearArrays,
    expected_nbytes,
    rank_linears,
    read_embedding,
    read_linear,
    read_lm_head,
    read_router,
    read_vector,
    verify,
)
from fastdeploy_lite.checkpoint.linears import Linear, model_linears
from fastdeploy_lite.checkpoint.tensor import bfloat16_to_float32, float32_to_bfloat16
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.formats.tiles import unpack_int4, unpack_int8
from fastdeploy_lite.quantization import ccq

EXPERT = "ernie.layers.1.mlp.experts.0.down_proj"
Tensors = dict[str, Any]


def dequantize(linear: LinearArrays) -> np.ndarray:
    """Return float32 [K, N] of arrays in file layout."""
    arrays = linear.arrays
    if linear.kind == "dense":
        weight = arrays["weight"]
        return bfloat16_to_float32(weight) if weight.dtype == np.uint16 else weight
    if linear.kind == "ccq":
        return ccq.decode(
            arrays["quant_weight"],
            arrays["weight_scale"],
            arrays["super_scales"],
            arrays["code_scale"],
            arrays["code_zp"],
        )
    unpack = unpack_int8 if linear.kind == "int8" else unpack_int4
    return unpack(arrays["quant_weight"]).astype(np.float32) * arrays["weight_scale"]


def weights(checkpoint: Checkpoint) -> dict[str, tuple[Linear, np.ndarray]]:
    verify(checkpoint)
    return {
        linear.module: (linear, dequantize(read_linear(checkpoint, linear)))
        for linear in rank_linears(checkpoint)
    }


def assert_same_weights(first: Checkpoint, second: Checkpoint) -> None:
    expected, found = weights(first), weights(second)
    assert expected.keys() == found.keys()
    for module, (_, weight) in expected.items():
        np.testing.assert_array_equal(found[module][1], weight, err_msg=module)


def variant(folder: Path, kind: Kind, change: Callable[[Tensors], Tensors | None]) -> Checkpoint:
    """Write a two-layer model after `change` of its tensors; open it."""
    config = tiny_config(kind, layers=2, experts=2, vocab_size=64, tied=False)
    tensors = tiny_tensors(config)
    tensors = change(tensors) or tensors
    write_tensors(folder, config, tensors)
    return Checkpoint.open(folder)


def unchanged(tensors: Tensors) -> None:
    """Leave the tensors as they are."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [0, 2])
def test_weights_are_those_written(tmp_path: Path, kind: Kind, shared: int) -> None:
    write_tiny_model(tmp_path, kind=kind, layers=3, vocab_size=64, shared_experts=shared)
    checkpoint = Checkpoint.open(tmp_path)
    tensors = tiny_tensors(tiny_config(kind, layers=3, vocab_size=64, shared_experts=shared))
    assert set(checkpoint.keys()) == set(tensors)
    for key, (array, dtype) in tensors.items():
        tensor = checkpoint.get(key)
        assert (tensor.dtype, tensor.shape) == (dtype, array.shape)
        np.testing.assert_array_equal(tensor.data, array)
        assert not tensor.data.flags.writeable
    assert expected_nbytes(checkpoint) == checkpoint.nbytes
    for linear, weight in weights(checkpoint).values():
        assert weight.shape == (linear.in_features, linear.out_features)
        deviation = weight.std() * np.sqrt(linear.in_features)
        assert 0.8 < deviation < 1.25, linear.module


def test_demo_decodes_to_plausible_weights(demo_dir: Path) -> None:
    checkpoint = Checkpoint.open(demo_dir)
    found = weights(checkpoint)
    assert len(found) == 7 * 2 + 2 + 6 * (16 + 1) * 2
    for linear, weight in found.values():
        assert np.isfinite(weight).all()
        assert 0.02 < weight.std() * np.sqrt(linear.in_features) < 5, linear.module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("presharded", [False, True])
def test_two_ranks_hold_the_whole_model(tmp_path: Path, kind: Kind, presharded: bool) -> None:
    whole = write_tiny_model(tmp_path / "whole", kind=kind, vocab_size=64, tied=False)
    folder = whole
    if presharded:
        folder = tmp_path / "ranks"
        write_tiny_model(folder, kind=kind, vocab_size=64, tied=False, tensor_parallel_size=2)
    reference = Checkpoint.open(whole)
    full = weights(reference)
    ranks = [Checkpoint.open(folder, 2, rank) for rank in range(2)]
    assert all(checkpoint.is_presharded == presharded for checkpoint in ranks)
    for checkpoint in ranks:
        for module, (linear, part) in weights(checkpoint).items():
            columns = np.concatenate([np.arange(a, b) for a, b in linear.column_ranges])
            rows = np.arange(*linear.row_range)
            np.testing.assert_array_equal(part, full[module][1][np.ix_(rows, columns)], module)
    tables = [read_embedding(checkpoint) for checkpoint in ranks]
    np.testing.assert_array_equal(np.concatenate(tables), read_embedding(reference))
    heads = [read_lm_head(checkpoint) for checkpoint in ranks]
    whole_head = read_lm_head(reference)
    assert whole_head is not None
    parts = [head[0] for head in heads if head is not None]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole_head[0])


def test_ranks_share_key_value_heads_when_there_are_more_of_them() -> None:
    config = ModelConfig.from_dict(tiny_config("bf16", num_key_value_heads=1))
    heads = [next(model_linears(config, 4, rank)) for rank in range(4)]
    assert [linear.column_ranges[0] for linear in heads] == [
        (64 * rank, 64 * rank + 64) for rank in range(4)
    ]
    assert {linear.column_ranges[1:] for linear in heads} == {((256, 320), (320, 384))}
    assert all(linear.out_features == 192 for linear in heads)


@pytest.mark.parametrize("kind", ["bf16", "w4w2"])
def test_shards_and_pickles_hold_the_same(tmp_path: Path, kind: Kind) -> None:
    single = write_tiny_model(tmp_path / "single", kind=kind, vocab_size=64)
    shards = write_tiny_model(tmp_path / "shards", kind=kind, vocab_size=64, shard_bytes=1 << 17)
    pickled = write_tiny_model(tmp_path / "p", kind=kind, vocab_size=64, file_format="pdparams")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert_same_weights(Checkpoint.open(single), Checkpoint.open(shards))
    assert_same_weights(Checkpoint.open(single), Checkpoint.open(pickled))


def as_signed(tensors: Tensors) -> None:
    for key, (array, dtype) in tensors.items():
        if dtype == "U8":
            tensors[key] = (array.view(np.int8), "I8")


def singular_super_scale(tensors: Tensors) -> None:
    for key in [key for key in tensors if key.endswith(".super_scales")]:
        tensors[key.removesuffix("s")] = tensors.pop(key)


def float_scales(tensors: Tensors) -> None:
    for key, (array, dtype) in tensors.items():
        if key.endswith((".weight_scale", ".super_scales")) and dtype == "BF16":
            tensors[key] = (bfloat16_to_float32(array), "F32")


def int_bytes_unsigned(tensors: Tensors) -> None:
    for key, (array, dtype) in tensors.items():
        if dtype == "I8":
            tensors[key] = (array.view(np.uint8), "U8")


@pytest.mark.parametrize(
    "change", [as_signed, singular_super_scale, float_scales, int_bytes_unsigned]
)
def test_other_spellings_of_quantised_tensors(tmp_path: Path, change: Any) -> None:
    plain = variant(tmp_path / "plain", "w4w2", unchanged)
    two_bit = variant(tmp_path / "plain2", "2bits", unchanged)
    assert_same_weights(plain, variant(tmp_path / "other", "w4w2", change))
    assert_same_weights(two_bit, variant(tmp_path / "other2", "2bits", change))


def test_separate_query_key_value_gate_and_up(tmp_path: Path) -> None:
    config = tiny_config("bf16", layers=2, experts=2, vocab_size=64)
    tensors = tiny_tensors(config)
    write_tensors(tmp_path / "fused", config, tensors)
    apart = split_fused(config, tensors)
    assert "ernie.layers.0.self_attn.k_proj.weight" in apart
    assert "ernie.layers.0.self_attn.qkv_proj.weight" not in apart
    write_tensors(tmp_path / "apart", config, apart)
    assert_same_weights(Checkpoint.open(tmp_path / "fused"), Checkpoint.open(tmp_path / "apart"))
    for rank in range(2):
        assert_same_weights(
            Checkpoint.open(tmp_path / "fused", 2, rank),
            Checkpoint.open(tmp_path / "apart", 2, rank),
        )


def test_parts_of_mixed_types_are_fused_as_float32(tmp_path: Path) -> None:
    config = tiny_config("bf16", layers=1, experts=2, vocab_size=64)
    tensors = split_fused(config, tiny_tensors(config))
    key = "ernie.layers.0.self_attn.k_proj.weight"
    tensors[key] = (bfloat16_to_float32(tensors[key][0]), "F32")
    write_tensors(tmp_path, config, tensors)
    checkpoint = Checkpoint.open(tmp_path)
    fused = read_linear(checkpoint, next(rank_linears(checkpoint))).arrays["weight"]
    assert fused.dtype == np.float32
    np.testing.assert_array_equal(fused[:, 256:384], tensors[key][0])


@pytest.mark.parametrize("kind", ["bf16", "2bits"])
def test_head_in_either_orientation(tmp_path: Path, kind: Kind) -> None:
    def transpose(tensors: Tensors) -> None:
        head, dtype = tensors["lm_head.weight"]
        tensors["lm_head.weight"] = (np.ascontiguousarray(head.T), dtype)

    plain = read_lm_head(variant(tmp_path / "plain", kind, unchanged))
    turned = read_lm_head(variant(tmp_path / "turned", kind, transpose))
    assert plain is not None
    assert turned is not None
    assert (plain[1], turned[1]) == (False, True)
    np.testing.assert_array_equal(turned[0].T, plain[0])


def test_tied_head_is_absent_unless_the_files_have_one(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tied", layers=1, vocab_size=64)
    assert read_lm_head(Checkpoint.open(tmp_path / "tied")) is None
    config = tiny_config(layers=1, vocab_size=64)
    tensors = tiny_tensors({**config, "tie_word_embeddings": False})
    write_tensors(tmp_path / "both", config, tensors)
    checkpoint = Checkpoint.open(tmp_path / "both")
    verify(checkpoint)
    assert read_lm_head(checkpoint) is not None


def test_router_types_and_shapes(tmp_path: Path) -> None:
    gate, bias = (
        "ernie.layers.1.mlp.gate.weight",
        ("ernie.layers.1.mlp.moe_statics.e_score_correction_bias"),
    )

    def change(tensors: Tensors) -> None:
        tensors[gate] = (float32_to_bfloat16(tensors[gate][0]), "BF16")
        tensors[bias] = (tensors[bias][0].reshape(-1), "F32")

    plain = read_router(variant(tmp_path / "plain", "2bits", unchanged), 1)
    other = read_router(variant(tmp_path / "other", "2bits", change), 1)
    assert plain[1] is not None
    assert other[1] is not None
    np.testing.assert_allclose(other[0], plain[0], rtol=2**-8)
    np.testing.assert_array_equal(other[1], plain[1])
    assert other[1].shape == (2,)


def test_no_selection_bias_without_aux_free(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, layers=2, vocab_size=64, moe_use_aux_free=False)
    checkpoint = Checkpoint.open(tmp_path)
    verify(checkpoint)
    assert read_router(checkpoint, 1)[1] is None


@pytest.mark.parametrize(("w4_end", "kind"), [(0, "w4w2"), (1, "2bits")])
def test_files_are_believed_before_the_layer_index(tmp_path: Path, w4_end: int, kind: Kind) -> None:
    """config.json says ccq where the experts are int4 (and the other way round)."""
    config = tiny_config(kind, layers=2, experts=2, vocab_size=64)
    honest = tmp_path / "honest"
    write_tensors(honest, config, tiny_tensors(config))
    scheme = config["quantization_config"]["moe_quant_config"]
    assert scheme["moe_w4_quant_config"]["quant_end_layer"] != w4_end
    scheme["moe_w4_quant_config"]["quant_end_layer"] = w4_end
    lying = tmp_path / "lying"
    lying_config = dict(config)
    write_tensors(
        lying, lying_config, tiny_tensors(tiny_config(kind, layers=2, experts=2, vocab_size=64))
    )
    assert_same_weights(Checkpoint.open(honest), Checkpoint.open(lying))


def test_norms_are_float32(tmp_path: Path) -> None:
    checkpoint = variant(tmp_path, "bf16", unchanged)
    norm = read_vector(checkpoint, "ernie.norm.weight", 128)
    assert norm.dtype == np.float32
    assert 0.5 <= norm.min() <= norm.max() <= 1.5


def test_bfloat16_conversion_rounds_to_nearest_even() -> None:
    values = np.float32([1.0, 1.00390625, 1.01171875, -2.5, 1e-40, 3.4e38, np.inf, np.nan])
    back = bfloat16_to_float32(float32_to_bfloat16(values))
    expected = np.float32([1.0, 1.0, 1.015625, -2.5, 9.183549615799121e-41, np.inf, np.inf, np.nan])
    np.testing.assert_array_equal(back, expected)
    bits = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(
        float32_to_bfloat16(bfloat16_to_float32(bits)) & 0xFFBF, bits & 0xFFBF
    )


MEASURE = """
import sys
import numpy as np
from pathlib import Path
from fastdeploy_lite.checkpoint import Checkpoint

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))

checkpoint = Checkpoint.open(sys.argv[1])
before, total = memory("VmHWM"), 0
for key in checkpoint.keys():
    total += int(checkpoint.get(key).data.sum(dtype=np.uint64))
    checkpoint.release()
print(memory("VmHWM") - before, total)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_reading_all_keeps_less_than_a_shard(tmp_path: Path) -> None:
    size = 8 << 20
    random = np.random.default_rng(0)
    tensors = {f"t{i}": (random.integers(0, 256, size, np.uint8), "U8") for i in range(12)}
    write_tensors(tmp_path, tiny_config(), tensors, shard_bytes=3 * size)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    grown, total = map(int, result.stdout.split())
    assert total == sum(int(array.sum(dtype=np.uint64)) for array, _ in tensors.values())
    assert grown < 2 * size  # of 12: one tensor and change
