"""Compiles CUDA kernels for this processor, against kernels/machine.h in place of a card.

A copy of custom_ops/cuda is compiled in which C++ stands where CUDA's own syntax stood (launches,
shared memory), and in which the files of kernels/ptx stand for those of ptx, the only ones with
instructions of a card.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).resolve().parent / "kernels"
ROOT = HERE.parents[2]
NATIVE = ROOT / "custom_ops"
BUILD = ROOT / "build" / "card_in_memory"
CODE = (".cu", ".cuh", ".cc", ".h")

sys.path.insert(0, str(ROOT))
from custom_ops import native_build  # noqa: E402

SOURCES = (
    *("cuda/encode/*.c[cu]", "cuda/gemm/*.c[cu]", "cuda/moe.cu"),
    *("bindings/cuda_encode.cc", "bindings/cuda_experts.cc", "rules/*.cu"),
)
"""What is compiled of the copy, beside what stands for the card."""

DECLARATOR = r"\w+(?:\[[^]]*\])*"
SHARED = re.compile(
    r"(?<!extern )__shared__ (?:__align__\((\d+)\) )?([\w:]+) "
    rf"({DECLARATOR}(?:, {DECLARATOR})*);"
)
DYNAMIC = re.compile(r"extern __shared__ (?:__align__\((\d+)\) )?(\w+) (\w+)\[\];")
LAUNCH = re.compile(r"([\w:]+(?:<[\w:, ]*>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)
UNALIGNED = "16"
"""Bytes at whose multiples shared memory begins where nothing is said."""


def without_cuda_syntax(source: str) -> str:
    """C++ for CUDA code: see CARD_SHARED and CardLaunch in kernels/cuda_runtime.h."""

    def variables(found: re.Match[str]) -> str:
        made = []
        for declarator in found[3].split(", "):
            name, bracket, sizes = declarator.partition("[")
            made.append(f"CARD_SHARED({name}, {found[1] or 1}, {found[2]} {bracket}{sizes})")
        return "; ".join(made) + ";"

    source = DYNAMIC.sub(
        lambda found: f"CARD_DYNAMIC_SHARED({found[3]}, {found[1] or UNALIGNED}, {found[2]});",
        source,
    )
    source = SHARED.sub(variables, source)
    source = LAUNCH.sub(r"CardLaunch(\2)(\1, ", source)
    for left in ("__shared__", "<<<", "asm("):
        if left in source:
            raise ValueError(f"the card in memory has no meaning for {left!r}")
    return source


def copied_sources() -> Iterator[tuple[Path, str]]:
    """Path below the folder of the copy, and text."""
    for folder in (NATIVE / "cuda", NATIVE / "bindings", HERE / "rules"):
        for path in sorted(folder.rglob("*")):
            if path.suffix not in CODE:
                continue
            stand_in = HERE / "ptx" / path.name
            source = stand_in if path.parent.name == "ptx" else path
            text = without_cuda_syntax(source.read_text())
            yield path.relative_to(folder.parent), f'#line 1 "{source}"\n{text}'


def write_copy(folder: Path) -> None:
    """Leave files alone that are as they should be: what was made from them stays fresh."""
    wanted = dict(copied_sources())
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder) not in wanted:
            path.unlink()
    for relative, text in wanted.items():
        target = folder / relative
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)


def units(copy: Path) -> list[native_build.CompileUnit]:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    # One operation at a time, as __fmul_rn and its like are on a card; FMA as an instruction.
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-march=native", "-w"]
    for folder in (HERE, pybind11.get_include(), sysconfig.get_paths()["include"]):
        flags.append(f"-I{folder}")
    kernel_flags = ["-D__CUDACC__=1", "-D__CUDA_ARCH__=900", "-D__CUDA_ARCH_FEAT_SM90_ALL=1"]
    kernel_flags += ["-DFD_SM90A", "-include", "cuda_runtime.h"]
    sources = [path for pattern in SOURCES for path in sorted(copy.glob(pattern))]
    made = []
    for source in [*sources, *sorted(HERE.glob("*.cc"))]:
        output = BUILD / f"{source.parent.name}_{source.name}.o"
        command = [*compiler, *flags, *(kernel_flags if source.suffix == ".cu" else [])]
        if "wgmma" in source.name:  # half of all compiling by -O1, and no slower for less of it
            command.append("-Og")
        command += ["-MMD", "-MF", str(output.with_suffix(".d")), "-x", "c++", "-c", str(source)]
        made.append(native_build.CompileUnit(source, output, [*command, "-o", str(output)]))
    return made


def build() -> ModuleType:
    """Compile what changed since the last time, and import; what stands for `_ops_cuda`."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    library = BUILD / "card_in_memory.so"
    with native_build.exclusive(BUILD):
        copy = BUILD / "copy"
        write_copy(copy)
        native_build.link(compiler, native_build.compile_all(units(copy)), library)
    spec = importlib.util.spec_from_file_location("card_in_memory", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
