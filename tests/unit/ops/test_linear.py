"""linear and embedding: against float64, and the same bits everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from native_ops import ISAS, assert_same_everywhere, bits, isa, tensor, threads
from oracles import ops as oracle

from fastdeploy_lite.model_executor import ops

# kind, K, N: ragged columns wherever the format allows them.
SHAPES = [
    *(("bf16", 1, 1), ("bf16", 63, 17), ("bf16", 384, 40), ("f32", 5, 100), ("f32", 129, 33)),
    *(("int8", 64, 16), ("int8", 384, 48), ("int8", 1024, 32), ("int8", 896, 16)),
    *(("int4", 64, 16), ("int4", 128, 48), ("int4", 896, 32), ("int4", 1024, 64)),
    *(("ccq", 128, 8), ("ccq", 384, 40), ("ccq", 896, 24), ("ccq", 1024, 64)),
]
TOKENS = [1, 2, 3, 4, 5, 8, 33]
Packed = tuple[ops.PackedWeight, np.ndarray]


def pack(kind: str, arrays: dict[str, Any], k: int, n: int) -> ops.PackedWeight:
    family: Any = "dense" if kind in ("bf16", "f32") else kind
    weight = ops.allocate_weight(family, k, n, paddle.CPUPlace())
    ops.fill_weight(weight, None, **arrays)
    ops.finish_weight(weight)
    return weight


def make(kind: str, k: int, n: int, seed: int = 0) -> Packed:
    arrays, matrix = oracle.random_weight(kind, k, n, np.random.default_rng(seed))
    return pack(kind, arrays, k, n), matrix


def activations(tokens: int, k: int, seed: int = 1) -> np.ndarray:
    """Rows and elements of very different sizes."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-4, 3, (tokens, 1))
    return (rng.standard_normal((tokens, k)) ** 3 * size).astype(np.float32)


@pytest.fixture(params=[24, 16])
def activation_bits(request: pytest.FixtureRequest) -> int:
    """How activations are rounded; of `coarser` weights."""
    return int(request.param)


def coarser(made: Packed, activation_bits: int) -> Packed:
    ops.set_activation_bits(made[0], activation_bits)
    return made


def multiply(x: np.ndarray, weight: ops.PackedWeight) -> np.ndarray:
    out = paddle.full([len(x), weight.out_features], float("nan"))
    ops.linear(tensor(x), weight, out)
    return out.numpy()


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("kind", "k", "n"), SHAPES)
def test_linear_equals_float64(name: str, kind: str, k: int, n: int, activation_bits: int) -> None:
    weight, matrix = coarser(make(kind, k, n), activation_bits)
    for tokens in TOKENS:
        x = activations(tokens, k)
        with isa(name):
            found = multiply(x, weight)
        error = np.abs(found - x.astype(np.float64) @ matrix)
        quantized = kind not in ("bf16", "f32")
        bound = oracle.linear_error_bound(x, matrix, quantized, activation_bits)
        assert (error <= bound).all(), f"{tokens} tokens: {(error / bound).max():.2f} of the bound"


@pytest.mark.parametrize(("kind", "k", "n"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 4, 7])
def test_linear_has_the_same_bits_everywhere(
    kind: str, k: int, n: int, tokens: int, activation_bits: int
) -> None:
    weight, _ = coarser(make(kind, k, n), activation_bits)
    x = activations(tokens, k)
    assert_same_everywhere(lambda: multiply(x, weight))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "ccq"])
def test_a_row_does_not_see_its_batch(name: str, kind: str, activation_bits: int) -> None:
    weight, _ = coarser(make(kind, 256, 48), activation_bits)
    x = activations(70, 256)
    with isa(name):
        alone = np.concatenate([multiply(x[i : i + 1], weight) for i in range(70)])
        for tokens in range(1, 71):
            found = multiply(x[70 - tokens :], weight)
            np.testing.assert_array_equal(bits(found), bits(alone[70 - tokens :]))


@pytest.mark.parametrize("kind", ["bf16", "int8", "ccq"])
def test_many_rows_are_cut_in_blocks(kind: str) -> None:
    """More rows than one kernel call takes, over many threads."""
    weight, _ = make(kind, 128, 640)
    x = activations(777, 128)
    with threads(3):
        found = multiply(x, weight)
    for i in (0, 1, 255, 256, 511, 512, 776):
        np.testing.assert_array_equal(bits(found[i]), bits(multiply(x[i : i + 1], weight)[0]))


