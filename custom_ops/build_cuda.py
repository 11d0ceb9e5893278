"""Builds ``fastdeploy_lite._ops_cuda`` and the NVIDIA plug-in for Paddle where nvcc is found.

Architectures come from FD_BUILDING_ARCS ("80,86,89,90,100,120" or "all"; "none" skips the build),
else from the cards present. Without nvcc, or without a card and FD_BUILDING_ARCS, nothing is built
and nothing fails.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from custom_ops import native_build

ARCHS_VARIABLE = "FD_BUILDING_ARCS"
SUPPORTED_ARCHS = ("80", "86", "89", "90", "100", "120")
OLDEST_ARCH = 80  # bf16 tensor cores and cp.async
FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
]


def build(root: Path, package_dir: Path, build_dir: Path) -> None:
    """Build both libraries into ``package_dir`` if this machine can.

    Args:
        root: the repository.
        package_dir: the package folder that receives `_ops_cuda*.so` and `_paddle_device/*.so`.
        build_dir: objects, reused by the next build.

    Raises:
        RuntimeError: the build was possible but failed, or its request cannot be met.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        if wanted_archs() not in (None, "none"):
            raise RuntimeError(f"{ARCHS_VARIABLE} is set but nvcc is not on PATH nor in CUDA_HOME")
        print("CUDA module: not built, nvcc was not found")
        return
    archs = choose_archs(nvcc)
    if not archs:
        print(f"CUDA module: not built, no card is present and {ARCHS_VARIABLE} names no target")
        return
    started = time.monotonic()
    build_dir = build_dir.resolve()
    with native_build.exclusive(build_dir):
        _build_ops(root, nvcc, archs, package_dir, build_dir / "ops")
        _build_plugin(root, nvcc, package_dir, build_dir / "plugin")
    seconds = time.monotonic() - started
    print(f"CUDA module: built for sm_{', sm_'.join(archs)} in {seconds:.0f} s", flush=True)


def find_nvcc() -> str | None:
    """The compiler on PATH, in CUDA_HOME or at the toolkit's usual place."""
    found = shutil.which("nvcc")
    if found:
        return found
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if folder and (Path(folder) / "bin" / "nvcc").is_file():
            return str(Path(folder) / "bin" / "nvcc")
    return None


def wanted_archs() -> str | None:
    """FD_BUILDING_ARCS in lower case without blanks; None when unset or empty."""
    value = os.environ.get(ARCHS_VARIABLE, "").replace(" ", "").lower()
    return value or None


def choose_archs(nvcc: str) -> list[str]:
    """The compute capabilities to build for, such as ["90"]; empty when there is no target."""
    wanted = wanted_archs()
    if wanted == "none":
        return []
    offered = offered_archs(nvcc)
    if wanted == "all":
        return [arch for arch in SUPPORTED_ARCHS if arch in offered]
    if wanted is None:
        return [arch for arch in present_archs() if arch in offered and int(arch) >= OLDEST_ARCH]
    archs = sorted({part.removeprefix("sm_") for part in wanted.split(",") if part}, key=int)
    for arch in archs:
        if arch not in offered or int(arch) < OLDEST_ARCH:
            usable = ", ".join(a for a in sorted(offered, key=int) if int(a) >= OLDEST_ARCH)
            raise RuntimeError(f"{ARCHS_VARIABLE} names {arch}, this nvcc can build for {usable}")
    return archs


def offered_archs(nvcc: str) -> set[str]:
    """What this nvcc can generate code for."""
    done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    return set(re.findall(r"sm_(\d+)$", done.stdout, re.MULTILINE))


