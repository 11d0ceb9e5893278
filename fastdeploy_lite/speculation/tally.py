"""How the guesses of one request, or of all, did."""

from __future__ import annotations

from fastdeploy_lite.request.messages import DraftCounts


class Tally:
    """Counts checks, in a moment each; what they add up to is worked out when somebody asks.

    Attributes:
        steps: Steps that decoded, checks included.
    """

    __slots__ = ("_checks", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self._checks: dict[tuple[int, int], int] = {}  # by guesses checked and those right

    def note(self, drafted: int, accepted: int) -> None:
        """Record a step that checked guesses."""
        self.steps += 1
        key = drafted, accepted
        self._checks[key] = self._checks.get(key, 0) + 1

    @property
    def counts(self) -> DraftCounts:
        """All that was noted so far; a new object."""
        counts = DraftCounts(steps=self.steps)
        for (drafted, accepted), times in self._checks.items():
            counts.checks += times
            counts.drafted += times * drafted
            counts.accepted += times * accepted
            _add(counts.checked_at, drafted, times)
            _add(counts.accepted_at, accepted, times)
        return counts


def _add(counts: list[int], places: int, times: int) -> None:
    counts.extend([0] * (places - len(counts)))
    for place in range(places):
        counts[place] += times
