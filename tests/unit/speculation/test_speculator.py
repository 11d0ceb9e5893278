"""The controller against simulated machines: it gains where guesses pay and is quiet elsewhere."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from fastdeploy_lite.request.messages import DraftCounts
from fastdeploy_lite.speculation.config import CHECK_SIZES, SpeculativeConfig
from fastdeploy_lite.speculation.drafters import Text
from fastdeploy_lite.speculation.rates import PRIOR, HitRates, Purse, StepCosts, StepSeconds
from fastdeploy_lite.speculation.speculator import FIRST_BUDGET, LOOK_COST, Speculator

NextToken = Callable[[list[int]], int]


@dataclass
class Answer:
    """A sequence; `will_say` is what the model says, however it is asked."""

    request_id: str
    prompt_token_ids: list[int] = field(default_factory=list)
    output_token_ids: list[int] = field(default_factory=list)
    will_say: list[int] = field(default_factory=list)

    @property
    def rest(self) -> list[int]:
        return self.will_say[len(self.output_token_ids) :]


@dataclass
class Device:
    """What a step takes, in seconds.

    Attributes:
        fixed, per_token: A step of so many tokens.
        checking: How many fixed parts a step with guesses takes.
        capture: What the first step with guesses of a size takes on top.
        look: What one look for guesses takes, whatever is found.
        noise: Steps take up to so much more or less; one in a hundred is interrupted, and takes
            twenty times as long.
    """

    fixed: float
    per_token: float
    checking: float = 1.0
    capture: float = 0.0
    look: float = 0.0
    noise: float = 0.1
    spent: float = 0.0
    is_looking: bool = False
    is_noting: bool = False
    rng: random.Random = field(default_factory=lambda: random.Random(3))
    captured: set[int] = field(default_factory=set)

    def plain_step(self, count: int) -> float:
        return self.fixed + self.per_token * count

    def step(self, count: int, guesses: int) -> float:
        seconds = self.plain_step(count + guesses)
        if guesses:
            seconds += (self.checking - 1.0) * self.fixed
        seconds *= self.rng.uniform(1 - self.noise, 1 + self.noise)
        size = next((s for s in CHECK_SIZES if s >= count + guesses), 0)
        if guesses and size not in self.captured:
            self.captured.add(size)
            seconds += self.capture
        if self.noise and self.rng.random() < 0.01:
            seconds *= 20
        self.spent += seconds
        return seconds

    def clock(self) -> float:
        """For `time.perf_counter`, which is read before and after looking and judging, and while
        accounts are kept, which takes no time here."""
        if self.is_noting:
            return self.spent
        self.spent += self.look / 2 if self.is_looking else 0.0
        self.is_looking = not self.is_looking
        return self.spent

    @property
    def interruptions(self) -> float:
        """How many times longer all steps take with those that are interrupted."""
        return 1.19 if self.noise else 1.0


def card(**extra: float) -> Device:
    """About a small model on a card with CUDA graphs."""
    return Device(6e-4, 1e-5, capture=15e-3, look=5e-5, **extra)


def repetitive(length: int = 40) -> NextToken:
    """A text that says the same again and again."""
    return lambda text: 1000 + len(text) % length


def noise(seed: int, words: int) -> NextToken:
    """A text without any order."""
    rng = random.Random(seed)
    return lambda text: rng.randrange(words)


def answers(sources: Sequence[NextToken], tokens: int, name: str = "") -> list[Answer]:
    made = []
    for i, source in enumerate(sources):
        text = list(range(10 * i, 10 * i + 8))
        for _ in range(tokens + 33):
            text.append(source(text))
        made.append(Answer(f"{name}{i}", text[:8], [], text[8:]))
    return made


def everything(text: Text, most: int) -> int:
    return most


def run(speculator: Speculator, device: Device, texts: list[Answer], tokens: int) -> None:
    """Answer `tokens` tokens of each text together."""
    alive = list(texts)
    while alive:
        chosen = {} if speculator.rests() else speculator.choose(alive, everything, 256)
        guesses, emitted, count = sum(map(len, chosen.values())), 0, len(alive)
        seconds = device.step(count, guesses)
        for text in alive.copy():
            guess, truth = chosen.get(text.request_id, []), text.rest
            right = next((i for i, g in enumerate(guess) if g != truth[i]), len(guess))
            new = truth[: right + 1]
            text.output_token_ids += new
            emitted += len(new)
            if guess:
                speculator.note_tokens(text, new, len(guess))
            if len(text.output_token_ids) >= tokens:
                alive.remove(text)
                speculator.finish(text)
        if not speculator.is_pausing:
            device.is_noting = True
            speculator.note_step(count, guesses, emitted, seconds)
            device.is_noting = False
    assert speculator.totals.drafted >= speculator.totals.accepted


def speedup(
    method: str,
    sources: Sequence[NextToken],
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    *,
    tokens: int = 2000,
    adaptive: bool = True,
) -> float:
    """Time by plain decoding over the time with speculation, that of guessing included."""
    monkeypatch.setattr(time, "perf_counter", device.clock)
    speculator = Speculator(SpeculativeConfig(method, adaptive=adaptive))
    run(speculator, device, answers(sources, tokens), tokens)
    return tokens * device.plain_step(len(sources)) * device.interruptions / device.spent


@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_on_a_card_a_text_that_repeats_gains(
    method: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [repetitive(31 + i) for i in range(batch)]
    assert speedup(method, sources, card(), monkeypatch) > 2.0


@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("words", [10, 1000])
def test_on_a_card_a_text_without_order_costs_next_to_nothing(
    method: str, batch: int, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [noise(seed, words) for seed in range(batch)]
    # Long enough for two graphs, each of which takes as long as 25 steps to capture.
    assert speedup(method, sources, card(noise=0.0), monkeypatch, tokens=6000) > 0.985


@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("words", [2, 10, 1000])
@pytest.mark.parametrize("per_token", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("batch", [1, 4])
def test_it_costs_nothing_where_guesses_are_wrong(
    method: str, words: int, per_token: float, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [noise(seed, words) for seed in range(batch)]
    device = Device(1.0, per_token, look=0.01, noise=0.0)
    assert speedup(method, sources, device, monkeypatch) > 0.985


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_kernels_that_work_off_tokens_one_by_one_leave_little_to_gain(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About the demo on two cores at a batch of 16, where only the fixed part can be saved."""
    sources = [repetitive(31 + i) for i in range(16)]
    device = Device(4e-3, 3e-4, look=2e-4)
    assert speedup(method, sources, device, monkeypatch) > 1.3
    device = Device(4e-3, 3e-4, look=2e-4, noise=0.0)
    assert speedup(method, [noise(i, 8) for i in range(16)], device, monkeypatch) > 0.985


