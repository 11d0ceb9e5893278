"""rms_norm and add_rms_norm against float64, bit for bit between instruction sets and batches."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from native_ops import ISAS, assert_same_everywhere, bits, isa, tensor
from oracles import rowwise as oracle

from fastdeploy_lite.model_executor.ops.norm import add_rms_norm, rms_norm

WIDTHS = [1, 15, 16, 17, 63, 64, 65, 80, 384, 2560, 8192]
EPS = 1e-5


def random_rows(seed: int, rows: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, width)) * rng.uniform(1e-3, 1e3, (rows, 1))).astype("f4")


def norm(x: np.ndarray, weight: paddle.Tensor) -> np.ndarray:
    out = paddle.empty(x.shape)
    rms_norm(tensor(x), weight, EPS, out)
    return out.numpy()


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
def test_rms_norm_equals_float64(name: str, width: int, weight_dtype: str) -> None:
    x = random_rows(width, 5, width)
    weight = tensor(random_rows(1, 1, width)[0], weight_dtype)
    with isa(name):
        found = norm(x, weight)
    expected = oracle.rms_norm(x, weight.astype("float32").numpy(), EPS)
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_same_bits_everywhere(width: int) -> None:
    x = random_rows(width, 33, width)
    weight = tensor(random_rows(2, 1, width)[0])
    batch = assert_same_everywhere(lambda: norm(x, weight))
    for row in (0, 17, 32):
        np.testing.assert_array_equal(bits(norm(x[row : row + 1], weight)[0]), bits(batch[row]))


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm_is_a_sum_and_a_norm(width: int) -> None:
    x, residual = random_rows(3, 4, width), random_rows(4, 4, width)
    weight = tensor(random_rows(5, 1, width)[0], "bfloat16")
    total, out = tensor(residual), paddle.empty(x.shape)
    add_rms_norm(tensor(x), total, weight, EPS, out)
    np.testing.assert_array_equal(bits(total.numpy()), bits(residual + x))
    np.testing.assert_array_equal(bits(out.numpy()), bits(norm(residual + x, weight)))

    also, total = random_rows(6, 4, width), tensor(residual)
    add_rms_norm(tensor(x), total, weight, EPS, out, tensor(also))
    both = residual + (x + also)
    np.testing.assert_array_equal(bits(total.numpy()), bits(both))
    np.testing.assert_array_equal(bits(out.numpy()), bits(norm(both, weight)))


def test_add_rms_norm_same_bits_everywhere() -> None:
    x, residual = random_rows(6, 40, 2576), random_rows(7, 40, 2576)
    weight = tensor(random_rows(8, 1, 2576)[0])

    def compute() -> np.ndarray:
        out = paddle.empty(x.shape)
        add_rms_norm(tensor(x), tensor(residual), weight, EPS, out)
        return out.numpy()

    assert_same_everywhere(compute)


def test_output_may_be_the_input() -> None:
    x = random_rows(9, 3, 100)
    weight = tensor(random_rows(10, 1, 100)[0])
    place = tensor(x)
    rms_norm(place, weight, EPS, place)
    np.testing.assert_array_equal(bits(place.numpy()), bits(norm(x, weight)))


def test_rows_may_have_gaps_between_them() -> None:
    x = random_rows(11, 6, 96)
    weight = tensor(random_rows(12, 1, 40)[0])
    out = paddle.empty([6, 40])
    rms_norm(paddle.as_strided(tensor(x), [6, 40], [96, 1], 4 * 8), weight, EPS, out)
    np.testing.assert_array_equal(bits(out.numpy()), bits(norm(x[:, 8:48], weight)))


def test_no_rows() -> None:
    out = paddle.empty([0, 8])
    rms_norm(paddle.empty([0, 8]), paddle.ones([8]), EPS, out)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": paddle.ones([7])}, ValueError, "rms_norm: weight has shape"),
        ({"weight": paddle.ones([8], "float64")}, TypeError, "rms_norm: weight has dtype"),
        ({"out": paddle.ones([2, 9])}, ValueError, "rms_norm: out has shape"),
        ({"x": paddle.ones([8])}, ValueError, "rms_norm: x has shape"),
        ({"x": paddle.ones([2, 8], "bfloat16")}, TypeError, "rms_norm: x has dtype"),
    ],
)
def test_errors_name_the_argument(
    change: dict[str, paddle.Tensor], error: type[Exception], message: str
) -> None:
    good = {"x": paddle.ones([2, 8]), "weight": paddle.ones([8]), "out": paddle.ones([2, 8])}
    with pytest.raises(error, match=message) as caught:
        rms_norm(**{**good, **change}, eps=EPS)
    assert "\n" not in str(caught.value)
