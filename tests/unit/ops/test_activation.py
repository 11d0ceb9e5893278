"""SwiGLU, the kernels' exponential, sums and gathers."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from native_ops import ISAS, assert_same_everywhere, bits, isa, tensor
from oracles import rowwise as oracle

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.model_executor.ops.activation import add_inplace, gather_rows, silu_and_mul


def exponential(x: np.ndarray) -> np.ndarray:
    source, out = np.ascontiguousarray(x, np.float32), np.empty(x.shape, np.float32)
    shape = (len(x),)
    _ops_cpu.exponential(
        (source.ctypes.data, "float32", shape, (1,)), (out.ctypes.data, "float32", shape, (1,))
    )
    return out


def test_exponential_is_within_one_ulp_on_every_set() -> None:
    rng = np.random.default_rng(0)
    dense = np.linspace(-104.5, 89.5, 400_003, dtype=np.float32)
    x = np.concatenate([dense, rng.normal(0, 1, 100_000).astype("f4"), [0.0, -0.0, 1e-30]])
    found = assert_same_everywhere(lambda: exponential(x))
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp(x.astype(np.float32).astype(np.float64))
        ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
        finite = np.isfinite(exact.astype(np.float32))
    assert np.all(np.isinf(found[~finite]))
    error = np.abs(found.astype(np.float64) - exact)[finite] / ulp[finite]
    assert error.max() < 1.0


@pytest.mark.parametrize("name", ISAS)
def test_exponential_of_special_values(name: str) -> None:
    x = np.array([-np.inf, -1e30, 0.0, np.inf, 1e30, np.nan, -0.0], np.float32)
    with isa(name):
        np.testing.assert_array_equal(exponential(x), [0, 0, 1, np.inf, np.inf, np.nan, 1])


def swiglu(x: np.ndarray) -> np.ndarray:
    out = paddle.empty([x.shape[0], x.shape[1] // 2])
    silu_and_mul(tensor(x), out)
    return out.numpy()


@pytest.mark.parametrize("width", [1, 16, 31, 256, 1536])
def test_silu_and_mul_equals_float64(width: int) -> None:
    x = (np.random.default_rng(width).standard_normal((7, 2 * width)) * 8).astype("f4")
    found = assert_same_everywhere(lambda: swiglu(x))
    np.testing.assert_allclose(found, oracle.silu_and_mul(x), rtol=5e-7, atol=1e-38)
    np.testing.assert_array_equal(bits(swiglu(x[3:4])[0]), bits(found[3]))


def test_silu_of_extreme_values() -> None:
    gate = np.array([[-200.0, 200.0, 0.0, -0.0, np.nan]], np.float32)
    found = swiglu(np.concatenate([gate, np.ones_like(gate)], axis=1))[0]
    np.testing.assert_array_equal(found, [0.0, 200.0, 0.0, 0.0, np.nan])


@pytest.mark.parametrize("width", [1, 17, 384])
def test_add_inplace(width: int) -> None:
    rng = np.random.default_rng(width)
    x, y = rng.standard_normal((2, 9, width)).astype("f4")
    place = tensor(x)
    add_inplace(place, tensor(y))
    np.testing.assert_array_equal(bits(place.numpy()), bits(x + y))


def test_gather_rows_takes_any_rows_in_any_order() -> None:
    x = np.random.default_rng(1).standard_normal((50, 33)).astype("f4")
    rows = [49, 0, 7, 7, 13]
    out = paddle.empty([5, 33])
    gather_rows(tensor(x), tensor(rows, "int32"), out)
    np.testing.assert_array_equal(bits(out.numpy()), bits(x[rows]))


@pytest.mark.parametrize("bad", [-1, 4])
def test_gather_rows_names_the_bad_index(bad: int) -> None:
    out = paddle.zeros([2, 3])
    with pytest.raises(ValueError, match=rf"gather_rows: rows\[1\] is {bad}, x has rows 0 to 3"):
        gather_rows(paddle.ones([4, 3]), tensor([0, bad], "int32"), out)
    assert not out.numpy().any()


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"silu_and_mul: x has shape \[2, 5\], expected \[2, 6\]"):
        silu_and_mul(paddle.ones([2, 5]), paddle.ones([2, 3]))
    with pytest.raises(ValueError, match="add_inplace: y has shape"):
        add_inplace(paddle.ones([2, 5]), paddle.ones([2, 4]))
    with pytest.raises(TypeError, match="gather_rows: rows has dtype"):
        gather_rows(paddle.ones([2, 5]), paddle.ones([1], "int64"), paddle.ones([1, 5]))
    with pytest.raises(TypeError, match=r"expected a paddle\.Tensor, found ndarray"):
        add_inplace(np.ones((2, 5)), paddle.ones([2, 5]))
