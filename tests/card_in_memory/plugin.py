"""The plug-in for Paddle over a card that is main memory: the place `nvidia:0` on any machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIBRARY = "libpaddle_nvidia.so"
CUDA_INCLUDE = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"


def missing() -> str | None:
    """What `build` lacks here, None when nothing."""
    if shutil.which("g++") is None:
        return "needs g++"
    if not (CUDA_INCLUDE / "cuda_runtime.h").is_file():
        return "needs the headers of CUDA's toolkit"
    return None


def build(folder: Path) -> None:
    """Compile into `folder`, which CUSTOM_DEVICE_ROOT is to name before Paddle is imported."""
    sources = [HERE / "driver.cc", ROOT / "custom_ops" / "paddle_device" / "nvidia.cc"]
    includes = [f"-I{CUDA_INCLUDE}", f"-I{ROOT / 'custom_ops' / 'include'}"]
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", *includes, *map(str, sources)]
    subprocess.run([*command, "-o", str(folder / LIBRARY)], check=True)


def run(script: str, folder: Path, *arguments: str) -> str:
    """Run a script of this directory over the plug-in in `folder`; return what it prints."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CUSTOM_DEVICE_ROOT": str(folder), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
