"""The plug-in under Paddle: tensors, copies, streams, memory."""

from __future__ import annotations

import cards
import numpy as np
import pytest


def plugin_place() -> object:
    place = cards.place()
    if not place.is_custom_place():
        pytest.skip("Paddle's own CUDA build is used, not the plug-in")
    return place


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32"])
@pytest.mark.parametrize("shape", [[1], [3, 5], [1000, 1001], [0]])
def test_tensors_survive_the_round_trip(dtype: str, shape: list[int]) -> None:
    import paddle

    place = plugin_place()
    values = np.random.default_rng(1).integers(0, 200, shape).astype(dtype)
    tensor = paddle.to_tensor(values, place=place)
    np.testing.assert_array_equal(tensor.numpy(), values)
    np.testing.assert_array_equal(tensor.clone().cpu().numpy(), values)


def test_paddle_operations_fall_back_to_the_host() -> None:
    import paddle

    place = plugin_place()
    x = paddle.to_tensor(np.arange(12, dtype=np.float32).reshape(3, 4), place=place)
    np.testing.assert_array_equal((x + x).numpy(), 2 * np.arange(12).reshape(3, 4))
    np.testing.assert_allclose(paddle.matmul(x, x, transpose_y=True).numpy()[0, 0], 14.0)


def test_slices_are_views() -> None:
    import paddle

    place = plugin_place()
    x = paddle.empty([8, 16], dtype="bfloat16", device=place)
    assert x[3:5].data_ptr() - x.data_ptr() == 3 * 16 * 2


def test_freed_memory_is_used_again() -> None:
    import paddle

    from fastdeploy_lite.model_executor import ops

    place = plugin_place()
    size = 1 << 30
    held = paddle.empty([size], dtype="uint8", device=place)
    free, total = ops.memory_info(place)
    assert 0 < free < total
    for _ in range(20):
        del held
        held = paddle.empty([size], dtype="uint8", device=place)
    assert held.shape == [size]
    again, _ = ops.memory_info(place)
    assert free - again < 2 * size


def test_allocation_beyond_the_card_raises_and_leaves_it_usable() -> None:
    import paddle

    from fastdeploy_lite.model_executor import ops

    place = plugin_place()
    _, total = ops.memory_info(place)
    with pytest.raises((MemoryError, OSError, RuntimeError)):
        paddle.empty([2 * total], dtype="uint8", device=place)
    np.testing.assert_array_equal(cards.get(cards.put(np.arange(5, dtype=np.int32))), np.arange(5))


def test_work_of_paddle_and_of_the_ops_is_ordered() -> None:
    import paddle

    from fastdeploy_lite.model_executor import ops

    place = plugin_place()
    for round_ in range(50):
        x = paddle.full([64, 1024], float(round_), dtype="float32").to(place)
        out = cards.poisoned([64, 1024], "float32")
        ops.gather_rows(x, cards.put(np.arange(64, dtype=np.int32)), out)
        del x  # its memory may be handed out again while the kernel runs
        assert (cards.get(out) == round_).all()


def test_a_second_card_works_alone() -> None:
    import paddle

    plugin_place()
    if paddle.device.get_available_custom_device() == ["nvidia:0"] or (
        paddle.device.device_count() < 2
    ):
        pytest.skip("one card only")
    other = paddle.CustomPlace("nvidia", 1)
    values = np.arange(1000, dtype=np.float32)
    tensor = paddle.to_tensor(values, place=other)
    np.testing.assert_array_equal(tensor.numpy(), values)
