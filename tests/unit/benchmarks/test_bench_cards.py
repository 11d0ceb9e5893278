"""The benchmarks of cards, run over CPU processes: time on cards is too dear for finding errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("benches_on_cpu.py")


def run(tmp_path: Path, *arguments: str) -> tuple[str, Any]:
    """What a benchmark prints, and what it writes."""
    output = tmp_path / "out.json"
    own = {name: value for name, value in os.environ.items() if name != "FD_DETERMINISTIC_MODE"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--output", str(output)],
        env={**own, "PYTHONPATH": str(SCRIPT.parents[3])},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(output.read_text("utf-8"))


@pytest.mark.parametrize(("shape", "size"), [("300b", 2), ("21b", 1)])
def test_a_models_steps(tmp_path: Path, shape: str, size: int) -> None:
    sizes = ["-tp", str(size), "--batches", "1,4", "--steps", "3"]
    lengths = ["--context", "70", "--prefill", "128"]  # prompts are cut at the steps' ends
    printed, found = run(tmp_path, "bench_card", "--shape", shape, *sizes, *lengths)
    assert found["cards"] == size and found["load_s"] > 0
    assert found["deterministic"] is False and "FD_DETERMINISTIC_MODE=0" in printed
    assert found["rows"][0]["prefill"] == 128
    for batch, row in zip((1, 4), found["rows"][1:], strict=True):
        assert row["batch"] == batch and row["tokens_s"] > 0 and row["graph_ms"] > 0
        if size > 1:  # there is something to leave out
            assert 0 < row["graph_without_sums_ms"] < row["graph_ms"]
    assert ("of it sums" in printed) == (size > 1)
    assert "GB a step" in printed and "prefill of 128 tokens" in printed


def test_a_run_in_deterministic_mode_says_so(tmp_path: Path) -> None:
    sizes = ["--shape", "21b", "--batches", "1", "--steps", "1", "--context", "9"]
    printed, found = run(tmp_path, "bench_card", *sizes, "--prefill", "64", "--deterministic")
    assert found["deterministic"] is True and "FD_DETERMINISTIC_MODE=1" in printed


def test_sums(tmp_path: Path) -> None:
    printed, found = run(tmp_path, "bench_ranks", "-tp", "2", "--hidden", "64")
    assert [row["rows"] for row in found] == [1, 8, 64, 512, 4096]
    for way in ("shared memory", "NCCL", "gathered"):
        assert all(row[way] > 0 for row in found)
        assert printed.count(f"{way} ") == 5


def test_experts_in_main_memory(tmp_path: Path) -> None:
    sizes = ["--shape", "300b", "--batches", "1,4", "--steps", "3", "--prefill", "128", "--profile"]
    printed, found = run(tmp_path, "bench_offload", *sizes, "--activation-bits", "16")
    assert found["offloaded_layers"] == 1 and found["crossing_us"] > 0
    steps = [row for row in found["rows"] if "batch" in row]
    assert [row["batch"] for row in steps] == [1, 1, 4, 4]
    for row in steps:
        assert row["profile"]["experts"] > 0
        assert len(row["profile"]["layers"]) == 1
    assert printed.count("  1 layers of int4: ") == 4
    assert printed.count(", 16 bits: ") >= 2
