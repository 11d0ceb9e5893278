"""What the kernels decode is what the files say: bit for bit for integers and CCQ codes."""

from __future__ import annotations

import cards
import matrices
import numpy as np
import pytest

from fastdeploy_lite.quantization import ccq, ccq_codes


def decoded(weight: object, expert: int = 0, *, scaled: bool) -> np.ndarray:
    from fastdeploy_lite.model_executor.ops import cuda_weights

    return cuda_weights.decoded(weight, expert, scaled=scaled)


@pytest.mark.parametrize(
    ("kind", "rows", "columns"),
    [
        *[("int8", 64, 16), ("int8", 192, 48), ("int8", 512, 272)],
        *[("int4", 64, 16), ("int4", 320, 112), ("int4", 256, 144)],
        *[("ccq", 128, 16), ("ccq", 384, 48), ("ccq", 1024, 272)],
    ],
)
def test_tiles_hold_the_matrix(kind: str, rows: int, columns: int) -> None:
    weight, expected = matrices.make(kind, np.random.default_rng(rows), rows, columns, experts=3)
    for expert in range(3):
        found = decoded(weight, expert, scaled=True)
        np.testing.assert_allclose(found, expected[expert], rtol=3e-7)


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_experts_from_float32_and_bf16(transposed: bool) -> None:
    from fastdeploy_lite.model_executor import ops

    random = np.random.default_rng(3)
    values = random.standard_normal((200, 48)).astype(np.float32)
    weight = ops.allocate_weight("dense", 200, 48, cards.place(), num_experts=2)
    source = np.ascontiguousarray(values.T) if transposed else values
    ops.fill_weight(weight, 0, weight=source, transposed=transposed)
    ops.fill_weight(weight, 1, weight=cards.bf16_bits(source), transposed=transposed)
    ops.finish_weight(weight)
    for expert in range(2):
        np.testing.assert_array_equal(
            decoded(weight, expert, scaled=True), cards.round_bf16(values)
        )


