"""Sampling when a slice brings guesses: several rows of logits for one sequence.

Row i is sampled like the token that would follow the first i guesses, with the same random number
as without speculation. The rows up to the first wrong guess are the answer; so it is the same,
bit for bit, whatever was guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.model_executor.sampling_batch import SampledRow
from fastdeploy_lite.request.step import SequenceSlice, SliceResult

SampleRows = Callable[[Sequence[int], Sequence[SequenceSlice]], list[SampledRow]]
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


def _row_of(part: SequenceSlice, row: int) -> SequenceSlice:
    """The slice as it would be if the first `row` guesses were known and the rest did not exist."""
    if row == 0:
        return part
    masks, output = part.draft_bitmasks, part.output_token_ids
    if part.logits_processors:  # nobody else reads it
        output = [*output, *part.draft_token_ids[:row]]
    # In a fifth of the time of `dataclasses.replace`: a step has many rows.
    return SequenceSlice(
        request_id=part.request_id,
        slot=part.slot,
        fresh=False,
        token_ids=part.token_ids,
        start=part.start,
        block_table=part.block_table,
        sample=part.sample,
        prompt_token_ids=part.prompt_token_ids,
        output_token_ids=output,
        sampling=part.sampling,
        step=part.step + row,
        banned_now=part.banned_now if row < part.num_banned_now else (),
        forced_token=part.forced_token,
        bitmask=None if masks is None else masks[row - 1],
        logits_processors=part.logits_processors,
        draft_token_ids=part.draft_token_ids,
        draft_bitmasks=masks,
        num_banned_now=part.num_banned_now,
        num_drafts=part.num_drafts,
        feeds_draft=part.feeds_draft,
        known_candidates=part.known_candidates,
    )


def _only(row: SampledRow) -> SliceResult:
    if row.error is not None:
        return SliceResult(error=row.error)
    return SliceResult([row.token_id], None if row.logprobs is None else [row.logprobs])


def _result(part: SequenceSlice, rows: Sequence[SampledRow]) -> SliceResult:
    if rows[0].error is not None:
        return _only(rows[0])
    kept = [rows[0]]
    for row in range(1, len(rows)):
        # A row that failed is left to a step of its own, as without guesses.
        if not _goes_on(part, row - 1, rows) or rows[row].error is not None:
            break
        kept.append(rows[row])
    logprobs = [row.logprobs for row in kept if row.logprobs is not None]
    return SliceResult([row.token_id for row in kept], logprobs or None)
