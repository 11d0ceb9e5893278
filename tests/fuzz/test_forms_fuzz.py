"""Thousands of damaged Hugging Face folders, rank folders, row orders and tokenizers.

As in test_reader_fuzz: one line or usable values, never anything else. Every case is also shown to
`inspect`, which must describe it without an exception.
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
from hugging_face import hugging_face_config, hugging_face_tensors
from test_reader_fuzz import (
    LONGEST_CASE,
    SIZES,
    Mutation,
    damage_anything,
    edit_header,
    edit_json,
    flip_any_bits,
    flip_header_bits,
    resize_file,
)
from tiny_model import tiny_config, tiny_tensors, write_tensors, write_tiny_model

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.checkpoint import inventory, row_order
from fastdeploy_lite.checkpoint.host_weights import (
    FileWeights,
    HostWeights,
    PermutedWeights,
    RankFolders,
    check_same_kinds,
)
from fastdeploy_lite.checkpoint.inspection import inspect
from fastdeploy_lite.checkpoint.reader import open_folders
from fastdeploy_lite.entrypoints.cli.inspect import table
from fastdeploy_lite.formats import get
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.errors import FastDeployError

CASES = 240  # of each of the ten families below
RANKS: dict[str, Any] = {**SIZES, "moe_intermediate_size": 256, "intermediate_size": 128}
RANKS |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def load(folder: Path) -> None:
    """Open, verify and read everything as the loader does."""
    folders = open_folders(folder)
    for one in folders:
        inventory.verify(one)
    check_same_kinds(folders)
    decision = row_order.decide(folders[0])
    weights: HostWeights = RankFolders(folders) if len(folders) > 1 else FileWeights(folders[0])
    if decision.order == "permuted":
        weights = PermutedWeights(weights)
    config = weights.config
    for linear in weights.linears.values():
        parts = weights.parts(linear)
        shapes = [get(weights.kind(linear)).shape(part) for part in parts]
        assert sum(rows for rows, _ in shapes) == linear.in_features
        assert {columns for _, columns in shapes} == {linear.out_features}
        for part in parts:
            for name, array in part.items():
                if array.dtype == np.float32 and name != "weight":
                    assert np.isfinite(array).all(), (linear.module, name)
    assert weights.embedding().shape == (config.vocab_size, config.hidden_size)
    head = weights.head()
    assert head is None or head[0].size == config.vocab_size * config.hidden_size
    for layer in range(config.num_hidden_layers):
        if config.is_moe_layer(layer):
            gate, _ = weights.router(layer)
            assert gate.shape == (config.hidden_size, config.moe_num_experts)


def works(action: Callable[[], object]) -> bool:
    """Whether it worked; False for a proper error."""
    started = time.process_time()
    try:
        action()
    except FastDeployError as error:
        message = str(error)
        assert message
        assert message.isprintable(), message
        assert len(message) < 3000, message
        return False
    finally:
        assert time.process_time() - started < LONGEST_CASE
    return True


def run(folder: Path, path: Path, mutate: Mutation, least: float, cases: int = CASES) -> None:
    original, refused = path.read_bytes(), 0
    assert works(lambda: load(folder))
    try:
        for seed in range(cases):
            path.write_bytes(mutate(random.Random(seed), original))
            try:
                loaded = works(lambda: load(folder))
                found = inspect(folder)
                json.dumps(found.to_dict(), allow_nan=False)
                lines = table(found).split("\n")
                assert all(line.isprintable() for line in lines)
                assert not (loaded and found.problems), found.problems
            except BaseException as error:
                raise AssertionError(f"{mutate.__name__}, seed {seed}: {error!r}") from error
            refused += not loaded
    finally:
        path.write_bytes(original)
    assert refused >= least * cases, f"only {refused} of {cases} were refused"


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    config = tiny_config("bf16", **SIZES)
    tensors = hugging_face_tensors(config, tiny_tensors(config))
    write_tensors(folder, hugging_face_config(config), tensors)
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_tiny_model(
        folder, kind="w4w2", tensor_parallel_size=2, tokenizer=False, **{**RANKS, "layers": 3}
    )
    return folder


@pytest.mark.parametrize("mutate", [flip_header_bits, resize_file, damage_anything, edit_header])
def test_hugging_face_files(hugging_face: Path, mutate: Mutation) -> None:
    least = {"resize_file": 0.99, "damage_anything": 0.2}.get(mutate.__name__, 0.5)
    run(hugging_face, hugging_face / "model.safetensors", mutate, least)


def test_hugging_face_config(hugging_face: Path) -> None:
    run(hugging_face, hugging_face / "config.json", edit_json, 0.3)


@pytest.mark.parametrize("mutate", [flip_header_bits, damage_anything, edit_header])
def test_a_rank_of_two(ranks: Path, mutate: Mutation) -> None:
    least = {"damage_anything": 0.2}.get(mutate.__name__, 0.5)
    run(ranks, ranks / "rank1/model.safetensors", mutate, least)


def test_the_config_of_rank_folders(ranks: Path) -> None:
    run(ranks, ranks / "config.json", edit_json, 0.3)


def test_permuted_rows(tmp_path: Path) -> None:
    config = tiny_config("2bits", **SIZES)
    scheme = config["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"]
    scheme["row_order"] = "permuted"
    write_tensors(tmp_path, config, tiny_tensors(config))
    run(tmp_path, tmp_path / "model.safetensors", damage_anything, 0.2)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json"])
def test_tokenizer_files(tmp_path: Path, name: str) -> None:
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(demo_path() / file, tmp_path / file)
    original = (tmp_path / name).read_bytes()
    mutate: Mutation = edit_json if name.endswith(".json") else flip_any_bits

    def use() -> None:
        tokenizer = Ernie4_5Tokenizer.from_pretrained(tmp_path)
        tokenizer.decode(tokenizer.encode_text("a b 春眠不觉晓</s>"))

    for seed in range(120):
        (tmp_path / name).write_bytes(mutate(random.Random(seed), original))
        try:
            works(use)
        except BaseException as error:
            raise AssertionError(f"{name}, seed {seed}: {error!r}") from error
