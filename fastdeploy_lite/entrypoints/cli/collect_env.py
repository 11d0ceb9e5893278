"""Print what a bug report needs: versions, device, native modules, environment."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from importlib import metadata
from pathlib import Path

import fastdeploy_lite
from fastdeploy_lite import envs
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
from fastdeploy_lite.utils.errors import one_line

_DISTRIBUTIONS = (
    "paddlepaddle", "paddlepaddle-gpu", "numpy", "safetensors", "sentencepiece", "fastapi",
    "uvicorn", "pydantic", "pyzmq", "msgspec", "llguidance", "prometheus_client",
)  # fmt: skip
_MODULES = ("_ops_cpu", "_ops_cuda")


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """There are no flags."""


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    for title, lines in report().items():
        print(f"{title}:")
        for line in lines:
            print(f"  {line}")
    return 0


def report() -> dict[str, list[str]]:
    """The sections of the report."""
    return {
        "fastdeploy_lite": [
            f"version {fastdeploy_lite.__version__}",
            f"in {Path(fastdeploy_lite.__file__).parent}",
            *(_module(name) for name in _MODULES),
        ],
        "machine": _machine(),
        "device": _device(),
        "packages": [_package(name) for name in _DISTRIBUTIONS],
        "environment": [f"{name}={value!r}" for name, value in _set_variables().items()],
    }


def _set_variables() -> dict[str, object]:
    """As they are set: a report must not fail on a value that cannot be used."""
    names = [*envs.VARIABLES, *envs.without_meaning()]
    return {
        name: "***" if name in envs.SECRETS else os.environ[name]
        for name in names
        if name in os.environ
    }


def _machine() -> list[str]:
    usable = len(os.sched_getaffinity(0))
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return [
        f"{platform.system()} {platform.release()} {platform.machine()}, "
        f"Python {platform.python_version()}",
        f"processor {_processor()}: {usable} of {os.cpu_count()} CPUs usable",
        f"in use on a CPU: {_in_use()}",
        f"memory {pages * size / 2**30:.1f} GiB",
    ]


def _in_use() -> str:
    try:
        from fastdeploy_lite import processor  # noqa: PLC0415 - may not have been built

        return processor.describe()
    except (ImportError, ValueError) as error:  # a variable may have a wrong value
        return f"nothing, {one_line(error)}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "unknown"
    )


def _device() -> list[str]:
    from fastdeploy_lite import device  # noqa: PLC0415 - looks at the machine

    return [f"{name}: {value}" for name, value in device.describe().items()]


def _module(name: str) -> str:
    try:
        importlib.import_module(f"fastdeploy_lite.{name}")
    except ImportError as error:
        return f"{name}: not available ({error})"
    return f"{name}: built"


def _package(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name} not installed"
