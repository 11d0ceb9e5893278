"""entrypoints/quantization_table.py on a tiny model: rows, what is kept, and pairs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny_model import write_tiny_model

from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.quantization.nearest import round_to_nearest
from fastdeploy_lite.utils.arrays import bfloat16_to_float32

SCRIPT = Path(__file__).resolve().parents[3] / "entrypoints" / "quantization_table.py"
ROWS = "2bits-nearest,2bits-data-free,wint4-dense4-hessian"
TEXT = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。\n\n" * 40


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quantization_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up here
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(script: ModuleType, tmp_path: Path) -> Callable[..., int]:
    """The script on a tiny model, with these options."""
    write_tiny_model(tmp_path / "model", kind="bf16", experts=2)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    command = ["--model", str(tmp_path / "model"), "--work", str(tmp_path / "work")]
    command += ["--text", str(text), "--calibration", str(text), "--calibration-tokens", "600"]
    command += ["--context", "64", "--limit", "300"]
    return lambda *options: int(script.main([*command, *options]))


def test_rows_are_made_once_and_pairs_compared(
    table: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = ["--pair", "2bits-nearest,2bits-data-free", "--pair", "2bits-nearest,2bits-nearest"]
    options = ["--rows", ROWS, *pairs, "--", "--row-order", "natural"]
    assert table(*options) == 0
    text = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    found = {cells[0]: cells[1:] for cells in lines if cells}
    kl = {name: float(found[name][2].split()[0]) for name in ROWS.split(",")}
    assert kl["2bits-nearest"] > kl["2bits-data-free"] > kl["wint4-dense4-hessian"] > 0
    assert found["2bits-nearest"][0] == "2.500"
    assert 2 < float(found["2bits-data-free"][0]) < 4 < float(found["wint4-dense4-hessian"][0])
    less = float(found["2bits-nearest less 2bits-data-free"][1].split()[0])
    assert abs(less - (kl["2bits-nearest"] - kl["2bits-data-free"])) < 0.002
    assert found["2bits-nearest less 2bits-nearest"] == ["0.000 (0.000 to 0.000)"] * 2

    work = tmp_path / "work"
    files = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert table(*options) == 0
    assert capsys.readouterr().out == text
    assert files == {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}


def test_rounded_to_nearest_is_what_the_report_compares_with(
    table: Callable[..., int], tmp_path: Path
) -> None:
    assert table("--rows", "2bits-nearest") == 0
    folders = tmp_path / "model", tmp_path / "work" / "2bits-nearest"
    before, after = (Checkpoint.open(folder) for folder in folders)
    assert sorted(before) == sorted(after)
    rounded = [key for key in before if re.search(r"\.experts\.\d+\.\w+\.weight$", key)]
    assert rounded
    for key in rounded:
        weight, found = (bfloat16_to_float32(it.get(key).data) for it in (before, after))
        np.testing.assert_allclose(found, round_to_nearest(weight, "ccq"), rtol=2**-8, atol=0)
        assert not np.array_equal(found, weight)


def test_names_and_failures_are_said(
    table: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rows in ("3bits-hessian", "2bits-nearest-tune", "2bits-data-free-tune"):
        with pytest.raises(SystemExit):
            table("--rows", rows)
        assert rows in capsys.readouterr().err
    with pytest.raises(SystemExit):
        table("--rows", "2bits-nearest", "--pair", "2bits-hessian")
    assert "expected two names of --rows" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "model")
    assert table("--rows", "2bits-nearest") == 1
    assert "quantization_table: " in capsys.readouterr().err
