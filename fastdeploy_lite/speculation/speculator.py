"""Decides which guesses of which sequences the next step checks, and keeps the accounts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.request.messages import DraftCounts
from fastdeploy_lite.speculation.attendance import Attendance
from fastdeploy_lite.speculation.config import CHECK_SIZES, SpeculativeConfig
from fastdeploy_lite.speculation.drafters import Draft, Text, create_drafters
from fastdeploy_lite.speculation.leads import Leads
from fastdeploy_lite.speculation.rates import (
    STALE_AFTER,
    Average,
    HitRates,
    Purse,
    StepCosts,
    StepSeconds,
)
from fastdeploy_lite.speculation.tally import Tally

# A step with guesses must be expected to give this much more tokens a second: estimates are noisy,
# and a guess that just breaks even only adds jitter.
MARGIN = 1.05
# A size of step whose cost is not known is tried where it would give this much more at no cost.
TRIED_GAIN = 1.4
# Its steps are expected to take so much of what a line through the smaller sizes says, and have at
# most so many times the tokens of the largest of these: on a card every size that is tried captures
# a graph, on a CPU steps take longer with every token.
TRIED_SLOPE, TRIED_REACH = 0.5, 4.0
# Guesses that come true less often than this are not thought about.
LEAST_CHANCE = 0.05
# Guessing may cost this share of the time of all steps, as much at once as so many steps take, and
# is forgiven what it owes beyond that many: where the costs of checks were rehearsed, where the
# first ones cost several times the later, and where a draft layer reads for a while before it is
# judged.
REHEARSED_BUDGET, FIRST_BUDGET = (0.01, 2.0, 4.0), (0.004, 4.0, 8.0)
LAYER_BUDGET = (0.004, 4.0, 64.0)
# A look, or keeping accounts, costs about twice its own time: the engine's part in it, cold caches,
# garbage.
LOOK_COST = 2.0
# Other processes interrupt steps and looks alike, for long beside a look, and as often as either
# takes. So neither counts for more than usual: a step as so many plain ones, a look as one plain
# step or so many looks.
EARNED_STEPS, CHARGED_LOOKS = 1.5, 4.0
# A check is charged at most so many plain steps: the first of a size may capture a graph, which
# takes as long as twenty. It is charged what is usual for its size where it took this much more: it
# was interrupted.
MOST_CHARGED, MOST_TRIED, INTERRUPTED = 4.0, 2.0, 3.0
# Costs of steps with guesses are measured anew after `StepCosts.stale_after` steps without any, and
# after each time in vain the wait is twice as long.
MOST_STALE_AFTER = 16_384
# While the budget is spent, a step is noted at least once in about so many.
MOST_PAUSED = 63
# So often a step goes without guesses, to know what that takes.
STEPS_BETWEEN_PLAIN = 64
# Numbers of sequences whose steps without guesses cost about the same.
PLAIN_SIZES = (*range(1, 17), *range(20, 65, 4), 80, 96, 112, 128)
PLAIN_STEPS, CHECKING_STEPS = 2, 3  # measured before a cost is known
# What the host takes for a guess beside the executor, before that was measured.
HOST_GUESS = 2e-6
# A cost that is not known is at most that of a step so many times as large.
CHECKING_REACH, PLAIN_REACH = 2.0, 1.25
# While time is short, so many looks are at so many sequences before others take their turn: what
# was never looked at need not be read.
LOOKS_A_TURN, LOOKED_AT = 4, 1


class _Memory:
    """How good the guesses for one sequence have been."""

    __slots__ = ("rates", "tally")

    def __init__(self, shared: HitRates) -> None:
        self.rates = HitRates(shared)
        self.tally = Tally()


class Speculator:
    """Speculation of one engine.

    A step that only decodes goes: `pauses`, and nothing else where it does. Any other, and one that
    does not: `rests`, and nothing else where a pause begins, see `is_pausing`; `choose` unless it
    rests; `note_tokens` of sequences whose guesses were checked, of all when a draft layer was
    asked; `note_step`, once the next step begins.

    Args:
        config: Method and limits.
        known: What steps took before the first request, where that was measured.

    Attributes:
        num_drafts: Tokens that a draft layer is to guess for each sequence that it has read, in
            this step.
        feeds_draft: Whether a draft layer reads this step.
        has_layer: Whether it is a draft layer that guesses.
        tally: What all guesses gave.
        seconds: Time spent on guessing, the checks themselves excluded.
        looks: Steps that looked for guesses.
        is_pausing: Whether the step for which `rests` was asked last is the first of a pause.
    """

    def __init__(self, config: SpeculativeConfig, known: StepSeconds | None = None) -> None:
        self.config = config
        self._most_tokens = config.most_tokens  # every step asks
        self.has_layer = config.method == "mtp"
        self.num_drafts, self.feeds_draft = 0, False
        self._attendance = Attendance()
        self._layer_share = Average()  # of a plain step, that reading adds to it
        self.tally = Tally()
        self.seconds, self.looks = 0.0, 0
        self._drafters = create_drafters(config)
        self._leads = Leads()
        self._open: dict[str, Draft] = {}  # guesses of this step that were not judged yet
        self._looked_at: list[tuple[Text, int]] = []  # with the length of the answer
        self._memories: dict[str, _Memory] = {}
        self._rates = HitRates()
        # What the executor takes, as it was rehearsed; what the host takes beside it comes on top.
        self._plain = StepCosts(PLAIN_SIZES, PLAIN_STEPS)
        self._checking = StepCosts(CHECK_SIZES, CHECKING_STEPS)
        self._beside = StepCosts(PLAIN_SIZES, 1)
        self._beside_guess = Average(HOST_GUESS, weight=1.0)
        self._is_rehearsed = known is not None  # so that no size has to be tried
        if known is not None:
            self._plain.begin_with(known.plain)
            self._checking.begin_with(known.checking)
        budget = LAYER_BUDGET if self.has_layer else FIRST_BUDGET
        self._purse = Purse(*(budget if known is None else REHEARSED_BUDGET))
        self._own_seconds = Average()
        # Steps that nobody has to ask about, and those that went by since the accounts were kept.
        self._pause = self._paused_steps = self._steps_since_noted = 0
        self.is_pausing = False
        self._is_spent = False  # the budget, before this step
        self._usual = 0.0  # seconds of a plain step, at the last look
        self._look_seconds = 0.0  # of guessing, in this step
        self._checks_noted = 0  # in this step
        self._steps_since_plain = 0
        # The last look: whether its guesses paid, and whether most of them were right.
        self._goes_well = self._is_promising = False
        self._may_try = True  # a size of step that was not measured

    # A sequence's end ----------------------------------------------------------------------------

    def finish(self, text: Text) -> None:
        """A sequence has ended, whatever ended it; unknown ones are ignored."""
        if self._most_tokens:
            self._drafters.finish(text)
            self._memories.pop(text.request_id, None)
            self._open.pop(text.request_id, None)
            self._attendance.forget(text.request_id)

    def counts(self, request_id: str, tokens: int) -> DraftCounts | None:
        """How the guesses for a sequence did; None if nothing is guessed here.

        Args:
            request_id: Of the request.
            tokens: That steps gave it.
        """
        if not self._most_tokens:
            return None
        memory = self._memories.get(request_id)
        counts = DraftCounts() if memory is None else memory.tally.counts
        counts.steps = tokens - counts.accepted
        return counts

    @property
    def totals(self) -> DraftCounts:
        """What all guesses gave."""
        return self.tally.counts

    # A step --------------------------------------------------------------------------------------

    def meet(self, names: Sequence[str]) -> None:
        """Say which sequences the next step begins to read, before `rests`; for a draft layer."""
        self._attendance.meet(names, self._purse.is_rich or not self.config.adaptive)

    def drafts_for(self, text: Text) -> int:
        """Tokens that a draft layer is to guess for a sequence in this step."""
        if not self.num_drafts or not self._attendance.knows(text.request_id):
            return 0
        return self.num_drafts

    def pauses(self) -> bool:
        """Whether the next step, which only decodes, needs nothing else; asked before anything
        else."""
        if self._pause == 0:
            return False
        self._pause -= 1
        self._paused_steps += 1
        return True

    def _end_pause(self) -> None:
        """Enter the steps of a pause into the accounts: each as long as is usual."""
        self._pass_steps(self._paused_steps)
        self._purse.pass_step(self._usual * self._paused_steps, False)
        self._steps_since_noted += self._paused_steps
        self._pause = self._paused_steps = 0

    def _pass_steps(self, count: int) -> None:
        self._plain.now += count
        self._checking.now = self._beside.now = self._plain.now

    def rests(self, decodes: bool = True) -> bool:
        """Whether the next step goes without guesses; asked once a step, before `choose`.

        Args:
            decodes: Whether the step does nothing else.
        """
        self.num_drafts, self.feeds_draft, self.is_pausing = 0, False, False
        if not self._most_tokens:
            return True
        if self._paused_steps:
            self._end_pause()
        if not self.config.adaptive:
            self.feeds_draft = self.has_layer
            return False
        if self._open:
            self._judge_the_rest()
        if decodes and self._steps_since_plain >= STEPS_BETWEEN_PLAIN:
            return True
        can_go_on = self._purse.can_pay(self._has_credit)
        if self.has_layer:
            return not self._attends(can_go_on)
        is_known = self._usual > 0 and self._steps_since_noted < MOST_PAUSED
        if not can_go_on and decodes and is_known:
            self._pause = max(self._steps_to_wait(), 1)  # to note a step would cost again
            self.is_pausing = self.pauses()
        self._is_spent = not can_go_on and not self.is_pausing
        return not can_go_on

    def _steps_to_wait(self) -> int:
        wait = self._purse.steps_to_wait(self._usual, self._has_credit)
        return min(wait, MOST_PAUSED)

    @property
    def _has_credit(self) -> bool:
        """Whether the last look or check says that the next ones will pay."""
        return self._goes_well or self._is_promising

    def _attends(self, can_go_on: bool) -> bool:
        """Let the draft layer read the next step, unless it has to stop."""
        attendance = self._attendance
        if attendance.is_on and not (can_go_on or attendance.is_committed):
            attendance.stop()
        self.feeds_draft = attendance.is_on
        return attendance.is_on

    def choose(
        self,
        texts: Sequence[Text],
        room: Callable[[Text, int], int],
        budget: int,
        decodes: bool = True,
    ) -> dict[str, list[int]]:
        """Choose what to check in the next step.

        Args:
            texts: All sequences that decode.
            room: Says how many of so many guessed tokens a sequence has room for: KV blocks, length
                limit, rules.
            budget: Most tokens that all guesses may have together.
            decodes: Whether the step does nothing else, so that its time says what guesses cost.

        Returns:
            Guessed tokens by request id; sequences without a guess are left out.
        """
        self._open = {}
        is_measured = bool(texts) and not self._is_without_measure(len(texts))
        if self.has_layer and (is_measured or not decodes):
            self._want_drafts(texts)
        if not is_measured:
            # A plain step says more than a draft layer that misses a token of each; not of prompts.
            self.feeds_draft = self.feeds_draft and not decodes
            return {}
        started = time.perf_counter()
        self._may_try = decodes and not self._is_rehearsed
        chosen = self._choose(self._taking_turns(texts), len(texts), room, budget)
        if chosen:
            self._leads.begin([text.request_id for text in texts])
        if self._open or not self.has_layer:  # a layer that was not asked says nothing
            self._goes_well = self._is_promising = False
        seconds = time.perf_counter() - started
        self.looks += 1
        self._purse.once = LOOK_COST * seconds
        self._own_seconds.note(self._spend(seconds))
        return chosen

    def _is_without_measure(self, count: int) -> bool:
        """Whether nobody could say what guesses cost or save: a plain step has to come first."""
        if not self.config.adaptive:
            return False
        plain = self._plain_seconds(count)
        self._usual = plain or self._usual
        return plain is None

    def _want_drafts(self, texts: Sequence[Text]) -> None:
        """Ask the draft layer for guesses in this step, for the next one."""
        self.num_drafts = self._most_tokens
        if any(self._attendance.knows(text.request_id) for text in texts):
            self._attendance.note_guesses()

    def _spend(self, seconds: float) -> float:
        """Charge time of guessing itself; how much of it counts."""
        self.seconds += seconds
        self._look_seconds += seconds
        if self._usual:
            seconds = min(seconds, max(self._usual, CHARGED_LOOKS * self._own_seconds.value))
        self._purse.add(-LOOK_COST * seconds)
        return seconds

    def _taking_turns(self, texts: Sequence[Text]) -> Sequence[Text]:
        """All sequences, or some while nothing pays and looking takes long beside a step."""
        if len(texts) <= LOOKED_AT or not self.config.adaptive or self.has_layer:
            return texts
        if self._goes_well or self._is_promising or self._purse.is_rich:
            return texts
        first = self.looks // LOOKS_A_TURN * LOOKED_AT % len(texts)
        end = first + LOOKED_AT
        return [*texts[first:end], *texts[: max(end - len(texts), 0)]]

    def _choose(
        self, texts: Sequence[Text], count: int, room: Callable[[Text, int], int], budget: int
    ) -> dict[str, list[int]]:
        drafts = self._drafters.propose(texts, self._most_tokens)
        self._open = {
            text.request_id: draft
            for text, draft in zip(texts, drafts, strict=True)
            if draft.tokens
        }
        if not self._open:
            return {}
        self._looked_at = [(text, len(text.output_token_ids)) for text in texts]
        if self.config.adaptive:
            lengths = self._lengths(count, budget)
        else:
            lengths = {request_id: len(draft.tokens) for request_id, draft in self._open.items()}
        chosen: dict[str, list[int]] = {}
        for text in texts if lengths else ():
            length = min(lengths.get(text.request_id, 0), budget)
            length = room(text, length) if length > 0 else 0
            if length > 0:
                chosen[text.request_id] = self._open[text.request_id].tokens[:length]
                budget -= length
        return chosen

    def note_tokens(
        self, text: Text, tokens: Sequence[int], checked: int, drafts: Sequence[int] = ()
    ) -> None:
        """Record what a sequence got in this step, where guesses were checked or a layer asked.

        Args:
            text: The sequence, with the new tokens.
            tokens: New tokens, in order.
            checked: Guessed tokens that the step computed.
            drafts: What a draft layer thinks comes next.
        """
        if self.num_drafts:
            self._drafters.offer(text, drafts)
        if not checked or not tokens:
            return
        self._judge(text.request_id, tokens, checked)
        self._checks_noted += 1
        self._leads.gain(text.request_id, len(tokens) - 1)
        for tally in (self._memories[text.request_id].tally, self.tally):
            tally.note(checked, len(tokens) - 1)

    def note_step(
        self,
        count: int,
        checked: int,
        emitted: int,
        seconds: float,
        decodes: bool = True,
        beside: float = 0.0,
    ) -> None:
        """Record a step, after the tokens of its sequences.

        Args:
            count: Sequences that it sampled for.
            checked: Guessed tokens that it computed.
            emitted: Tokens that it gave.
            seconds: From its beginning to that of the next, without the time of guessing.
            decodes: Whether it did nothing else.
            beside: Seconds of these that the executor did not take.
        """
        if not self._most_tokens:
            return
        started = time.perf_counter()
        self.tally.steps += count - self._checks_noted
        self._checks_noted = 0
        if decodes and count:
            self._pass_steps(1)
            if checked or self.feeds_draft:
                self._settle(count, checked, emitted, seconds, beside)
            else:
                self._note_plain(count, seconds, beside)
        else:
            self._settle_unmeasured(count, checked, emitted, seconds)
        if decodes and self._usual:
            seconds = min(seconds, EARNED_STEPS * self._usual)
        self._purse.pass_step(seconds, decodes and count > 0)
        self._steps_since_noted = 0
        if self._open and not (self.has_layer or self._goes_well or self._purse.is_rich):
            # The next look comes when all that was guessed can be judged.
            self._pause = max(len(draft.tokens) for draft in self._open.values()) - 1
        elif self._is_spent:
            self._pause, self._is_spent = self._steps_to_wait(), False
        if not self.has_layer:  # which is asked in every step
            self._spend(time.perf_counter() - started)
        self._look_seconds = 0.0

    def _note_plain(self, count: int, seconds: float, beside: float) -> None:
        """Learn from a step without guesses."""
        self._steps_since_plain = 0
        self._plain.note(count, seconds - beside)
        self._beside.note(count, beside)
        self._usual = min(seconds, EARNED_STEPS * (self._usual or seconds))

    def _judge_the_rest(self) -> None:
        """Judge guesses that were not checked by what was said since: the account costs nothing."""
        started = time.perf_counter()
        judged = hits = 0
        for text, known in self._looked_at:
            draft = self._open.get(text.request_id)
            tokens = text.output_token_ids[known : known + self._most_tokens]
            if draft is not None and tokens:
                right = self._judge(text.request_id, tokens, len(draft.tokens))
                judged += min(right + 1, len(tokens), len(draft.tokens))
                hits += right
        self._open = {}
        self._is_promising = 0 < judged <= 2 * hits
        self._spend(time.perf_counter() - started)

    def _judge(self, request_id: str, tokens: Sequence[int], checked: int) -> int:
        """Learn from what a sequence said instead of a guess; how many of its tokens were right."""
        memory = self._memories.get(request_id)
        if memory is None:
            memory = self._memories[request_id] = _Memory(self._rates)
        draft = self._open.pop(request_id)
        guess, judged, hits = draft.tokens, min(checked, len(tokens)), 0
        while hits < judged and guess[hits] == tokens[hits]:
            hits += 1
        memory.rates.note(draft.matched, hits, hits < judged)
        return hits

    def _settle(
        self, count: int, checked: int, emitted: int, seconds: float, beside: float
    ) -> None:
        """Charge a step with guesses, or credit what they saved."""
        self._steps_since_plain += 1
        plain = self._plain_seconds(count)
        known = self._checking_seconds(count, checked) if checked else None
        is_first = checked > 0 and not self._checking.knew(count + checked)
        if checked:
            self._checking.note(count + checked, seconds - beside)
            self._note_beside(count, checked, beside, plain or 0.0)
        if plain is None:
            return
        if known is not None:  # a graph was captured again, or something came between
            seconds = min(seconds, INTERRUPTED * known)
        saved = emitted / count * plain - seconds
        sure = self._worth(count, plain) - seconds
        self._purse.add(max(sure, -(MOST_TRIED if is_first else MOST_CHARGED) * plain))
        if not checked:
            self._layer_share.note(min(max(seconds / plain - 1.0, 0.0), INTERRUPTED))
            return
        self._goes_well = saved > self._look_seconds or (is_first and emitted > count)
        if saved > 0:
            self._checking.stale_after = STALE_AFTER
        elif not is_first:
            self._checking.stale_after = min(2 * self._checking.stale_after, MOST_STALE_AFTER)

    def _note_beside(self, count: int, checked: int, beside: float, plain: float) -> None:
        """Learn what the host takes for a guess, on top of what a sequence takes; an interruption
        counts for no more than a plain step."""
        more = max(beside - self._beside_seconds(count), 0.0) / checked
        self._beside_guess.note(min(more, INTERRUPTED * self._beside_guess.value + plain / checked))

    def _settle_unmeasured(self, count: int, checked: int, emitted: int, seconds: float) -> None:
        """Charge a step that read prompts, too, with what its parts usually take alone."""
        if self.feeds_draft:
            self._purse.add(-self._layer_share.value * seconds)
        if not checked:
            return
        plain = self._plain_seconds(count)
        known = self._checking_seconds(count, checked)
        if plain is not None and known is not None:
            self._purse.add(self._worth(count, plain) - known)

    def _worth(self, count: int, plain: float) -> float:
        """Seconds that a step with guesses saved those who wait for the last of its sequences,
        itself included."""
        ahead, gained = self._leads.end()
        alone = plain if count == 1 else self._plain_seconds(1)
        if alone is None:  # all sequences are taken to add as much
            alone = plain / count
        more = max(plain - alone, 0.0) / max(count - 1, 1)
        return plain + ahead * (plain - count * more) + gained * more

    # Decisions -----------------------------------------------------------------------------------

    def _lengths(self, count: int, budget: int) -> dict[str, int]:
        """Guessed tokens of each sequence that a step of `count` sequences is to check."""
        plain = self._plain_seconds(count)
        if plain is None:
            return {}
        rates = [self._rate(*guess) for guess in self._open.items()]
        sizes = [len(draft.tokens) for draft in self._open.values()]
        leads = [self._leads.of(request_id) for request_id in self._open]
        won, owners = _ops_cpu.rank_guesses(rates, sizes, leads, LEAST_CHANCE, budget)
        taken = self._best_number(count, plain, won)
        if not taken:
            return {}
        names = list(self._open)
        return {names[owner]: length for owner, length in Counter(owners[:taken]).items()}

    def _rate(self, request_id: str, draft: Draft) -> float:
        """How likely a token of a guess is right if those before it are."""
        memory = self._memories.get(request_id)
        return (self._rates if memory is None else memory.rates).value(draft.matched)

    def _plain_seconds(self, count: int) -> float | None:
        """A step of `count` sequences without guesses."""
        executed = self._executed(count)
        return None if executed is None else executed + self._beside_seconds(count)

    def _executed(self, count: int) -> float | None:
        """What the executor takes of it; a step of fewer sequences than one that was measured takes
        at least its share of it."""
        reach = max(PLAIN_REACH * count, self._plain.size(count))
        larger = self._plain.larger(count, reach)
        return None if larger is None else larger[1] * min(count / larger[0], 1.0)

    def _beside_seconds(self, count: int) -> float:
        """What the host takes beside it; 0 before the first step of about as many sequences."""
        larger = self._beside.larger(count, max(PLAIN_REACH * count, self._beside.size(count)))
        return 0.0 if larger is None else larger[1] * min(count / larger[0], 1.0)

    def _checking_seconds(self, count: int, checked: int) -> float | None:
        """At most what a step of `count` sequences takes that checks so many guesses."""
        executed = self._executed_checking(count + checked, self._slower(count))
        if executed is None:
            return None
        return executed + self._beside_seconds(count) + self._beside_guess.value * checked

    def _executed_checking(self, tokens: int, slower: float) -> float | None:
        """At most what the executor takes of it; see `_slower`."""
        reach = max(CHECKING_REACH * tokens, self._checking.size(tokens))
        larger = self._checking.larger(tokens, reach, slower)
        return None if larger is None else larger[1]

    def _slower(self, count: int) -> float:
        """How many times as long the executor takes now as before the first request: longer texts
        make all steps longer."""
        first = self._plain.first(count)
        if first is None:
            return 1.0
        return max((self._executed(count) or first) / first, 1.0)

    def _best_number(self, count: int, plain: float, won: Sequence[float]) -> int:
        """How many of the ranked tokens give most tokens a second; 0 if a plain step does.

        Sizes are tried in their order, so that no step is much larger than any that was measured.

        Args:
            count: Sequences.
            plain: Seconds of a step without guesses.
            won: Tokens expected from the first 0, 1, ... guesses.
        """
        most, taken, best = len(won) - 1, 0, MARGIN * count / plain
        checked, at, known, slope = 0, 0, plain, 0.0
        slower, beside = self._slower(count), self._beside_seconds(count)
        while checked < most:
            checked = min(self._checking.size(count + checked + 1) - count, most)
            seconds = self._executed_checking(count + checked, slower)
            if seconds is not None:
                seconds += beside + self._beside_guess.value * checked
                known, slope, at = seconds, max(seconds - plain, 0.0) / checked, checked
            elif count + checked > TRIED_REACH * (count + at):
                break
            elif self._may_try and count + won[checked] >= TRIED_GAIN * count:
                seconds = known + TRIED_SLOPE * slope * (checked - at)
            else:
                continue
            speed = (count + won[checked]) / (seconds + self._own_seconds.value)
            if speed > best:
                best, taken = speed, checked
        return taken
