"""What is measured: how often guesses are right, and what a step costs."""

from __future__ import annotations

import math

# Upper ends of the classes of match lengths that share a rate of success.
CLASS_ENDS = (1, 2, 3, 5, 8, 16)
# What was seen this many guesses ago weighs 1 / e: texts change.
GUESSES_REMEMBERED = 64
STEPS_REMEMBERED = 128
# A sequence's own record counts as much as that of all sequences after this many guesses.
OWN_WEIGHT = 6.0


def match_class(matched: int) -> int:
    """The class of a match of `matched` tokens."""
    return next((i for i, end in enumerate(CLASS_ENDS) if matched <= end), len(CLASS_ENDS))


class HitRate:
    """How often a guessed token was right when those before it were; old guesses fade.

    Args:
        prior: Rate before anything was seen, worth `weight` guesses.
    """

    __slots__ = ("_hits", "_trials")

    def __init__(self, prior: float = 0.5, weight: float = 2.0) -> None:
        self._hits, self._trials = prior * weight, weight

    def note(self, hits: int, missed: bool) -> None:
        """Record `hits` right tokens in a row and whether a wrong one followed."""
        fade = math.exp(-(hits + missed) / GUESSES_REMEMBERED)
        self._hits = self._hits * fade + hits
        self._trials = self._trials * fade + hits + missed

    @property
    def value(self) -> float:
        """In (0, 1)."""
        return self._hits / self._trials


class HitRates:
    """Hit rates by class of match; of everybody, or of one sequence on top of everybody's.

    Args:
        shared: Everybody's, for those of one sequence.
    """

    def __init__(self, shared: HitRates | None = None) -> None:
        self._shared = shared
        self._own: dict[int, HitRate] = {}

    def value(self, matched: int) -> float:
        """Probability that the next token of a guess is right."""
        kind = match_class(matched)
        own = self._own.get(kind)
        if own is not None:
            return own.value
        return 0.5 if self._shared is None else self._shared.value(matched)

    def note(self, matched: int, hits: int, missed: bool) -> None:
        """See HitRate.note."""
        kind = match_class(matched)
        own = self._own.get(kind)
        if own is None:
            weight = 2.0 if self._shared is None else OWN_WEIGHT
            own = self._own[kind] = HitRate(self.value(matched), weight)
        own.note(hits, missed)
        if self._shared is not None:
            self._shared.note(matched, hits, missed)


class Average:
    """A mean in which old values fade; 0 before the first."""

    def __init__(self) -> None:
        self._weight = self._sum = 0.0

    def note(self, value: float) -> None:
        """Record one value; an interruption counts as at most four times the mean."""
        if self._weight >= 4:
            value = min(value, 4 * self.value)
        fade = 1.0 - 1.0 / STEPS_REMEMBERED
        self._weight = self._weight * fade + 1.0
        self._sum = self._sum * fade + value

    @property
    def value(self) -> float:
        """The mean."""
        return self._sum / self._weight if self._weight else 0.0


class StepLine:
    """Seconds of a step as a line over its tokens, by least squares over the last steps."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.count = 0

    def note(self, tokens: int, seconds: float) -> None:
        """Record one step; one that was interrupted counts as at most four times the expected."""
        if self.count >= 4:
            seconds = min(seconds, 4 * max(self.seconds(tokens), 1e-9))
        fade = 1.0 - 1.0 / STEPS_REMEMBERED
        self._weight = self._weight * fade + 1.0
        self._x = self._x * fade + tokens
        self._y = self._y * fade + seconds
        self._xx = self._xx * fade + tokens * tokens
        self._xy = self._xy * fade + tokens * seconds
        self.count += 1

    @property
    def slope(self) -> float | None:
        """Seconds of one more token, at least 0; None while all steps had equally many."""
        spread = self._xx * self._weight - self._x * self._x
        if spread <= 1e-6 * self._xx * self._weight:
            return None
        return max((self._xy * self._weight - self._x * self._y) / spread, 0.0)

    def seconds(self, tokens: float) -> float:
        """What a step of `tokens` takes; 0 before any was measured."""
        if not self._weight:
            return 0.0
        return max((self._y + (self.slope or 0.0) * (tokens * self._weight - self._x)), 0.0) / (
            self._weight
        )
