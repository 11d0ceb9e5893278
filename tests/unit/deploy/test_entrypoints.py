"""The scripts of entrypoints/, with an interpreter that only notes what it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
RECORDER = """#!/bin/sh
printf '%s|' "$@" >> "$CALLS"
echo >> "$CALLS"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "entrypoints", tmp_path / "entrypoints")
    (tmp_path / "custom_ops").mkdir()
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("python", "chromedriver"):  # the second so that none is installed
        program = tmp_path / ".venv/bin" / name
        program.write_text(RECORDER)
        program.chmod(0o755)
    return tmp_path


def calls(project: Path, script: str, *arguments: str) -> list[list[str]]:
    log = project / "calls"
    path = f"{project / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "CALLS": str(log), "CXX": "true", "PATH": path}
    command = ["bash", str(project / "entrypoints" / script), *arguments]
    subprocess.run(command, check=True, env=env, cwd=project.parent, timeout=60)
    return [line.split("|")[:-1] for line in log.read_text().splitlines()]


@pytest.mark.parametrize(
    ("script", "arguments", "extra", "started"),
    [
        ("demo.sh", [], ".", ["entrypoints/offline_inference.py"]),
        ("demo.sh", ["床前 明月", "--max-tokens", "8"], ".",
         ["entrypoints/offline_inference.py", "床前 明月", "--max-tokens", "8"]),
        ("serve.sh", ["--port", "8180"], ".",
         ["-m", "fastdeploy_lite.entrypoints.openai.api_server", "--model", "demo", "--port",
          "8180"]),
        ("serve.sh", ["--model", "DIR"], ".",
         ["-m", "fastdeploy_lite.entrypoints.openai.api_server", "--model", "DIR"]),
        ("test.sh", ["tests", "-k", "x"], ".[test]", ["-m", "pytest", "tests", "-k", "x"]),
    ],
)  # fmt: skip
def test_arguments_reach_the_program_and_nothing_else(
    project: Path, script: str, arguments: list[str], extra: str, started: list[str]
) -> None:
    """They were taken for extras of the installation, which then failed."""
    found = calls(project, script, *arguments)
    installed = [call for call in found if call[:3] == ["-m", "pip", "install"]]
    assert [call[-1] for call in installed] == [extra]
    assert found[-1] == started


@pytest.mark.parametrize("cores", [1, 2])
def test_all_tests_are_run_side_by_side_where_there_are_cores_and_no_card(
    project: Path, cores: int
) -> None:
    nproc = project / ".venv/bin/nproc"
    nproc.write_text(f"#!/bin/sh\necho {cores}\n")
    nproc.chmod(0o755)
    side_by_side = cores > 1 and not Path("/dev/nvidiactl").exists()
    wanted = ["tests/side_by_side.py"] if side_by_side else ["-m", "pytest"]
    assert calls(project, "test.sh")[-1] == wanted


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "entrypoints").glob("*.py")))
def test_help_does_nothing_else(script: str, tmp_path: Path) -> None:
    """It renewed the page's libraries, in one case; in another it needed a card."""
    folder = tmp_path / "entrypoints"
    shutil.copytree(ROOT / "entrypoints", folder)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(
        [sys.executable, str(folder / script), "--help"],
        capture_output=True, text=True, check=False, env=env, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("usage: ")
    assert [p.name for p in tmp_path.iterdir()] == ["entrypoints"]
