"""`bench_speculation.py`: everybody answers the same, and a policy that is never asked costs
nothing that the pairs could show."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ENTRYPOINTS = Path(__file__).resolve().parents[2] / "entrypoints"


def test_contestants_take_turns_in_one_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ENTRYPOINTS))
    bench = importlib.import_module("bench_speculation")
    path = tmp_path / "rows.json"
    command = "--methods naive,suffix --batches 1,3 --max-tokens 24 --rounds 1 --profile"
    monkeypatch.setattr(sys, "argv", ["bench", *command.split(), "--json", str(path)])
    assert bench.main() == 0
    assert "runs whose answers differ from those without guesses: 0" in capsys.readouterr().out
    rows = json.loads(path.read_text())
    names = ("none", "again", "naive", "suffix")
    assert [(row["prompts"], row["batch"], row["method"]) for row in rows] == [
        (kind, batch, name) for kind in bench.KINDS for batch in (1, 3) for name in names
    ]
    for row in rows:
        assert row["ratio_95"][0] <= row["ratio"] <= row["ratio_95"][1]
        assert row["cpu_ratio_95"][0] <= row["cpu_ratio"] <= row["cpu_ratio_95"][1]
        if row["method"] != "suffix":
            assert row["share_of_answer"] == 0.0
    naive = [row["cpu_ratio"] for row in rows if row["method"] == "naive"]
    assert 0.8 < sorted(naive)[len(naive) // 2] < 1.25
