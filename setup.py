"""Builds the native modules that this machine can build and computes the dependency on Paddle.

``fastdeploy_lite._ops_cpu`` is always built. ``custom_ops/build_cuda.py`` builds the CUDA module
where nvcc is found. Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# A PEP 517 front end runs this file without its folder on the import path.
sys.path.insert(0, str(ROOT))

from custom_ops import native_build  # noqa: E402

RUNTIME_DEPENDENCIES = [
    "fastapi",
    "httpx",
    "jinja2",
    "llguidance",
    "msgspec",
    "numpy",
    "prometheus_client",
    "prompt_toolkit",
    "pydantic>=2.8",
    "pyyaml",
    "pyzmq",
    "rich",
    "safetensors",
    "sentencepiece",
    "setuptools",  # Paddle imports it and does not ask for it
    "shtab",
    "tokenizers",
    "tqdm",
    "starlette",
    "uvicorn",
]


def site_folders() -> list[Path]:
    """The folders where the package's neighbours are installed.

    Build isolation hides their contents from ``import`` but not from the disk.
    """
    paths = sysconfig.get_paths()
    folders = {paths["purelib"], paths["platlib"], *site.getsitepackages()}
    if site.ENABLE_USER_SITE:
        folders.add(site.getusersitepackages())
    return [Path(folder) for folder in folders]


def has_cuda_paddle() -> bool:
    """True if a CUDA build of Paddle 3 or later is already installed."""
    for folder in site_folders():
        for info in folder.glob("paddlepaddle_gpu-*.dist-info"):
            version = re.match(r"paddlepaddle_gpu-(\d+)", info.name)
            if version and int(version[1]) >= 3:
                return True
    return False


def install_requires() -> list[str]:
    """Run-time dependencies; a CUDA build of Paddle takes the place of the CPU wheel."""
    return RUNTIME_DEPENDENCIES + ([] if has_cuda_paddle() else ["paddlepaddle>=3.2"])


class BuildNative(build_ext):
    """Compiles the native code with the rules of ``custom_ops/native_build.py``."""

    def run(self) -> None:
        """Build the CPU module, then what of CUDA this machine can build."""
        super().run()
        if (ROOT / "custom_ops" / "build_cuda.py").exists():
            from custom_ops import build_cuda  # noqa: PLC0415 - needs nothing on a plain machine

            package = ROOT if self.inplace else Path(self.build_lib)
            build_cuda.build(ROOT, package / "fastdeploy_lite", Path(self.build_temp) / "cuda")
        if not self.inplace:
            self._copy_to_sources()

    def _copy_to_sources(self) -> None:
        """Put the modules beside the sources too.

        Python started in this folder (`python -m pytest`, `python -c`) finds the package here
        before the installed one, and it would lack its native modules.
        """
        built = Path(self.build_lib)
        for module in (built / "fastdeploy_lite").rglob("*.so"):
            beside = ROOT / module.relative_to(built)
            beside.parent.mkdir(parents=True, exist_ok=True)
            scratch = beside.with_suffix(".tmp")
            shutil.copy2(module, scratch)
            scratch.replace(beside)  # a running process keeps the old file

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension into the place where setuptools expects it."""
        import pybind11  # noqa: PLC0415 - a build requirement, absent when only metadata is asked for

        # distutils' compiler drags in the flags that Python was built with; CXX is enough.
        compiler = shlex.split(os.environ.get("CXX", "g++")) + shlex.split(
            os.environ.get("CXXFLAGS", "")
        )
        includes = [sysconfig.get_paths()["include"], pybind11.get_include()]
        build_dir = Path(self.build_temp).resolve() / "cpu"
        with native_build.exclusive(build_dir):
            units = native_build.cpu_units(ROOT, compiler, includes, build_dir)
            objects = native_build.compile_all(units)
            native_build.link(compiler, objects, Path(self.get_ext_fullpath(ext.name)))


setup(
    install_requires=install_requires(),
    # The sources are named for the source distribution and for setuptools' up-to-date check.
    ext_modules=[Extension("fastdeploy_lite._ops_cpu", ["custom_ops/bindings/module_cpu.cc"])],
    cmdclass={"build_ext": BuildNative},
)
