"""How long a step may take, learned from those before, and who says that one takes longer."""

from __future__ import annotations

import math

from fastdeploy_lite.executor.step_clock import StepState

FIRST_SECONDS = 300.0
"""Until a step was measured: weights may come from a slow disk, kernels may be loaded."""
SLOWER = 20  # times what steps took: the context grows, other programs want the processors
FADING = (
    0.995  # of what a step took, with each later one of its size: slow first steps are forgotten
)
WORDS_SECONDS = 3.0  # in which a process that knows why it ends can say so itself
LONGEST_LOOK = 1.0


class StepLimit:
    """Knows the steps of one engine by size, in powers of two of their tokens.

    Args:
        least: seconds that any step may take: so long that nothing that is done once (a graph,
            a kernel, a page that has to be read) comes near. 0: no step is ever too long.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._seconds: dict[int, float] = {}

    def saw(self, tokens: int, seconds: float) -> None:
        """Take note of a step that was sound."""
        size = tokens.bit_length()
        self._seconds[size] = max(seconds, FADING * self._seconds.get(size, 0.0))

    def of(self, tokens: int) -> float:
        """Return how many seconds a step may take that has so many tokens."""
        if not self._least:
            return math.inf
        return max(self._least, SLOWER * self._expected(tokens.bit_length()))

    def _expected(self, size: int) -> float:
        """What such a step takes at most, by steps of up to its size, else by larger ones."""
        smaller = [known for known in self._seconds if known <= size]
        if smaller:
            slowest = max(self._seconds[known] for known in smaller)
            return slowest * 2.0 ** (size - max(smaller))
        if self._seconds:
            return self._seconds[min(self._seconds)]
        return FIRST_SECONDS / SLOWER


class StepWatch:
    """Looks at the clock of another process, several times a second.

    Time counts as it passes here, a second a look at most: what stops the whole machine for a
    minute ends nothing.
    """

    def __init__(self) -> None:
        self._number = 0
        self._age = 0.0
        self._known_for = 0.0
        self._looked: float | None = None

    def look(self, shown: StepState, now: float) -> str | None:
        """Return why the process has to end, None while it need not.

        Args:
            shown: by the clock.
            now: time of `time.monotonic`.
        """
        passed = 0.0 if self._looked is None else min(now - self._looked, LONGEST_LOOK)
        self._looked = now
        self._age = self._age + passed if shown.number == self._number else 0.0
        self._number = shown.number
        if shown.words:
            self._known_for += passed
            return shown.words if self._known_for > WORDS_SECONDS else None
        if shown.number and self._age > shown.limit:
            return (
                f"a step of {shown.tokens} tokens has not ended within {shown.limit:.0f} s"
                " (FD_LITE_STEP_SECONDS is the least that a step may take)"
            )
        return None
