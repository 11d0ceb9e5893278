"""The rules of one answer: what its next token may be, and when it ends.

A stop text or a fulfilled constraint is followed by a closing EOS token, as upstream does
(docs/serving.md). At the length limit there is none, because all `max_tokens` tokens are the
model's; with upstream's counting the last of them is EOS. All EOS ids appear as the first of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.config import EarlyStopConfig
from fastdeploy_lite.guided.paced import LONGEST_SECONDS, PacedMatcher
from fastdeploy_lite.request.messages import EngineSampling, FinishReason


class TextStream(Protocol):
    """An incremental detokeniser."""

    def feed(self, token_id: int) -> str:
        """Text that the token completes."""


def end_of(stop: str, text: str, before: int) -> int:
    """Where a stop text ends in the new part of a text.

    Args:
        stop: The stop text.
        text: Ends with what is new.
        before: Length of what is old.

    Returns:
        The end of the first occurrence that ends behind `before`; 0 without one.
    """
    at = text.find(stop, max(before - len(stop) + 1, 0))
    return at + len(stop) if at >= 0 else 0


class StopFinder:
    """Finds stop texts in the text and stop sequences in the tokens of an answer.

    Both are looked for: a text may be spelled by other tokens in context, and a special token may
    have no text.

    Args:
        texts: Stop texts.
        sequences: Stop token sequences.
        stream: Detokeniser of this answer; needed when there are texts.
    """

    def __init__(
        self,
        texts: Sequence[str],
        sequences: Sequence[tuple[int, ...]],
        stream: TextStream | None,
    ) -> None:
        self._texts = tuple(texts)
        self._single = {s[0] for s in sequences if len(s) == 1}
        self._sequences = [list(s) for s in sequences if len(s) > 1]
        self._keep = max(map(len, self._texts), default=1) - 1
        self._stream = stream
        self._tail = ""

    def feed(self, output: Sequence[int]) -> str | int | None:
        """Look at the newest token.

        Args:
            output: All tokens of the answer.

        Returns:
            The stop text or (last) stop token that is now complete, or None.
        """
        found = self._in_text(output[-1])
        if found is not None:
            return found
        if output[-1] in self._single:
            return output[-1]
        ends = (s for s in self._sequences if list(output[-len(s) :]) == s)
        return next((s[-1] for s in ends), None)

    def _in_text(self, token_id: int) -> str | None:
        if self._stream is None:
            return None
        before, text = len(self._tail), self._tail + self._stream.feed(token_id)
        self._tail = text[-self._keep :] if self._keep else ""
        # What ends in the tail was complete earlier, when `min_tokens` did not let it count yet.
        ends = [(end_of(stop, text, before), stop) for stop in self._texts]
        _, stop = min(((end, stop) for end, stop in ends if end), default=(0, None))
        return stop


class RepetitionFinder:
    """Notices that a model only repeats: every token of a window was nearly certain.

    Args:
        config: Window and threshold.
    """

    def __init__(self, config: EarlyStopConfig) -> None:
        self._window = config.window_size
        self._least = math.log(config.threshold) if config.threshold > 0 else -math.inf
        self._streak = 0

    def feed(self, logprob: float) -> bool:
        """Count one token; True when the window is full of certain ones."""
        self._streak = self._streak + 1 if logprob > self._least else 0
        return self._streak >= self._window


class Generation:
    """State of one answer.

    Args:
        sampling: What the request asks.
        output: The answer's tokens; this object appends to it.
        vocab_size: Number of logits.
        stream: Detokeniser, when there are stop texts.
        matcher: Constraint on the output.
        early_stop: When to give up on repetition.
        counts_closing: Whether the last token that a length limit allows is the closing EOS.
    """

    __slots__ = (
        "_answer_tokens",
        "_counts_closing",
        "_early",
        "_ends_as",
        "_eos_ids",
        "_forced",
        "_is_plain",
        "_last_slot",
        "_matcher",
        "_sampling",
        "_settled",
        "_stops",
        "_thinking",
        "_thinking_tokens",
        "ending",
        "output",
        "reason",
        "stop_reason",
    )  # fmt: skip

    def __init__(
        self,
        sampling: EngineSampling,
        output: list[int],
        *,
        vocab_size: int,
        stream: TextStream | None = None,
        matcher: PacedMatcher | None = None,
        early_stop: EarlyStopConfig | None = None,
        counts_closing: bool = False,
    ) -> None:
        self.output = output
        self.ending = False  # the next token is the closing EOS
        self.reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._ends_as: FinishReason = "stop"
        self._sampling = sampling
        self._eos_ids = frozenset(sampling.eos_token_ids)
        self._counts_closing = counts_closing
        self._last_slot = sampling.max_tokens - counts_closing
        has_stops = sampling.stop or sampling.stop_token_seqs
        self._stops = (
            StopFinder(sampling.stop, sampling.stop_token_seqs, stream) if has_stops else None
        )
        self._early = RepetitionFinder(early_stop) if early_stop is not None else None
        self._matcher = matcher
        self._settled = matcher is None
        self._forced: deque[int] = deque()
        self._thinking = sampling.thinking
        self._thinking_tokens = self._answer_tokens = 0
        limits = (sampling.reasoning_max_tokens, sampling.response_max_tokens)
        # Most requests have none of these rules; their tokens take the short way.
        self._is_plain = not (has_stops or self._early or matcher) and limits == (None, None)
        if not self._is_plain:
            self._look_ahead()

    # Before a token ------------------------------------------------------------------------------

    @property
    def forced_token(self) -> int:
        """The token that must come next, -1 when the model decides."""
        if self.ending or len(self.output) >= self._last_slot:
            return self._sampling.eos_token_ids[0]
        return self._forced[0] if self._forced else -1

    @property
    def num_free(self) -> int:
        """Most tokens that the model may decide from here on."""
        return 0 if self.forced_token >= 0 else self._last_slot - len(self.output)

    @property
    def num_banned_now(self) -> int:
        """Tokens from here on that `banned_now` holds for."""
        least = (
            self._sampling.max_tokens if self._sampling.ignore_eos else self._sampling.min_tokens
        )
        return max(least - len(self.output), 0)

    @property
    def banned_now(self) -> tuple[int, ...]:
        """EOS ids while the answer is too short to end, or never ends by itself."""
        sampling = self._sampling
        too_short = sampling.ignore_eos or len(self.output) < sampling.min_tokens
        return sampling.eos_token_ids if too_short else ()

    def bitmask(self) -> npt.NDArray[np.int32] | None:
        """Tokens that the constraint allows; None allows all."""
        return None if self._matcher is None else self._matcher.mask

    def settle(self, patience: float = math.inf) -> bool:
        """Wait until the constraint has followed the newest token, which happens in a thread.

        Args:
            patience: Seconds.

        Returns:
            Whether it has; False says to go on without this answer for now.

        Raises:
            RequestError: It cannot be followed, or takes more than its share of time.
            RuntimeError: The sampler gave a token that it forbids.
        """
        if self._matcher is None or self._settled:
            return True
        if not self._matcher.settle(min(patience, LONGEST_SECONDS)):
            return False
        self._settled = True
        if self._matcher.is_finished:
            self.ending = True
        return True

    def guess_bitmasks(
        self, guess: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[npt.NDArray[np.int32] | None] | None]:
        """Cut a guess where the constraint forbids it, and look ahead.

        Args:
            guess: Tokens that may come next.

        Returns:
            The part of it that is allowed, and what `bitmask` would be after each of its tokens;
            None without a constraint.
        """
        return (guess, None) if self._matcher is None else self._matcher.look_ahead(guess)

    # After a token -------------------------------------------------------------------------------

    def accept(self, token_id: int, logprob: float | None = None) -> int:
        """Append a token.

        Args:
            token_id: Sampled or forced.
            logprob: Its log-probability, when it was computed.

        Returns:
            The token as it appears in the answer. `reason` is set when the answer is complete.

        Raises:
            RuntimeError: The sampler gave a token that the constraint forbids.
        """
        output = self.output
        if token_id in self._eos_ids:
            output.append(self._sampling.eos_token_ids[0])
            self.reason = "length" if len(output) > self._last_slot else self._ends_as
            return output[-1]
        output.append(token_id)
        if not self._is_plain:
            self._apply_rules(token_id, logprob)
        if len(output) >= self._last_slot and not self._counts_closing:
            self.reason = self._ends_as if self.ending else "length"
        return token_id

    def accept_all(self, token_ids: Sequence[int]) -> bool:
        """Append tokens at once, as `accept` would append each.

        Returns:
            Whether they could be: not where rules look at each, nor where one ends the answer.
        """
        output = self.output
        if not self._is_plain or len(output) + len(token_ids) >= self._last_slot:
            return False
        if not self._eos_ids.isdisjoint(token_ids):
            return False
        output.extend(token_ids)
        return True

    def _apply_rules(self, token_id: int, logprob: float | None) -> None:
        if self._forced:
            self._forced.popleft()
        if self._matcher is not None:
            self._matcher.advance(token_id)
            self._settled = False
        self._count_thinking(token_id)
        stop = None if self._stops is None else self._stops.feed(self.output)
        if stop is not None and len(self.output) + 1 >= self._sampling.min_tokens:
            self.stop_reason, self.ending = stop, True
        if self._early is not None and logprob is not None and self._early.feed(logprob):
            self.ending = True
        self._look_ahead()

    def _count_thinking(self, token_id: int) -> None:
        sampling = self._sampling
        if token_id == sampling.think_end_id:
            self._thinking = False
        elif token_id == sampling.think_start_id:
            self._thinking = True
        elif self._thinking:
            self._thinking_tokens += 1
        else:
            self._answer_tokens += 1

    def _look_ahead(self) -> None:
        """Decide whether something is forced from here on."""
        sampling = self._sampling
        budget = sampling.reasoning_max_tokens
        spent = self._thinking and budget is not None and self._thinking_tokens >= budget
        if spent and not self._forced:
            self._forced.extend(sampling.think_truncate_ids)
        limit = sampling.response_max_tokens
        if limit is None or self._thinking:
            return
        if self._answer_tokens >= limit - self._counts_closing:
            self.ending, self._ends_as = True, "length"
            if not self._counts_closing:
                self.reason = "length"
