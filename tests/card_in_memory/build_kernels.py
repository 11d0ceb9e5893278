"""Compiles the encoders' CUDA kernels for this processor: see kernels/cuda_runtime.h."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).resolve().parent / "kernels"
NATIVE = HERE.parents[2] / "custom_ops"
SOURCES = (
    *sorted((NATIVE / "cuda" / "encode").glob("*.c[cu]")),
    NATIVE / "bindings" / "cuda_encode.cc",
    HERE / "fibers.cc",
    HERE / "module.cc",
)


def build(folder: Path) -> ModuleType:
    """Compile into `folder` and import; what stands for `fastdeploy_lite._ops_cuda`."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    # One operation at a time, as __fmul_rn and its like are on a card; FMA as an instruction.
    flags = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-march=native", "-w"]
    flags += ["-include", "cuda_runtime.h", f"-I{HERE}", f"-I{pybind11.get_include()}"]
    flags += [f"-I{sysconfig.get_paths()['include']}"]

    def compiled(source: Path) -> str:
        output = str(folder / f"{source.name}.o")
        command = [*compiler, *flags, "-x", "c++", "-c", str(source), "-o", output]
        subprocess.run(command, check=True)
        return output

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, SOURCES))
    library = folder / "card_in_memory.so"
    subprocess.run([*compiler, "-shared", *objects, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("card_in_memory", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
