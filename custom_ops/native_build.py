"""Compiles the native modules: parallel, incremental, several instruction sets from one source.

Used by setup.py only. A file under ``custom_ops/cpu/isa`` is compiled once per instruction set (see
``ISA_FLAGS``) with the macro FD_ISA naming the set, and lives in the C++ namespace ``fd::FD_ISA``.
Such a file includes no header with inline functions of the standard library: the linker keeps one
copy of those, and the copy with AVX-512 instructions would then run on every machine.
Every other file is compiled once with the baseline flags of the platform.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

BASE_FLAGS = [
    "-std=c++17",
    os.environ.get("FD_BUILD_OPTIMIZATION", "-O3"),
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
    # Results are the same for every set: products are fused only where the source says so.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]

# Every set beyond "plain" is optional: a compiler that refuses the flags leaves the set out.
AVX512_FLAGS = [
    *["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavx512f", "-mavx512bw", "-mavx512dq"],
    *["-mavx512vl", "-mavx512vnni", "-mavx512vbmi", "-mprefer-vector-width=512"],
]
ISA_FLAGS: dict[str, list[str]] = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avxvnni": ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavxvnni"],
    "avx512": AVX512_FLAGS,
    "amx": [*AVX512_FLAGS, "-mamx-tile", "-mamx-int8"],
}
X86_MACHINES = {"x86_64", "amd64", "AMD64"}


@dataclass(frozen=True)
class CompileUnit:
    """One run of the compiler: ``source`` with ``flags`` into ``output``."""

    source: Path
    output: Path
    command: list[str]


def job_count() -> int:
    """How many compilers may run at once: FD_BUILD_JOBS, else the CPUs this process may use."""
    jobs = os.environ.get("FD_BUILD_JOBS")
    if jobs:
        return max(1, int(jobs))
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def supported_isas(compiler: Sequence[str], build_dir: Path) -> list[str]:
    """The instruction sets that this compiler can produce for this machine's architecture."""
    names = ["plain"]
    if platform.machine() not in X86_MACHINES:
        return names
    build_dir.mkdir(parents=True, exist_ok=True)
    probe = build_dir / "probe.cc"
    probe.write_text("#include <immintrin.h>\nint main() { return 0; }\n")
    for name, flags in ISA_FLAGS.items():
        command = [*compiler, *BASE_FLAGS, *flags, "-fsyntax-only", str(probe)]
        if flags and subprocess.run(command, capture_output=True, check=False).returncode == 0:
            names.append(name)
    return names


def is_fresh(unit: CompileUnit) -> bool:
    """True if the object is newer than everything it was made from and was made by this command."""
    depfile = unit.output.with_suffix(".d")
    stamp = unit.output.with_suffix(".cmd")
    if not (unit.output.exists() and depfile.exists() and stamp.exists()):
        return False
    if stamp.read_text() != shlex.join(unit.command):
        return False
    made = unit.output.stat().st_mtime
    prerequisites = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return all(Path(p).exists() and Path(p).stat().st_mtime <= made for p in prerequisites)


def compile_unit(unit: CompileUnit) -> None:
    """Compile one unit unless it is fresh. Raises RuntimeError with the compiler's own words."""
    if is_fresh(unit):
        return
    unit.output.parent.mkdir(parents=True, exist_ok=True)
    stamp = unit.output.with_suffix(".cmd")
    stamp.unlink(missing_ok=True)  # an interrupted compiler must not leave a fresh-looking object
    print(f"compiling {unit.output.stem} ({unit.source.name})", flush=True)
    done = subprocess.run(unit.command, capture_output=True, text=True, check=False)
    if done.stderr:
        print(done.stderr, flush=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"compiling {unit.source} failed with status {done.returncode}: "
            f"{shlex.join(unit.command)}"
        )
    stamp.write_text(shlex.join(unit.command))


def compile_all(units: Sequence[CompileUnit]) -> list[Path]:
    """Compile the units, ``job_count()`` at a time, and return their objects.

    Raises RuntimeError with the compiler's command for the first unit that fails.
    """
    with ThreadPoolExecutor(job_count()) as pool:
        list(pool.map(compile_unit, units))
    return [unit.output for unit in units]


def cpu_units(
    root: Path, compiler: Sequence[str], includes: Sequence[str], build_dir: Path
) -> list[CompileUnit]:
    """The units of ``fastdeploy_lite._ops_cpu``: common files, and ISA files once per set."""
    native = root / "custom_ops"
    include_flags = [f"-I{native / 'include'}", *(f"-I{path}" for path in includes)]
    isas = supported_isas(compiler, build_dir)
    have = [f"-DFD_HAVE_{name.upper()}=1" for name in isas]

    def unit(source: Path, tag: str, flags: Sequence[str]) -> CompileUnit:
        output = build_dir / source.relative_to(native).with_suffix(f".{tag}.o")
        depfile = output.with_suffix(".d")
        command = [*compiler, *BASE_FLAGS, *have, *flags, *include_flags]
        command += ["-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        return CompileUnit(source, output, command)

    units = [
        unit(source, isa, [*ISA_FLAGS[isa], f"-DFD_ISA={isa}", f"-DFD_ISA_{isa.upper()}=1"])
        for source in sorted((native / "cpu" / "isa").glob("*.cc"))
        for isa in reversed(isas)
    ]
    bindings = [native / "bindings" / "module_cpu.cc", *(native / "bindings").glob("cpu_*.cc")]
    plans = (native / "cuda" / "gemm").glob("plan*.cc")  # free of CUDA: tests run anywhere
    common = [*(native / "cpu").glob("*.cc"), *bindings, *plans]
    return units + [unit(source, "base", []) for source in sorted(common)]


@contextlib.contextmanager
def exclusive(build_dir: Path) -> Iterator[None]:
    """Hold the build folder: a second build of the same tree waits instead of mixing objects."""
    build_dir.mkdir(parents=True, exist_ok=True)
    with (build_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def link(compiler: Sequence[str], objects: Sequence[Path], output: Path) -> None:
    """Link the objects into the shared module ``output`` unless it is newer than all of them."""
    newest = max(path.stat().st_mtime for path in objects)
    if output.exists() and output.stat().st_mtime >= newest:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: a running process keeps the old file, nobody sees half a module.
    scratch = output.with_suffix(".tmp")
    command = [*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(scratch)]
    print(f"linking {output.name}", flush=True)
    subprocess.run(command, check=True)
    scratch.replace(output)