def present_archs() -> list[str]:
    """Compute capabilities of the cards of this machine, without the dot."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"a card is present but nvidia-smi fails ({error}): set {ARCHS_VARIABLE}"
        ) from error
    found = {line.strip().replace(".", "") for line in done.stdout.splitlines() if line.strip()}
    return sorted(found, key=int)


def site_folders() -> list[Path]:
    """Folders of installed packages; build isolation hides them from import, not from the disk."""
    paths = sysconfig.get_paths()
    extra = [
        Path(folder) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder
    ]
    folders = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    return [*extra, *(Path(folder) for folder in dict.fromkeys(folders))]


def cublas_includes(nvcc: str) -> list[str]:
    """Include flags for cublasLt.h: none if the toolkit has it, else the nvidia-cublas wheel's.

    Raises:
        RuntimeError: neither has it.
    """
    toolkit = Path(nvcc).resolve().parent.parent
    for folder in (toolkit / "include", toolkit / "targets" / "x86_64-linux" / "include"):
        if (folder / "cublasLt.h").is_file():
            return []
    named = os.environ.get("FD_CUBLAS_INCLUDE")
    places = [Path(named)] if named else []
    for folder in site_folders():
        places += sorted(folder.glob("nvidia/*/include"), reverse=True)
    for place in places:
        if (place / "cublasLt.h").is_file():
            return [f"-I{place}"]
    raise RuntimeError(
        "cublasLt.h was not found: install the toolkit's cuBLAS or `pip install nvidia-cublas`, "
        f"name its folder in FD_CUBLAS_INCLUDE, or skip the CUDA module with {ARCHS_VARIABLE}=none"
    )


def target_flags(archs: Sequence[str]) -> list[str]:
    """Compiler flags for these compute capabilities.

    Hopper's code uses instructions of that architecture alone (wgmma); FD_SM90A tells that it is
    in the build. The newest PTX lets later cards compile the other kernels at first use.
    """
    names = [f"{arch}a" if arch == "90" else arch for arch in archs]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    newest = max(archs, key=int)
    flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return [*flags, "-DFD_SM90A"] if "90" in archs else flags


def _build_ops(
    root: Path, nvcc: str, archs: Sequence[str], package_dir: Path, build_dir: Path
) -> None:
    import pybind11  # noqa: PLC0415 - a build requirement, absent when only metadata is asked for

    native = root / "custom_ops"
    targets = target_flags(archs)
    includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    includes += cublas_includes(nvcc)
    kernels = sorted((native / "cuda").rglob("*.cu"))
    hosts = [
        *sorted((native / "cuda").rglob("*.cc")),
        *sorted((native / "bindings").glob("*cuda*.cc")),
    ]
    units = [_unit(nvcc, native, source, build_dir, targets) for source in kernels]
    units += [_unit(nvcc, native, source, build_dir, includes) for source in hosts]
    # the largest files first, so that the last compiler does not run alone
    units.sort(key=lambda unit: not unit.source.name.startswith(("tiles_wgmma_", "gemm_")))
    objects = native_build.compile_all(units)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    _link(nvcc, objects, package_dir / f"_ops_cuda{suffix}")


def _build_plugin(root: Path, nvcc: str, package_dir: Path, build_dir: Path) -> None:
    native = root / "custom_ops"
    unit = _unit(nvcc, native, native / "paddle_device" / "nvidia.cc", build_dir, [])
    objects = native_build.compile_all([unit])
    _link(nvcc, objects, package_dir / "_paddle_device" / "libpaddle_nvidia.so")


def _unit(
    nvcc: str, native: Path, source: Path, build_dir: Path, flags: Sequence[str]
) -> native_build.CompileUnit:
    output = build_dir / source.relative_to(native).with_suffix(source.suffix + ".o")
    depfile = output.with_suffix(".d")
    command = [nvcc, *FLAGS, *flags, "-MMD", "-MF", str(depfile)]
    command += ["-c", str(source), "-o", str(output)]
    return native_build.CompileUnit(source, output, command)


def _link(nvcc: str, objects: Sequence[Path], output: Path) -> None:
    """Link with the static CUDA runtime: the result needs nothing of the toolkit at run time."""
    newest = max(path.stat().st_mtime for path in objects)
    if output.exists() and output.stat().st_mtime >= newest:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = output.with_suffix(".tmp")
    command = [nvcc, "-shared", "-cudart=static", *map(str, objects), "-o", str(scratch), "-ldl"]
    subprocess.run(command, check=True)
    scratch.replace(output)
