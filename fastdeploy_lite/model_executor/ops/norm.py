"""RMSNorm, with and without the residual sum."""

from __future__ import annotations

from fastdeploy_lite.model_executor.ops._view import Arguments, Tensor, View

_WEIGHT_DTYPES = ("float32", "bfloat16")


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight, row by row (Zhang and Sennrich, 2019).

    Args:
        x: activations [T, H].
        weight: float32 or bfloat16 [H].
        eps: added to the mean of squares.
        out: activations [T, H]; may be x.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or place.
    """
    args = Arguments("rms_norm", x)
    x_view = args.view("x", x, args.activation, None, None)
    tokens, hidden = x_view[2]
    args.native()(
        x_view,
        args.view("weight", weight, _WEIGHT_DTYPES, hidden),
        eps,
        args.view("out", out, args.activation, tokens, hidden),
    )


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    also: Tensor | None = None,
) -> None:
    """residual += x (+ also), then out = rms_norm(residual, weight, eps).

    Args:
        x: activations [T, H]; with `also`, its values are lost.
        residual: activations [T, H], updated in place.
        weight: float32 or bfloat16 [H].
        eps: added to the mean of squares.
        out: activations [T, H]; may be x.
        also: activations [T, H], added to x first; the sum is rounded to their dtype.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or place.
    """
    args = Arguments("add_rms_norm", x)
    x_view = args.view("x", x, args.activation, None, None)
    tokens, hidden = x_view[2]
    more: list[View] = []
    if also is not None:
        more = [args.view("also", also, args.activation, tokens, hidden)]
    arguments = (
        args.view("residual", residual, args.activation, tokens, hidden),
        args.view("weight", weight, _WEIGHT_DTYPES, hidden),
        eps,
        args.view("out", out, args.activation, tokens, hidden),
    )
    if args.kind == "cpu":
        for view in more:
            args.native("add_inplace")(x_view, view)
        more = []
    args.native()(x_view, *arguments, *more)
