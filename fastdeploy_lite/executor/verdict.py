"""Which requests die in a step that failed.

The rule is kept in one place, above all devices: it sees a step's verdict of all of them together
and has each try the same again, so no device ever waits for one that decided otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fastdeploy_lite.executor.base import Executor, ExecutorDeadError
from fastdeploy_lite.request.step import SamplerParams, SequenceSlice, SliceResult
from fastdeploy_lite.utils.errors import one_line


@dataclass(frozen=True)
class StepVerdict:
    """How a step ended.

    Attributes:
        results: one per slice; those that the step fails for have an `error`.
        error: what the step of all slices raised, None when it did not.
        is_broken: whether nothing could be computed, not even plain numbers in a slice's place.
    """

    results: list[SliceResult]
    error: Exception | None = None
    is_broken: bool = False


def run_step(executor: Executor, slices: Sequence[SequenceSlice]) -> StepVerdict:
    """Run a step; when it fails, find the slices that it fails for.

    A slice writes keys and values that nobody else reads and may be computed again, so each one
    gets a second chance alone.

    Raises:
        ExecutorDeadError: a device is lost.
    """
    try:
        return StepVerdict(executor.execute(slices))
    except ExecutorDeadError:
        raise
    except Exception as error:
        if len(slices) == 1:
            results = [SliceResult(error=describe(error))]
        else:
            results = [_alone(executor, part) for part in slices]
        failed = all(result.error is not None for result in results)
        # An error that belongs to a request says nothing about the device.
        return StepVerdict(results, error, failed and not _can_still_run(executor, slices[0]))


def describe(error: BaseException) -> str:
    """Return type and message of an error in one line."""
    return one_line(f"{type(error).__name__}: {error}")


def _alone(executor: Executor, part: SequenceSlice) -> SliceResult:
    part.fresh = True  # the failed step may have left the slot's rows half updated
    try:
        return executor.execute([part])[0]
    except ExecutorDeadError:
        raise
    except Exception as error:
        return SliceResult(error=describe(error))


def _can_still_run(executor: Executor, part: SequenceSlice) -> bool:
    """Whether a slice of plain numbers is computed where this one has failed.

    It writes where the failed one would have written: into blocks that nobody else reads.
    """
    known = len(part.token_ids) - len(part.draft_token_ids)
    plain = dataclasses.replace(
        part, fresh=True, token_ids=list(part.token_ids)[:known], sampling=SamplerParams(),
        banned_now=(), forced_token=-1, bitmask=None, logits_processors=None,
        draft_token_ids=(), draft_bitmasks=None,
    )  # fmt: skip
    shortest = dataclasses.replace(plain, token_ids=plain.token_ids[:1], sample=False)
    return any(_alone(executor, each).error is None for each in (plain, shortest))
