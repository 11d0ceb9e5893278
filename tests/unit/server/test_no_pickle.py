"""Nothing that could run code on arrival is read from any socket."""

from __future__ import annotations

import ast
from pathlib import Path

import fastdeploy_lite

PACKAGE = Path(fastdeploy_lite.__file__).parent
RUNS_CODE = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing"}
# Its unpickler admits arrays only, and it reads files.
ALLOWED = {"checkpoint/pdparams.py"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Attribute) and node.attr in ("send_pyobj", "recv_pyobj"):
            names.add("pickle")
    return names


def test_no_pickle_in_the_package() -> None:
    found = {
        str(path.relative_to(PACKAGE)): imported(path) & RUNS_CODE for path in PACKAGE.rglob("*.py")
    }
    assert len(found) > 50
    offenders = {name: used for name, used in found.items() if used and name not in ALLOWED}
    assert not offenders
