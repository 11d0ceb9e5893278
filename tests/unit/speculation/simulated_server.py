"""A simulated machine that serves simulated requests, for policies of speculation.

What a step takes is given; what looking for guesses takes is charged where the real drafters look,
part of it unseen by the policy: the engine's work, caches that it empties, garbage that it leaves.

The default costs of looks and rests are from the engine's process over a card in memory on two
shared cores of an EPYC (Zen 4), in CPU time. Drafters of 16 texts that gained 20 tokens each since
the caches were emptied: 89 us for one text, 218 for all with "ngram", 134 and 296 with "suffix";
once more at once 11 to 13 and 41 to 45. 104 more tokens of 16 texts: 120 and 255 us. A step with a
look took 17 to 36 us longer than the policy saw; one at rest takes 1 to 3 us more than without
speculation (`tests/card_in_memory/host_step.py --speculation`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.speculation.config import CHECK_SIZES
from fastdeploy_lite.speculation.drafters import Draft, LookupDrafters, Text
from fastdeploy_lite.speculation.rates import StepSeconds
from fastdeploy_lite.speculation.speculator import Speculator

Say = Callable[["Asked", Sequence[int]], list[int]]
"""What the model says after an answer so far, and where it agrees after each guessed token."""
Source = Callable[[list[int]], int]
"""The next token of a text."""
COOLING = 16  # steps after which nothing of a look is left in the caches


@dataclass
class Machine:
    """Seconds of steps and of looking.

    Attributes:
        fixed, per_token: of a step and of each sequence in it.
        per_guess: of each guessed token in it.
        checking: of a step with guesses on top: the host's part.
        uneven: of every third step with guesses on top.
        prefill: of each token of a prompt.
        look, next_look: of a look that finds the caches without its code and data, and of one in
            the step after another; in between it grows with the steps, for `COOLING`.
        look_at, read: of each sequence looked at, of each token indexed.
        unseen: of a look, beside what the policy can see.
        beside: of each sequence after the model's part: rules, text, messages.
        beside_guess: of each guessed token on top, checked or right, before and after it.
        resting: of every step, for speculation that is configured.
        capture: of the first step of a size on top; again after each `recapture_every` steps.
        noise: steps take up to so much more or less; one in a hundred is interrupted, and takes
            twenty times as long.
        held_up: looks out of a hundred that another process holds up, for 20 ms.
        slow, slow_every: steps take so many times as long in every other period of that many.
    """

    fixed: float
    per_token: float
    per_guess: float
    checking: float = 0.0
    prefill: float = 0.0
    look: float = 1e-4
    next_look: float = 2e-5
    look_at: float = 1e-5
    read: float = 2e-7
    unseen: float = 3e-5
    beside: float = 0.0
    beside_guess: float = 0.0
    resting: float = 0.0
    capture: float = 0.0
    recapture_every: int = 0
    noise: float = 0.0
    held_up: int = 0
    slow: float = 1.0
    slow_every: int = 1 << 60
    uneven: float = 0.0
    clock: float = 0.0
    steps: int = 0
    last_look: int = -1000
    hidden: float = 0.0
    plain: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(3))
    captured: set[tuple[bool, int]] = field(default_factory=set)

    def step(self, count: int, guesses: int, emitted: int, prompts: int) -> float:
        """Seconds of a step of `count` sequences. `plain` grows by what as many tokens would take
        without guesses, in steps as this one."""
        shared = (self.fixed + self.per_token * count + self.prefill * prompts) * self._luck()
        seconds = shared + (self.per_guess * guesses + self.checking if guesses else 0.0)
        self.plain += shared * emitted / count
        if guesses and self.rng.randrange(3) == 0:
            seconds += self.uneven
        if not prompts:
            seconds += self._capture(count, guesses)
        self.clock += seconds + self.resting
        return seconds

    def go_on(self, count: int, guesses: int, emitted: int) -> float:
        """Seconds between the model's part of a step and the next step."""
        seconds = self.beside * count + self.beside_guess * guesses
        self.plain += self.beside * emitted
        self.clock += seconds
        return seconds

    def rehearsed(self, guesses: int = 8) -> StepSeconds:
        """What steps of texts with so many guesses each take, as a start would find them."""

        def usual(count: int, guessed: int) -> float:
            seconds = self.fixed + self.per_token * count
            return seconds + (self.per_guess * guessed + self.checking if guessed else 0.0)

        checks = [(-(-tokens // (guesses + 1)), tokens) for tokens in CHECK_SIZES]
        return StepSeconds(
            {count: usual(count, 0) for count in (1, 2, 4, 8, 16)},
            {tokens: usual(count, tokens - count) for count, tokens in checks},
        )

    def _luck(self) -> float:
        self.steps += 1
        factor = self.slow if self.steps // self.slow_every % 2 else 1.0
        if not self.noise:
            return factor
        factor *= self.rng.uniform(1 - self.noise, 1 + self.noise)
        return 20 * factor if self.rng.random() < 0.01 else factor

    def _capture(self, count: int, guesses: int) -> float:
        if not self.capture:
            return 0.0
        if self.recapture_every and self.steps % self.recapture_every == 0:
            self.captured.clear()
        size = next((s for s in CHECK_SIZES if s >= count + guesses), 0) if guesses else count
        if (guesses > 0, size) in self.captured:
            return 0.0
        self.captured.add((guesses > 0, size))
        if not guesses:
            self.plain += self.capture  # so it would have without guesses
        return self.capture

    def watch(self, speculator: Speculator) -> None:
        """Charge what its drafters do."""
        drafters = speculator._drafters
        assert isinstance(drafters, LookupDrafters)
        propose, readers = drafters.propose, drafters._readers

        def watched(texts: Sequence[Text], most: int) -> list[Draft]:
            before = {name: reader.read for name, reader in readers.items()}
            drafts = propose(texts, most)
            new = sum(
                reader.cost * (reader.read - before.get(name, 0))
                for name, reader in readers.items()
            )
            cold = min((self.steps - self.last_look - 1) / COOLING, 1.0)
            self.last_look = self.steps
            self.clock += self.next_look + cold * (self.look - self.next_look)
            self.clock += self.look_at * len(texts) + self.read * new
            self.clock += 0.02 if self.rng.randrange(100) < self.held_up else 0.0
            self.hidden += self.unseen
            return drafts

        drafters.propose = watched  # type: ignore[method-assign]

    @property
    def speedup(self) -> float:
        """Plain decoding's time for what was answered over the time that it took."""
        return self.plain / (self.clock + self.hidden)


@dataclass
class Asked:
    """A request and its answer."""

    request_id: str
    prompt_token_ids: list[int]
    tokens: int
    say: Say
    output_token_ids: list[int] = field(default_factory=list)


def ask(name: str, text: Callable[[list[int]], Say], tokens: int, prompt: int = 64) -> Asked:
    """A request of random words that is answered by a text of `tokens` tokens."""
    rng = random.Random(name)
    words = [rng.randrange(50) for _ in range(prompt)]
    return Asked(name, words, tokens, text(words))


# Texts -------------------------------------------------------------------------------------------


def known(source: Source, most: int = 4000) -> Callable[[list[int]], Say]:
    """A text that is the same whatever is guessed."""

    def begin(prompt: list[int]) -> Say:
        text = list(prompt)

        def say(asked: Asked, guess: Sequence[int]) -> list[int]:
            at = len(prompt) + len(asked.output_token_ids)
            while len(text) < at + len(guess) + 1:
                text.append(source(text))
            truth = text[at : at + len(guess) + 1]
            right = next((i for i, g in enumerate(guess) if g != truth[i]), len(guess))
            return truth[: right + 1]

        return say

    return begin


def noise(seed: int, words: int) -> Source:
    """No order at all."""
    rng = random.Random(seed)
    return lambda text: rng.randrange(words)


def repeating(period: int) -> Source:
    """The same again and again."""
    return lambda text: 1000 + len(text) % period


def moody(obeys: int, refuses: int, seed: int) -> Source:
    """Says what prompt lookup guesses for some tokens, and something else for the next ones."""
    rng, drafter, read = random.Random(seed), _ops_cpu.NgramDrafter(2, 5), [0]

    def source(text: list[int]) -> int:
        drafter.extend(text[read[0] :])
        read[0] = len(text)
        guess = drafter.propose(1)[0]
        word = rng.randrange(50)
        if not guess:
            return word
        if len(text) % (obeys + refuses) < obeys:
            return guess[0]
        return word if word != guess[0] else word + 1

    return source


def spiteful(seed: int, unchecked: float = 1.0, checked: float = 0.0) -> Callable[..., Say]:
    """The worst of all: likely what is guessed while nobody checks it, unlikely once it costs."""

    def begin(_: list[int]) -> Say:
        rng, drafter, read = random.Random(seed), _ops_cpu.NgramDrafter(2, 5), [0]

        def say(asked: Asked, guess: Sequence[int]) -> list[int]:
            text = [*asked.prompt_token_ids, *asked.output_token_ids]
            drafter.extend(text[read[0] :])
            read[0] = len(text)
            if guess:
                right = next((i for i in range(len(guess)) if rng.random() >= checked), len(guess))
                wrong = guess[right] + 1 if right < len(guess) else rng.randrange(50)
                return [*guess[:right], wrong]
            found = drafter.propose(1)[0]
            return found if found and rng.random() < unchecked else [rng.randrange(50)]

        return say

    return begin


# Serving -----------------------------------------------------------------------------------------


def serve(speculator: Speculator, machine: Machine, asked: Sequence[Asked], seats: int) -> None:
    """Answer all requests, at most `seats` together."""
    waiting, alive = list(asked)[::-1], list[Asked]()

    def room(text: Text, most: int) -> int:
        return min(most, text.tokens - len(text.output_token_ids) - 1)  # type: ignore[attr-defined]

    while waiting or alive:
        new = [waiting.pop() for _ in range(min(seats - len(alive), len(waiting)))]
        pauses = not new and speculator.pauses()
        rests = pauses or speculator.rests()
        chosen = {} if rests else speculator.choose(alive, room, 256, not new)
        alive += new
        said = [text.say(text, chosen.get(text.request_id, ())) for text in alive]
        guesses, emitted = sum(map(len, chosen.values())), sum(map(len, said))
        count, prompts = len(alive), sum(len(text.prompt_token_ids) for text in new)
        seconds = machine.step(count, guesses, emitted, prompts)
        beside = machine.go_on(count, guesses, emitted)
        for text, tokens in zip(alive.copy(), said, strict=True):
            text.output_token_ids += tokens
            if text.request_id in chosen:
                speculator.note_tokens(text, tokens, len(chosen[text.request_id]))
            if len(text.output_token_ids) >= text.tokens:
                alive.remove(text)
                speculator.finish(text)
        if not (pauses or speculator.is_pausing):
            speculator.note_step(count, guesses, emitted, seconds + beside, not new, beside)
