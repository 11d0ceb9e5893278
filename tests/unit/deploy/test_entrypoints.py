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


# Most scripts import Paddle before they read arguments, which takes a second or two: one process
# imports it for all. Each script runs in a fork of it, as `python SCRIPT --help` would.
HELP_OF_ALL = """\
import os, runpy, sys
from pathlib import Path
import paddle
folder, out = map(Path, sys.argv[1:])
for script in sorted(folder.glob("*.py")):
    child = os.fork()
    if child == 0:
        for descriptor, ending in ((1, "out"), (2, "err")):
            os.dup2(os.open(out / f"{script.name}.{ending}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv[:] = [str(script), "--help"]
        sys.path[0] = str(folder)
        runpy.run_path(str(script), run_name="__main__")
        sys.exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (out / f"{script.name}.status").write_text(str(status))
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder that scripts ran in, and one of what each has printed."""
    cwd, out = (tmp_path_factory.mktemp(name) for name in ("cwd", "out"))
    folder = cwd / "entrypoints"
    shutil.copytree(ROOT / "entrypoints", folder)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent)}
    subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, str(folder), str(out)],
        check=True, env=env, cwd=cwd, timeout=300,
    )  # fmt: skip
    return cwd, out


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "entrypoints").glob("*.py")))
def test_help_does_nothing_else(script: str, helps: tuple[Path, Path]) -> None:
    """It renewed the page's libraries, in one case; in another it needed a card."""
    cwd, out = helps
    assert (out / f"{script}.status").read_text() == "0", (out / f"{script}.err").read_text()
    assert (out / f"{script}.out").read_text().startswith("usage: ")
    assert [p.name for p in cwd.iterdir()] == ["entrypoints"]
