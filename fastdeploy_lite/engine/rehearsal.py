"""Steps before the first request: they capture a card's graphs, and say what steps take.

A policy of speculation that had to find that out while it serves would have to pay for each graph
with the time of hundreds of steps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from fastdeploy_lite.config import BLOCK_SIZE, RuntimeConfig
from fastdeploy_lite.executor.base import Executor, ExecutorDeadError
from fastdeploy_lite.request.step import SamplerParams, SequenceSlice
from fastdeploy_lite.speculation.config import CHECK_SIZES
from fastdeploy_lite.speculation.rates import StepSeconds
from fastdeploy_lite.utils.errors import one_line
from fastdeploy_lite.utils.logging import get_logger

# Sequences of steps without guesses; what lies between is on a line.
PLAIN_SIZES = (1, 2, 4, 8, 16, 32, 64)
# The first step of a size captures its graph, or the second where the first made a buffer larger.
UNTIMED, TIMED = 2, 7
# No size is begun later than so many seconds after the first: with experts in main memory a step
# may take a second.
PATIENCE = 10.0
_log = get_logger("fastdeploy")


def rehearse(config: RuntimeConfig, executor: Executor) -> StepSeconds | None:
    """Run steps of all sizes that guesses will need, the small ones first.

    Nothing remains of their sequences: slots and blocks are overwritten by whoever gets them.

    Args:
        config: Of the engine.
        executor: Loaded, without requests.

    Returns:
        Seconds of steps; None where nothing is looked up, on a CPU, whose steps depend on their
        words more than on their number, and where such a step fails.

    Raises:
        ExecutorDeadError: a device was lost.
    """
    report = executor.report()
    if "cpu" in report.device or config.scheduler.max_model_len < BLOCK_SIZE:
        return None
    if config.max_draft_tokens == 0 or config.has_draft_model:
        return None
    started = time.monotonic()
    rehearsal = _Rehearsal(executor, config.model.vocab_size)
    plain: dict[int, float] = {}
    checking: dict[int, float] = {}
    try:
        for count, guesses in _sizes(config, report.num_blocks):
            if time.monotonic() > started + PATIENCE:
                break
            seconds = rehearsal.seconds(count, guesses)
            if guesses:
                checking[count + guesses] = seconds
            else:
                plain[count] = seconds
    except ExecutorDeadError:
        raise
    except Exception as error:  # a request will say the same, and the server may live without it
        _log.warning("A step before the first request failed: %s", one_line(error))
        return None
    taken = time.monotonic() - started
    _log.info(
        "Speculation: steps of %d sizes took %.1f s; ms of plain ones by sequences: %s;"
        " of those with guesses by tokens: %s",
        len(plain) + len(checking),
        taken,
        _in_words(plain),
        _in_words(checking),
    )
    return StepSeconds(plain, checking)


def _in_words(seconds: dict[int, float]) -> str:
    return ", ".join(f"{size}: {1e3 * each:.2f}" for size, each in seconds.items())


def _sizes(config: RuntimeConfig, num_blocks: int) -> Iterator[tuple[int, int]]:
    """Sequences and guessed tokens of the steps to run."""
    assert config.speculative is not None
    most = min(config.scheduler.max_num_seqs, num_blocks, PLAIN_SIZES[-1])
    for count in sorted({most, *(size for size in PLAIN_SIZES if size < most)}):
        yield count, 0
    for tokens in CHECK_SIZES:
        count = -(-tokens // (config.speculative.most_tokens + 1))
        if count <= most and tokens - count <= config.max_draft_tokens:
            yield count, tokens - count


class _Rehearsal:
    """Runs steps of sequences of random words, each in a block of its own."""

    def __init__(self, executor: Executor, vocab_size: int) -> None:
        self._executor = executor
        self._vocab_size = vocab_size
        self._draw = random.Random(0)
        self._sampling = SamplerParams(temperature=0.0)

    def seconds(self, count: int, guesses: int) -> float:
        """Of a step of `count` sequences with so many guessed tokens together; what two of three
        exceed.

        Raises:
            RuntimeError: a sequence failed.
        """
        texts = [self._words(1) for _ in range(count)]
        taken = []
        for step in range(UNTIMED + TIMED):
            slices = [
                self._slice(slot, step, text, guesses // count + (slot < guesses % count))
                for slot, text in enumerate(texts)
            ]
            started = time.perf_counter()
            results = self._executor.execute(slices)
            taken.append(time.perf_counter() - started)
            problem = next((result.error for result in results if result.error), None)
            if problem is not None:
                raise RuntimeError(problem)
            for text in texts:
                text.extend(self._words(1))
        return sorted(taken[UNTIMED:])[(TIMED - 1) // 3]

    def _slice(self, slot: int, step: int, text: list[int], guesses: int) -> SequenceSlice:
        guess = self._words(guesses)
        return SequenceSlice(
            request_id=f"rehearsal-{slot}",
            slot=slot,
            fresh=step == 0,
            token_ids=[text[-1], *guess],
            start=step,
            block_table=[slot],
            sample=True,
            prompt_token_ids=text[:1],
            output_token_ids=text[1:],
            sampling=self._sampling,
            step=step,
            draft_token_ids=guess,
            feeds_draft=False,
        )

    def _words(self, count: int) -> list[int]:
        """Any words: others choose other experts, as those of real texts do."""
        return [self._draw.randrange(self._vocab_size) for _ in range(count)]
