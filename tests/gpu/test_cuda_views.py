"""The CUDA module looks at what it is given: a wrong view is refused before anything is queued."""

from __future__ import annotations

from typing import Any

import pytest


def view(shape: list[int], dtype: str = "bfloat16", strides: list[int] | None = None) -> Any:
    """Of memory that nobody may touch."""
    steps = [1]
    for extent in shape[:0:-1]:
        steps.insert(0, steps[0] * extent)
    return 8, dtype, shape, steps if strides is None else strides


def weight() -> Any:
    from fastdeploy_lite import _ops_cuda

    names = ("tiles", "local_scale", "code_scale", "code_bias", "column_scale")
    addresses = dict.fromkeys(names, 0)
    return _ops_cuda.Weight(kind=1, in_features=128, out_features=32, **addresses)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (view([4, 64]), view([4, 32]), r"linear: x has size 64 along axis 1, expected 128"),
        (view([4, 128], "float32"), view([4, 32]), r"linear: x has dtype float32, expected bf"),
        (view([4, 128]), view([3, 32]), r"linear: out has size 3 along axis 0, expected 4"),
        (view([4, 128]), view([4, 32], "int32"), r"linear: out has dtype int32"),
        (view([4, 128], strides=[256, 1]), view([4, 32]), r"linear: x is not contiguous"),
        (view([512]), view([4, 32]), r"linear: x has 1 dimensions, expected 2"),
    ],
)
def test_a_linear_map_refuses_other_tensors(x: Any, out: Any, message: str) -> None:
    from fastdeploy_lite import _ops_cuda

    with pytest.raises(ValueError, match=message):
        _ops_cuda.linear(x, weight(), out, 0, 0, 0, 0)


def test_an_absent_tensor_is_none_and_a_present_one_is_checked() -> None:
    from fastdeploy_lite import _ops_cuda

    rows, scale = view([4, 128]), view([128], "float32")
    with pytest.raises(ValueError, match=r"rms_norm: residual has size 3 along axis 0, expected 4"):
        _ops_cuda.rms_norm(rows, None, view([3, 128]), scale, 1e-5, rows, 0)


def test_rows_are_gathered_into_their_own_dtype() -> None:
    from fastdeploy_lite import _ops_cuda

    rows = view([2], "int32")
    with pytest.raises(ValueError, match="gather_rows: x and out differ in dtype"):
        _ops_cuda.gather_rows(view([4, 128]), rows, view([2, 128], "float32"), 0)


def test_attention_looks_at_heads_tables_and_cache() -> None:
    from fastdeploy_lite import _ops_cuda

    def attend(**changes: Any) -> None:
        views = {
            "q": view([3, 8 * 64]),
            "keys": view([9, 2, 64, 64]),
            "values": view([9, 2, 64, 64]),
            "tables": view([3, 5], "int32"),
            "cu_seqlens": view([4], "int32"),
            "contexts": view([3], "int32"),
        }
        views.update(changes)
        _ops_cuda.paged_attention(*views.values(), 0.125, 0, 0, 0, view([3, 8 * 64]), 0)

    with pytest.raises(ValueError, match="q is 448 wide, expected a multiple of 2 KV heads of 64"):
        attend(q=view([3, 7 * 64]))
    with pytest.raises(ValueError, match="attention: cu_seqlens_q has size 3 along axis 0"):
        attend(cu_seqlens=view([3], "int32"))
    with pytest.raises(ValueError, match="attention: block_tables is not contiguous"):
        attend(tables=view([3, 5], "int32", [8, 1]))
    with pytest.raises(ValueError, match="attention: value_cache has size 8 along axis 0"):
        attend(values=view([8, 2, 64, 64]))
