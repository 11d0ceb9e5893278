"""Helpers of the op tests: tensors from arrays, and runs on every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle

from fastdeploy_lite import _ops_cpu

ISAS = _ops_cpu.available_isas()


def tensor(array: Any, dtype: str | None = None) -> paddle.Tensor:
    """A CPU tensor with a copy of the array; dtype "bfloat16" converts float32."""
    array = np.ascontiguousarray(array, None if dtype in (None, "bfloat16") else dtype)
    made = paddle.to_tensor(array, place=paddle.CPUPlace())
    return made.astype("bfloat16") if dtype == "bfloat16" else made


def bits(array: np.ndarray) -> np.ndarray:
    """The array's bytes as integers, so that -0.0 differs from 0.0 and NaN equals itself."""
    return array.view({4: np.uint32, 8: np.uint64}[array.itemsize])


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Run the body on one instruction set."""
    before = _ops_cpu.current_isa()
    _ops_cpu.set_isa(name)
    try:
        yield
    finally:
        _ops_cpu.set_isa(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body with this many threads."""
    before = _ops_cpu.num_threads()
    _ops_cpu.set_num_threads(count)
    try:
        yield
    finally:
        _ops_cpu.set_num_threads(before)


def assert_same_everywhere(compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Check that `compute` gives the same bits on all sets and thread counts; return them."""
    with isa("plain"), threads(1):
        expected = compute()
    for name in ISAS:
        for count in (1, 2, 5):
            with isa(name), threads(count):
                found = compute()
            np.testing.assert_array_equal(bits(found), bits(expected), f"{name}, {count} threads")
    return expected
