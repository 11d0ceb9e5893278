"""The numpy oracle of the CCQ code against exact rational arithmetic and the worked example."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_lite.quantization import ccq


def round_to_float32(value: Fraction) -> Fraction:
    """Nearest float32, ties to even, by integer arithmetic alone (normal range)."""
    if value == 0:
        return value
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    quotient, rest = divmod(magnitude, unit)
    if 2 * rest > unit or (2 * rest == unit and quotient % 2):
        quotient += 1
    return quotient * unit * (1 if value > 0 else -1)


def exact_code(byte: int, scale: np.float32, zero: np.float32) -> int:
    addend = round_to_float32(Fraction(float(zero)) + Fraction(1, 2))
    return math.floor(round_to_float32(byte * Fraction(float(scale)) + addend))


def adversarial_scales() -> tuple[np.ndarray, np.ndarray]:
    """Scales whose sums lie on and next to integers and float32 ties."""
    rng = np.random.default_rng(5)
    scale = [128.0, 100.5, 127.99999, 128.00002, 0.5, -128.25, 1e-30, 4097.0, 1.0 / 3, 16777.217]
    zero = [0.0, -0.5, 0.49999997, -0.50000006, 12.25, 32767.5, -1e-8, 1e6, -32768.5, 3e-39]
    pairs = [(s, z) for s in scale for z in zero]
    for _ in range(100):  # choose the zero point so that one byte lands within an ulp of an integer
        s = np.float32(rng.uniform(90, 260))
        byte = int(rng.integers(1, 256))
        target = round(byte * float(s)) - 0.5 - byte * float(s)
        z = np.float32(target)
        pairs += [(s, z), (s, np.nextafter(z, np.float32(9))), (s, np.nextafter(z, np.float32(-9)))]
    table = np.array(pairs, dtype=np.float32)
    return table[:, 0].copy(), table[:, 1].copy()


def test_codebook_equals_exact_arithmetic_on_adversarial_scales() -> None:
    scale, zero = adversarial_scales()
    found = ccq.codebook(scale, zero)
    assert found.dtype == np.int32
    for column in range(len(scale)):
        expected = [exact_code(byte, scale[column], zero[column]) for byte in range(256)]
        assert found[:, column].tolist() == expected, (scale[column], zero[column])


finite_scale = st.floats(-8e6, 8e6, width=32, allow_subnormal=False)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 255), finite_scale, st.floats(-1e6, 1e6, width=32, allow_subnormal=False))
def test_codes_equal_exact_arithmetic(byte: int, scale: float, zero: float) -> None:
    packed = np.array([[byte]], dtype=np.uint8)
    s, z = np.float32(scale), np.float32(zero)
    found = ccq.decode_codes(packed, np.array([s]), np.array([z]))
    assert int(found[0, 0]) == exact_code(byte, s, z)


def test_multiply_add_rounds_once() -> None:
    """A sum whose float64 rounding creates a float32 tie: two roundings give the wrong float32."""
    # Keep products that lie exactly between two float32 and add far less than a float64 ulp.
    rng = np.random.default_rng(0)
    byte = rng.integers(1, 256, 2_000_000)
    scale = rng.uniform(1, 2, byte.size).astype(np.float32)
    tie = (byte * scale.astype(np.float64)).astype(np.float32).astype(np.float64)
    half_unit = np.spacing(np.abs(tie).astype(np.float32)).astype(np.float64) / 2
    addend = np.float32(2) ** rng.integers(-60, -35, byte.size).astype(np.float32)
    product = byte * scale.astype(np.float64)
    on_tie = np.abs(np.abs(product - tie) - half_unit) == 0
    byte, scale, addend = byte[on_tie], scale[on_tie], (addend * -1.0)[on_tie].astype(np.float32)
    naive = (byte * scale.astype(np.float64) + addend).astype(np.float32)
    found = ccq.fused_multiply_add(byte, scale, addend)
    expected = [
        float(round_to_float32(int(b) * Fraction(float(s)) + Fraction(float(a))))
        for b, s, a in zip(byte, scale, addend, strict=True)
    ]
    assert found.tolist() == expected
    assert (naive != found).any(), "the case must be one where double rounding shows"


def test_worked_example_of_the_format() -> None:
    packed = np.full((32, 1), 200, dtype=np.uint8)
    one = np.ones(1, dtype=np.float32)
    scale, zero = 100.5 * one, 12.25 * one
    assert ccq.decode_codes(packed, scale, zero)[0, 0] == 20112
    assert ccq.code_values(np.array([20112])).tolist() == [[7, 26, -14, -16]]
    decoded = ccq.decode(packed, np.array([[0xA7]], dtype=np.uint8), 0.25 * one, scale, zero)
    assert decoded.shape == (128, 1)
    assert decoded[:4, 0].tolist() == [7 * 2.5, 26 * 2.5, -14 * 2.5, -16 * 2.5]
    assert decoded[64:68, 0].tolist() == [7 * 1.75, 26 * 1.75, -14 * 1.75, -16 * 1.75]


def test_neighbouring_fields_overlap_by_three_bits() -> None:
    fields = ccq.code_values(np.arange(1 << 15)).astype(int) + ccq.FIELD_OFFSET
    assert ((fields[:, :-1] & 7) == (fields[:, 1:] >> 3)).all()


def test_codes_beyond_15_bits_wrap() -> None:
    codes = np.array([40000, -3, 1 << 20 | 77])
    assert (ccq.code_values(codes) == ccq.code_values(codes & ccq.CODE_MASK)).all()


def test_bfloat16_super_scales_decode_like_their_float32() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0x3800, 0x3C00, 5).astype(np.uint16)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    packed = rng.integers(0, 256, (64, 5)).astype(np.uint8)
    local = rng.integers(0, 256, (2, 5)).astype(np.uint8)
    scale = np.full(5, 128.3, np.float32)
    zero = np.full(5, -7.7, np.float32)
    from_bits = ccq.decode(packed, local, bits, scale, zero)
    assert (from_bits == ccq.decode(packed, local, wide, scale, zero)).all()


def test_local_scale_nibbles_round_trip() -> None:
    scale = np.random.default_rng(2).integers(0, 16, (6, 7))
    packed = ccq.pack_local_scale(scale)
    assert packed.shape == (3, 7)
    assert (packed[0] >> 4 == scale[0]).all()
    assert (ccq.unpack_local_scale(packed) == scale).all()


GOOD = {
    "packed": np.zeros((32, 3), np.uint8),
    "local_scale": np.zeros((1, 3), np.uint8),
    "super_scale": np.ones(3, np.float32),
    "code_scale": np.full(3, 128, np.float32),
    "code_zp": np.zeros(3, np.float32),
}


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("packed", np.zeros((32, 3), np.int8), TypeError, "packed: found dtype int8"),
        ("packed", np.zeros(32, np.uint8), ValueError, "packed: found shape (32,)"),
        ("packed", np.zeros((31, 3), np.uint8), ValueError, "K = 124"),
        ("packed", np.zeros((0, 3), np.uint8), ValueError, "K = 0"),
        ("packed", np.zeros((32, 4), np.uint8), ValueError, "local_scale: found shape (1, 3)"),
        ("local_scale", np.zeros((2, 3), np.uint8), ValueError, "expected (1, 3)"),
        ("super_scale", np.ones(2, np.float32), ValueError, "super_scale: found shape [2]"),
        ("super_scale", np.ones(3), TypeError, "super_scale: found dtype float64"),
        ("code_scale", np.full(3, np.nan, np.float32), ValueError, "code_scale[0]: found nan"),
        ("code_zp", np.array([0, 0, np.inf], np.float32), ValueError, "code_zp[2]: found inf"),
        ("code_scale", np.array([1, 1e9, 1], np.float32), ValueError, "code_scale[1] = 1e+09"),
        ("code_zp", np.zeros(4, np.float32), ValueError, "code_zp: found shape [4], expected [3]"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(
    name: str, value: np.ndarray, error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        ccq.decode(**{**GOOD, name: value})
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
