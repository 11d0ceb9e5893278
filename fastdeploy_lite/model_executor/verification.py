"""Sampling when a slice brings guesses: several rows of logits for one sequence.

Row i is sampled like the token that would follow the first i guesses, with the same random number
as without speculation. The rows up to the first wrong guess are the answer; so it is the same,
bit for bit, whatever was guessed, wherever logits do not depend on how many tokens a step has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice, zip_longest

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.model_executor.sampling_batch import SampledRow
from fastdeploy_lite.request.step import (
    GuessedPosition,
    SampledPart,
    SequenceSlice,
    SliceResult,
    TokenLogprobs,
)

SampleRows = Callable[[Sequence[int], Sequence[SampledPart]], list[SampledRow]]
"""`sample(rows, parts)` samples rows of the step's logits, one for each part."""


def logit_rows(
    slices: Sequence[SequenceSlice], ends: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """Rows of the hidden states that are sampled: of each slice, its guesses and the row before.

    Args:
        slices: those that sample.
        ends: for each, the row after its last token.
    """
    counts = np.array([part.num_rows for part in slices], np.int64)
    begins = np.cumsum(counts) - counts
    rows: npt.NDArray[np.int64] = np.repeat(ends - counts - begins, counts)
    return rows + np.arange(len(rows))


def sample_slices(slices: Sequence[SequenceSlice], sample: SampleRows) -> list[SliceResult]:
    """Sample all rows of slices, some of which bring guesses.

    What depends on the tokens before (penalties, custom processors) is sampled a row at a time,
    the next one only if the guess was right; all others at once.

    Args:
        slices: those that sample.
        sample: samples rows; row numbers count through the rows of all slices.

    Returns:
        One result per slice, of several tokens where guesses were right.
    """
    if not any(part.draft_token_ids for part in slices):
        return [_only(row) for row in sample(range(len(slices)), slices)]
    if any(map(_depends_on_tokens, slices)):
        return _sample_in_turn(slices, sample)
    parts = [each for part in slices for each in _positions(part)]
    rows = iter(sample(range(len(parts)), parts))
    return [_result(part, list(islice(rows, part.num_rows))) for part in slices]


def _sample_in_turn(slices: Sequence[SequenceSlice], sample: SampleRows) -> list[SliceResult]:
    found: list[list[SampledRow]] = [[] for _ in slices]
    firsts = np.cumsum([0, *(part.num_rows for part in slices)]).tolist()
    pending = [
        (index, row)
        for index, part in enumerate(slices)
        for row in range(1 if _depends_on_tokens(part) else part.num_rows)
    ]
    while pending:
        parts = [_row_of(slices[index], row) for index, row in pending]
        numbers = [firsts[index] + row for index, row in pending]
        for (index, _), sampled in zip(pending, sample(numbers, parts), strict=True):
            found[index].append(sampled)
        pending = [
            (index, row + 1)
            for index, row in pending
            if _depends_on_tokens(slices[index]) and _goes_on(slices[index], row, found[index])
        ]
    return [_result(part, rows) for part, rows in zip(slices, found, strict=True)]


def _depends_on_tokens(part: SequenceSlice) -> bool:
    return part.sampling.uses_penalties or bool(part.logits_processors)


def _goes_on(part: SequenceSlice, row: int, rows: Sequence[SampledRow]) -> bool:
    """Whether the guess after `row` was right, so that the next row is of the answer."""
    if row >= len(part.draft_token_ids) or rows[row].error is not None:
        return False
    return rows[row].token_id == part.draft_token_ids[row]


def _positions(part: SequenceSlice) -> list[SampledPart]:
    """The slice, and what it is behind each of its guesses."""
    return [part, *(_row_of(part, row) for row in range(1, part.num_rows))]


def _row_of(part: SequenceSlice, row: int) -> SampledPart:
    """The slice as it would be if the first `row` guesses were known and the rest did not exist."""
    if row == 0:
        return part
    masks, output = part.draft_bitmasks, part.output_token_ids
    if part.logits_processors:  # nobody else reads it
        output = [*output, *part.draft_token_ids[:row]]
    return GuessedPosition(
        part.slot,
        part.sampling,
        part.step + row,
        output,
        part.banned_now if row < part.num_banned_now else (),
        part.forced_token,
        None if masks is None else masks[row - 1],
        part.logits_processors,
    )


def _only(row: SampledRow) -> SliceResult:
    if row.error is not None:
        return SliceResult(error=row.error)
    return SliceResult([row.token_id], None if row.logprobs is None else [row.logprobs])


def _result(part: SequenceSlice, rows: Sequence[SampledRow]) -> SliceResult:
    if rows[0].error is not None:
        return _only(rows[0])
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    for row, guess in zip_longest(rows, part.draft_token_ids[: len(rows)]):
        if row.error is not None:  # left to a step of its own, as without guesses
            break
        tokens.append(row.token_id)
        if row.logprobs is not None:
            logprobs.append(row.logprobs)
        if row.token_id != guess:
            break
    return SliceResult(tokens, logprobs or None)
