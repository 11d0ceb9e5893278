"""Damaged and contradictory checkpoints: one line that names file, key, found and expected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import tiny_config, tiny_tensors, write_tensors, write_tiny_model

from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import (
    rank_linears,
    read_embedding,
    read_linear,
    read_lm_head,
    read_vector,
    verify,
)
from fastdeploy_lite.checkpoint.tensor import float32_to_bfloat16
from fastdeploy_lite.quantization.split import split_checkpoint
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError, FastDeployError

EXPERT = "ernie.layers.1.mlp.experts.0.down_proj"
Change = Callable[[dict[str, Any]], None]


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors file with an arbitrary header (an object, or bytes as they are)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def load_all(folder: Path, size: int = 1, rank: int = 0) -> None:
    """Everything that the loader does: open, verify, read all."""
    checkpoint = Checkpoint.open(folder, size, rank)
    verify(checkpoint)
    for linear in rank_linears(checkpoint):
        read_linear(checkpoint, linear)
    read_vector(checkpoint, "ernie.norm.weight", checkpoint.config.hidden_size)
    read_embedding(checkpoint)
    read_lm_head(checkpoint)


def refused(folder: Path, *parts: str, size: int = 1) -> str:
    with pytest.raises(FastDeployError) as caught:
        load_all(folder, size)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return tiny_config("2bits", layers=2, experts=2, vocab_size=64)


@pytest.fixture
def tensors(config: dict[str, Any]) -> dict[str, Any]:
    return tiny_tensors(config)


@pytest.mark.parametrize(
    ("header", "data", "length", "part"),
    [
        (b"", b"", None, "JSON"),
        (b"{", b"", None, "JSON"),
        (b"[" * 50_000, b"", None, "JSON"),
        (b"[1, 2]", b"", None, "JSON object"),
        (b"\xff\xfe{}", b"", None, "JSON"),
        (b"{}", b"", 1 << 40, "not a safetensors file"),
        (b"{}", b"", 1000, "truncated"),
        ({"a": 3}, b"", None, "a: header entry 3"),
        ({"a": {"dtype": "F32"}}, b"", None, "a: header entry"),
        ({"a": entry("Q7", [1], 0, 4)}, b"1234", None, "a: found dtype 'Q7'"),
        ({"a": entry("F32", [-1], 0, 4)}, b"1234", None, "a: found shape [-1]"),
        ({"a": entry("F32", [1.0], 0, 4)}, b"1234", None, "a: found shape"),  # type: ignore[list-item]
        ({"a": entry("F32", [True], 0, 4)}, b"1234", None, "a: found shape"),
        ({"a": entry("F32", [1], 4, 0)}, b"1234", None, "a: found -4 bytes"),
        ({"a": entry("F32", [2], 0, 4)}, b"1234", None, "a: found 4 bytes of data, expected 8"),
        ({"a": entry("F32", [1 << 40, 1 << 40], 0, 4)}, b"1234", None, "a: found 4 bytes"),
        ({"a": entry("F32", [2], 0, 8)}, b"1234", None, "truncated"),
        ({"a": entry("F32", [1], 0, 4)}, b"12345", None, "1 bytes after the last tensor"),
        ({"a": entry("F32", [1], 4, 8)}, b"12345678", None, "leave a gap"),
        (
            {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)},
            b"123456",
            None,
            "b: data at [2, 6] overlap",
        ),
        (
            b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b' "a": {"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"12",
            None,
            "'a' occurs twice",
        ),
        ({"__metadata__": 3, "a": entry("U8", [1], 0, 1)}, b"1", None, "safetensors library"),
    ],
)
def test_bad_headers(
    tmp_path: Path, header: Any, data: bytes, length: int | None, part: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
    file = raw_file(tmp_path / "model.safetensors", header, data, length)
    refused(tmp_path, str(file), part)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "model.safetensors", "found 0 bytes", "the file is empty")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    refused(tmp_path, "model.safetensors", "found 4 bytes", "the file is truncated")


def test_newlines_in_names_cannot_forge_log_lines(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
    raw_file(tmp_path / "model.safetensors", {"a\nERROR all is lost\x1b[2J": 3})
    message = refused(tmp_path, "a\\nERROR")
    assert "\x1b" not in message


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_truncated_data(tmp_path: Path, cut: int) -> None:
    file = write_tiny_model(tmp_path, layers=2, vocab_size=64) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    refused(tmp_path, str(file), "truncated")


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_signal(tmp_path: Path) -> None:
    file = write_tiny_model(tmp_path, layers=2, vocab_size=64) / "model.safetensors"
    checkpoint = Checkpoint.open(tmp_path)
    with file.open("r+b") as handle:
        handle.truncate(4096)
    with pytest.raises(CheckpointError, match="shrank"):
        checkpoint.get("ernie.norm.weight")


def test_missing_tensor(tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any]) -> None:
    del tensors[f"{EXPERT}.code_zp"]
    write_tensors(tmp_path, config, tensors)
    message = refused(
        tmp_path, "model.safetensors", f"{EXPERT}.code_zp", "found nothing", "expected F32 [128]"
    )
    assert "more problems" not in message


def test_all_problems_are_counted(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any]
) -> None:
    for suffix in ("code_zp", "code_scale", "super_scales"):
        del tensors[f"ernie.layers.1.mlp.experts.1.down_proj.{suffix}"]
    tensors["ernie.norm.weight"] = (np.zeros(7, np.uint16), "BF16")
    write_tensors(tmp_path, config, tensors)
    refused(tmp_path, "ernie.norm.weight: found BF16 [7], expected BF16/F32 [128]", "(and 3 more")


def test_unknown_tensors_are_ignored(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any]
) -> None:
    tensors["ernie.layers.1.mlp.moe_statics.expert_usage"] = (np.zeros(2, np.int64), "I64")
    tensors["ernie.mtp_block.0.input_layernorm.weight"] = (np.zeros(9, np.uint16), "BF16")
    write_tensors(tmp_path, config, tensors)
    load_all(tmp_path)


def test_biases_are_refused(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any]
) -> None:
    tensors["ernie.layers.0.self_attn.o_proj.bias"] = (np.zeros(128, np.uint16), "BF16")
    write_tensors(tmp_path, config, tensors)
    refused(tmp_path, "ernie.layers.0.self_attn.o_proj.bias", "biases are not supported")


@pytest.mark.parametrize(
    ("key", "array", "dtype", "wanted"),
    [
        (f"{EXPERT}.quant_weight", np.zeros((64, 128), np.int32), "I32", "U8/I8 [64, 128]"),
        (f"{EXPERT}.quant_weight", np.zeros((128, 64), np.uint8), "U8", "[64, 128]"),
        (f"{EXPERT}.weight_scale", np.zeros((4, 128), np.uint8), "U8", "[2, 128]"),
        (f"{EXPERT}.super_scales", np.zeros(128, np.uint8), "U8", "BF16/F32 [128]"),
        (f"{EXPERT}.code_scale", np.zeros(128, np.uint16), "BF16", "F32 [128]"),
        ("ernie.layers.0.mlp.down_proj.quant_weight", np.zeros((64, 256), np.int8), "I8", "[128"),
        ("ernie.layers.0.mlp.down_proj.weight_scale", np.zeros(128, np.int8), "I8", "BF16"),
        ("ernie.layers.1.mlp.gate.weight", np.zeros((2, 128), np.float32), "F32", "[128, 2]"),
        ("ernie.embed_tokens.weight", np.zeros((63, 128), np.uint16), "BF16", "[64, 128]"),
        ("ernie.norm.weight", np.zeros(128, np.float64), "F64", "BF16/F32 [128]"),
        ("lm_head.weight", np.zeros((128, 65), np.uint16), "BF16", "[128, 64] or [64, 128]"),
    ],
)
def test_wrong_shapes_and_types(
    tmp_path: Path,
    config: dict[str, Any],
    tensors: dict[str, Any],
    key: str,
    array: np.ndarray,
    dtype: str,
    wanted: str,
) -> None:
    tensors[key] = (array, dtype)
    write_tensors(tmp_path, config, tensors)
    found = f"found {dtype} {list(array.shape)}"
    refused(tmp_path, str(tmp_path / "model.safetensors"), key, found, wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "key",
    [
        f"{EXPERT}.super_scales",
        f"{EXPERT}.code_scale",
        f"{EXPERT}.code_zp",
        "ernie.layers.0.self_attn.qkv_proj.weight_scale",
        "ernie.norm.weight",
    ],
)
def test_scales_that_are_not_finite(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any], key: str, bad: float
) -> None:
    array, dtype = tensors[key]
    array = array.copy()
    array[5] = float32_to_bfloat16(np.float32([bad]))[0] if dtype == "BF16" else bad
    tensors[key] = (array, dtype)
    write_tensors(tmp_path, config, tensors)
    refused(tmp_path, "model.safetensors", key, f"found {bad} at element 5", "finite")


@pytest.mark.parametrize("element", [0, -1])
@pytest.mark.parametrize(
    "key", ["ernie.embed_tokens.weight", "lm_head.weight", f"{EXPERT}.weight"], ids=str
)
def test_dense_weights_that_are_not_finite(tmp_path: Path, key: str, element: int) -> None:
    config = tiny_config("bf16", layers=2, experts=2, tied=False)
    tensors = tiny_tensors(config)
    flat = tensors[key][0].reshape(-1).copy()
    flat[element] = 0xFFC0  # a negative NaN
    tensors[key] = (flat.reshape(tensors[key][0].shape), "BF16")
    write_tensors(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match="expected finite values") as caught:
        load_all(tmp_path, 1)
    where = range(flat.size)[element]
    assert f"model.safetensors: {key}: found nan at element {where} (1 such)" in str(caught.value)


def test_code_maps_beyond_integers(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any]
) -> None:
    tensors[f"{EXPERT}.code_scale"][0][7] = 1e30
    write_tensors(tmp_path, config, tensors)
    refused(tmp_path, f"{EXPERT}.code_scale", "column 7")


def test_no_folder_no_config_no_weights(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such folder")
    refused(tmp_path, "config.json", "no such file")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
    refused(tmp_path, str(tmp_path), "no weights", "model.safetensors")


def test_unknown_quantization(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, layers=2, vocab_size=64)
    edit_json(tmp_path / "config.json", lambda c: c["quantization_config"].update(quantization="x"))
    refused(tmp_path, "config.json", "Invalid quantization method: 'x'")


def test_config_that_forgets_the_quantization(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, layers=2, vocab_size=64)
    edit_json(tmp_path / "config.json", forget_quantization)
    refused(tmp_path, "qkv_proj.weight", "there is .quant_weight instead", "quantization_config")


def test_config_that_invents_a_quantization(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, kind="bf16", layers=2, vocab_size=64)
    (tmp_path / "config.json").write_text(
        json.dumps(tiny_config("2bits", layers=2, vocab_size=64)), encoding="utf-8"
    )
    refused(tmp_path, "qkv_proj.quant_weight", "there is .weight instead")


def test_sizes_that_a_format_cannot_hold(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, layers=2, vocab_size=64)
    edit_json(tmp_path / "config.json", lambda c: c.update(moe_intermediate_size=192))
    refused(tmp_path, "config.json", "down_proj", "K = 192", "multiples of 128")


def test_errors_speak_of_hugging_face_files_in_their_own_names(tmp_path: Path) -> None:
    data = {"model.embed_tokens.weight": entry("BF16", [1], 0, 2)}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("bf16")), encoding="utf-8")
    raw_file(tmp_path / "model.safetensors", data, b"12")
    refused(tmp_path, "model.safetensors", "model.embed_tokens.weight: found BF16 [1]")


def test_transposed_weights_are_explained(tmp_path: Path) -> None:
    config = tiny_config("bf16", layers=2, vocab_size=64)
    tensors = tiny_tensors(config)
    key = "ernie.layers.0.self_attn.qkv_proj.weight"
    tensors[key] = (np.ascontiguousarray(tensors[key][0].T), "BF16")
    write_tensors(tmp_path, config, tensors)
    refused(tmp_path, key, "found BF16 [512, 128]", "expected BF16/F32 [128, 512]", "transposed")


def test_rank_folders_must_match_the_degree(tmp_path: Path) -> None:
    folder = tmp_path / "ERNIE-4.5-300B-A47B-2Bits-TP2-Paddle"
    write_tiny_model(folder, layers=2, vocab_size=64, tensor_parallel_size=2)
    for size, sibling in ((1, "A47B-2Bits-Paddle"), (4, "A47B-2Bits-TP4-Paddle")):
        refused(folder, "found 2 rank folders", "tp2", sibling, size=size)
    load_all(folder, 2)
    load_all(folder, 2, 1)
    (folder / "rank1").rename(folder / "rank3")
    refused(folder, "without rank1", size=2)


def test_rank_folders_under_another_name(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "mine", layers=2, vocab_size=64, tensor_parallel_size=2)
    refused(tmp_path / "mine", "'...-2Bits-Paddle' repository", size=1)


def test_a_rank_of_another_size(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, layers=2, vocab_size=64, tensor_parallel_size=2)
    whole = write_tiny_model(tmp_path / "whole", layers=2, vocab_size=64)
    shutil.copy(whole / "model.safetensors", tmp_path / "rank0" / "model.safetensors")
    refused(tmp_path, "rank0/model.safetensors", "found I8 [512, 128], expected U8/I8 [256", size=2)


@pytest.mark.parametrize("size", [3, 8])
def test_degrees_that_do_not_divide(tmp_path: Path, size: int) -> None:
    write_tiny_model(tmp_path, layers=2, vocab_size=64)
    refused(tmp_path, f"tensor_parallel_size {size}", "this model allows 1, 2, 4", size=size)


def test_two_bit_tiles_limit_the_ranks_that_have_a_part_of_the_experts(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", layers=2, vocab_size=64)
    for size in (1, 2, 4):
        load_all(tmp_path / "model", size)
    with pytest.raises(ConfigError, match="moe_intermediate_size 256 is less than 4 x 128"):
        split_checkpoint(tmp_path / "model", tmp_path / "cut", 4)  # a file can't be empty


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda i: i.pop("weight_map"), ("weight_map",)),
        (lambda i: i.update(weight_map={}), ("weight_map",)),
        (lambda i: i.update(weight_map=[1]), ("weight_map",)),
        (lambda i: i["weight_map"].update({"ernie.norm.weight": 3}), ("ernie.norm.weight", "3")),
        (
            lambda i: i["weight_map"].update({"ernie.norm.weight": "gone.safetensors"}),
            ("gone.safetensors", "not in the folder"),
        ),
        (
            lambda i: i["weight_map"].update({"ernie.norm.weight": "../secret.safetensors"}),
            ("ernie.norm.weight", "in this folder"),
        ),
        (
            lambda i: i["weight_map"].update({"ernie.norm.weight": "/etc/x.safetensors"}),
            ("ernie.norm.weight", "in this folder"),
        ),
        (
            lambda i: i["weight_map"].update({"ernie.norm.weight": "a\0.safetensors"}),
            ("ernie.norm.weight", "in this folder"),
        ),
        (
            lambda i: i["weight_map"].update({"ernie.norm.weight": "a" * 9999 + ".safetensors"}),
            ("ernie.norm.weight", "not in the folder"),
        ),
        (lambda i: i["weight_map"].update(extra="@last"), ("extra", "found nothing", "index")),
    ],
)
def test_bad_indices(tmp_path: Path, change: Change, parts: tuple[str, ...]) -> None:
    write_tiny_model(tmp_path, layers=2, vocab_size=64, shard_bytes=1 << 16)
    index = tmp_path / "model.safetensors.index.json"
    last = sorted(p.name for p in tmp_path.glob("*.safetensors"))[-1]

    def edit(value: dict[str, Any]) -> None:
        change(value)
        if isinstance(value.get("weight_map"), dict) and value["weight_map"].get("extra"):
            value["weight_map"]["extra"] = last

    edit_json(index, edit)
    refused(tmp_path, *parts)


def test_index_that_names_a_key_twice(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, layers=2, vocab_size=64, shard_bytes=1 << 16)
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if "ernie.norm.weight" in line)
    index.write_text(text.replace(line, f"{line.rstrip(',')},\n{line}"), encoding="utf-8")
    refused(tmp_path, "index.json", "'ernie.norm.weight' occurs twice")


def test_lost_shard(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, layers=2, vocab_size=64, shard_bytes=1 << 16)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path, "index.json", shard.name, "download it again")


def test_swapped_shards(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, layers=2, vocab_size=64, shard_bytes=1 << 16)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    first.rename(tmp_path / "swap")
    second.rename(first)
    (tmp_path / "swap").rename(second)
    refused(tmp_path, first.name, "found nothing", "index.json says that it is here")


def test_mixed_formats_in_one_layer(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any]
) -> None:
    module = "ernie.layers.1.mlp.experts.1.down_proj"
    for name in ("weight_scale", "super_scales", "code_scale", "code_zp"):
        tensors.pop(f"{module}.{name}")
    tensors[f"{module}.quant_weight"] = (np.zeros((64, 256), np.int8), "I8")
    tensors[f"{module}.weight_scale"] = (np.zeros(128, np.uint16), "BF16")
    write_tensors(tmp_path, config, tensors)
    refused(tmp_path, module, "found int4 weights, expected ccq")


def edit_json(path: Path, change: Change) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def forget_quantization(config: dict[str, Any]) -> None:
    del config["quantization_config"]
    config["is_quantized"] = False
