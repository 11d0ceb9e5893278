"""SwiGLU and the movements of rows between layers."""

from __future__ import annotations

from fastdeploy_lite.model_executor.ops._view import Arguments, Tensor


def silu_and_mul(x: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up, where gate is the first half of x's columns and up the second.

    Args:
        x: activations [T, 2 I].
        out: activations [T, I].

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or place.
    """
    args = Arguments("silu_and_mul", x)
    out_view = args.view("out", out, args.activation, None, None)
    tokens, width = out_view[2]
    args.native()(args.view("x", x, args.activation, tokens, 2 * width), out_view)


def add_inplace(x: Tensor, y: Tensor) -> None:
    """x += y.

    Args:
        x: activations [T, H], updated in place.
        y: activations [T, H].

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or place.
    """
    args = Arguments("add_inplace", x)
    x_view = args.view("x", x, args.activation, None, None)
    args.native()(x_view, args.view("y", y, args.activation, *x_view[2]))


def gather_rows(x: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[r] = x[rows[r]].

    Args:
        x: activations or float32 [T, H].
        rows: int32 [R], each in 0 .. T - 1.
        out: like x, [R, H].

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or place; an index out of range.
    """
    args = Arguments("gather_rows", x)
    x_view = args.view("x", x, (args.activation, "float32"), None, None)
    out_view = args.view("out", out, x_view[1], None, x_view[2][1])
    args.native()(x_view, args.view("rows", rows, "int32", out_view[2][0]), out_view)
