"""From logits to tokens: masks, penalties, temperature, the draw, and log-probabilities.

Logits are float32 [R, V] everywhere, one row per sequence that gets a token in this step.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastdeploy_lite.model_executor.ops._view import Arguments, Tensor


def mask_logits(logits: Tensor, bitmask: Tensor, bitmask_rows: Tensor) -> None:
    """Forbid tokens (-inf) that a grammar does not allow next.

    Args:
        logits: float32 [R, V], in place.
        bitmask: int32 [M, ceil(V / 32)]; token t is allowed iff bit t % 32 of word t // 32 is set.
        bitmask_rows: int32 [R], the mask of each row; -1 = none.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or place; a mask out of range.
    """
    args = Arguments("mask_logits", logits)
    view = args.view("logits", logits, "float32", None, None)
    rows, vocab = view[2]
    args.native()(
        view,
        args.view("bitmask", bitmask, "int32", None, (vocab + 31) // 32),
        args.view("bitmask_rows", bitmask_rows, "int32", rows),
    )


def process_logits(
    logits: Tensor,
    slots: Tensor,
    occurrences: Tensor | None,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    temperature: Tensor,
    edit_offsets: Tensor,
    edit_ids: Tensor,
    edit_values: Tensor,
) -> None:
    """Apply, in this order: edits, repetition, frequency and presence penalties, temperature.

    A token that occurred in the prompt or the output has its logit divided (if positive) or
    multiplied (if negative) by `repetition`; one that was generated n > 0 times loses
    n * frequency + presence.

    Args:
        logits: float32 [R, V], in place.
        slots: int32 [R], rows of `occurrences`.
        occurrences: int32 [S, V] as kept by update_occurrences; None = no penalties.
        repetition: float32 [R], more than 0; 1 = off.
        frequency: float32 [R]; 0 = off.
        presence: float32 [R]; 0 = off.
        temperature: float32 [R], 0 or more; 0 = greedy, no division. Below 1e-3 the row's best
            logit is moved to 0 before the division: no probability changes, nothing overflows.
        edit_offsets: int32 [R + 1], cumulative: the edits of each row.
        edit_ids: int32 [n], token ids; in a row they ascend, and edits of one id apply in order.
        edit_values: float32 [n], added to the logits; -inf bans the token for good.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or place; on the CPU also a value or
            an index out of range.
    """
    args = Arguments("process_logits", logits)
    view = args.view("logits", logits, "float32", None, None)
    rows, vocab = view[2]
    seen = None
    if occurrences is not None:
        seen = args.view("occurrences", occurrences, "int32", None, vocab)
    ids = args.view("edit_ids", edit_ids, "int32", None)
    args.native()(
        view,
        args.view("slots", slots, "int32", rows),
        seen,
        args.view("repetition", repetition, "float32", rows),
        args.view("frequency", frequency, "float32", rows),
        args.view("presence", presence, "float32", rows),
        args.view("temperature", temperature, "float32", rows),
        args.view("edit_offsets", edit_offsets, "int32", rows + 1),
        ids,
        args.view("edit_values", edit_values, "float32", ids[2][0]),
    )


def update_occurrences(occurrences: Tensor, slots: Tensor, token_ids: Tensor, prompt: bool) -> None:
    """Record tokens: set bit 30 for prompt tokens, else add 1 to the count in the low 24 bits.

    Args:
        occurrences: int32 [S, V], in place.
        slots: int32 [n], rows of `occurrences`; a pair of slot and token may repeat.
        token_ids: int32 [n].
        prompt: whether the tokens belong to the prompt.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or place; on the CPU also an index
            out of range.
    """
    args = Arguments("update_occurrences", occurrences)
    slot_view = args.view("slots", slots, "int32", None)
    args.native()(
        args.view("occurrences", occurrences, "int32", None, None),
        slot_view,
        args.view("token_ids", token_ids, "int32", slot_view[2][0]),
        prompt,
    )


# What `sample` takes beside the logits and the output, in order, one value a row.
SAMPLE_ROWS: Mapping[str, str] = {
    "temperature": "float32",
    "top_k": "int32",
    "top_p": "float32",
    "min_p": "float32",
    "seeds": "int64",
    "steps": "int64",
    "forced": "int32",
}


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    forced: Tensor,
    out: Tensor,
) -> None:
    """Draw one token per row.

    Softmax, then min_p (drop p < min_p * p_max), then the top_k most likely, renormalised, then the
    smallest set that reaches top_p, renormalised; equal logits enter by ascending id. A row is
    greedy (best logit, ties to the lower id) if temperature is 0, top_k is 1 or top_p at most 1e-5.
    The uniform number is Philox4x32-10 of (seed, step): a draw depends on its own row alone.

    Args:
        logits: float32 [R, V], already divided by the temperature; V below 2^20.
        temperature: float32 [R], 0 or more; only tells greedy rows here.
        top_k: int32 [R]; 0 or less = off.
        top_p: float32 [R], 0 to 1; 1 = off.
        min_p: float32 [R], 0 to 1; 0 = off.
        seeds: int64 [R].
        steps: int64 [R], the index of the token in its output.
        forced: int32 [R]; 0 or more = this token, whatever the logits; -1 = draw.
        out: int32 [R], the tokens.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a tensor of another shape or place; on the CPU also a parameter out of range,
            and a row whose logits contain NaN or are all -inf: the message names the first such
            row, and the other rows of `out` are valid.
    """
    args = Arguments("sample", logits)
    view = args.view("logits", logits, "float32", None, None)
    rows = view[2][0]
    args.native()(
        view,
        args.view("temperature", temperature, "float32", rows),
        args.view("top_k", top_k, "int32", rows),
        args.view("top_p", top_p, "float32", rows),
        args.view("min_p", min_p, "float32", rows),
        args.view("seeds", seeds, "int64", rows),
        args.view("steps", steps, "int64", rows),
        args.view("forced", forced, "int32", rows),
        args.view("out", out, "int32", rows),
    )


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    k: int,
    out_logprob: Tensor,
    out_rank: Tensor,
    out_ids: Tensor,
    out_logprobs: Tensor,
) -> None:
    """Natural-log probabilities of chosen tokens and of the k best tokens of each row.

    -inf is written as float32's lowest number, -3.4028235e38.

    Args:
        logits: float32 [R, V]; V below 2^20.
        tokens: int32 [R], the chosen tokens.
        k: alternatives per row, 0 to V.
        out_logprob: float32 [R], of the chosen tokens.
        out_rank: int32 [R], from 1; equal logits rank by ascending id.
        out_ids: int32 [R, k], best first, equal logits by ascending id.
        out_logprobs: float32 [R, k].

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a tensor of another shape or place; on the CPU also a token out of range, and a
            row whose logits contain NaN or are all -inf (the message names it).
    """
    args = Arguments("token_logprobs", logits)
    view = args.view("logits", logits, "float32", None, None)
    rows, vocab = view[2]
    if not 0 <= k <= vocab:
        raise ValueError(f"token_logprobs: k is {k}, expected 0 to {vocab}")
    args.native()(
        view,
        args.view("tokens", tokens, "int32", rows),
        k,
        args.view("out_logprob", out_logprob, "float32", rows),
        args.view("out_rank", out_rank, "int32", rows),
        args.view("out_ids", out_ids, "int32", rows, k),
        args.view("out_logprobs", out_logprobs, "float32", rows, k),
    )


def best_logits(logits: Tensor, temperature: Tensor, out_ids: Tensor, out_values: Tensor) -> None:
    """Find the best tokens of each row by logit / temperature, equal quotients by ascending id.

    On the CPU alone. In this order tokens are sampled, so the first k of a row, and of each part of
    a row, hold the k best of the whole one.

    Args:
        logits: float32 [R, V].
        temperature: float32 [R]; 0 and 1 leave the logits as they are.
        out_ids: int32 [R, k], best first.
        out_values: float32 [R, k], their logits, undivided; NaN where a row has NaN.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a tensor of another shape or place; k is not 1 to V.
    """
    args = Arguments("best_logits", logits)
    view = args.view("logits", logits, "float32", None, None)
    rows, k = view[2][0], out_ids.shape[1]
    args.native()(
        view,
        args.view("temperature", temperature, "float32", rows),
        args.view("out_ids", out_ids, "int32", rows, k),
        args.view("out_values", out_values, "float32", rows, k),
    )
