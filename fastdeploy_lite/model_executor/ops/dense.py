"""Linear maps and embedding lookups over packed weights."""

from __future__ import annotations

from fastdeploy_lite.model_executor.ops._view import Arguments, Tensor
from fastdeploy_lite.model_executor.ops.packed_weight import PackedWeight


def linear(x: Tensor, weight: PackedWeight, out: Tensor) -> None:
    """out = x @ W.

    A row's result has the same bits whatever the other rows are; on CPU whatever the number of
    threads and the instruction set are, too. There, with quantised weights, the row enters as
    24-bit integers per group of 64 (error at most 2^-22.99 of the group's largest element; 16 bits
    and 2^-14.99 after `set_activation_bits`). Sums are float32.

    Args:
        x: [T, K], float32 on CPU, bfloat16 on a card.
        weight: packed [K, N] without experts, on the same place.
        out: [T, N], dtype of x or float32.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or place, or a weight that holds experts.
    """
    args = Arguments("linear", x)
    handle = args.weight("weight", weight)
    args.native()(
        args.view("x", x, args.activation, None, weight.in_features),
        handle,
        args.view("out", out, (args.activation, "float32"), x.shape[0], weight.out_features),
    )


def embedding(token_ids: Tensor, weight: PackedWeight, out: Tensor) -> None:
    """out[t] = W^T[token_ids[t]]: rows of the table whose transpose is a linear map [H, V].

    One copy of a tied table so serves as embedding and as `linear` for the logits.

    Args:
        token_ids: int32 [T], each 0 to V - 1.
        weight: dense, in_features H, out_features V.
        out: [T, H], float32 on CPU, bfloat16 on a card.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or place, a quantised weight, or (on CPU) an id out of range.
    """
    args = Arguments("embedding", token_ids)
    handle = args.weight("weight", weight)
    args.native()(
        args.view("token_ids", token_ids, "int32", None),
        handle,
        args.view("out", out, args.activation, token_ids.shape[0], weight.in_features),
    )


def embedding_share(token_ids: Tensor, weight: PackedWeight, first: int, out: Tensor) -> None:
    """As `embedding`, of a table of which the rows from `first` on are held.

    Args:
        token_ids: int32 [T]; ids of rows that are not held give zeros.
        weight: dense, in_features H, out_features as many as rows are held.
        first: id of the first one.
        out: [T, H], float32 on CPU, bfloat16 on a card.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or place, or a quantised weight.
    """
    args = Arguments("embedding_share", token_ids)
    handle = args.weight("weight", weight)
    args.native()(
        args.view("token_ids", token_ids, "int32", None),
        handle,
        first,
        args.view("out", out, args.activation, token_ids.shape[0], weight.in_features),
    )
