"""A matcher that works beside the engine's steps, within a budget of its own.

Following a constraint costs a fraction of a millisecond a token as a rule, and a second a token
for a grammar that is ambiguous enough. So each token of an answer is followed in a thread; a step
waits for it a few milliseconds at most and otherwise goes on without that answer, and an answer
whose constraint takes more than its share ends with an error of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

import numpy as np

from fastdeploy_lite.guided.matcher import Bitmask, Matcher
from fastdeploy_lite.utils.errors import RequestError

# What a constraint may take: a large schema needs 0.1 s for its first token and little afterwards.
START_SECONDS = 0.5
SECONDS_PER_TOKEN = 0.01
LONGEST_SECONDS = 3.0  # of one token, by the clock: the thread may be kept from running
# Looking ahead for guesses follows several tokens at once; not where one is slow.
FAST_SECONDS = 0.001
Submit = Callable[[Callable[[], None]], "Future[None]"]


class PacedMatcher:
    """One request's constraint.

    Args:
        matcher: Positioned before the first token.
        words: Size of a mask, int32 words.
        submit: Runs a function in a thread.
    """

    def __init__(self, matcher: Matcher, words: int, submit: Submit) -> None:
        self._matcher = matcher
        self._submit = submit
        self._mask: Bitmask = np.empty(words, np.int32)
        self._allowed, self._latest = START_SECONDS, 0.0
        self._used = 0.0
        self._job: Future[None] | None = None
        self._begin(None)

    def advance(self, token_id: int) -> None:
        """Follow one more token; call `settle` before anything else."""
        self._allowed += SECONDS_PER_TOKEN
        self._begin(token_id)

    def _begin(self, token_id: int | None) -> None:
        self._began = time.monotonic()
        self._job = self._submit(lambda: self._follow(token_id))

    def _follow(self, token_id: int | None) -> None:
        started = time.thread_time()
        try:
            if token_id is not None and not self._matcher.accept(token_id):
                raise RuntimeError(
                    f"the sampler gave token {token_id}, which the constraint forbids"
                )
            if self._matcher.is_active and not self._matcher.is_finished:
                self._matcher.fill_bitmask(self._mask)
        finally:
            self._latest = time.thread_time() - started
            self._used += self._latest

    def settle(self, patience: float) -> bool:
        """Wait for the newest token to be followed.

        Args:
            patience: Seconds.

        Returns:
            Whether it has been; False says to go on without this answer.

        Raises:
            RequestError: The constraint cannot be followed, or takes more than its share.
            RuntimeError: The token was forbidden.
        """
        job = self._job
        if job is None:
            return True
        if not job.done():
            wait([job], patience)
        if not job.done():
            if time.monotonic() - self._began > LONGEST_SECONDS:
                raise _too_slow(LONGEST_SECONDS)
            return False
        self._job = None
        job.result()
        if self._used > self._allowed:
            raise _too_slow(self._used)
        return True

    @property
    def mask(self) -> Bitmask | None:
        """Tokens that may come next; None allows all."""
        return self._mask if self._matcher.is_active else None

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end of the sequence may follow."""
        return self._matcher.is_finished

    def look_ahead(self, guess: Sequence[int]) -> tuple[list[int], list[Bitmask | None]]:
        """See `Matcher.look_ahead`; nothing where following a token is slow."""
        if self._latest > FAST_SECONDS:
            return [], []
        return self._matcher.look_ahead(guess, len(self._mask))


def _too_slow(seconds: float) -> RequestError:
    return RequestError(
        f"The output constraint takes too much time to follow ({seconds:.1f} s): simplify it",
        code="invalid_value",
    )