@pytest.mark.parametrize("kind", ["int8", "int4", "ccq"])
@pytest.mark.parametrize(("k", "tokens"), [(4352, 6), (5632, 70), (1152, 256), (576, 40)])
def test_a_deep_weight_is_walked_in_stretches(
    kind: str, k: int, tokens: int, activation_bits: int
) -> None:
    """Totals wait in `out` between two stretches of K, beside columns that are not ours."""
    k -= k % 128 if kind == "ccq" else 0
    weight, _ = coarser(make(kind, k, 48), activation_bits)
    x = activations(tokens, k)
    expected = np.concatenate([multiply(x[i : i + 1], weight) for i in range(tokens)])
    for name in ISAS:
        wide = paddle.full([tokens, 80], 7.0)
        with isa(name), threads(2):
            ops.linear(tensor(x), weight, wide[:, 16:64])
        found = wide.numpy()
        np.testing.assert_array_equal(bits(found[:, 16:64]), bits(expected), name)
        assert (found[:, :16] == 7).all(), name
        assert (found[:, 64:] == 7).all(), name


@pytest.mark.parametrize("k", [128, 3968, 8192, 8320])
def test_one_row_of_2_bits_has_the_same_bits_everywhere(k: int, activation_bits: int) -> None:
    """Also in stretches of 128 groups, and rows that are no numbers."""
    weight, _ = coarser(make("ccq", k, 56), activation_bits)
    x = activations(6, k)
    x[1] = np.float32(2.0 - 2.0**-20)
    x[2] = -x[1]
    x[3, 0] = np.nan
    x[4, k - 1] = np.inf
    for row in x:
        assert_same_everywhere(lambda row=row: multiply(row[None], weight))


@pytest.mark.parametrize("steepest", [120, 140])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 6, 67])
def test_rows_of_2_bits_have_the_same_bits_everywhere(
    steepest: float, tokens: int, activation_bits: int
) -> None:
    """With codes that integers give (up to 128.5 a byte) and others; in stretches of K."""
    rng = np.random.default_rng(tokens)
    arrays, _ = oracle.random_weight("ccq", 2944, 40, rng)
    arrays["code_scale"] = rng.uniform(60, steepest, 40).astype(np.float32)
    weight = pack("ccq", arrays, 2944, 40)
    ops.set_activation_bits(weight, activation_bits)
    x = activations(tokens, 2944)
    x[0, 2943] = np.inf
    assert_same_everywhere(lambda: multiply(x, weight))


def largest_stored(kind: str) -> Packed:
    """A weight [256, 16] whose stored bytes are the format's largest."""
    if kind == "ccq":
        ones = np.ones(16, np.float32)
        arrays = {
            "quant_weight": np.zeros((64, 16), np.uint8),
            "weight_scale": np.full((2, 16), 0xFF, np.uint8),
            "super_scales": ones,
            "code_scale": 0 * ones,
            "code_zp": 32767 * ones,
        }
        return pack("ccq", arrays, 256, 16), np.full((256, 16), 31.0 * 15)
    largest = 127 if kind == "int8" else 7
    arrays = {
        "quant_weight": oracle.permute(np.full((256, 16), largest), 8 if kind == "int8" else 4),
        "weight_scale": np.ones(16, np.float32),
    }
    return pack(kind, arrays, 256, 16), np.full((256, 16), float(largest))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("kind", ["int8", "int4", "ccq"])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_the_largest_sums_do_not_overflow(
    name: str, kind: str, tokens: int, activation_bits: int
) -> None:
    """Digits (-126, -128, -128) and (127, 127, 127) times the largest bytes: exact as integers.

    Without the last digits where activations have 16 bits.
    """
    weight, matrix = coarser(largest_stored(kind), activation_bits)
    wholes = (-0x7E8080, 0x7F7F7F) if activation_bits == 24 else (-0x7E8000, 0x7F7F00)
    for whole in wholes:
        x = np.full((tokens, 256), whole, np.float32)
        with isa(name):
            found = multiply(x, weight)
        error = np.abs(found - x.astype(np.float64) @ matrix)
        assert (error <= oracle.linear_error_bound(x, matrix, True)).all()


