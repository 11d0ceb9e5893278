"""Thousands of corrupted checkpoints: an error of one line, or values that can be used.

A case never ends in another exception, a crash, a hang, or arrays of a wrong shape or with scales
that are not finite. Cases are made from seeds, so a failure names the case that repeats it.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import KINDS, tiny_config, tiny_tensors, write_pdparams, write_tensors

from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import (
    rank_linears,
    read_embedding,
    read_linear,
    read_lm_head,
    read_router,
    read_vector,
    verify,
)
from fastdeploy_lite.config import GenerationDefaults, ModelConfig
from fastdeploy_lite.utils.errors import FastDeployError

SIZES: dict[str, Any] = {
    "layers": 2,
    "experts": 2,
    "vocab_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CASES = 600  # of each of the six families below
LONGEST_CASE = 5.0  # seconds of the processor; the usual one takes milliseconds
Mutation = Callable[[random.Random, bytes], bytes]


def check_loaded(folder: Path) -> bool:
    """Load as the engine does. True if it worked; False for a proper error."""
    started = time.process_time()
    try:
        GenerationDefaults.from_dir(folder)
        checkpoint = Checkpoint.open(folder)
        verify(checkpoint)
        check_values(checkpoint)
    except FastDeployError as error:
        message = str(error)
        assert message
        assert message.isprintable(), message
        assert len(message) < 2000, message
        return False
    finally:
        assert time.process_time() - started < LONGEST_CASE
    return True


def check_values(checkpoint: Checkpoint) -> None:
    """Read everything; shapes must be those of config.json and scales finite."""
    config = checkpoint.config
    for linear in rank_linears(checkpoint):
        k, n = linear.in_features, linear.out_features
        loaded = read_linear(checkpoint, linear)
        shapes = {
            "dense": {"weight": (k, n)},
            "int8": {"quant_weight": (n, k), "weight_scale": (n,)},
            "int4": {"quant_weight": (n // 2, k), "weight_scale": (n,)},
            "ccq": {
                "quant_weight": (k // 4, n),
                "weight_scale": (k // 128, n),
                "super_scales": (n,),
                "code_scale": (n,),
                "code_zp": (n,),
            },
        }[loaded.kind]
        assert {name: array.shape for name, array in loaded.arrays.items()} == shapes
        for name, array in loaded.arrays.items():
            if array.dtype == np.float32 and name != "weight":
                assert np.isfinite(array).all(), (linear.module, name)
            int(array.view(np.uint8).sum(dtype=np.int64))  # every page of it can be read
    for layer in range(config.num_hidden_layers):
        key = f"ernie.layers.{layer}.input_layernorm.weight"
        assert np.isfinite(read_vector(checkpoint, key, config.hidden_size)).all()
        if config.is_moe_layer(layer):
            gate, _ = read_router(checkpoint, layer)
            assert gate.shape == (config.hidden_size, config.moe_num_experts)
    assert read_embedding(checkpoint).shape == (config.vocab_size, config.hidden_size)
    head = read_lm_head(checkpoint)
    assert head is None or head[0].size == config.vocab_size * config.hidden_size


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small file with int8, int4 and ccq weights."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config("w4w2", **{**SIZES, "layers": 3})
    write_tensors(folder, config, tiny_tensors(config))
    assert check_loaded(folder)
    return folder


def run_cases(
    folder: Path, name: str, mutate: Mutation, cases: int = CASES, expect_errors: float = 0.0
) -> None:
    """Mutate file `name` in `cases` ways; at least the given share must be refused."""
    path = folder / name
    original = path.read_bytes()
    refused = 0
    try:
        for seed in range(cases):
            path.write_bytes(mutate(random.Random(seed), original))
            try:
                refused += not check_loaded(folder)
            except BaseException as error:
                raise AssertionError(f"{mutate.__name__}, seed {seed}: {error!r}") from error
    finally:
        path.write_bytes(original)
    assert refused >= expect_errors * cases, f"only {refused} of {cases} were refused"


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip_header_bits(rng: random.Random, data: bytes) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(header_end(data)) if rng.random() < 0.9 else rng.randrange(8)
        result[at] ^= 1 << rng.randrange(8)
    return bytes(result)


def resize_file(rng: random.Random, data: bytes) -> bytes:
    choice = rng.random()
    if choice < 0.5:
        return data[: rng.randrange(len(data))]
    if choice < 0.7:
        return data[: rng.randrange(header_end(data) + 8)]
    if choice < 0.85:
        return data + rng.randbytes(rng.randrange(1, 5000))
    cut = rng.randrange(len(data))
    return data[:cut] + data[cut + rng.randrange(1, 64) :]


def damage_anything(rng: random.Random, data: bytes) -> bytes:
    """Overwrite, drop or repeat a stretch anywhere: mostly data, where many values are valid."""
    result = bytearray(data)
    at, length = rng.randrange(len(data)), rng.randrange(1, 2000)
    match rng.randrange(4):
        case 0:
            result[at : at + length] = rng.randbytes(len(result[at : at + length]))
        case 1:
            result[at : at + length] = bytes([rng.choice((0, 255))]) * len(result[at : at + length])
        case 2:
            del result[at : at + length]
        case _:
            result[at:at] = result[at : at + length]
    return bytes(result)


JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**40,
    1.5,
    1e308,
    "",
    "x",
    "F32",
    "U8",
    [],
    [0],
    [-1, 3],
    [[1]],
    {},
    {"a": 1},
    "\n\x1b[31mred",
]


def edit_header(rng: random.Random, data: bytes) -> bytes:
    """Well-formed JSON, wrong content: types, shapes, offsets, names."""
    end = header_end(data)
    header: dict[str, Any] = json.loads(data[8:end])
    for _ in range(rng.choice((1, 1, 1, 3))):
        key = rng.choice([key for key in header if key != "__metadata__"])
        edit_entry(rng, header, key)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def edit_entry(rng: random.Random, header: dict[str, Any], key: str) -> None:
    entry = header[key]
    is_tensor = isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}
    match rng.randrange(8 if is_tensor else 3):
        case 0:
            header[key] = rng.choice(JUNK)
        case 1:
            del header[key]
        case 2:
            header[rng.choice((key + "x", key.upper(), "", "\n", key[:-1]))] = header.pop(key)
        case 3:
            entry["dtype"] = rng.choice(("F32", "BF16", "I8", "U8", "I64", "BOOL", "F4", *JUNK))
        case 4:
            entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], *JUNK))
        case 5:
            entry["shape"] = [size + rng.randrange(-2, 3) for size in entry["shape"]]
        case 6:
            entry["data_offsets"] = [at + rng.choice((0, 8, -8)) for at in entry["data_offsets"]]
        case _:
            entry[rng.choice(list(entry))] = rng.choice(JUNK)


def edit_object(rng: random.Random, value: Any) -> Any:
    """Replace, remove or add something somewhere in parsed JSON."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                del value[key]
            case 1:
                value[rng.choice(("", "\r\n", key + "s"))] = value.pop(key)
            case 2 if isinstance(value[key], int):
                value[key] = value[key] * rng.choice((0, -1, 2, 1000)) + rng.randrange(-1, 2)
            case 3 | 4:
                value[key] = edit_object(rng, value[key])
            case _:
                value[key] = rng.choice(JUNK)
        return value
    return rng.choice(JUNK)


