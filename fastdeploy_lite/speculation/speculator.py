"""Decides which guesses of which sequences the next step checks, and keeps the accounts."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from fastdeploy_lite.request.messages import DraftCounts
from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.speculation.drafters import (
    NOTHING,
    Draft,
    Drafter,
    DrafterFactory,
    ModelDrafter,
)
from fastdeploy_lite.speculation.rates import Average, HitRates, StepLine

# A guess must be expected to pay this much more than it costs: estimates are noisy, and a guess
# that just breaks even only adds jitter.
MARGIN = 1.1
# Before the cost of a longer step is known, guesses that are right this often are tried anyway.
TRIED_RATE = 0.6
TRIED_TOKENS = 3
STEPS_TRIED = 8
# After so many steps without a checked guess, one is tried again: costs change, too.
STEPS_BETWEEN_TRIES = 500
# After so many steps in which no guess paid, looking for guesses is the cost that is left: one step
# in so many looks from then on. A text that begins to repeat waits for it.
STEPS_UNTIL_REST = 32
REST_STEPS = 16
# A draft layer's work is part of every step; so often one goes without, to know what that costs.
STEPS_BETWEEN_PLAIN = 64


class Candidate(NamedTuple):
    """A sequence that decodes in the next step.

    Attributes:
        request_id: Of the request.
        room: Most tokens that may be guessed for it: KV blocks, length limit, rules.
    """

    request_id: str
    room: int


class _Memory:
    """One sequence: its drafter, how good it has been, and the guess that is open."""

    __slots__ = ("_drafter", "_unread", "counts", "draft", "rates")

    def __init__(self, drafter: Drafter, shared: HitRates) -> None:
        self._drafter = drafter
        self._unread: list[int] = []
        self.rates = HitRates(shared)
        self.draft: Draft = NOTHING
        self.counts = DraftCounts()

    def add(self, tokens: Sequence[int], drafts: Sequence[int]) -> None:
        """New tokens of the sequence, and what a draft layer thinks comes next."""
        self._unread.extend(tokens)
        if isinstance(self._drafter, ModelDrafter):
            self.drafter()
            self._drafter.offer(drafts)

    def drafter(self) -> Drafter:
        """The drafter, once it has read all tokens: while guesses rest it needs to read none."""
        if self._unread:
            self._drafter.extend(self._unread)
            self._unread = []
        return self._drafter


class _Rest:
    """When to look for guesses at all."""

    def __init__(self) -> None:
        self._without = 0  # looks in which nothing was worth checking
        self.left = 0  # steps until the next look

    def take_step(self) -> bool:
        """Count a step, and say whether it goes without looking."""
        if not self.left:
            return False
        self.left -= 1
        return True

    def note(self, has_guesses: bool) -> None:
        """Record what a look found."""
        self._without = 0 if has_guesses else self._without + 1
        if self._without >= STEPS_UNTIL_REST:
            self.left = REST_STEPS - 1


class Speculator:
    """Speculation of one engine.

    Args:
        config: Method and limits.

    Attributes:
        num_drafts: Tokens that a draft layer is to guess for each sequence in the step that was
            last chosen for.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self.config = config
        self.num_drafts = 0
        self._steps = 0
        self._factory = DrafterFactory(config)
        self._memories: dict[str, _Memory] = {}
        self._rates = HitRates()
        self._plain, self._checking = StepLine(), StepLine()
        self._rest = _Rest()
        self._steps_unchecked = 0
        self._own_seconds = Average()
        self._own_unfinished = 0.0
        self.totals = DraftCounts()

    # A sequence's life ---------------------------------------------------------------------------

    def start(self, request_id: str, prompt: Sequence[int]) -> None:
        """A sequence begins."""
        if self.config.most_tokens:
            self._memories[request_id] = _Memory(self._factory.create(prompt), self._rates)

    def finish(self, request_id: str) -> None:
        """A sequence has ended, whatever ended it; unknown ids are ignored."""
        memory = self._memories.pop(request_id, None)
        if memory is not None:
            memory.drafter().finish()

    def counts(self, request_id: str) -> DraftCounts | None:
        """How the guesses for a sequence did; None if nothing is guessed for it."""
        memory = self._memories.get(request_id)
        return None if memory is None else memory.counts

    # A step --------------------------------------------------------------------------------------

    def rests(self) -> bool:
        """Whether the next step goes without guesses; asked once a step, before `choose`."""
        if not self._rest.take_step():
            return False
        self._end_choice({})
        return True

    def choose(self, candidates: Sequence[Candidate], budget: int) -> dict[str, list[int]]:
        """Choose what to check in the next step.

        Args:
            candidates: All sequences that decode.
            budget: Most tokens that all guesses may have together.

        Returns:
            Guessed tokens by request id; sequences without a guess are left out.
        """
        started = time.perf_counter()
        chosen = self._choose(candidates, budget)
        self._own_unfinished = time.perf_counter() - started
        if self.config.adaptive and candidates:
            self._rest.note(bool(chosen))
        self._end_choice(chosen)
        return chosen

    def _end_choice(self, chosen: dict[str, list[int]]) -> None:
        self._steps += 1
        self._steps_unchecked = 0 if chosen else self._steps_unchecked + 1
        self.num_drafts = self.config.most_tokens if self._wants_drafts() else 0

    def _wants_drafts(self) -> bool:
        """Whether a draft layer is to guess in this step, for the next one."""
        if self.config.method != "mtp":
            return False
        if not self.config.adaptive:
            return True
        is_known = self._plain.count >= STEPS_TRIED and self._steps % STEPS_BETWEEN_PLAIN
        return bool(is_known) and not self._rest.left

    def _choose(self, candidates: Sequence[Candidate], budget: int) -> dict[str, list[int]]:
        if candidates and self._own_unfinished:
            self._own_seconds.note(self._own_unfinished / len(candidates))
        for candidate in candidates:
            self._guess(candidate)
        lengths = {c.request_id: self._length(c, len(candidates)) for c in candidates}
        if self.config.adaptive and not self._pays(lengths, len(candidates)):
            lengths = self._trial(candidates)
        chosen: dict[str, list[int]] = {}
        for request_id, wanted in lengths.items():
            length = min(wanted, budget)
            memory = self._memories.get(request_id)
            if memory is None or length < 1:
                continue
            chosen[request_id] = memory.draft.tokens[:length]
            budget -= length
        return chosen

    def note_tokens(
        self, request_id: str, tokens: Sequence[int], checked: int, drafts: Sequence[int] = ()
    ) -> None:
        """Record what a sequence got in this step, and judge its guess by it.

        Args:
            request_id: Of the request.
            tokens: New tokens, in order.
            checked: Guessed tokens that the step computed.
            drafts: What a draft layer thinks comes next.
        """
        memory = self._memories.get(request_id)
        if memory is None:
            return
        for counts in (memory.counts, self.totals):
            counts.note(checked, len(tokens) - 1)
        memory.add(tokens, drafts)
        if memory.draft is NOTHING:
            return
        started = time.perf_counter()
        # A guess that was not checked is judged by its first token: the account costs nothing.
        judged = memory.draft.tokens[: max(checked, 1)]
        pairs = zip(judged, tokens, strict=False)
        hits = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(judged), len(tokens)))
        if judged and tokens:
            memory.rates.note(memory.draft.matched, hits, hits < min(len(judged), len(tokens)))
        memory.draft = NOTHING
        self._own_unfinished += time.perf_counter() - started

    def note_step(self, tokens: int, checked: bool, seconds: float) -> None:
        """Record a step of decoding sequences only.

        Args:
            tokens: All tokens computed.
            checked: Whether guesses were among them.
            seconds: Of the model.
        """
        if checked:
            self._checking.note(tokens, seconds)
        elif not self.num_drafts:  # guessing is no part of a plain step
            self._plain.note(tokens, seconds)

    # Decisions -----------------------------------------------------------------------------------

    def _guess(self, candidate: Candidate) -> None:
        memory = self._memories.get(candidate.request_id)
        if memory is None:
            return
        most = min(self.config.most_tokens, candidate.room)
        memory.draft = memory.drafter().propose(most) if most > 0 else NOTHING

    def _rate(self, request_id: str) -> float:
        memory = self._memories.get(request_id)
        if memory is None or not memory.draft.tokens:
            return 0.0
        return memory.rates.value(memory.draft.matched)

    def _length(self, candidate: Candidate, count: int) -> int:
        """Guessed tokens of a sequence that are each worth more than they cost."""
        memory = self._memories.get(candidate.request_id)
        if memory is None:
            return 0
        available = len(memory.draft.tokens)
        if not self.config.adaptive:
            return available
        if self._checking.count < STEPS_TRIED:
            return 0
        # Where all guesses have one length, only the step as a whole has a price: see `_pays`.
        slope = self._checking.slope or 0.0
        # A token is worth what it costs without guessing; the i-th guess comes true with rate^i.
        worth = self._plain_seconds(count) / count
        least = MARGIN * slope / worth if worth else math.inf
        rate, chance, length = self._rate(candidate.request_id), 1.0, 0
        while length < available and chance * rate > least:
            chance *= rate
            length += 1
        return length

    def _plain_seconds(self, count: int) -> float:
        """A step of `count` sequences without guesses."""
        return self._plain.seconds(count) or self._checking.seconds(count)

    def _pays(self, lengths: dict[str, int], count: int) -> bool:
        """Whether the whole step is expected to give more tokens a second than a plain one."""
        checked = sum(lengths.values())
        if not checked:
            return False
        won = 0.0
        for request_id, length in lengths.items():
            rate = self._rate(request_id)
            won += sum(rate**i for i in range(1, length + 1))
        seconds = self._checking.seconds(count + checked) + self._own_seconds.value * count
        return (count + won) * self._plain_seconds(count) > MARGIN * count * seconds

    def _trial(self, candidates: Sequence[Candidate]) -> dict[str, int]:
        """Short guesses of sequences that are often right, while or when costs are not known."""
        learning = self._checking.count < STEPS_TRIED and self._plain.count >= STEPS_TRIED
        due = self._steps_unchecked >= STEPS_BETWEEN_TRIES
        if not learning and not due:
            return {}
        # Different lengths, so that a line can be drawn through their costs.
        most = 1 + self._checking.count % TRIED_TOKENS
        tried = [c.request_id for c in candidates if self._rate(c.request_id) > TRIED_RATE]
        return {r: min(most, len(self._memories[r].draft.tokens)) for r in tried}
