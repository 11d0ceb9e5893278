"""What guessing costs where nothing is gained, on simulated machines from two cores to a card, with
texts that mislead it as best they can; and that it still gains where something is to be had."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from simulated_server import Asked, Machine, ask, known, moody, noise, repeating, serve, spiteful

from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.speculation.speculator import Speculator

COLD_LOOK = Machine.look  # where the model itself empties the caches in every step
# Seconds. A card's steps take 0.5 to 10 ms; the host's part in a check 0.1 to 0.3 ms on all.
MACHINES = {
    "two cores, demo": Machine(1.5e-3, 4e-4, 4e-4, 1e-4, 3e-4, next_look=COLD_LOOK),
    "two cores, 21B": Machine(2e-2, 8e-3, 8e-3, 1e-4, 8e-3, next_look=COLD_LOOK),
    "busy cores": Machine(
        1.5e-3, 4e-4, 4e-4, 1e-4, 3e-4, next_look=COLD_LOOK, noise=0.2, slow=2.0, slow_every=300
    ),
    "card, 0.5 ms": Machine(5e-4, 5e-6, 5e-6, checking=2e-4, prefill=2e-5),
    "card, 2 ms": Machine(2e-3, 1e-4, 2e-4, checking=2e-4, prefill=4e-5),
    "card, 10 ms": Machine(8e-3, 2e-4, 2e-4, checking=3e-4, prefill=1e-4),
}
# An H100 with the demo model that ran steps of all sizes before its first request, as it was
# measured: in the executor 0.31 ms for one sequence, 0.42 for 16, 0.46 for a check of 2 tokens,
# 0.58 of 16, 0.80 of 64; on the host 50 us for one sequence, 290 for 16, 5 to 12 for each guess.
H100 = Machine(
    3.1e-4, 8e-6, 6e-6, 1.3e-4, prefill=1e-5, resting=1e-6, beside=1.6e-5, beside_guess=7e-6
)
HOSTS = {
    "as measured": H100,
    "slow": replace(H100, beside_guess=6e-5),
    "uneven": replace(H100, uneven=1e-3),
}
TOKENS = 1000


def each(numbers: range, make: Callable[[int], Asked]) -> list[Asked]:
    return [make(i) for i in numbers]


def times(numbers: range, count: int, more: int = 0) -> range:
    """So many times as many numbers, others than those of other ranges."""
    return range(numbers.start * count, numbers.start * count + len(numbers) * count + more)


# By numbers, one a text that is answered together with others.
HOPELESS: dict[str, Callable[[range], list[Asked]]] = {
    "nothing twice": lambda n: each(n, lambda i: ask(f"{i}", known(noise(i, 10**6)), TOKENS)),
    "three words": lambda n: each(n, lambda i: ask(f"{i}", known(noise(i, 3)), TOKENS)),
    "good, then bad": lambda n: each(n, lambda i: ask(f"{i}", known(moody(8, 40, i)), TOKENS)),
    "spite": lambda n: each(n, lambda i: ask(f"{i}", spiteful(i), TOKENS)),
    "some spite": lambda n: each(n, lambda i: ask(f"{i}", spiteful(i, 0.6, 0.3), TOKENS)),
    "many short ones": lambda n: each(
        times(n, 40), lambda i: ask(f"{i}", known(noise(i, 30)), 4 + i * 7 % 36, prompt=100)
    ),
    "all lengths": lambda n: each(
        times(n, 5, more=2),
        lambda i: ask(f"{i}", known(noise(i, 9) if i % 2 else moody(16, 16, i)), 20 + 97 * i % 380),
    ),
}


def repeating_texts(batch: int, tokens: int = TOKENS) -> list[Asked]:
    return each(range(batch), lambda i: ask(f"r{i}", known(repeating(31 + i)), tokens))


def served(
    method: str,
    machine: Machine,
    asked: list[Asked],
    seats: int,
    monkeypatch: pytest.MonkeyPatch,
    speculator: Speculator | None = None,
) -> Machine:
    speculator = speculator or Speculator(SpeculativeConfig(method))
    used = replace(machine, captured=set(), rng=random.Random(3))
    monkeypatch.setattr(time, "perf_counter", lambda: used.clock)
    used.watch(speculator)
    serve(speculator, used, asked, seats)
    assert not speculator._memories  # whatever a step did with the last guesses for a text
    assert not speculator._open
    return used


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("texts", HOPELESS)
@pytest.mark.parametrize("name", MACHINES)
def test_what_cannot_be_gained_is_not_lost(
    name: str, texts: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = "suffix" if batch == 4 else "ngram"
    machine = served(method, MACHINES[name], HOPELESS[texts](range(batch)), batch, monkeypatch)
    assert machine.speedup > 0.98


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("texts", ["nothing twice", "many short ones"])
@pytest.mark.parametrize("name", MACHINES)
def test_in_the_long_run_off_is_off(
    name: str, texts: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a server has learnt by then it pays once."""
    speculator = Speculator(SpeculativeConfig("suffix"))
    for start in (0, batch):
        asked = HOPELESS[texts](range(start, start + batch))
        machine = served("suffix", MACHINES[name], asked, batch, monkeypatch, speculator)
    assert machine.speedup > 0.99


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("texts", HOPELESS)
@pytest.mark.parametrize("host", HOSTS)
def test_costs_from_the_start_lose_nothing_either(
    host: str, texts: str, method: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    speculator = Speculator(SpeculativeConfig(method), H100.rehearsed())
    asked = HOPELESS[texts](range(batch))
    assert served(method, HOSTS[host], asked, batch, monkeypatch, speculator).speedup > 0.98


def half_right(batch: int, tokens: int = TOKENS) -> list[Asked]:
    """Texts of which the guesses are right often enough to pay if the host took no time."""
    return each(range(batch), lambda i: ask(f"h{i}", known(moody(24, 4, i)), tokens))


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("texts", [half_right, repeating_texts])
@pytest.mark.parametrize("host", HOSTS)
def test_what_the_host_takes_between_two_steps_counts(
    host: str,
    texts: Callable[[int], list[Asked]],
    method: str,
    batch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside a check that pays by what the executor takes alone, as by two of three steps."""
    speculator = Speculator(SpeculativeConfig(method), H100.rehearsed())
    machine = served(method, HOSTS[host], texts(batch), batch, monkeypatch, speculator)
    assert machine.speedup > 0.985


def of_which(repeat: int, batch: int, turn: int) -> list[Asked]:
    """Answers of 128 tokens, some of which repeat."""
    return each(
        range(turn * batch, turn * batch + batch),
        lambda i: ask(
            f"{i}", known(repeating(9 + i % 7) if i % batch < repeat else noise(i, 30)), 128
        ),
    )


@pytest.mark.parametrize(
    ("repeat", "batch"), [(0, 16), (1, 4), (3, 4), (4, 16), (12, 16), (15, 16)]
)
@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_some_that_run_ahead_hold_up_the_others_little(
    method: str, repeat: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last answer of a batch ends no earlier because others did, while checks make its steps
    longer."""
    taken = []
    for config in (SpeculativeConfig("naive"), SpeculativeConfig(method)):
        speculator, seconds = Speculator(config, H100.rehearsed()), 0.0
        for turn in range(16):
            asked = of_which(repeat, batch, turn)
            with monkeypatch.context() as patch:
                machine = served(method, H100, asked, batch, patch, speculator)
            seconds += machine.clock + machine.hidden
        taken.append(seconds)
    plain, guessing = taken
    assert plain / guessing > 0.985


@pytest.mark.parametrize(("batch", "gain"), [(1, 1.45), (4, 1.4), (16, 1.2)])
@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("before", [None, "nothing twice", "many short ones"])
def test_with_costs_from_the_start_a_short_answer_that_repeats_is_found(
    before: str | None, method: str, batch: int, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 200 tokens, the first 31 of which say nothing twice; a step checks 8 guesses at most, and
    together they pay little at 16."""
    speculator = Speculator(SpeculativeConfig(method), H100.rehearsed())
    if before is not None:
        served(method, H100, HOPELESS[before](range(batch)), batch, monkeypatch, speculator)
    asked = repeating_texts(batch, 200)
    machine = served(method, H100, asked, batch, monkeypatch, speculator)
    assert machine.speedup > gain


def first_hit(speculator: Speculator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the length of the answer at every guess that comes true."""
    hits, note = list[int](), speculator.note_tokens

    def watched(text: Asked, tokens: list[int], checked: int) -> None:
        if len(tokens) > 1:
            hits.append(len(text.output_token_ids) - len(tokens))
        note(text, tokens, checked)

    monkeypatch.setattr(speculator, "note_tokens", watched)
    return hits


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("obeys", [0, 8])
def test_what_repeats_is_found_in_the_first_third_of_an_answer(
    obeys: int, method: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of most answers of 200 tokens that repeat, each after one that gives nothing and may mislead,
    in a server that keeps what it learnt and what it owes; and the others lose little."""
    speculator, found, others = Speculator(SpeculativeConfig(method), H100.rehearsed()), [], []
    hits = first_hit(speculator, monkeypatch)
    for start in range(0, 12 * batch, batch):
        numbers = range(start, start + batch)
        nothing = [known(moody(obeys, 40, i) if obeys else noise(i, 30)) for i in numbers]
        asked = [ask(f"n{i}", text, 200) for i, text in zip(numbers, nothing, strict=True)]
        with monkeypatch.context() as patch:
            others.append(served(method, H100, asked, batch, patch, speculator).speedup)
        hits.clear()
        asked = each(numbers, lambda i: ask(f"r{i}", known(repeating(9 + i % 7)), 200))
        with monkeypatch.context() as patch:
            served(method, H100, asked, batch, patch, speculator)
        found.append(min(hits, default=200))
    assert statistics.median(found) <= 200 / 3
    assert statistics.mean(others) > 0.975


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("texts", HOPELESS)
def test_a_graph_for_every_size_is_paid_by_what_guesses_save(
    texts: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 ms once for every size of step beside steps of half a millisecond: as long as 14 of them,
    of which one is 0.1 % here."""
    machine = replace(MACHINES["card, 0.5 ms"], capture=7e-3)
    machine = served("suffix", machine, HOPELESS[texts](range(batch)), batch, monkeypatch)
    assert machine.speedup > 0.96


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("every", [0, 500])
def test_graphs_that_are_captured_hide_no_gain(
    every: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = replace(MACHINES["card, 0.5 ms"], capture=7e-3, recapture_every=every)
    machine = served("suffix", machine, repeating_texts(batch), batch, monkeypatch)
    assert machine.speedup > 1.8


@pytest.mark.parametrize(
    ("name", "batch", "gain"),
    [
        ("two cores, demo", 1, 2.4),
        ("two cores, demo", 4, 1.5),
        ("two cores, demo", 16, 1.1),
        ("two cores, 21B", 1, 2.0),
        ("busy cores", 1, 2.4),
        ("busy cores", 4, 1.5),
        ("card, 0.5 ms", 1, 2.7),
        ("card, 0.5 ms", 16, 1.9),
        ("card, 2 ms", 1, 3.0),
        ("card, 10 ms", 1, 4.0),
        ("card, 10 ms", 4, 3.2),
        ("card, 10 ms", 16, 2.0),
    ],
)
@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_what_can_be_gained_is(
    method: str, name: str, batch: int, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = served(method, MACHINES[name], repeating_texts(batch), batch, monkeypatch)
    assert machine.speedup > gain


@pytest.mark.parametrize("batch", [1, 4])
def test_a_look_that_was_held_up_is_no_reason_to_stop(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as 40 steps."""
    machine = replace(MACHINES["card, 0.5 ms"], held_up=5, noise=0.1)
    machine = served("suffix", machine, repeating_texts(batch), batch, monkeypatch)
    assert machine.speedup > 1.8


@pytest.mark.parametrize("name", MACHINES)
def test_after_a_long_rest_what_repeats_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speculator = Speculator(SpeculativeConfig("suffix"))
    served(
        "suffix", MACHINES[name], HOPELESS["nothing twice"](range(4)), 4, monkeypatch, speculator
    )
    machine = served("suffix", MACHINES[name], repeating_texts(4), 4, monkeypatch, speculator)
    assert machine.speedup > 1.3


def test_one_text_that_repeats_is_found_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = each(range(4), lambda i: ask(f"{i}", known(noise(i, 30) if i else repeating(31)), 2000))
    machine = served("ngram", MACHINES["card, 10 ms"], asked, 4, monkeypatch)
    assert machine.speedup > 1.1


def test_steps_that_read_prompts_too_are_charged_what_is_usual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a prompt arrives with every step, no check can be measured, and none is tried."""
    asked = [ask("long", spiteful(1), 2000)]
    asked += [ask(f"{i}", known(noise(i, 10**6)), 1, prompt=64) for i in range(1800)]
    machine = served("ngram", MACHINES["two cores, demo"], asked, 2, monkeypatch)
    assert machine.speedup > 0.99