@pytest.mark.parametrize("batch", [1, 16])
def test_it_stays_off_where_every_token_costs_a_step(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(0.0, 1.0, noise=0.0)
    assert speedup("ngram", [repetitive()] * batch, device, monkeypatch) > 0.985


def test_it_stays_off_where_checking_needs_a_slow_kind_of_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(1.0, 0.01, checking=12.0, noise=0.0)
    assert speedup("ngram", [repetitive()], device, monkeypatch, tokens=4000) > 0.98


def test_a_good_and_a_bad_sequence_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [repetitive(), noise(1, 3)]
    speed = speedup("ngram", sources, Device(1.0, 0.2), monkeypatch)
    assert speed > 1.0
    always = speedup("ngram", sources, Device(1.0, 0.2), monkeypatch, adaptive=False)
    assert speed > always * 0.95


def test_costs_that_change_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that others used while sizes were measured for the first time."""
    device = Device(1.0, 0.01, checking=20.0, noise=0.0)
    monkeypatch.setattr(time, "perf_counter", device.clock)
    speculator = Speculator(SpeculativeConfig("ngram"))
    run(speculator, device, answers([repetitive()], 500, "a"), 500)
    assert speculator.totals.checks < 30
    device.checking, device.spent = 1.0, 0.0
    run(speculator, device, answers([repetitive()], 4000, "b"), 4000)
    assert 4000 * device.plain_step(1) / device.spent > 1.5


def test_the_time_of_guessing_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that takes as long as a hundred steps is no help, however right it is."""
    device = Device(1.0, 0.01, look=100.0, noise=0.0)
    speculator = Speculator(SpeculativeConfig("ngram"))
    monkeypatch.setattr(time, "perf_counter", device.clock)
    run(speculator, device, answers([repetitive()], 8000), 8000)
    assert speculator.looks <= 3


def test_naive_guesses_nothing() -> None:
    speculator = Speculator(SpeculativeConfig("naive"))
    text = Answer("a", [1, 1, 1, 1, 1, 1])
    assert speculator.rests()
    speculator.note_step(1, 0, 1, 1.0)
    assert speculator.totals == DraftCounts()
    assert speculator.counts("a", 1) is None
    speculator.finish(text)


def test_room_and_budget_are_kept() -> None:
    speculator = Speculator(SpeculativeConfig("ngram", adaptive=False))
    texts = [Answer(name, [1, 2, 3, 4, 5] * 3) for name in "ab"]
    room = {"a": 2, "b": 0}

    def room_of(text: Text, most: int) -> int:
        return min(room[text.request_id], most)

    assert not speculator.rests()
    assert speculator.choose(texts, room_of, 10) == {"a": [1, 2]}
    speculator.note_step(2, 2, 2, 1.0)
    room = {"a": 9, "b": 9}
    assert speculator.choose(texts, room_of, 6) == {"a": [1, 2, 3, 4, 5], "b": [1]}


def test_counts_are_of_a_request_and_of_all() -> None:
    speculator = Speculator(SpeculativeConfig("ngram", adaptive=False))
    text = Answer("a", [1, 2, 3, 4, 5] * 3)
    assert not speculator.rests()
    assert speculator.choose([text], everything, 3) == {"a": [1, 2, 3]}
    text.output_token_ids += [1, 2, 9]
    speculator.note_tokens(text, [1, 2, 9], 3)
    speculator.note_step(1, 3, 3, 1.0)
    assert not speculator.rests()
    assert speculator.choose([text], everything, 3) == {}
    text.output_token_ids.append(9)
    speculator.note_step(1, 0, 1, 1.0)
    counts = speculator.counts("a", 4)
    assert counts == speculator.totals
    assert counts is not None
    assert (counts.steps, counts.checks, counts.drafted, counts.accepted) == (2, 1, 3, 2)
    other = speculator.counts("b", 7)
    assert other is not None
    assert (other.steps, other.checks) == (7, 0)
    speculator.note_step(5, 0, 5, 1.0)
    assert speculator.totals.steps == 7


def test_while_nothing_pays_few_sequences_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    device = card()
    monkeypatch.setattr(time, "perf_counter", device.clock)
    speculator, seen = Speculator(SpeculativeConfig("suffix")), []
    propose = speculator._drafters.propose

    def watched(texts: Sequence[Text], most: int) -> list:
        seen.append([text.request_id for text in texts])
        return propose(texts, most)

    monkeypatch.setattr(speculator._drafters, "propose", watched)
    run(speculator, device, answers([noise(i, 1000) for i in range(16)], 2000), 2000)
    late = seen[-4 * 16 :]
    assert {len(names) for names in late} == {1}
    assert len({name for names in late for name in names}) == 16
    assert len(seen) < 700


def test_costs_that_a_start_measured_hold_until_steps_say_better() -> None:
    costs = StepCosts((4, 8, 16, 32), 3)
    costs.begin_with({4: 1.0, 16: 4.0})
    assert costs.larger(3, 4) == (4, 1.0)
    assert costs.larger(5, 8) == (8, 2.0)  # a third of the way from 4 to 16
    assert costs.larger(9, 16, slower=1.5) == (16, 6.0)
    assert costs.larger(17, 32) is None
    assert costs.knew(8)
    assert not costs.knew(17)
    for _ in range(3):
        costs.now += 1
        assert costs.larger(5, 8, slower=1.5) == (8, 3.0)
        costs.note(7, 2.5)
    assert costs.larger(5, 8, slower=1.5) == (8, 2.5)  # now it is known how slow
    costs.now += costs.stale_after + 1
    assert costs.larger(5, 8) == (8, 2.0)
    assert costs.first(7) == 2.0
    assert costs.first(40) is None


@pytest.mark.parametrize("sizes", [(2, 4), (2, 4, 6, 8, 12)])
def test_costs_from_the_start_say_what_is_checked_at_once(
    sizes: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the last size there is no graph."""
    device = Device(6e-4, 1e-5, noise=0.0, capture=15e-3, captured={*sizes})
    monkeypatch.setattr(time, "perf_counter", device.clock)
    known = StepSeconds({1: 6.1e-4}, {size: device.plain_step(size) for size in sizes})
    speculator, seen = Speculator(SpeculativeConfig("ngram", 8), known), []
    note = speculator.note_step

    def watched(count: int, checked: int, *rest: Any) -> None:
        seen.append(checked)
        note(count, checked, *rest)

    monkeypatch.setattr(speculator, "note_step", watched)
    run(speculator, device, answers([repetitive(4)], 100), 100)
    assert any(seen[:10])  # the eighth token is the first that was said before
    assert len(seen) < 100 * (0.6 if sizes[-1] == 4 else 0.3)
    assert max(seen) < sizes[-1]
    assert device.captured == {*sizes}


def test_rates_are_of_a_sequence_and_of_all() -> None:
    shared = HitRates()
    good, bad = HitRates(shared), HitRates(shared)
    for _ in range(100):
        good.note(4, 3, False)
        bad.note(4, 0, True)
    assert good.value(4) > 0.9
    assert bad.value(4) < 0.15
    assert 0.2 < shared.value(4) < 0.95
    assert HitRates(shared).value(4) == shared.value(4)
    assert HitRates(shared).value(1) == PRIOR


def test_costs_are_found_through_captures_and_interruptions() -> None:
    costs, rng = StepCosts((4, 8, 16), 3), random.Random(1)
    assert [costs.size(n) for n in (1, 4, 5, 16, 17, 33)] == [4, 4, 8, 16, 32, 48]
    for seconds in (20.0, 20.0, 1.0):
        assert costs.larger(5, 8) is None
        costs.note(6, seconds)
    assert costs.larger(5, 8) == (8, 1.0)
    for _ in range(100):
        costs.note(8, 50.0 if rng.random() < 0.2 else rng.uniform(1.9, 2.1))
    found = costs.larger(3, 8)
    assert found is not None
    assert 2.0 < found[1] < 3.0  # a fifth of them counts for three times what is usual
    assert costs.larger(9, 100) is None
    assert costs.larger(3, 7) is None
    costs.now += costs.stale_after + 1
    assert costs.larger(3, 8) is None
    for _ in range(3):
        costs.note(8, 7.0)
    assert costs.larger(3, 8) == (8, 7.0)


def rest(speculator: Speculator) -> bool:
    """Take a plain step of a second, unless guesses are wanted; whether it was taken."""
    if speculator.pauses():
        return True
    if not speculator.rests():
        return False
    if not speculator.is_pausing:
        speculator.note_step(1, 0, 1, 1.0)
    return True


def test_steps_of_a_pause_are_in_the_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    speculator, noted = Speculator(SpeculativeConfig("ngram")), list[int]()
    note = speculator._plain.note
    monkeypatch.setattr(speculator._plain, "note", lambda *_: noted.append(1) or note(*_))
    speculator.note_step(1, 0, 1, 1.0)
    speculator._purse.add(-4.0)
    before = speculator._purse.seconds
    assert all(rest(speculator) for _ in range(400))
    assert speculator._pause < 100
    speculator._end_pause()
    assert 400 / 100 < len(noted) < 400 / 30  # now and then a step is
    assert speculator._plain.now == 401
    assert speculator._purse.seconds == pytest.approx(before + 400 * FIRST_BUDGET[0])


def test_keeping_accounts_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0.0, 0.01)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    speculator = Speculator(SpeculativeConfig("ngram"))
    speculator.note_step(1, 0, 1, 1.0)
    before = speculator._purse.seconds
    speculator.note_step(1, 0, 1, 1.0)
    assert speculator._purse.seconds == pytest.approx(before + FIRST_BUDGET[0] - LOOK_COST * 0.01)


def test_accounts_do_not_eat_the_budget_of_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping them costs as much as 10 steps earn."""
    ticks = itertools.count(0.0, 5 * FIRST_BUDGET[0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    speculator = Speculator(SpeculativeConfig("ngram"))
    speculator.note_step(1, 0, 1, 1.0)
    speculator._purse.add(-speculator._purse.seconds - 0.5 * FIRST_BUDGET[0])
    assert [rest(speculator) for _ in range(3)] == [True, False, False]


def test_a_pause_ends_when_the_budget_can_pay_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    speculator = Speculator(SpeculativeConfig("ngram"))
    speculator.note_step(1, 0, 1, 1.0)
    speculator._purse.add(-speculator._purse.seconds - 4.5 * FIRST_BUDGET[0])
    assert [rest(speculator) for _ in range(7)].index(False) == 5


def test_a_purse_bounds_what_guessing_costs() -> None:
    purse, lost = Purse(0.01, 4.0), 0.0
    for _ in range(10_000):
        if purse.seconds > 0:
            purse.add(-0.7)
            lost += 0.7
        purse.pass_step(1.0)
    assert 0.008 < lost / 10_000 < 0.0115
    purse.add(100.0)
    purse.pass_step(1.0)
    assert purse.seconds == 4.0


def test_what_a_large_batch_lost_is_no_debt_of_many_steps_of_a_small_one() -> None:
    purse = Purse(0.01, 2.0, debt=4.0)
    purse.pass_step(100.0)
    purse.add(-1000.0)
    purse.pass_step(100.0)
    assert purse.seconds == pytest.approx(-400.0 + 1.0)
    purse.pass_step(1.0)
    assert purse.seconds == pytest.approx(-4.0 + 0.01)
    assert purse.steps_to_wait(1.0) == 399


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_other_methods_ask_no_layer(method: str) -> None:
    speculator = Speculator(SpeculativeConfig(method, adaptive=False))
    text = Answer("a", [1, 2, 3])
    for _ in range(50):
        assert not speculator.rests()
        speculator.choose([text], everything, 512)
        assert speculator.num_drafts == 0
        text.output_token_ids.append(5)
        speculator.note_step(1, 0, 1, 1.0)


def test_guesses_for_other_tokens_are_forgotten() -> None:
    config = SpeculativeConfig("mtp", num_speculative_tokens=4, adaptive=False)
    speculator, text = Speculator(config), Answer("a", [1, 2, 3])

    def room(_: Text, most: int) -> int:
        return min(most, 2)

    assert speculator.choose([text], everything, 512) == {}
    text.output_token_ids.append(4)
    speculator.note_tokens(text, [4], 0, [5, 6, 7])
    assert speculator.choose([text], room, 512) == {"a": [5, 6]}
    text.output_token_ids += [5, 6, 9]
    speculator.note_tokens(text, [5, 6, 9], 2)  # the layer said nothing more
    assert speculator.choose([text], everything, 512) == {}
    text.output_token_ids.append(1)
    speculator.note_tokens(text, [1], 0, [5])
    text.output_token_ids.append(1)  # a step without guesses in between
    assert speculator.choose([text], everything, 512) == {}


def test_steps_that_only_read_prompts_are_no_looks() -> None:
    speculator = Speculator(SpeculativeConfig("ngram"))
    speculator.note_step(1, 0, 1, 1.0)
    for _ in range(1000):
        assert not speculator.rests()
        assert speculator.choose([], everything, 9) == {}
        speculator.note_step(0, 0, 0, 1.0, decodes=False)
    assert speculator.looks == 0