@pytest.mark.parametrize("kind", ["int8", "int4", "ccq"])
@pytest.mark.parametrize("tokens", [5, 15, 16, 17, 31, 33, 47, 48, 255])
def test_blocks_of_rows_have_the_same_bits_everywhere(
    kind: str, tokens: int, activation_bits: int
) -> None:
    """Numbers of rows around the height of a tile register, extreme rows among them."""
    weight, _ = coarser(make(kind, 256, 40 if kind == "ccq" else 48), activation_bits)
    x = activations(tokens, 256)
    x[0] = 0
    x[1, 70] = np.inf
    x[-1] = np.float32(1e-40)
    x[-2, 200] = np.nan
    assert_same_everywhere(lambda: multiply(x, weight))


@pytest.mark.parametrize("kind", ["f32", "int4", "ccq"])
def test_strided_rows_in_and_out(kind: str) -> None:
    weight, _ = make(kind, 128, 48)
    x = activations(5, 384)
    wide_in, wide_out = tensor(x), paddle.full([5, 100], 7.0)
    ops.linear(wide_in[:, 128:256], weight, wide_out[:, 20:68])
    found = wide_out.numpy()
    np.testing.assert_array_equal(bits(found[:, 20:68]), bits(multiply(x[:, 128:256], weight)))
    assert (found[:, :20] == 7).all()
    assert (found[:, 68:] == 7).all()


def test_more_experts_than_one_is_not_linear() -> None:
    weight = ops.allocate_weight("int8", 64, 16, paddle.CPUPlace(), num_experts=2)
    with pytest.raises(ValueError, match="weight has 2 experts, expected a plain linear map"):
        ops.linear(paddle.zeros([1, 64]), weight, paddle.zeros([1, 16]))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("kind", ["int8", "int4", "ccq"])
def test_extreme_activations(name: str, kind: str) -> None:
    weight, matrix = make(kind, 256, 16)
    x = activations(7, 256)
    x[0] = 0
    x[1] = np.float32(1e-40) * np.sign(x[1])  # subnormal: too small to count, never wrong
    x[2, 64:128] = 0
    x[3] = np.abs(x[3]).max() * np.float32(1e30)
    x[4, 70] = np.inf
    x[5, 200] = np.nan
    with isa(name):
        found = multiply(x, weight)
        alone = multiply(x[6:], weight)
    assert (found[0] == 0).all()
    assert np.abs(found[1]).max() <= 2.0**-100 * np.abs(matrix).sum(axis=0).max()
    for row in (2, 3):
        bound = oracle.linear_error_bound(x[row : row + 1], matrix, True)
        assert (np.abs(found[row] - x[row].astype(np.float64) @ matrix) <= bound).all()
    assert np.isnan(found[4:6]).all()
    np.testing.assert_array_equal(bits(found[6]), bits(alone[0]))


def identity(activation_bits: int) -> ops.PackedWeight:
    """Makes the rounding of the activations visible element by element."""
    q = np.eye(64, dtype=np.int64)
    arrays = {"quant_weight": oracle.permute(q, 8), "weight_scale": np.ones(64, np.float32)}
    weight = pack("int8", arrays, 64, 64)
    ops.set_activation_bits(weight, activation_bits)
    return weight


def test_activation_error_is_as_documented(activation_bits: int) -> None:
    x = activations(400, 64, seed=5)
    error = np.abs(multiply(x, identity(activation_bits)).astype(np.float64) - x).max(axis=1)
    top = np.abs(x).max(axis=1)
    assert (error <= 2.0 ** (1.01 - activation_bits) * top).all()
    assert (error > 2.0 ** (-2 - activation_bits) * top).any()  # the bound is not idle


def edges_of_rounding() -> np.ndarray:
    """Rows [T, 64]: ties, the largest integers, powers of two, and what is hardly a number."""
    rng = np.random.default_rng(8)
    x = activations(40, 64, seed=9)
    for row, top in enumerate((0x7F7F7F, 0x7F7F80, 0x7F7F00, 0x7F7F01, 0x7F80 << 8, 1 << 22)):
        x[row] = rng.integers(-top, top, 64)
        x[row, row] = top * (-1) ** row
    x[6] = 256.0 * rng.integers(-(2**14), 2**14, 64) + 128  # halves of a unit of 16 bits
    x[6, 0] = 0x7F0000
    x[7] = rng.integers(-(2**22), 2**22, 64) + 0.5  # of 24
    x[7, 0] = 0x7F7F00
    x[8] = 0
    x[9] = -0.0
    x[10] = np.float32(1e-45) * rng.integers(-9, 9, 64)  # subnormal
    x[11] = np.float32(2.0**-84) * rng.standard_normal(64)  # below the least unit, at 2^-100
    x[12] = np.finfo(np.float32).max
    x[13, 5], x[14, 63], x[15, 0] = np.inf, -np.inf, np.nan
    x[16, 1:] = np.float32(1e-30)  # beside one that is far larger
    return x


