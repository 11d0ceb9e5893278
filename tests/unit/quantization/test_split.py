"""A checkpoint that is cut for several ranks is the same model, read by one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hugging_face import hugging_face_config, hugging_face_tensors
from model_driver import make_runner
from tiny_model import KINDS, tiny_config, tiny_tensors, write_tensors, write_tiny_model

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.entrypoints.cli import main as cli
from fastdeploy_lite.quantization.split import split_checkpoint
from fastdeploy_lite.utils.errors import FastDeployError

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 8192, 40)]
WIDE: dict[str, Any] = {"moe_intermediate_size": 512, "intermediate_size": 512}


def test_the_demo_for_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["split", "--model", "demo", "--output", str(tmp_path / "tp2"), "-tp", "2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tp2'}: rank0 to rank1\n"
    found, wanted = make_runner(tmp_path / "tp2"), make_runner(demo_path())
    np.testing.assert_array_equal(found.logits(IDS), wanted.logits(IDS))
    assert (tmp_path / "tp2/tokenizer.model").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_for_four_ranks(tmp_path: Path, kind: Any) -> None:
    whole = write_tiny_model(tmp_path / "whole", kind=kind, tied=False, **WIDE)
    split_checkpoint(whole, tmp_path / "tp4", 4)
    found, wanted = make_runner(tmp_path / "tp4"), make_runner(whole)
    np.testing.assert_array_equal(found.logits(IDS), wanted.logits(IDS))


def test_hugging_face_files(tmp_path: Path) -> None:
    config = tiny_config("bf16", tied=False)
    tensors = tiny_tensors(config)
    write_tensors(
        tmp_path / "hf", hugging_face_config(config), hugging_face_tensors(config, tensors)
    )
    split_checkpoint(tmp_path / "hf", tmp_path / "tp2", 2)
    found, wanted = make_runner(tmp_path / "tp2"), make_runner(tmp_path / "hf")
    np.testing.assert_array_equal(found.logits(IDS), wanted.logits(IDS))


def test_what_cannot_be_cut(tmp_path: Path) -> None:
    whole = write_tiny_model(tmp_path / "whole")
    with pytest.raises(FastDeployError, match="this model allows 1, 2"):
        split_checkpoint(whole, tmp_path / "out", 4)
    with pytest.raises(FastDeployError, match="expected 2 or more"):
        split_checkpoint(whole, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()
    split_checkpoint(whole, tmp_path / "out", 2)
    with pytest.raises(FastDeployError, match="not empty"):
        split_checkpoint(whole, tmp_path / "out", 2)
    with pytest.raises(FastDeployError, match="folders of ranks already"):
        split_checkpoint(tmp_path / "out", tmp_path / "again", 2)
