"""The checkpoint of random weights is one that everything else of the package takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_driver import make_runner

from fastdeploy_lite.checkpoint.inventory import verify
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.checkpoint.reader import Checkpoint
from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.entrypoints.cli import main as cli
from fastdeploy_lite.quantization.random_model import (
    published_shape_config,
    random_model_config,
    write_random_model,
)
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError

SMALL = ["--layers", "2", "--hidden-size", "128", "--experts", "4"]


def test_it_is_written_quantised_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, quantised = tmp_path / "random", tmp_path / "random-2bits"
    assert cli.run(["random-model", "--output", str(model), *SMALL]) == 0
    said = capsys.readouterr().out
    arrays = Checkpoint.open(model)
    count = sum(int(np.prod(arrays.info(key).shape)) for key in arrays)
    assert f"{count / 1e6:.1f} million weights" in said
    command = said.splitlines()[-1].split("fastdeploy-lite ")[1].split()
    assert cli.run([*command, "--scheme", "2bits", "--quiet"]) == 0
    for folder in (model, quantised):
        assert cli.run(["generate", "a", "--model", str(folder), "--max-tokens", "4"]) == 0
    assert Checkpoint.open(quantised).config.is_quantized


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    config = random_model_config(2, 128, 4)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_model(tmp_path / name, config, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_activations_keep_their_size(tmp_path: Path) -> None:
    """Logits of a model in which the signal died or exploded are all alike or not finite."""
    write_random_model(tmp_path / "model", random_model_config(6, 256, 8))
    logits = np.asarray(make_runner(tmp_path / "model").logits(list(range(100, 120))))
    assert np.isfinite(logits).all()
    assert 0.05 < logits.std() < 20


def test_impossible_sizes_and_a_folder_in_use_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sizes in ((1, 128, 4), (2, 100, 4), (2, 0, 4), (2, 128, 0)):
        with pytest.raises(ConfigError, match="got"):
            random_model_config(*sizes)
    write_random_model(tmp_path, random_model_config(2, 128, 4))
    with pytest.raises(CheckpointError, match="not empty"):
        write_random_model(tmp_path, random_model_config(2, 128, 4))
    command = ["random-model", "--output", str(tmp_path), "--layers", "0"]
    assert cli.run(command) == 1
    assert "--layers must be at least 2, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.run(["random-model", "--output", str(tmp_path / "new"), "--seed", "-1"])
    assert "argument --seed: expected an integer of at least 0, got '-1'" in capsys.readouterr().err


def test_published_shapes_have_the_published_widths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig.from_dict(published_shape_config("21b", 3))
    assert (config.hidden_size, config.moe_intermediate_size) == (2560, 1536)
    assert (config.moe_num_experts, config.moe_k) == (64, 6)
    linears = [linear for linear in model_linears(config) if linear.expert is not None]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    assert weights == 2 * 64 * 3 * 2560 * 1536
    few = ModelConfig.from_dict(published_shape_config("300b", 2, 4))
    assert (few.hidden_size, few.moe_num_experts, few.moe_k) == (8192, 4, 4)
    command = ["random-model", "--output", str(tmp_path), "--shape", "21b"]
    assert cli.run([*command, "--hidden-size", "128"]) == 1
    assert "--shape 21b fixes the widths" in capsys.readouterr().err
    assert cli.run([*command, "--experts", "0"]) == 1
    assert "--experts must be at least 1, got 0" in capsys.readouterr().err


def test_a_quantised_model_is_written_where_the_configuration_says_so(tmp_path: Path) -> None:
    config = random_model_config(3, 128, 4)
    config["quantization_config"] = {
        "quantization": "wint2",
        "dense_quant_type": "wint8",
        "moe_quant_type": "w4w2",
        "moe_quant_config": {
            "moe_w4_quant_config": {"quant_start_layer": 0, "quant_end_layer": 1},
            "moe_w2_quant_config": {"quant_start_layer": 2, "row_order": "natural"},
        },
    }
    write_random_model(tmp_path / "model", {**config, "is_quantized": True})
    found = Checkpoint.open(tmp_path / "model")
    verify(found)
    assert {linear.kind for linear in model_linears(found.config)} == {"int8", "int4", "ccq"}
    logits = np.asarray(make_runner(tmp_path / "model").logits(list(range(100, 120))))
    assert np.isfinite(logits).all()
    assert 0.05 < logits.std() < 20
