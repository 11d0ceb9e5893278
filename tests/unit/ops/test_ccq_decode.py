"""The 2-bit decoder gives the oracle's code bit for bit, for every byte and nasty scales."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from native_ops import ISAS, isa, tensor
from oracles import ops as oracle

from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.quantization import ccq

ROWS = 4 * 256  # one row of packed bytes for every byte


def adversarial_columns() -> tuple[np.ndarray, np.ndarray]:
    """(code_scale, code_zp): fractions next to .5, negative and wrapping codes, tiny slopes."""
    rng = np.random.default_rng(7)
    pairs: list[tuple[float, float]] = [
        *((128.0, -0.5), (128.0, 0.0), (127.99609375, 0.5), (100.5, 12.25), (0.0, 0.0)),
        *((0.0, -0.5), (0.0, -32768.0), (0.5, 0.0), (0.5, -0.5), (1 / 3, 2 / 3)),
        *((-128.0, 32767.0), (-77.7, -1234.5), (-1e-20, -0.5), (1e-30, -0.5), (1e-30, 0.49999997)),
        *((4_000_000.0, -1e6), (-4_000_000.0, 1e6), (1e-6, 32767.4999), (65536.0, 0.0)),
        *((128.5, 8388607.5), (1.0, 16777216.0), (2.0**-24, 16383.5), (2.0**-33, 2.0**-2)),
    ]
    scale = rng.uniform(90, 130, 60)
    # One byte lands half a unit in the last place (2^-9 from 16384 on) around an integer.
    for s, byte in zip(scale[:40].astype(np.float32), rng.integers(0, 256, 40), strict=True):
        target = np.float64(20000) - np.float64(s) * byte - 0.5
        pairs += [(s, np.float32(target + step * 2.0**-10)) for step in (-1, 0, 1)]
    pairs += list(zip(scale[40:], rng.uniform(-3000, 3000, 20), strict=True))
    pairs += [(0.0, 0.0)] * (-len(pairs) % 8)
    table = np.array(pairs, np.float32)
    return table[:, 0].copy(), table[:, 1].copy()


def plain_columns() -> tuple[np.ndarray, np.ndarray]:
    """(code_scale, code_zp) as checkpoints have them, and the steepest that integers can follow."""
    rng = np.random.default_rng(11)
    scale = rng.uniform(100, 127, 256)
    scale[::32] = [128, -128, 128.875, -128.875, 0, 1e-3, 64, -127.99]
    return scale.astype(np.float32), rng.uniform(-300, 300, 256).astype(np.float32)


COLUMNS = {"adversarial": adversarial_columns(), "plain": plain_columns()}


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return oracle.ccq_codes(*adversarial_columns())


def coded_weight(scale: np.ndarray, zero: np.ndarray) -> ops.PackedWeight:
    """One byte after the other in every column."""
    columns = len(scale)
    weight = ops.allocate_weight("ccq", ROWS, columns, paddle.CPUPlace())
    ops.fill_weight(
        weight,
        None,
        quant_weight=np.arange(256, dtype=np.uint8)[:, None].repeat(columns, axis=1),
        weight_scale=np.full((ROWS // 128, columns), 0x11, np.uint8),
        super_scales=np.ones(columns, np.float32),
        code_scale=scale,
        code_zp=zero,
    )
    return weight


def tiles_by_integers(weight: ops.PackedWeight) -> np.ndarray:
    """Which tiles of 16 columns are decoded by integers: the first word of their codes."""
    words = weight.tensors["codes"].numpy().view(np.int32)
    return words.reshape(-(-weight.out_features // 16), -1)[:, 0] != 0


def decoded_codes(rows_at_once: int, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """The 15 bits that the kernel sees, [256, N]: rows of the identity pick single weights."""
    columns = len(scale)
    weight = coded_weight(scale, zero)
    fields = np.empty((ROWS, columns), np.float32)
    for first in range(0, ROWS, rows_at_once):
        x = np.eye(rows_at_once, ROWS, first, dtype=np.float32)
        out = paddle.empty([rows_at_once, columns])
        ops.linear(tensor(x), weight, out)
        fields[first : first + rows_at_once] = out.numpy()
    assert (fields == np.round(fields)).all()
    field = fields.astype(np.int64).reshape(256, 4, columns) + 32
    assert field.min() >= 0
    assert field.max() <= 63
    # Neighbouring fields share three bits.
    assert (field[:, :-1] & 7 == field[:, 1:] >> 3).all()
    low = field & 7
    return field[:, 0] << 9 | low[:, 1] << 6 | low[:, 2] << 3 | low[:, 3]


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("rows_at_once", [1, 4, 128])
@pytest.mark.parametrize("columns", COLUMNS)
def test_every_byte_decodes_like_the_oracle(name: str, rows_at_once: int, columns: str) -> None:
    with isa(name):
        found = decoded_codes(rows_at_once, *COLUMNS[columns])
    np.testing.assert_array_equal(found, oracle.ccq_codes(*COLUMNS[columns]))


@pytest.mark.parametrize("name", ISAS)
def test_integers_are_found_for_plain_columns_and_not_for_steep_ones(name: str) -> None:
    scale, zero = plain_columns()
    scale[40], zero[70] = 129, np.float32(2**29)  # beyond two factors; rounded to multiples of 32
    with isa(name):
        found = tiles_by_integers(coded_weight(scale, zero))
    np.testing.assert_array_equal(np.flatnonzero(~found), [40 // 16, 70 // 16])


def test_all_instruction_sets_find_the_same_integers() -> None:
    found = {}
    for name in ISAS:
        with isa(name):
            found[name] = coded_weight(*COLUMNS["adversarial"]).tensors["codes"].numpy().tobytes()
    assert len(set(found.values())) == 1


def test_oracle_agrees_with_the_package(expected: np.ndarray) -> None:
    np.testing.assert_array_equal(ccq.codebook(*adversarial_columns()) & 0x7FFF, expected)


def test_the_columns_tell_fused_from_separate_rounding(expected: np.ndarray) -> None:
    """Otherwise the tests above would pass for a decoder without a fused multiply-add."""
    scale, zero = adversarial_columns()
    product = np.arange(256, dtype=np.float32)[:, None] * scale
    separate = np.floor(product + (zero + np.float32(0.5))).astype(np.int64) & 0x7FFF
    assert (separate != expected).any()
