"""OpenBLAS beside our own threads: it obeys --num-threads, and does not wait in a loop."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

GETTERS = ("scipy_openblas_get_num_threads64_", "openblas_get_num_threads")
COUNT = f"""
import ctypes
def count():
    paths = {{line.split()[-1] for line in open("/proc/self/maps") if "openblas" in line}}
    for path in paths:
        for name in {GETTERS}:
            if hasattr(ctypes.CDLL(path), name):
                return getattr(ctypes.CDLL(path), name)()
"""
"""Threads of the library that numpy has loaded; None where it has another."""
FIRST_IMPORT = """
import importlib, os, sys
from fastdeploy_lite.entrypoints.cli import main

real = importlib.import_module

def watched(name):
    print("numpy" in sys.modules, os.environ.get("OPENBLAS_THREAD_TIMEOUT"))
    return real(name)

importlib.import_module = watched
main.run(sys.argv[1:])
"""


def python(code: str, *arguments: str, **variables: str) -> list[str]:
    """What a fresh process prints first, and last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=True, env={**os.environ, **variables},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    return [lines[0], lines[-1]]


@pytest.mark.parametrize(
    ("arguments", "said", "timeout"),
    [
        (("quantize",), {}, "4"),
        (("bench", "quantize"), {}, "4"),
        (("quantize",), {"OPENBLAS_THREAD_TIMEOUT": "20"}, "20"),
        (("inspect",), {}, "None"),
    ],
)
def test_idle_threads_sleep_where_ours_take_turns_with_them(
    arguments: tuple[str, ...], said: dict[str, str], timeout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library reads the variable once, when numpy is imported."""
    monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT", raising=False)
    assert python(FIRST_IMPORT, *arguments, "--help=nothing", **said)[0] == f"False {timeout}"


@pytest.mark.parametrize("threads", [1, 3])
def test_products_keep_to_the_number_of_threads(threads: int) -> None:
    """--num-threads was the search's alone."""
    code = f"""
import numpy
{COUNT}
before = count()
from fastdeploy_lite.entrypoints.cli import main
from fastdeploy_lite.utils import blas
status = main.run(["bench", "quantize", "--shape", "128,64", "--methods", "hessian", "--rounds",
                   "1", "--num-threads", "{threads}"])
print(before, count(), status)
"""
    before, after, status = python(code, OPENBLAS_NUM_THREADS="2")[1].split()
    if before == "None":
        pytest.skip("numpy multiplies with another library here")
    assert (before, after, status) == ("2", str(threads), "0")


def test_a_process_without_the_library_is_left_alone() -> None:
    code = "from fastdeploy_lite.utils import blas\nprint(blas.set_num_threads(1))"
    assert python(code)[0] == "False"
