"""How far sequences have run ahead of each other, and how much of that saves steps."""

from __future__ import annotations

from collections.abc import Iterable


class Leads:
    """Tokens that right guesses gave to sequences that are answered together.

    Together they take as many steps as the slowest of them. What runs ahead ends early, after which
    steps are shorter by what one sequence adds to them; whole steps are saved only where all get
    ahead.
    """

    def __init__(self) -> None:
        self._leads: dict[str, int] = {}  # over the slowest
        self._gained = 0

    def begin(self, names: Iterable[str]) -> None:
        """A step of these sequences checks guesses; a new one begins where the slowest is."""
        known = self._leads
        slowest = min((known[name] for name in names if name in known), default=0)
        self._leads = {name: known.get(name, slowest) - slowest for name in names}
        self._gained = 0

    def gain(self, name: str, tokens: int) -> None:
        """So many guesses for a sequence of the step were right."""
        self._leads[name] += tokens
        self._gained += tokens

    def of(self, name: str) -> int:
        """Tokens that a sequence is ahead of the slowest, as far as is known."""
        return self._leads.get(name, 0)

    def end(self) -> tuple[int, int]:
        """The step is over; ended sequences are forgotten when the next one begins.

        Returns:
            Steps that all have got ahead in it, and tokens that guesses gave in it.
        """
        return min(self._leads.values(), default=0), self._gained
