"""These tests need an NVIDIA card and the CUDA module; elsewhere they skip, with the reason."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdeploy_lite import device

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for cards.py

if device.decide().is_cuda and "paddle" not in sys.modules:
    device.prepare_environment()


@pytest.fixture(scope="session", autouse=True)
def card() -> None:
    """Make the card current, or skip."""
    decided = device.decide()
    if not decided.is_cuda:
        pytest.skip(f"no card to test on: {decided.reason}")
    device.activate(0)


@pytest.fixture(scope="module")
def deterministic() -> Iterator[None]:
    """FD_DETERMINISTIC_MODE=1 for models that are loaded from now on, in other processes too.

    For tests that compare bits of steps of few tokens with those of many, or of mixed steps:
    without it 2-bit experts promise the same bits among steps of few tokens only.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FD_DETERMINISTIC_MODE", "1")
        yield


@pytest.fixture(scope="module")
def fast() -> Iterator[None]:
    """FD_DETERMINISTIC_MODE=0, the default, on cards where 2-bit experts differ by it."""
    from fastdeploy_lite import _ops_cuda
    from fastdeploy_lite.model_executor.ops import cuda_runtime

    if _ops_cuda.device_facts(cuda_runtime.device_index()).major < 9:
        pytest.skip("before Hopper cards have one way to sum, in either mode")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FD_DETERMINISTIC_MODE", "0")
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test FD_LITE_CHECK_REPEATS times: a race on the card shows now and then only."""
    repeats = int(os.getenv("FD_LITE_CHECK_REPEATS", "1"))
    if repeats > 1:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(repeats))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    folder = Path(__file__).resolve().parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.gpu)