def edit_json(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.1:
        result = bytearray(data)
        result[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(result)
    return json.dumps(edit_object(rng, json.loads(data))).encode()


def flip_any_bits(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    result = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        result[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(result)


def shuffle_structure(rng: random.Random, data: bytes) -> bytes:
    """Damage what is not array data: the first bytes and the short runs of instructions."""
    result = bytearray(data)
    places = [at for at in range(len(data)) if data[at] in b"\x94\x8c\x93Rb(tu}K"]
    for _ in range(rng.choice((1, 2, 5))):
        result[rng.choice(places)] = rng.choice(b"\x94\x8c\x93Rb(tu}K.0123456789NR\x81\x85cC")
    return bytes(result)


@pytest.mark.parametrize("mutate", [flip_header_bits, resize_file, damage_anything, edit_header])
def test_damaged_file(model: Path, mutate: Mutation) -> None:
    least = {"resize_file": 0.99, "damage_anything": 0.3}.get(mutate.__name__, 0.5)
    run_cases(model, "model.safetensors", mutate, expect_errors=least)


def test_damaged_config(model: Path) -> None:
    run_cases(model, "config.json", edit_json, expect_errors=0.4)


def test_damaged_index(tmp_path: Path) -> None:
    config = tiny_config("2bits", **SIZES)
    write_tensors(tmp_path, config, tiny_tensors(config), shard_bytes=1 << 16)
    assert check_loaded(tmp_path)
    run_cases(tmp_path, "model.safetensors.index.json", edit_json, expect_errors=0.5)


@pytest.mark.parametrize("mutate", [flip_any_bits, shuffle_structure])
@pytest.mark.parametrize("protocol", [2, 4])
def test_damaged_pickle(tmp_path: Path, mutate: Mutation, protocol: int) -> None:
    config = tiny_config("bf16", **{**SIZES, "layers": 1})
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_pdparams(tmp_path / "model_state.pdparams", tiny_tensors(config), protocol)
    assert check_loaded(tmp_path)
    run_cases(tmp_path, "model_state.pdparams", mutate, cases=CASES // 4)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
CONFIG_KEYS = sorted(tiny_config("w4w2"))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON_VALUES, min_size=1, max_size=3))
def test_any_config_value(changes: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_dict({**tiny_config("w4w2"), **changes})
    except FastDeployError as error:
        assert str(error).isprintable()
        return
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.head_dim % 2 == 0
    assert config.moe_num_experts == 0 or 1 <= config.moe_k <= config.moe_num_experts
    assert {config.expert_kind(i) for i in range(config.num_hidden_layers)} <= {
        "dense",
        "int8",
        "int4",
        "ccq",
    }


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=3), st.binary(max_size=64))
def test_any_header(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    config = tiny_config("bf16", **SIZES)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert not check_loaded(tmp_path)


# Which weights load under a config.json of another kind: `.super_scales` marks ccq experts and the
# byte count tells int4 from ccq, so these files speak for themselves. Anything else is refused.
READABLE_UNDER = {
    "bf16": {"bf16"},
    "wint8": {"wint8"},
    "wint4": {"wint4", "w4w2", "2bits"},
    "w4w2": {"wint4", "w4w2", "2bits"},
    "2bits": {"wint8", "wint4", "w4w2", "2bits"},
}


def test_swapped_files_of_two_models(tmp_path: Path) -> None:
    for kind in KINDS:
        config = tiny_config(kind, **{**SIZES, "layers": 3})
        write_tensors(tmp_path / kind, config, tiny_tensors(config))
    for weights_of, configs in READABLE_UNDER.items():
        for config_of in KINDS:
            folder = tmp_path / f"{config_of}-{weights_of}"
            folder.mkdir()
            shutil.copy(tmp_path / config_of / "config.json", folder)
            shutil.copy(tmp_path / weights_of / "model.safetensors", folder)
            assert check_loaded(folder) == (config_of in configs), (config_of, weights_of)
