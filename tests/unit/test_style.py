"""Linters, formatters and the type checker, run as tests so that there is one command for all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON_CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
}


def run(command: list[str]) -> None:
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", PYTHON_CHECKS)
def test_python(name: str) -> None:
    run([sys.executable, "-m", *PYTHON_CHECKS[name]])


def test_native_code_is_formatted() -> None:
    endings = (".cc", ".cu", ".cuh", ".h")
    sources = [p for p in (REPOSITORY / "custom_ops").rglob("*") if p.suffix in endings]
    assert sources
    clang_format = Path(sys.executable).with_name("clang-format")
    run([str(clang_format), "--dry-run", "-Werror", *map(str, sources)])


def test_shell_scripts_parse() -> None:
    folders = ("deploy", "entrypoints", "examples")
    scripts = [path for folder in folders for path in (REPOSITORY / folder).glob("*.sh")]
    for script in [*scripts, REPOSITORY / ".ci" / "run"]:
        run(["bash", "-n", str(script)])
