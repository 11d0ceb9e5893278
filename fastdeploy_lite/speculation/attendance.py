"""When a draft layer reads what the model reads.

Reading costs a layer's work in every step, guessed or not, so it has to stop where guesses do not
pay. A sequence of which the layer has missed tokens is not asked about again: its guesses would say
nothing about how good the layer is. So reading begins with the prompts of new sequences.
"""

from __future__ import annotations

from collections.abc import Collection

# Once begun, reading goes on for so many steps with guesses, whatever they cost: fewer would say
# nothing.
COMMITTED = 16


class Attendance:
    """Of one draft layer.

    Attributes:
        is_on: Whether it reads.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._whole: set[str] = set()
        self._left = 0

    @property
    def is_committed(self) -> bool:
        """Whether too little was seen yet to stop."""
        return self._left > 0

    def meet(self, names: Collection[str], may_begin: bool) -> None:
        """Take note of sequences that the next step begins to read, again after a preemption."""
        if names and may_begin and not self.is_on:
            self.is_on, self._left = True, COMMITTED
        if self.is_on:
            self._whole.update(names)

    def knows(self, name: str) -> bool:
        """Whether the layer has read a sequence from its beginning, but for single steps."""
        return name in self._whole

    def note_guesses(self) -> None:
        """A step asks for guesses."""
        self._left -= 1

    def forget(self, name: str) -> None:
        """A sequence has ended."""
        self._whole.discard(name)

    def stop(self) -> None:
        """Read no more; all sequences miss something from here on."""
        self.is_on = False
        self._whole.clear()
