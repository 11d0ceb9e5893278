"""The policy for draft layers on a simulated machine: asked where right, else not even read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from fastdeploy_lite.speculation.attendance import COMMITTED, Attendance
from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.speculation.drafters import Text
from fastdeploy_lite.speculation.speculator import Speculator

# Steps: one of a prompt takes so long.
PROMPT = 10.0


@dataclass
class Answer:
    """A sequence; each token is its place in the text."""

    request_id: str
    prompt_token_ids: list[int] = field(default_factory=lambda: [1, 2, 3])
    output_token_ids: list[int] = field(default_factory=list)
    missed: int = 0  # steps that the layer did not read


@dataclass
class Layer:
    """A layer and the model's machine.

    Attributes:
        right: how often a guess is right where nearly all tokens were read; never elsewhere.
        reading: what reading adds to a step.
    """

    right: float
    reading: float
    seconds: float = 0.0
    plain: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(4))

    def step(self, count: int, prompts: int, guesses: int, emitted: int, reads: bool) -> float:
        shared = (1.0 + PROMPT * prompts) * self.rng.uniform(0.9, 1.1)
        seconds = shared * (1.0 + self.reading * reads) + 0.05 * guesses
        self.plain += shared * emitted / count
        self.seconds += seconds
        return seconds

    def guess(self, answer: Answer, most: int) -> list[int]:
        at = len(answer.output_token_ids)
        right = self.right if answer.missed < 0.1 * at + 3 else 0.0
        return [at + i if self.rng.random() < right else -1 for i in range(most)]

    @property
    def speedup(self) -> float:
        return self.plain / self.seconds


def everything(_: Text, most: int) -> int:
    return most


def agreed(answer: Answer, guess: Sequence[int]) -> list[int]:
    at = len(answer.output_token_ids)
    hits = next((i for i, token in enumerate(guess) if token != at + i), len(guess))
    return list(range(at, at + hits + 1))


def serve(
    layer: Layer,
    *,
    most: int = 3,
    requests: int = 20,
    tokens: int = 200,
    seats: int = 1,
    adaptive: bool = True,
    speculator: Speculator | None = None,
) -> float:
    """Plain decoding's time over the time that it takes with the layer, prompts included."""
    config = SpeculativeConfig("mtp", num_speculative_tokens=most, adaptive=adaptive)
    speculator, alive = speculator or Speculator(config), list[Answer]()
    waiting = [Answer(f"{i}") for i in range(requests)]
    while waiting or alive:
        new = [waiting.pop() for _ in range(min(len(waiting), seats - len(alive)))]
        speculator.meet([answer.request_id for answer in new])
        chosen = {}
        if not speculator.rests(not new):
            chosen = speculator.choose(alive, everything, 512, not new)
        alive += new
        said = [agreed(answer, chosen.get(answer.request_id, ())) for answer in alive]
        guesses, emitted = sum(map(len, chosen.values())), sum(map(len, said))
        seconds = layer.step(len(alive), len(new), guesses, emitted, speculator.feeds_draft)
        count = len(alive)
        for answer, out in zip(alive.copy(), said, strict=True):
            answer.output_token_ids += out
            answer.missed += not speculator.feeds_draft
            if chosen.get(answer.request_id) or speculator.num_drafts:
                drafts = layer.guess(answer, speculator.drafts_for(answer))
                checked = len(chosen.get(answer.request_id, ()))
                speculator.note_tokens(answer, out, checked, drafts)
            if len(answer.output_token_ids) >= tokens:
                alive.remove(answer)
                speculator.finish(answer)
        speculator.note_step(count, guesses, emitted, seconds, not new)
    assert not speculator._attendance._whole
    return layer.speedup


def test_a_layer_that_is_right_pays() -> None:
    assert serve(Layer(0.9, 0.05), adaptive=False) > 2.2
    assert serve(Layer(0.8, 0.05), most=1, adaptive=False) > 1.5
    assert serve(Layer(0.9, 0.05)) > 2.2
    assert serve(Layer(0.7, 0.1), most=1) > 1.3
    for seed in range(4):  # prompts take half of the time
        assert serve(Layer(0.9, 0.05, rng=random.Random(seed)), seats=4) > 1.6
    assert serve(Layer(0.5, 0.05), most=1, seats=4) > 1.1


@pytest.mark.parametrize(("seats", "least"), [(1, 0.985), (4, 0.98), (16, 0.95)])
@pytest.mark.parametrize("tokens", [20, 200, 1000])
@pytest.mark.parametrize("reading", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("right", [0.0, 0.1])
def test_a_layer_that_is_wrong_is_not_even_read(
    right: float, reading: float, tokens: int, seats: int, least: float
) -> None:
    """Beside the prompts of the first requests, here as long as 10 steps each."""
    layer = Layer(right, reading)
    assert serve(layer, tokens=tokens, seats=seats, requests=3000 * seats // tokens) > least


def test_a_layer_that_is_always_read_would_cost_all_that_it_takes() -> None:
    assert serve(Layer(0.0, 0.5), adaptive=False) < 0.7


def test_a_layer_that_gets_better_is_noticed() -> None:
    layer = Layer(0.0, 0.1)
    config = SpeculativeConfig("mtp", num_speculative_tokens=1)
    speculator = Speculator(config)
    assert serve(layer, requests=60, speculator=speculator) > 0.98
    layer.right, layer.seconds, layer.plain = 0.8, 0.0, 0.0
    assert serve(layer, requests=60, speculator=speculator) > 1.2


def test_a_sequence_is_known_from_its_beginning_on() -> None:
    attendance = Attendance()
    attendance.meet(["a"], may_begin=False)
    assert not attendance.is_on
    attendance.meet([], may_begin=True)
    assert not attendance.is_on  # everybody alive has been missed
    attendance.meet(["b"], may_begin=True)
    assert attendance.is_on
    attendance.meet(["c"], may_begin=False)
    assert [attendance.knows(name) for name in "abc"] == [False, True, True]
    attendance.forget("b")
    attendance.forget("never met")
    for _ in range(COMMITTED):
        assert attendance.is_committed
        attendance.note_guesses()
    assert not attendance.is_committed
    attendance.stop()
    assert not any(attendance.knows(name) for name in "abc")
