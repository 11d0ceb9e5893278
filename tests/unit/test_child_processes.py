"""Processes that this package starts end with whoever started them, also before they are ready."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from waiting import until

from fastdeploy_lite.engine import engine_client
from fastdeploy_lite.executor import ranks

# Starts a process as its owner would, says which, and holds its standard input open. The child's
# child keeps the pipe: only the end of the parent can tell.
PARENT = """\
import os, subprocess, sys
code = {code!r}.format(path={path!r}, descriptor=0, parent=os.getpid())
read, write = os.pipe()
child = subprocess.Popen([sys.executable, "-c", code], stdin=read, pass_fds=[write])
print(child.pid, flush=True)
child.wait()
"""
# Stands for a framework: it is imported, and that takes long.
SLOW_MODULE = """\
import pathlib, time
pathlib.Path({mark!r}).touch()
time.sleep(600)
"""


@pytest.mark.parametrize("code", [engine_client._RUN_CORE, ranks._RUN_RANK], ids=["engine", "rank"])
def test_a_process_that_still_imports_ends_with_its_parent(tmp_path: Path, code: str) -> None:
    mark = tmp_path / "imports"
    (tmp_path / "msgspec.py").write_text(SLOW_MODULE.format(mark=str(mark)))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(code=code, path=[str(tmp_path), *sys.path])],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        try:
            until(mark.exists)
            parent.kill()
            until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
        finally:
            parent.kill()
            if child.is_running():
                child.kill()
