"""Hugging Face files of a model are the same model as Paddle's: logits, quantised bytes, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hugging_face import hugging_face_config, hugging_face_tensors
from model_driver import make_runner
from tiny_model import TOKENIZER_FILES, tiny_config, tiny_tensors, write_tensors

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import read_linear, verify
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.quantization.convert import quantize_checkpoint
from fastdeploy_lite.utils.errors import CheckpointError

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 8192, 40)]


def write_both(folder: Path, *, stacked: bool = False, **config: Any) -> tuple[Path, Path]:
    paddle = tiny_config("bf16", **config)
    tensors = tiny_tensors(paddle, seed=5)
    write_tensors(folder / "paddle", paddle, tensors)
    form = hugging_face_tensors(paddle, tensors, stacked=stacked)
    write_tensors(folder / "hf", hugging_face_config(paddle), form, shard_bytes=1 << 20)
    for target in ("paddle", "hf"):
        for name in TOKENIZER_FILES:
            shutil.copyfile(demo_path() / name, folder / target / name)
    return folder / "paddle", folder / "hf"


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_quantised_files_are_equal(tmp_path: Path, tied: bool, stacked: bool) -> None:
    paddle, other = write_both(tmp_path, tied=tied, stacked=stacked)
    checkpoint = Checkpoint.open(other)
    verify(checkpoint)
    assert checkpoint.spelling == "Hugging Face names"
    logits = [make_runner(folder).logits(IDS) for folder in (paddle, other)]
    np.testing.assert_array_equal(*logits)
    quantised = [tmp_path / "quantised" / folder.name for folder in (paddle, other)]
    for folder, output in zip((paddle, other), quantised, strict=True):
        quantize_checkpoint(folder, output, scheme="w4w2", progress=False)
    files = [folder / "model.safetensors" for folder in quantised]
    assert files[0].read_bytes() == files[1].read_bytes()
    written = [json.loads((folder / "config.json").read_text()) for folder in quantised]
    for key in ("dtype", "rope_theta", "moe_use_aux_free", "quantization_config"):
        assert written[0][key] == written[1][key]
    np.testing.assert_array_equal(*[make_runner(folder).logits(IDS) for folder in quantised])


def test_a_dense_model_and_quantisation_while_loading(tmp_path: Path) -> None:
    paddle, other = write_both(
        tmp_path, experts=0, moe_num_experts=0, architectures=["Ernie4_5ForCausalLM"]
    )
    for wanted in (None, "wint8"):
        logits = [
            make_runner(f, model=Checkpoint.open(f).config.with_quantization(wanted)).logits(IDS)
            for f in (paddle, other)
        ]
        np.testing.assert_array_equal(*logits)


def test_matrices_are_views_of_the_file(tmp_path: Path) -> None:
    """No copy of a whole matrix: o_proj and down_proj come as transposed views."""
    _, other = write_both(tmp_path)
    checkpoint = Checkpoint.open(other)
    for linear in model_linears(checkpoint.config):
        weight = read_linear(checkpoint, linear).arrays["weight"]
        assert weight.shape == (linear.in_features, linear.out_features)
        if linear.is_row_split:
            assert weight.flags.f_contiguous
            assert not weight.flags.owndata


def test_errors_name_the_tensor_as_the_file_does(tmp_path: Path) -> None:
    config = tiny_config("bf16")
    tensors = hugging_face_tensors(config, tiny_tensors(config))
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[key] = (tensors[key][0][:-1], "BF16")
    write_tensors(tmp_path, hugging_face_config(config), tensors)
    with pytest.raises(CheckpointError, match=rf"{key}: found BF16 \[128, 255\]"):
        verify(Checkpoint.open(tmp_path))


def test_a_bad_value_is_counted_as_the_file_has_it(tmp_path: Path) -> None:
    config = tiny_config("bf16")
    tensors = hugging_face_tensors(config, tiny_tensors(config))
    key = "model.layers.0.mlp.down_proj.weight"
    array = tensors[key][0].copy()
    array[3, 5] = 0x7FC0
    tensors[key] = (array, "BF16")
    write_tensors(tmp_path, hugging_face_config(config), tensors)
    with pytest.raises(CheckpointError, match=rf"{key}: found nan at element {3 * 256 + 5} "):
        make_runner(tmp_path)