def adversarial_columns(random: np.random.Generator, wide: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points whose codes sit on, just under and just over integers."""
    scale = np.concatenate(
        [
            random.uniform(0, 1028, 200),
            np.array([0, 1, 127, 128, 128.5, 0.001, 1 / 3, -5.25, -128, 1000]),
            random.integers(1, 1000, 100) / 8,
            np.nextafter(random.integers(1, 129, 50).astype(np.float32), np.float32(200)),
        ]
    ).astype(np.float32)
    zero = np.concatenate(
        [
            random.uniform(-300, 400, 120),
            random.integers(-200, 200, 120) + 0.5,
            random.integers(-200, 200, 60) + 0.49999997,
            random.integers(0, 2000, 60) / 16,
        ]
    ).astype(np.float32)
    zero = zero[: len(scale)]
    scale = scale[: len(zero)]
    if wide:
        scale, zero = scale * np.float32(3000), zero * np.float32(70000)
    return scale, zero


@pytest.mark.parametrize("wide", [False, True])
def test_ccq_codes_equal_the_oracle_for_all_bytes(wide: bool) -> None:
    from fastdeploy_lite.model_executor import ops
    from fastdeploy_lite.model_executor.ops import cuda_weights

    random = np.random.default_rng(17)
    scale, zero = adversarial_columns(random, wide)
    columns = len(scale) // 8 * 8
    scale, zero = scale[:columns], zero[:columns]
    packed = np.repeat(np.arange(256, dtype=np.uint8)[:, None], columns, axis=1)
    weight = ops.allocate_weight("ccq", 1024, columns, cards.place())
    ops.fill_weight(
        weight,
        None,
        quant_weight=packed,
        weight_scale=np.full((8, columns), 0x11, np.uint8),
        super_scales=np.ones(columns, np.float32),
        code_scale=scale,
        code_zp=zero,
    )
    ops.finish_weight(weight)
    assert weight.handle.kind == (cuda_weights.CCQ_WIDE if wide else 3)
    codes = ccq.decode_codes(packed, scale, zero).astype(np.int64)
    fields = np.stack([(codes >> shift) & 63 for shift in (9, 6, 3, 0)], axis=1)
    expected = fields.reshape(1024, columns) - 32
    np.testing.assert_array_equal(decoded(weight, scaled=False).astype(np.int64), expected)


@pytest.mark.parametrize("columns", ["adversarial", "wide", "of our encoder"])
def test_experts_codes_equal_the_oracle_for_all_bytes(columns: str) -> None:
    """Columns without proven constants decode exactly too, and are counted."""
    from fastdeploy_lite.model_executor import ops

    random = np.random.default_rng(18)
    if columns == "of our encoder":
        scale, zero = np.array(ccq_codes.CODES[:32], np.float32).T
    else:
        scale, zero = adversarial_columns(random, columns == "wide")
    count = len(scale) // 16 * 16
    scale, zero = scale[:count], zero[:count]
    packed = np.repeat(np.arange(256, dtype=np.uint8)[:, None], count, axis=1)
    weight = ops.allocate_weight("ccq", 1024, count, cards.place(), num_experts=1)
    ops.fill_weight(
        weight,
        0,
        quant_weight=packed,
        weight_scale=np.full((8, count), 0x11, np.uint8),
        super_scales=np.ones(count, np.float32),
        code_scale=scale,
        code_zp=zero,
    )
    ops.finish_weight(weight)
    assert (weight.handle.unproven == 0) == (columns == "of our encoder")
    codes = ccq.decode_codes(packed, scale, zero).astype(np.int64)
    fields = np.stack([(codes >> shift) & 63 for shift in (9, 6, 3, 0)], axis=1)
    expected = fields.reshape(1024, count) - 32
    np.testing.assert_array_equal(decoded(weight, scaled=False).astype(np.int64), expected)


def test_proven_columns_decode_as_the_reference_does() -> None:
    """Random columns, fast decoder and exact one; nearly all columns have proven constants."""
    from fastdeploy_lite.model_executor import ops
    from fastdeploy_lite.model_executor.ops import cuda_experts

    random = np.random.default_rng(19)
    weight = ops.allocate_weight("ccq", 1024, 2048, cards.place(), num_experts=1)
    found = matrices.ccq_arrays(random, 1024, 2048)
    found["quant_weight"] = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 2048, axis=1)
    ops.fill_weight(weight, 0, **found)
    ops.finish_weight(weight)
    assert weight.handle.unproven < 100
    exact = cuda_experts.decoded(weight, 0, True)
    np.testing.assert_allclose(exact, matrices.matrix("ccq", found, 1024, 2048), rtol=3e-7)
    unproven = weight.handle.unproven
    weight.handle.unproven = 0  # the fast decoder, whatever the columns
    cuda_experts._make_native(weight)
    differing = (cuda_experts.decoded(weight, 0, True) != exact).any(axis=0)
    assert differing.sum() <= unproven


def test_fast_and_wide_decoders_agree() -> None:
    from fastdeploy_lite.model_executor.ops import cuda_weights

    weight, expected = matrices.make("ccq", np.random.default_rng(8), 512, 64)
    np.testing.assert_allclose(decoded(weight, scaled=True), expected, rtol=3e-7)
    cuda_weights._make_handle(weight, cuda_weights.CCQ_WIDE)
    np.testing.assert_allclose(decoded(weight, scaled=True), expected, rtol=3e-7)


def test_a_code_beyond_32_bits_is_refused() -> None:
    from fastdeploy_lite.model_executor import ops

    found = matrices.ccq_arrays(np.random.default_rng(1), 128, 8)
    found["code_scale"][3] = 1e9
    weight = ops.allocate_weight("ccq", 128, 8, cards.place())
    with pytest.raises(ValueError, match=r"code_scale\[3\]"):
        ops.fill_weight(weight, None, **found)


def test_an_expert_that_was_never_filled_is_refused() -> None:
    from fastdeploy_lite.model_executor import ops

    weight = ops.allocate_weight("ccq", 128, 16, cards.place(), num_experts=2)
    ops.fill_weight(weight, 0, **matrices.ccq_arrays(np.random.default_rng(1), 128, 16))
    ops.fill_weight(weight, 0, **matrices.ccq_arrays(np.random.default_rng(2), 128, 16))
    with pytest.raises(ValueError, match="1 fills"):
        ops.finish_weight(weight)


@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "ccq"])
def test_random_weights_are_valid_and_of_the_right_size(kind: str) -> None:
    from fastdeploy_lite.model_executor import ops

    weight = ops.allocate_weight(kind, 1024, 512, cards.place(), num_experts=2)
    ops.randomize_weight(weight, 5)
    ops.finish_weight(weight)
    for expert in range(2):
        found = decoded(weight, expert, scaled=True)
        assert np.isfinite(found).all()
        assert 0.8 < found.std() * 1024**0.5 < 1.25
        assert abs(found.mean()) < 0.1 * found.std()