@pytest.mark.parametrize("name", ISAS)
def test_activations_are_rounded_as_in_numpy(name: str, activation_bits: int) -> None:
    x = edges_of_rounding()
    with isa(name):
        found = multiply(x, identity(activation_bits))
    with np.errstate(over="ignore"):  # the largest floats round to an infinity
        expected = oracle.rounded_activations(x, activation_bits).astype(np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["int8", "int4", "ccq"])
def test_bits_of_activations_belong_to_a_weight(kind: str) -> None:
    fine, matrix = make(kind, 256, 48)
    coarse = coarser(make(kind, 256, 48), 16)[0]
    x = activations(3, 256)
    bound = oracle.linear_error_bound(x, matrix, True)
    assert (np.abs(multiply(x, fine) - x.astype(np.float64) @ matrix) <= bound).all()
    rounded = oracle.rounded_activations(x, 16)
    assert (np.abs(multiply(x, coarse) - rounded @ matrix) <= bound).all()
    assert (multiply(x, fine) != multiply(x, coarse)).any()
    with pytest.raises(ValueError, match="activation_bits is 8, expected 16 or 24"):
        ops.set_activation_bits(fine, 8)


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_embedding_reads_the_rows_of_a_tied_table(kind: str) -> None:
    rng = np.random.default_rng(3)
    arrays, table = oracle.random_weight(kind, 100, 48, rng)  # [V, H]
    weight = pack(kind, {**arrays, "transposed": True}, 48, 100)
    ids = rng.integers(0, 100, 37).astype(np.int32)
    ids[:3] = (0, 99, 15)
    out = paddle.empty([37, 48])
    ops.embedding(tensor(ids), weight, out)
    np.testing.assert_array_equal(out.numpy(), table[ids].astype(np.float32))
    x = activations(3, 48)
    bound = oracle.linear_error_bound(x, table.T, False)
    assert (np.abs(multiply(x, weight) - x.astype(np.float64) @ table.T) <= bound).all()


@pytest.mark.parametrize("token", [-1, 100, 2**31 - 1])
def test_embedding_refuses_unknown_tokens(token: int) -> None:
    weight, _ = make("bf16", 8, 100)
    with pytest.raises(ValueError, match=rf"token_ids\[1\] is {token}, expected 0 to 99"):
        ops.embedding(tensor(np.array([5, token], np.int32)), weight, paddle.empty([2, 8]))


def test_wrong_arguments_are_named() -> None:
    weight, _ = make("int8", 64, 16)
    x, out = paddle.zeros([2, 64]), paddle.zeros([2, 16])
    wide, gaps = x.cast("float64"), paddle.zeros([2, 128])[:, ::2]
    cases: list[tuple[type[Exception], str, tuple[Any, Any, Any]]] = [
        (TypeError, "x has dtype paddle.float64, expected float32", (wide, weight, out)),
        (TypeError, "x has dtype paddle.bfloat16", (x.cast("bfloat16"), weight, out)),
        (TypeError, "out has dtype paddle.int32", (x, weight, out.cast("int32"))),
        (TypeError, "expected a paddle.Tensor, found ndarray", (x.numpy(), weight, out)),
        (TypeError, "weight must be a PackedWeight, found Tensor", (x, x, out)),
        (ValueError, r"x has shape \[2, 32\], expected \[any, 64\]", (x[:, :32], weight, out)),
        (ValueError, r"out has shape \[2, 8\], expected \[2, 16\]", (x, weight, out[:, :8])),
        (ValueError, r"out has shape \[1, 16\], expected \[2, 16\]", (x, weight, out[:1])),
        (ValueError, "x has stride 2 along its last axis", (gaps, weight, out)),
    ]  # fmt: skip
    for error, message, arguments in cases:
        with pytest.raises(error, match=message) as caught:
            ops.linear(*arguments)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("linear: ")


def test_a_dense_weight_must_be_filled() -> None:
    weight = ops.allocate_weight("dense", 4, 4, paddle.CPUPlace())
    with pytest.raises(ValueError, match="never filled"):
        ops.finish_weight(weight)
