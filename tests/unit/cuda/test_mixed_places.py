"""Paddle's place `nvidia:0` over a card that is main memory, beside main memory itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CARD = ROOT / "tests" / "card_in_memory"
CUDA_INCLUDE = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(
    not (CUDA_INCLUDE / "cuda_runtime.h").is_file(), reason="needs the headers of CUDA's toolkit"
)
def test_experts_stay_in_main_memory_while_the_card_is_current(tmp_path: Path) -> None:
    plugin = ROOT / "custom_ops" / "paddle_device" / "nvidia.cc"
    folders = [f"-I{CUDA_INCLUDE}", f"-I{ROOT / 'custom_ops' / 'include'}"]
    library = tmp_path / "libpaddle_nvidia.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", *folders, str(CARD / "driver.cc")]
    subprocess.run([*command, str(plugin), "-o", str(library)], check=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CUSTOM_DEVICE_ROOT": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(CARD / "mixed_places.py")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "equal"
