"""Guesses of the next tokens from the tokens of a sequence and of earlier answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.speculation.config import SpeculativeConfig

LONGEST_CONTEXT = 64
# An answer is remembered with the end of its prompt, so that its first words can be guessed.
PROMPT_TOKENS_KEPT = 8


class Draft(NamedTuple):
    """Guessed tokens and the number of tokens before them that had occurred in the same order."""

    tokens: list[int]
    matched: int


NOTHING = Draft([], 0)


class Drafter(Protocol):
    """The memory of one sequence."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens of the sequence."""

    def propose(self, most: int) -> Draft:
        """Guess at most `most` tokens after those that are known."""

    def finish(self) -> None:
        """The sequence has ended."""


class NgramDrafter:
    """Finds the last earlier place where the newest tokens stand, and copies what follows there.

    Args:
        shortest, longest: How many of the newest tokens are compared; the longest match wins, among
            equals the latest.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self._longest = shortest, longest
        self._tokens: npt.NDArray[np.int32] = np.empty(256, np.int32)
        self._count = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """See Drafter."""
        end = self._count + len(tokens)
        if end > len(self._tokens):
            grown = np.empty(2 * end, np.int32)
            grown[: self._count] = self._tokens[: self._count]
            self._tokens = grown
        self._tokens[self._count : end] = tokens
        self._count = end

    def propose(self, most: int) -> Draft:
        """See Drafter; one pass over the tokens (30 us for 100,000)."""
        tokens = self._tokens[: self._count]
        places = np.flatnonzero(tokens[:-1] == tokens[-1]) if self._count > 1 else tokens[:0]
        matched, best = 0, places
        for back in range(1, self._longest + 1):  # places whose last `back` tokens agree
            if not len(places):
                break
            matched, best = back, places
            if back == self._longest or back >= self._count:
                break
            places = places[places >= back]
            places = places[tokens[places - back] == tokens[-1 - back]]
        if matched < self._shortest:
            return NOTHING
        start = int(best[-1]) + 1
        copied = tokens[start : start + most].tolist()
        # Where the match runs into the end, what was copied so far goes on: a loop in the text.
        period = self._count - start
        while len(copied) < most:
            copied.append(copied[len(copied) - period])
        return Draft(copied, matched)

    def finish(self) -> None:
        """See Drafter."""


class AnswerIndex:
    """Earlier answers, the newest about `most_tokens` tokens of them.

    An index cannot forget single answers, so two take turns: when the newer one is half full, the
    older one is dropped.
    """

    def __init__(self, most_tokens: int) -> None:
        self._half = most_tokens // 2
        self._old = _ops_cpu.SuffixIndex()
        self._new = _ops_cpu.SuffixIndex()

    @property
    def num_tokens(self) -> int:
        """Tokens remembered."""
        return self._old.num_tokens + self._new.num_tokens

    def add(self, answer: Sequence[int]) -> None:
        """Remember an answer, of a long one its end."""
        if not self._half:
            return
        answer = answer[-self._half :]
        if self._new.num_tokens + len(answer) > self._half:
            self._old, self._new = self._new, _ops_cpu.SuffixIndex()
        self._new.start_sequence()
        self._new.extend(answer)

    def propose(
        self, context: Sequence[int], most: int, least_share: float
    ) -> _ops_cpu.SuffixDraft:
        """What followed the longest known end of `context`."""
        drafts = [index.propose(context, most, least_share) for index in (self._new, self._old)]
        return max(drafts, key=_worth)


class SuffixDrafter:
    """Looks for the longest end of the sequence that occurred before, in it or in earlier answers.

    Args:
        answers: Shared by all sequences.
        least_share: A guess ends where it would follow less than this share of what was seen.
    """

    def __init__(self, answers: AnswerIndex, least_share: float) -> None:
        self._answers = answers
        self._least_share = least_share
        self._own = _ops_cpu.SuffixIndex()
        self._context: list[int] = []
        self._answer: list[int] = []
        self._has_prompt = False

    def extend(self, tokens: Sequence[int]) -> None:
        """See Drafter; the first call brings the prompt."""
        self._own.extend(tokens)
        self._context = [*self._context, *tokens][-LONGEST_CONTEXT:]
        self._answer.extend(tokens if self._has_prompt else tokens[-PROMPT_TOKENS_KEPT:])
        self._has_prompt = True

    def propose(self, most: int) -> Draft:
        """See Drafter."""
        own = self._own.propose_repeat(most, self._least_share)
        other = self._answers.propose(self._context, most, self._least_share)
        best = max(own, other, key=_worth)
        return Draft(best.tokens, best.matched) if best.tokens else NOTHING

    def finish(self) -> None:
        """See Drafter; the answer becomes something that others may repeat."""
        self._answers.add(self._answer)


def _worth(draft: _ops_cpu.SuffixDraft) -> tuple[float, int]:
    """Tokens that will probably be right; a longer match decides between equals."""
    return sum(draft.shares), draft.matched


class ModelDrafter:
    """Passes on what a layer of the model guessed at the end of the step before."""

    # All guesses of one layer are equally well founded.
    MATCHED = 1

    def __init__(self) -> None:
        self._offered: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """See Drafter; older guesses no longer fit."""
        self._offered = []

    def offer(self, tokens: Sequence[int]) -> None:
        """Take the guesses of what follows the tokens that are known."""
        self._offered = list(tokens)

    def propose(self, most: int) -> Draft:
        """See Drafter."""
        return Draft(self._offered[:most], self.MATCHED) if self._offered else NOTHING

    def finish(self) -> None:
        """See Drafter."""


class DrafterFactory:
    """Makes the drafters of one engine."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._answers = AnswerIndex(config.suffix_decoding_max_cached_tokens)

    def create(self, prompt: Sequence[int]) -> Drafter:
        """A drafter that has read `prompt`."""
        config = self._config
        drafter: Drafter
        if config.method == "mtp":
            drafter = ModelDrafter()
        elif config.method == "suffix":
            drafter = SuffixDrafter(self._answers, config.suffix_decoding_min_token_prob)
        else:
            drafter = NgramDrafter(config.min_ngram_size, config.max_ngram_size)
        drafter.extend(prompt)
        return drafter
