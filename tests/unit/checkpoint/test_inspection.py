"""`inspect` describes every folder that loads, and the faults of those that do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hugging_face import hugging_face_config, hugging_face_tensors
from tiny_model import KINDS, tiny_config, tiny_tensors, write_tensors, write_tiny_model

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inspection import inspect
from fastdeploy_lite.entrypoints.cli import main as cli


def test_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", "demo"]) == 0
    text = capsys.readouterr().out
    for part in (
        "Paddle names",
        "1 with 1044 tensors, 19.4 MiB",
        "natural: by the weights: down rows follow gate and up columns by 0.2",
        "runs at TP    1, 2",
        "BF16 [8192, 384]; head none; tie_word_embeddings true",
        "96 expert up_gate_proj",
    ):
        assert part in text
    assert "problem" not in text


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", "demo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["row_order"] == "natural"
    assert found["sizes"]["experts"] == 16
    formats = {(s["role"], s["format"], s["first_layer"], s["last_layer"]) for s in found["stacks"]}
    assert ("expert down_proj", "ccq", 1, 6) in formats
    assert ("qkv_proj", "int8", 0, 6) in formats
    assert all(0.01 < s["deviation"] < 0.2 for s in found["stacks"])
    assert found["scale_dtypes"] == {"BF16": 220, "U8": 192}
    assert found["problems"] == found["remarks"] == found["unused"] == []


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form(tmp_path: Path, kind: Any, size: int) -> None:
    folder = write_tiny_model(tmp_path, kind=kind, tensor_parallel_size=size)
    found = inspect(folder)
    assert found.problems == []
    assert found.rank_folders == (size if size > 1 else 0)
    assert found.tensor_parallel_sizes == [1, 2, 4]
    whole = write_tiny_model(tmp_path / "whole", kind=kind)
    linears = sum(stack.linears for stack in found.stacks)
    assert linears == size * (2 * 3 + 2 + 2 * (2 * 4 + 2))
    assert found.nbytes >= Checkpoint.open(whole).nbytes


def test_hugging_face_files_and_what_is_not_used(tmp_path: Path) -> None:
    config = tiny_config("bf16")
    tensors = tiny_tensors(config)
    tensors["ernie.mtp_emb_norm.0.weight"] = (np.zeros(128, np.uint16), "BF16")
    tensors["ernie.layers.1.mlp.moe_statics.expert_usage"] = (np.zeros(4, np.int64), "I64")
    write_tensors(tmp_path, hugging_face_config(config), hugging_face_tensors(config, tensors))
    found = inspect(tmp_path)
    assert found.spelling == "Hugging Face names"
    assert found.draft_tensors == 1
    assert len(found.unused) == 2
    assert found.missing_side_files[:2] == ["tokenizer.model", "tokenizer.json"]
    assert found.problems == []


def test_noise_has_no_row_order(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"]["row_order"]
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect(folder)
    assert found.row_order is None
    assert "the weights do not tell" in found.row_order_reason


def test_remarks(tmp_path: Path) -> None:
    config = tiny_config("2bits", tied=False, tie_word_embeddings=True)
    tensors = tiny_tensors(config | {"tie_word_embeddings": False})
    key = "ernie.layers.0.self_attn.qkv_proj.quant_weight"
    array = tensors[key][0].copy()
    array[0, 0] = 0
    tensors[key] = (array, "I8")
    write_tensors(tmp_path, config, tensors)
    remarks = " ".join(inspect(tmp_path).remarks)
    assert "tie_word_embeddings is true, but" in remarks
    assert "qkv_proj: bytes of 0" in remarks


def test_problems_are_lines_and_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_model(tmp_path / "model", layers=2)
    config = json.loads((folder / "config.json").read_text())
    config["moe_intermediate_size"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.run(["inspect", str(folder)]) == 1
    text = capsys.readouterr().out
    assert text.count("\nproblem: ") >= 5
    assert "expected U8/I8" in text
    (folder / "model.safetensors").write_bytes(b"12")
    assert "problem: " in table_of(folder, capsys)
    (folder / "config.json").write_text("{")
    assert "not readable as JSON" in table_of(folder, capsys)
    shutil.rmtree(folder)
    assert cli.run(["inspect", str(folder)]) == 1
    assert "no such folder" in capsys.readouterr().err


def table_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run(["inspect", str(folder)]) == 1
    return capsys.readouterr().out


def test_nothing_is_written(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(demo_path(), tmp_path / "copy"))
    before = {p.name: p.stat().st_mtime_ns for p in copy.iterdir()}
    inspect(copy)
    assert {p.name: p.stat().st_mtime_ns for p in copy.iterdir()} == before
