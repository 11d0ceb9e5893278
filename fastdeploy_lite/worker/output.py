"""Containers of log-probabilities, under the names that FastDeploy scripts import."""

from __future__ import annotations

from typing import NamedTuple


class Logprob(NamedTuple):
    """Natural-log probability of one token.

    Attributes:
        logprob: Natural logarithm of the probability.
        rank: 1 for the most likely token of the vocabulary; None when unknown.
        decoded_token: The token's own text.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PromptLogprobs = list[dict[int, Logprob] | None]
"""One entry per prompt token: None for the first, then the token and its alternatives."""


class LogprobsLists(NamedTuple):
    """Log-probabilities of several positions; column 0 is the sampled token, then the best ones.

    Attributes:
        logprob_token_ids: `[positions][1 + k]` token ids.
        logprobs: `[positions][1 + k]` natural-log probabilities.
        sampled_token_ranks: `[positions]` ranks of the sampled tokens, 1 = best.
    """

    logprob_token_ids: list[list[int]]
    logprobs: list[list[float]]
    sampled_token_ranks: list[int]

    def slice_columns(self, start: int, end: int) -> LogprobsLists:
        """Keep columns `start..end-1` of every position."""
        return LogprobsLists(
            [row[start:end] for row in self.logprob_token_ids],
            [row[start:end] for row in self.logprobs],
            self.sampled_token_ranks,
        )

    def slice_rows(self, start: int, end: int) -> LogprobsLists:
        """Keep positions `start..end-1`."""
        return LogprobsLists(
            self.logprob_token_ids[start:end],
            self.logprobs[start:end],
            self.sampled_token_ranks[start:end],
        )

    def extend(self, other: LogprobsLists) -> None:
        """Append the positions of `other`."""
        self.logprob_token_ids.extend(other.logprob_token_ids)
        self.logprobs.extend(other.logprobs)
        self.sampled_token_ranks.extend(other.sampled_token_ranks)
