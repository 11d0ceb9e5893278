"""`bench quantize`: times and errors of the encoders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdeploy_lite.benchmarks import encoding
from fastdeploy_lite.benchmarks.encoding import Experts, measure
from fastdeploy_lite.entrypoints.cli import main as cli


def test_each_encoder_is_best_at_what_it_minimises() -> None:
    data_free, known = (measure(name, 256, 32, "gaussian", 2) for name in ("data-free", "hessian"))
    assert data_free.error < known.error
    assert known.product_error < data_free.product_error
    for row in (data_free, known):
        assert 0 < row.low_ms <= row.ms <= row.high_ms
        assert row.cpu_ms > 0
        assert 0.05 < row.product_error < row.error * 1.1 < 0.3


def test_heavy_tails_cost_more() -> None:
    errors = [measure("data-free", 512, 32, name, 1).error for name in ("gaussian", "student-t")]
    assert errors[1] > 1.1 * errors[0]


def test_a_table_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    command = ["bench", "quantize", "--shape", "128,16", "--rounds", "1", "--num-threads", "1"]
    assert cli.run([*command, "--json", str(file)]) == 0
    said = capsys.readouterr().out
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [row["method"] for row in rows] == ["data-free", "hessian"]
    for row in rows:
        assert f"| {row['method']} | {row['ms']:,.0f} |" in said
        assert f"{row['error']:.5f}" in said


def test_times_of_all_experts_follow_from_their_shapes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = Experts(((128, 8), (256, 4)), 1000)
    monkeypatch.setitem(encoding.MODELS, "21b", experts)
    command = ["bench", "quantize", "--experts-of", "21b", "--rounds", "1"]
    assert cli.run([*command, "--methods", "data-free"]) == 0
    said = capsys.readouterr().out
    assert "| [128, 8] | data-free |" in said
    assert "| [256, 4] | data-free |" in said
    assert "All 1000 experts of 21b: data-free " in said
    rows = [measure("data-free", *shape, "gaussian", 1) for shape in experts.shapes]
    taken = rows[0].ms * 128 * 8 / 1e6 + rows[1].ms * 256 * 4 / 1e6  # one expert of each
    assert experts.seconds(rows) == pytest.approx(taken)


@pytest.mark.parametrize("wrong", [["--shape", "100,8"], ["--shape", "128"], ["--methods", "x"]])
def test_what_cannot_be_parsed_is_refused(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.run(["bench", "quantize", *wrong])
    assert wrong[1] in capsys.readouterr().err
