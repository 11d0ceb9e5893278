"""What "a sequence's results do not depend on the batch" means, as checks of a model runner.

Bits are compared, of logits as well as tokens. The CPU and the card are held to the same checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from model_driver import generate, sequences

from fastdeploy_lite.request.step import SamplerParams
from fastdeploy_lite.worker.model_runner import ModelRunner

LENGTHS = (1, 5, 63, 64, 65, 130)
NEW_TOKENS = 6


def make_prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Random prompts of the given lengths."""
    random = np.random.default_rng(0)
    return [[int(i) for i in random.integers(0, 8192, length)] for length in lengths]


class Invariance:
    """The checks, for prompts of some lengths; `longest` bounds prompt and output together."""

    def __init__(self, lengths: Sequence[int] = LENGTHS, longest: int = 192) -> None:
        """Args: lengths: of the prompts, at least three; longest: a multiple of 64."""
        self.prompts = make_prompts(lengths)
        self.longest = longest

    def lone_runs(
        self, runner: ModelRunner, **fields: SamplerParams
    ) -> tuple[list[list[int]], list[bytes]]:
        """Tokens and raw logits of every prompt run by itself."""
        tokens, rows = [], []
        for prompt in self.prompts:
            running = sequences([prompt], self.longest, **fields)
            tokens += generate(runner, running, NEW_TOKENS)
            rows.append(np.stack(running[0].rows).tobytes())
        return tokens, rows

    def batched_and_chunked(self, runner: ModelRunner, chunk: int) -> None:
        """With small chunks some sequences decode while others still prefill."""
        alone, alone_rows = self.lone_runs(runner)
        running = sequences(self.prompts, self.longest)
        assert generate(runner, running, NEW_TOKENS, chunk) == alone
        assert [np.stack(one.rows).tobytes() for one in running] == alone_rows

    def seeded_sampling(self, runner: ModelRunner) -> None:
        """Seeds, not neighbours, decide what is drawn."""
        sampling = SamplerParams(
            temperature=1.5,
            top_p=0.9,
            top_k=50,
            repetition_penalty=1.3,
            frequency_penalty=0.5,
            seed=7,
        )
        alone, _ = self.lone_runs(runner, sampling=sampling)
        together = sequences(self.prompts, self.longest, sampling=sampling)
        assert generate(runner, together, NEW_TOKENS, 33) == alone
        other = SamplerParams(temperature=1.5, top_p=0.9, top_k=50, seed=8)
        together = sequences(self.prompts, self.longest, sampling=other)
        assert generate(runner, together, NEW_TOKENS) != alone

    def preempted(self, runner: ModelRunner) -> None:
        """A preempted sequence comes back with its output, in another slot and other blocks."""
        sampling = SamplerParams(
            temperature=1.0, presence_penalty=1.0, repetition_penalty=1.2, seed=3
        )
        prompt = self.prompts[-1]
        (expected,) = generate(
            runner, sequences([prompt], self.longest, sampling=sampling), NEW_TOKENS + 4
        )
        (before,) = sequences([prompt], self.longest, sampling=sampling)
        generate(runner, [before], 4)
        others = sequences(self.prompts[:3], self.longest)
        generate(runner, others, 2)
        (after,) = sequences([prompt], self.longest, sampling=sampling)
        after.slot, after.output = 5, before.output
        after.blocks = [3 * i + 2 for i in reversed(range(self.longest // 64))]
        generate(runner, [after], NEW_TOKENS + 4, chunk=40)
        assert after.output == expected

    def teacher_forced(self, runner: ModelRunner) -> None:
        """One pass over prompt and output gives the logits that generation saw."""
        for prompt in (self.prompts[3], self.prompts[-1]):
            (one,) = sequences([prompt], self.longest)
            generate(runner, [one], NEW_TOKENS, chunk=13)
            forced = runner.logits(one.prompt + one.output[:-1])
            assert np.array_equal(forced[-NEW_TOKENS:], np.stack(one.rows))

    def step_sizes(self, make: Callable[[int], ModelRunner], sizes: Sequence[int]) -> None:
        """`make` gives a runner whose steps hold so many tokens; all give the same logits."""
        ids = self.prompts[-1] + self.prompts[-2]
        whole = make(sizes[0]).logits(ids)
        for size in sizes[1:]:
            assert np.array_equal(make(size).logits(ids), whole), size


class RunnerTests:
    """The checks as tests of the fixture `runner`, for a subclass in a test module."""

    checks = Invariance()

    @pytest.mark.parametrize("chunk", [10_000, 64, 17, 1])
    def test_batched_and_chunked_runs_equal_lone_runs(
        self, runner: ModelRunner, chunk: int
    ) -> None:
        self.checks.batched_and_chunked(runner, chunk)

    def test_seeded_sampling_does_not_depend_on_the_batch(self, runner: ModelRunner) -> None:
        self.checks.seeded_sampling(runner)

    def test_recomputation_after_preemption_continues_alike(self, runner: ModelRunner) -> None:
        self.checks.preempted(runner)

    def test_teacher_forcing_equals_generation_bit_for_bit(self, runner: ModelRunner) -> None:
        self.checks.teacher_forced(runner)
