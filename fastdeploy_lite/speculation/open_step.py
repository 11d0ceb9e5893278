"""What a step takes: until the next one begins, since whoever waits for tokens waits for both."""

from __future__ import annotations

from dataclasses import dataclass

from fastdeploy_lite.speculation.speculator import Speculator


@dataclass(slots=True)
class OpenStep:
    """A step that the next one will end. Times are of `time.perf_counter`, in seconds.

    Attributes:
        speculator: Policy that is to be told.
        began: When the step did.
        executed: What the executor took of it.
        guessed: What guessing took of it, which the policy knows.
        sampled: Sequences that it sampled for.
        checked: Guessed tokens that it computed.
        emitted: Tokens that it gave.
        decodes: Whether it read no prompts.
        ended: When the engine had done its part.
    """

    speculator: Speculator
    began: float
    executed: float
    guessed: float
    sampled: int
    checked: int
    emitted: int
    decodes: bool
    ended: float = 0.0

    def close(self, now: float) -> None:
        """Tell the policy, as the next step begins.

        Whoever takes the tokens may take any time to ask for more: what exceeds the time of the
        step itself is no part of it.
        """
        own = self.ended - self.began
        seconds = own + min(now - self.ended, own) - self.guessed
        beside = max(seconds - self.executed, 0.0)
        self.speculator.note_step(
            self.sampled, self.checked, self.emitted, seconds, self.decodes, beside
        )
