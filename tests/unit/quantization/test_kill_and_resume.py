"""entrypoints/kill_and_resume.py on a tiny model: it kills, goes on and compares."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from tiny_model import write_tiny_model

SCRIPT = Path(__file__).resolve().parents[3] / "entrypoints" / "kill_and_resume.py"


def test_it_is_killed_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", kind="bf16", layers=4, experts=2)
    command = [sys.executable, str(SCRIPT), "--model", str(model), "--work", str(tmp_path / "work")]
    done = subprocess.run(
        [*command, "--", "--scheme", "2bits"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| killed after layer 1 |" in done.stdout
    assert "the same bytes in config.json, model.safetensors" in done.stdout


def test_it_would_notice_another_byte_and_a_failure(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    write_tiny_model(tmp_path / "model", kind="bf16", experts=2, tokenizer=False)
    before = module.digests(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    after = module.digests(tmp_path / "model")
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors"]
    found = module.quantize(tmp_path / "nothing", tmp_path / "out", [])
    assert found.status == 1
    assert found.peak_bytes > 1 << 20
