"""Every file of examples/, run as its reader would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import REPOSITORY, ServerProcess, environment

EXAMPLES = REPOSITORY / "examples"
SCRIPTS = {"offline.py", "client.py", "tools.py", "structured_output.py", "quantise.sh"}


def run(folder: Path, *command: str) -> str:
    """What a command prints; it must succeed."""
    tools = Path(sys.executable).parent
    env = environment()
    env["PATH"] = f"{tools}:{env['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def example(name: str) -> str:
    return str(EXAMPLES / name)


def test_every_example_is_tested_and_described() -> None:
    found = {path.name for path in EXAMPLES.iterdir()}
    assert found == SCRIPTS | {"notebook.ipynb", "README.md"}
    described = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in described for name in found - {"README.md"})


def test_offline(tmp_path: Path) -> None:
    printed = run(tmp_path, sys.executable, example("offline.py"))
    assert printed.count(" tokens] ") == 2
    assert len(printed.splitlines()) >= 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [("client.py", "first token after"), ("tools.py", "add("), ("structured_output.py", "dynasty")],
)
def test_clients(server: ServerProcess, tmp_path: Path, name: str, expected: str) -> None:
    printed = run(tmp_path, sys.executable, example(name), f"{server.url}/v1")
    assert expected in printed


def test_quantise(tmp_path: Path) -> None:
    printed = run(tmp_path, "bash", example("quantise.sh"), str(tmp_path / "models"))
    assert "million weights in bf16" in printed
    assert (tmp_path / "models/2bits/config.json").is_file()


def test_notebook(tmp_path: Path) -> None:
    """The code of its cells, in their order, in one process; a notebook's own file has no output,
    so that nothing in it can be out of date."""
    notebook = json.loads(Path(example("notebook.ipynb")).read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells)
    script = tmp_path / "cells.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells), encoding="utf-8")
    printed = run(tmp_path, sys.executable, str(script))
    assert "routed experts" in printed
    assert "bits a weight" in printed
