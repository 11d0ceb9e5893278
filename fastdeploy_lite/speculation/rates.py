"""What is measured: how often guesses are right, and what a step costs."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastdeploy_lite.speculation.config import MOST_TOKENS

# Upper ends of the classes of match lengths that share a rate of success.
CLASS_ENDS = (1, 2, 3, 5, 8, 16)
# Rate before anything was seen, worth so many guesses: too low for a trial, which captures graphs.
# Guesses that are not checked are judged, too, so that it takes few looks to know better.
PRIOR, PRIOR_WEIGHT = 0.15, 8.0
# What was seen this many guesses ago weighs 1 / e: texts change.
GUESSES_REMEMBERED = 64
STEPS_REMEMBERED = 15
LOOKS_REMEMBERED = 128
STALE_AFTER = 256
# A sequence's own record counts as much as that of all sequences after this many guesses.
OWN_WEIGHT = 6.0


_CLASSES = [bisect_left(CLASS_ENDS, matched) for matched in range(CLASS_ENDS[-1] + 1)]


def match_class(matched: int) -> int:
    """The class of a match of `matched` tokens."""
    return _CLASSES[matched] if matched <= CLASS_ENDS[-1] else len(CLASS_ENDS)


# After so many guesses.
_FADES = [math.exp(-count / GUESSES_REMEMBERED) for count in range(MOST_TOKENS + 1)]


class HitRate:
    """How often a guessed token was right when those before it were; old guesses fade.

    Args:
        prior: Rate before anything was seen, worth `weight` guesses.

    Attributes:
        value: In (0, 1).
    """

    __slots__ = ("_hits", "_trials", "value")

    def __init__(self, prior: float, weight: float) -> None:
        self._hits, self._trials, self.value = prior * weight, weight, prior

    def note(self, hits: int, missed: bool) -> None:
        """Record `hits` right tokens in a row and whether a wrong one followed."""
        fade = _FADES[hits + missed]
        self._hits = self._hits * fade + hits
        self._trials = self._trials * fade + hits + missed
        self.value = self._hits / self._trials


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
        return PRIOR if self._shared is None else self._shared.value(matched)

    def note(self, matched: int, hits: int, missed: bool) -> None:
        """See HitRate.note."""
        kind = match_class(matched)
        own = self._own.get(kind)
        if own is None:
            weight = PRIOR_WEIGHT if self._shared is None else OWN_WEIGHT
            own = self._own[kind] = HitRate(self.value(matched), weight)
        own.note(hits, missed)
        if self._shared is not None:
            self._shared.note(matched, hits, missed)


class Average:
    """A mean in which old values fade.

    Args:
        first: Value before the first one, worth `weight` of them.
    """

    def __init__(self, first: float = 0.0, weight: float = 0.0) -> None:
        self._weight, self._sum = weight, first * weight

    def note(self, value: float) -> None:
        """Record one value."""
        fade = 1.0 - 1.0 / LOOKS_REMEMBERED
        self._weight = self._weight * fade + 1.0
        self._sum = self._sum * fade + value

    @property
    def value(self) -> float:
        """The mean."""
        return self._sum / self._weight if self._weight else 0.0


@dataclass(frozen=True)
class StepSeconds:
    """What steps took before the first request, in seconds.

    Attributes:
        plain: Of steps without guesses, by their number of sequences.
        checking: Of steps with guesses, by their number of tokens.
    """

    plain: Mapping[int, float]
    checking: Mapping[int, float]


def between(known: Mapping[int, float], at: int) -> float | None:
    """A value at `at` on the lines through known ones; None outside of them."""
    if not known or not min(known) <= at <= max(known):
        return None
    low = max(size for size in known if size <= at)
    high = min(size for size in known if size >= at)
    share = (at - low) / max(high - low, 1)
    return known[low] + share * (known[high] - known[low])


class _StepClass:
    """Steps of about one size: what they took, when one was recorded last, what was worked out."""

    __slots__ = ("first", "found", "last", "noted", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.first: float | None = None  # before all that was noted
        self.noted: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self.last = 0
        self.found: float | None = None


class StepCosts:
    """Seconds of a step by its size: what a graph or a kernel does with few more tokens is the
    same, and may be quite another thing with many more.

    Args:
        sizes: Classes of sizes, ascending; above the last one, classes are as wide as it is large.
        least: Steps of a class that must be measured. The first ones may capture a graph, which
            takes as long as twenty.

    Attributes:
        now: Steps so far, of any kind; counted by the owner.
        stale_after: Steps after which a class must be measured again: costs change, too.
    """

    # A cost is a mean, in which no step counts for more than so many times what two of three
    # exceed: it captured a graph or was interrupted. Most of the first few may have been.
    EXCEEDED_BY, MOST_COUNTED, FEW = 3, 3.0, 5

    def __init__(self, sizes: Sequence[int], least: int) -> None:
        self._sizes, self._least = tuple(sizes), least
        self._classes: dict[int, _StepClass] = {}  # by size
        self._class_of: dict[int, _StepClass] = {}  # by tokens: a step looks only once
        self._known: list[int] = []  # classes that ever had enough steps
        self.now, self.stale_after = 0, STALE_AFTER

    def begin_with(self, known: Mapping[int, float]) -> None:
        """Take seconds by size that were measured beforehand, for classes without newer ones."""
        for size in self._sizes:
            seconds = between(known, size)
            if seconds is not None:
                self._classes.setdefault(size, _StepClass(size)).first = seconds
                if size not in self._known:
                    insort(self._known, size)

    def size(self, tokens: int) -> int:
        """The class of a step of `tokens`: most tokens of a step in it."""
        index = bisect_left(self._sizes, tokens)
        widest = self._sizes[-1]
        return self._sizes[index] if index < len(self._sizes) else -(-tokens // widest) * widest

    @property
    def sizes_noted(self) -> list[int]:
        """Classes of which anything is known."""
        return sorted(self._classes)

    def note(self, tokens: int, seconds: float) -> None:
        """Record one step."""
        steps = self._class_of.get(tokens)
        if steps is None:
            size = self.size(tokens)
            steps = self._class_of[tokens] = self._classes.setdefault(size, _StepClass(size))
        if self._is_stale(steps):
            steps.noted.clear()
        steps.noted.append(seconds)
        steps.last, steps.found = self.now, None
        if len(steps.noted) == self._least and steps.size not in self._known:
            insort(self._known, steps.size)

    def knew(self, tokens: int) -> bool:
        """Whether enough steps of the class of `tokens` were measured, be it long ago."""
        return self.size(tokens) in self._known

    def larger(self, tokens: int, most: float, slower: float = 1.0) -> tuple[int, float] | None:
        """The smallest measured class of `tokens` to `most` tokens, and what its steps take.

        Args:
            tokens, most: Sizes.
            slower: How many times as long steps take now as they did before the first of all.
        """
        for size in self._known[bisect_left(self._known, tokens) :]:
            if size > most:
                break
            steps = self._classes[size]
            if len(steps.noted) < self._least or self._is_stale(steps):
                if steps.first is None:
                    continue
                return size, steps.first * slower
            if steps.found is None:
                steps.found = self._cost(sorted(steps.noted))
            return size, steps.found
        return None

    def _cost(self, ordered: Sequence[float]) -> float:
        usual = ordered[(len(ordered) - 1) // self.EXCEEDED_BY]
        if len(ordered) < self.FEW:
            return usual
        most = self.MOST_COUNTED * usual
        return sum(min(seconds, most) for seconds in ordered) / len(ordered)

    def first(self, tokens: int) -> float | None:
        """What a step of `tokens` took before the first of all, if that was measured."""
        steps = self._classes.get(self.size(tokens))
        return None if steps is None else steps.first

    def _is_stale(self, steps: _StepClass) -> bool:
        return self.now - steps.last > self.stale_after


class Purse:
    """Seconds that guessing may still cost: a share of the time that steps take, and what guesses
    saved. So guessing costs no more than that share, whatever is estimated wrongly.

    Args:
        share: Of each step's time.
        reserve: Most that it holds, in steps of decoding; it begins with half of that.
        debt: Most that it owes, in steps of decoding: what was lost beyond that is forgiven. So
            what a large batch lost does not silence a small one, whose steps are shorter.

    Attributes:
        once: What guessing may cost in one step, in seconds; as much is never forgiven.
    """

    def __init__(self, share: float, reserve: float, debt: float = math.inf) -> None:
        self._share, self._reserve, self._debt = share, reserve, debt
        self._most = 0.0
        self.seconds = self.once = 0.0

    @property
    def is_rich(self) -> bool:
        """Whether at least half of the reserve is there."""
        return self.seconds >= 0.5 * self._most

    def can_pay(self, on_credit: bool = False) -> bool:
        """Whether guessing may go on; with credit, until as much is owed as the reserve."""
        return self.seconds > (-self._most if on_credit else 0.0)

    def steps_to_wait(self, seconds: float, on_credit: bool = False) -> int:
        """Steps of so many seconds that can pass before guessing may go on; see `can_pay`."""
        short = (-self._most if on_credit else 0.0) - self.seconds
        earned = self._share * seconds
        return int(short / earned) if short > 0 and earned > 0 else 0

    def pass_step(self, seconds: float, decodes: bool = True) -> None:
        """Earn the share of a step; how long one that only decodes takes bounds what is kept."""
        if decodes:
            if not self._most:
                self.seconds += 0.5 * self._reserve * seconds
            self._most = self._reserve * seconds
            self.seconds = max(self.seconds, -self._debt * seconds - self.once)
        self.seconds = min(self.seconds + self._share * seconds, self._most)

    def add(self, seconds: float) -> None:
        """Record what guesses saved, or less than 0 for what they cost."""
        self.seconds += seconds
