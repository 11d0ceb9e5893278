"""The controller against simulated machines: it gains where guesses pay and is quiet elsewhere."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable

import pytest

from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.speculation.rates import HitRates, StepLine
from fastdeploy_lite.speculation.speculator import Candidate, Speculator

NextToken = Callable[[list[int]], int]


def repetitive(length: int = 40) -> NextToken:
    """A text that says the same again and again."""
    return lambda text: 1000 + len(text) % length


def noise(seed: int, words: int) -> NextToken:
    """A text without any order."""
    rng = random.Random(seed)
    return lambda text: rng.randrange(words)


def run(
    method: str,
    sources: list[NextToken],
    fixed: float,
    per_token: float,
    *,
    steps_of_setup: float = 0.0,
    tokens: int = 600,
    adaptive: bool = True,
) -> float:
    """Simulate a batch; return the time by plain decoding over the time with speculation."""
    speculator = Speculator(SpeculativeConfig(method, adaptive=adaptive))
    rng = random.Random(3)
    texts: dict[str, list[int]] = {}
    for i, _ in enumerate(sources):
        texts[str(i)] = list(range(10 * i, 10 * i + 8))
        speculator.start(str(i), texts[str(i)])
    # What the model will say does not depend on how it is asked.
    for text, source in zip(texts.values(), sources, strict=True):
        for _ in range(tokens):
            text.append(source(text))
    known = dict.fromkeys(texts, 8)
    spent = 0.0
    while known:
        candidates = [Candidate(r, 100) for r in known]
        chosen = {} if speculator.rests() else speculator.choose(candidates, 512)
        size = len(known) + sum(map(len, chosen.values()))
        seconds = fixed + per_token * size + (steps_of_setup * fixed if chosen else 0.0)
        seconds *= rng.uniform(0.9, 1.1)
        speculator.note_step(size, bool(chosen), seconds)
        spent += seconds
        for request_id in list(known):
            text, at = texts[request_id], known[request_id]
            guess = chosen.get(request_id, [])
            right = next((i for i, g in enumerate(guess) if g != text[at + i]), len(guess))
            new = text[at : at + right + 1]
            speculator.note_tokens(request_id, new, len(guess))
            known[request_id] += len(new)
            if known[request_id] + 33 >= len(text):
                del known[request_id]
                speculator.finish(request_id)
    assert speculator.totals.drafted >= speculator.totals.accepted
    plain = (tokens - 33) * (fixed + per_token * len(sources))
    return plain / spent


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_it_pays_where_the_text_repeats_and_steps_are_flat(method: str) -> None:
    assert run(method, [repetitive()], 1.0, 0.01) > 3.0


@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("words", [2, 10, 1000])
@pytest.mark.parametrize("per_token", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("batch", [1, 4])
def test_it_costs_nothing_where_guesses_are_wrong(
    method: str, words: int, per_token: float, batch: int
) -> None:
    sources = [noise(seed, words) for seed in range(batch)]
    assert run(method, sources, 1.0, per_token) > 0.96  # the noise of the simulated clock is 1 %


def test_it_stays_off_where_every_token_costs_a_step() -> None:
    assert run("ngram", [repetitive()], 0.0, 1.0) > 0.97


def test_it_stays_off_where_checking_needs_a_slow_kind_of_step() -> None:
    assert run("ngram", [repetitive()], 1.0, 0.01, steps_of_setup=12.0, tokens=3000) > 0.95


def test_a_good_and_a_bad_sequence_are_told_apart() -> None:
    speed = run("ngram", [repetitive(), noise(1, 3)], 1.0, 0.2)
    assert speed > 1.0
    always = run("ngram", [repetitive(), noise(1, 3)], 1.0, 0.2, adaptive=False)
    assert speed > always * 0.95


def test_naive_guesses_nothing() -> None:
    speculator = Speculator(SpeculativeConfig("naive"))
    speculator.start("a", [1, 1, 1, 1, 1, 1])
    assert speculator.choose([Candidate("a", 5)], 10) == {}
    speculator.note_tokens("a", [1], 0)
    assert speculator.totals.checks == 0


def test_room_and_budget_are_kept() -> None:
    speculator = Speculator(SpeculativeConfig("ngram", adaptive=False))
    for name in "ab":
        speculator.start(name, [1, 2, 3, 4, 5] * 3)
    chosen = speculator.choose([Candidate("a", 2), Candidate("b", 0)], 10)
    assert chosen == {"a": [1, 2]}
    assert speculator.choose([Candidate("a", 9), Candidate("b", 9)], 6) == {
        "a": [1, 2, 3, 4, 5],
        "b": [1],
    }


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
    assert HitRates(shared).value(1) == 0.5


def test_the_line_is_found_through_noise_and_interruptions() -> None:
    line, rng = StepLine(), random.Random(1)
    assert line.slope is None
    assert line.seconds(3) == 0.0
    for _ in range(400):
        tokens = rng.randint(1, 9)
        seconds = (2.0 + 0.5 * tokens) * rng.uniform(0.95, 1.05)
        line.note(tokens, 50.0 if rng.random() < 0.01 else seconds)
    assert line.slope == pytest.approx(0.5, rel=0.2)
    assert line.seconds(5) == pytest.approx(4.5, rel=0.1)


def run_layer(
    right: float, drafting: float, *, most: int = 3, tokens: int = 4000, adaptive: bool = True
) -> float:
    """Simulate a prediction layer whose guesses are right so often, and whose work on them takes
    that share of a step; return the time by plain decoding over the time with it."""
    config = SpeculativeConfig("mtp", num_speculative_tokens=most, adaptive=adaptive)
    speculator, rng = Speculator(config), random.Random(4)
    speculator.start("a", [1, 2, 3])
    spent, written = 0.0, 0
    while written < tokens:
        guess = speculator.choose([Candidate("a", 100)], 512).get("a", [])
        asked = speculator.num_drafts
        seconds = 1.0 + 0.05 * len(guess) + (drafting if asked else 0.0)
        seconds *= rng.uniform(0.9, 1.1)
        speculator.note_step(1 + len(guess), bool(guess), seconds)
        spent += seconds
        truth = range(written, written + len(guess) + 1)  # each token is its place in the text
        hits = next((i for i, g in enumerate(guess) if g != truth[i]), len(guess))
        written += hits + 1
        drafts = [written + i if rng.random() < right else -1 for i in range(asked)]
        speculator.note_tokens("a", list(truth[: hits + 1]), len(guess), drafts)
    return written / spent


def test_a_layer_that_is_right_pays() -> None:
    assert run_layer(0.9, 0.05, adaptive=False) > 2.2
    assert run_layer(0.8, 0.05, most=1, adaptive=False) > 1.5
    assert run_layer(0.9, 0.05) > 2.0
    assert run_layer(0.7, 0.1, most=1) > 1.3


def test_a_layer_that_is_wrong_is_left_alone() -> None:
    """Its work is part of each step that it guesses in, so it has to be asked less and less."""
    assert run_layer(0.0, 0.5, adaptive=False) < 0.65
    assert run_layer(0.0, 0.2) > 0.97
    assert run_layer(0.0, 0.02) > 0.97
    assert run_layer(0.0, 0.5) > 0.93


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_other_methods_ask_no_layer(method: str) -> None:
    speculator = Speculator(SpeculativeConfig(method, adaptive=False))
    speculator.start("a", [1, 2, 3])
    for _ in range(50):
        speculator.choose([Candidate("a", 100)], 512)
        assert speculator.num_drafts == 0
        speculator.note_step(1, False, 1.0)
        speculator.note_tokens("a", [5], 0)


def test_guesses_for_other_tokens_are_forgotten() -> None:
    speculator = Speculator(SpeculativeConfig("mtp", num_speculative_tokens=4, adaptive=False))
    speculator.start("a", [1, 2, 3])
    speculator.note_tokens("a", [4], 0, [5, 6, 7])
    assert speculator.choose([Candidate("a", 2)], 512) == {"a": [5, 6]}
    speculator.note_tokens("a", [5, 6, 9], 2)  # the layer said nothing more
    assert speculator.choose([Candidate("a", 100)], 512) == {}


def test_while_nothing_repeats_few_steps_look_for_guesses() -> None:
    """On a card a step takes half a millisecond, and looking is what is left of the cost."""
    speculator, looks = Speculator(SpeculativeConfig("suffix")), 0
    speculator.start("a", list(range(100)))
    for step in range(1000):
        if not speculator.rests():
            looks += 1
            assert speculator.choose([Candidate("a", 9)], 9) == {}
        speculator.note_step(1, False, 1.0)
        speculator.note_tokens("a", [100 + step], 0)
    assert looks < 100
    assert speculator.totals.steps == 1000
    # What was not read at once is there when it is needed.
    speculator.note_tokens("a", [50, 51, 52, 53, 54, 55], 0)
    while speculator.rests():
        pass
    assert speculator._memories["a"].drafter().propose(3).tokens == [56, 57, 58]


def test_steps_that_only_read_prompts_are_no_failed_looks() -> None:
    speculator = Speculator(SpeculativeConfig("ngram"))
    for _ in range(1000):
        assert not speculator.rests()
        assert speculator.choose([], 9) == {}


def test_the_time_of_guessing_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: 1e-3 * next(clock))
    cheap = run("ngram", [repetitive()], 1.0, 0.01)
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: 100.0 * next(clock))
    assert cheap > 3.0
    assert run("ngram", [repetitive()], 1.0, 0.01) == pytest.approx(1.0, abs=0.1)
