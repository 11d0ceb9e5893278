"""The int8 and int4 file layouts against Paddle's own operator and the written formulas."""

from __future__ import annotations

import numpy as np
import pytest

from fastdeploy_lite import formats
from fastdeploy_lite.formats.tiles import (
    pack_int4,
    pack_int8,
    unpack_int4,
    unpack_int8,
)
from fastdeploy_lite.utils.arrays import float32_to_bfloat16

SHAPES = [
    (64, 16),
    (64, 32),
    (128, 16),
    (192, 48),
    (320, 112),
    (384, 640),
    (896, 256),
    (256, 384),
    (1024, 48),
    (2560, 16),
]
PACK = {"int8": pack_int8, "int4": pack_int4}
UNPACK = {"int8": unpack_int8, "int4": unpack_int4}
LARGEST = {"int8": 127, "int4": 7}


def random_codes(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    largest = LARGEST[kind]
    random = np.random.default_rng(seed)
    return random.integers(-largest - 1, largest + 1, shape).astype(np.int8)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_paddle_writes_these_bytes(kind: str, shape: tuple[int, int], seed: int) -> None:
    import paddle

    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    tensor = paddle.to_tensor(float32_to_bfloat16(weight)).view("bfloat16")
    packed, scale = paddle.nn.quant.weight_quantize(tensor, algo=f"weight_only_{kind}", arch=80)
    packed, scale = packed.numpy(), scale.astype("float32").numpy()
    exact = tensor.astype("float32").numpy()
    # Paddle rounds half away from zero after dividing by the bf16 scale.
    ratio = exact / scale
    codes = np.trunc(ratio + np.copysign(np.float32(0.5), ratio))
    codes = np.clip(codes, -LARGEST[kind], LARGEST[kind]).astype(np.int8)
    np.testing.assert_array_equal(UNPACK[kind](packed), codes)
    repacked = PACK[kind](codes)
    assert repacked.dtype == packed.dtype
    np.testing.assert_array_equal(repacked, packed)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_code_survives(kind: str, shape: tuple[int, int]) -> None:
    codes = random_codes(kind, shape)
    packed = PACK[kind](codes)
    np.testing.assert_array_equal(UNPACK[kind](packed), codes)
    np.testing.assert_array_equal(UNPACK[kind](packed.view(np.uint8)), codes)


def test_int8_position_formula() -> None:
    k_size, n_size = 192, 32
    codes = random_codes("int8", (k_size, n_size))
    flat = pack_int8(codes).reshape(-1).view(np.uint8)
    for k in range(k_size):
        for n in range(n_size):
            tile = (n // 2) * (k_size // 64) + k // 64
            within = (n % 2) * 64 + (k % 64) // 16 * 16 + 2 * (k % 8) + k % 16 // 8
            assert int(flat[tile * 128 + within]) - 128 == codes[k, n]


def test_int4_position_formula() -> None:
    k_size, n_size = 192, 32
    codes = random_codes("int4", (k_size, n_size))
    flat = pack_int4(codes).reshape(-1).view(np.uint8)
    for k in range(k_size):
        for n in range(n_size):
            tile = (n // 4) * (k_size // 64) + k // 64
            within = (n % 4) * 64 + (k % 64) // 32 * 32 + 4 * (k % 8) + k % 32 // 8
            at = tile * 256 + within
            assert (int(flat[at // 2]) >> (4 * (at % 2)) & 15) - 8 == codes[k, n]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_impossible_sizes_are_refused(kind: str) -> None:
    for shape in ((32, 16), (64, 8), (96, 32)):
        with pytest.raises(ValueError, match="multiple of 64"):
            PACK[kind](np.zeros(shape, np.int8))


def test_int4_refuses_codes_that_do_not_fit() -> None:
    for value in (8, -9, 250):
        with pytest.raises(ValueError, match=r"outside -8\.\.7"):
            pack_int4(np.full((64, 16), value, np.int16))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_slices_of_packed_data_are_packed_slices(kind: str) -> None:
    codes = random_codes(kind, (320, 96))
    scale = np.arange(96, dtype=np.float32)
    arrays = {"quant_weight": PACK[kind](codes), "weight_scale": scale}
    rows = formats.get(kind).slice_rows(arrays, 64, 192)
    np.testing.assert_array_equal(rows["quant_weight"], PACK[kind](codes[64:192]))
    np.testing.assert_array_equal(rows["weight_scale"], scale)
    ranges = [(0, 16), (48, 64)]
    columns = formats.get(kind).slice_columns(arrays, ranges)
    wanted = np.concatenate([codes[:, 0:16], codes[:, 48:64]], axis=1)
    np.testing.assert_array_equal(columns["quant_weight"], PACK[kind](wanted))
    np.testing.assert_array_equal(columns["weight_scale"], np.r_[scale[:16], scale[48:64]])


def test_slices_of_two_bit_data() -> None:
    random = np.random.default_rng(0)
    arrays = {
        "quant_weight": random.integers(0, 256, (96, 40), np.uint8),
        "weight_scale": random.integers(0, 256, (3, 40), np.uint8),
        "super_scales": random.standard_normal(40).astype(np.float32),
    }
    rows = formats.get("ccq").slice_rows(arrays, 128, 384)
    np.testing.assert_array_equal(rows["quant_weight"], arrays["quant_weight"][32:96])
    np.testing.assert_array_equal(rows["weight_scale"], arrays["weight_scale"][1:3])
    columns = formats.get("ccq").slice_columns(arrays, [(8, 16)])
    assert {name: a.shape[-1] for name, a in columns.items()} == dict.fromkeys(arrays, 8)


def test_cuts_through_a_tile_are_refused() -> None:
    arrays = {"quant_weight": np.zeros((32, 128), np.int8)}
    with pytest.raises(ValueError, match="multiples of 64"):
        formats.get("int8").slice_rows(arrays, 0, 32)
    with pytest.raises(ValueError, match="multiples of 4"):
        formats.get("int4").slice_columns(arrays, [(0, 6)])
    with pytest.raises(ValueError, match="multiples of 128"):
        formats.get("ccq").slice_rows(arrays, 0, 64)
