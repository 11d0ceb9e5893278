"""allocate_weight, fill_weight: sizes, sources, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from native_ops import bits, tensor
from oracles import ops as oracle

from fastdeploy_lite.model_executor import ops

CPU = paddle.CPUPlace()


def product(weight: ops.PackedWeight, x: np.ndarray) -> np.ndarray:
    out = paddle.empty([len(x), weight.out_features])
    ops.linear(tensor(x), weight, out)
    return out.numpy()


def ccq_arrays(k: int = 128, n: int = 16) -> dict[str, Any]:
    return oracle.random_weight("ccq", k, n, np.random.default_rng(0))[0]


def fill(kind: Any, k: int, n: int, arrays: dict[str, Any]) -> ops.PackedWeight:
    weight = ops.allocate_weight(kind, k, n, CPU)
    ops.fill_weight(weight, None, **arrays)
    return weight


@pytest.mark.parametrize(
    ("kind", "column_bytes", "bits_per_weight"),
    # ccq: three numbers a column, and for 16 columns a word that says what two of them are.
    [("ccq", 12.25, 2.0625), ("int4", 4, 4), ("int8", 4, 8)],
)
def test_memory_is_the_format_and_nothing_more(
    kind: Any, column_bytes: float, bits_per_weight: float
) -> None:
    weight = ops.allocate_weight(kind, 1024, 512, CPU, num_experts=3)
    matrix = 3 * 1024 * 512 * bits_per_weight / 8
    assert weight.nbytes == matrix + 3 * 512 * column_bytes
    assert weight.logical_bits == pytest.approx(bits_per_weight + 8 * column_bytes / 1024)


@pytest.mark.parametrize(("kind", "element"), [("bf16", 2), ("f32", 4)])
def test_a_dense_weight_keeps_the_dtype_of_its_first_fill(kind: str, element: int) -> None:
    arrays, _ = oracle.random_weight(kind, 32, 48, np.random.default_rng(0))
    weight = ops.allocate_weight("dense", 32, 48, CPU, num_experts=2)
    assert weight.nbytes == 0
    ops.fill_weight(weight, 0, **arrays)
    assert weight.nbytes == 2 * 32 * 48 * element
    other, _ = oracle.random_weight("f32" if kind == "bf16" else "bf16", 32, 48,
                                    np.random.default_rng(0))  # fmt: skip
    with pytest.raises(ValueError, match="weight has dtype"):
        ops.fill_weight(weight, 1, **other)


def test_sources_may_be_slices_of_a_read_only_file(tmp_path: Path) -> None:
    """A tensor-parallel slice of a mapped file: rows with gaps, memory that cannot be written."""
    arrays = ccq_arrays(256, 64)
    whole = {}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        whole[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    sliced = {name: array[..., 16:40] for name, array in whole.items()}
    copies = {name: np.ascontiguousarray(array) for name, array in sliced.items()}
    x = np.random.default_rng(1).standard_normal((3, 256), dtype=np.float32)
    found = product(fill("ccq", 256, 24, sliced), x)
    np.testing.assert_array_equal(bits(found), bits(product(fill("ccq", 256, 24, copies), x)))
    np.testing.assert_array_equal(
        bits(found), bits(product(fill("ccq", 256, 64, whole), x)[:, 16:40])
    )


def test_dense_sources_in_both_orders_and_with_gaps() -> None:
    matrix = np.random.default_rng(0).standard_normal((24, 40), dtype=np.float32)
    x = np.random.default_rng(1).standard_normal((2, 24), dtype=np.float32)
    expected = product(fill("dense", 24, 40, {"weight": matrix}), x)
    for source in (matrix.T.copy(), matrix.T, np.repeat(matrix.T, 2, axis=0)[::2]):
        found = product(fill("dense", 24, 40, {"weight": source, "transposed": True}), x)
        np.testing.assert_array_equal(bits(found), bits(expected))


def test_int8_may_come_as_signed_or_unsigned_of_any_shape() -> None:
    arrays, _ = oracle.random_weight("int8", 64, 32, np.random.default_rng(0))
    x = np.ones((1, 64), np.float32)
    expected = product(fill("int8", 64, 32, arrays), x)
    nominal = {**arrays, "quant_weight": arrays["quant_weight"].reshape(32, 64).view(np.int8)}
    np.testing.assert_array_equal(bits(product(fill("int8", 64, 32, nominal), x)), bits(expected))


@pytest.mark.parametrize(
    ("kind", "k", "n", "message"),
    [
        ("ccq", 64, 16, "in_features is 64, expected a positive multiple of 128"),
        ("ccq", 128, 12, "out_features is 12, expected a positive multiple of 8"),
        ("int8", 32, 16, "in_features is 32, expected a positive multiple of 64"),
        ("int4", 64, 8, "out_features is 8, expected a positive multiple of 16"),
        ("dense", 0, 8, "in_features is 0, expected a positive multiple of 1"),
        ("int2", 64, 8, "kind is 'int2', expected dense, int8, int4 or ccq"),
    ],
)
def test_sizes_that_a_kind_does_not_allow(kind: Any, k: int, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.allocate_weight(kind, k, n, CPU)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["super_scales", "code_scale", "code_zp"])
def test_scales_must_be_finite(name: str, value: float) -> None:
    arrays = ccq_arrays()
    arrays[name][5] = value
    with pytest.raises(ValueError, match=rf"{name}\[5\] is .*, expected a finite number"):
        fill("ccq", 128, 16, arrays)


@pytest.mark.parametrize(("scale", "zero"), [(1e8, 0), (1, 3e9), (-5e6, 0), (3e38, -3e38)])
def test_codes_must_stay_in_range(scale: float, zero: float) -> None:
    arrays = ccq_arrays()
    arrays["code_scale"][3], arrays["code_zp"][3] = scale, zero
    with pytest.raises(ValueError, match=r"code_scale\[3\] = .* gives codes beyond 2\^30"):
        fill("ccq", 128, 16, arrays)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("quant_weight", np.zeros((32, 15), np.uint8), ValueError, "along axis 1, expected 16"),
        ("quant_weight", np.zeros((31, 16), np.uint8), ValueError, "along axis 0, expected 32"),
        ("quant_weight", np.zeros(512, np.uint8), ValueError, "has 1 dimensions, expected 2"),
        ("quant_weight", np.zeros((32, 16), np.int32), TypeError, "dtype int32, expected uint8"),
        ("weight_scale", np.zeros((2, 16), np.uint8), ValueError, "along axis 0, expected 1"),
        ("code_zp", np.zeros(16, np.float64), TypeError, "dtype float64, expected float32"),
        ("code_zp", np.zeros(8, np.float32), ValueError, "code_zp has size 8 along axis 0"),
    ],
)
def test_wrong_arrays_are_named(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        fill("ccq", 128, 16, {**ccq_arrays(), name: value})
    assert name in str(caught.value)


def test_missing_and_unknown_arrays() -> None:
    arrays = ccq_arrays()
    del arrays["code_zp"]
    with pytest.raises(TypeError, match=r"a ccq weight takes code_scale, code_zp, .* found"):
        fill("ccq", 128, 16, arrays)
    with pytest.raises(TypeError, match="a dense weight takes weight, found weight_scale"):
        fill("dense", 4, 4, {"weight_scale": np.zeros(4)})
    with pytest.raises(ValueError, match="quant_weight has 100 bytes, expected 1024"):
        short = {"quant_weight": np.zeros(100, np.uint8), "weight_scale": np.ones(16, np.float32)}
        fill("int8", 64, 16, short)


@pytest.mark.parametrize(("experts", "expert"), [(0, 0), (2, None), (2, 2), (2, -1)])
def test_expert_numbers_are_checked(experts: int, expert: int | None) -> None:
    weight = ops.allocate_weight("ccq", 128, 16, CPU, num_experts=experts)
    with pytest.raises(ValueError, match="expert is"):
        ops.fill_weight(weight, expert, **ccq_arrays())
