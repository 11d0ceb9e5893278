"""Guesses of the next tokens of sequences, from their own tokens, earlier answers or a layer."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.speculation.config import SpeculativeConfig

# An answer is remembered with the end of its prompt, so that its first words can be guessed.
PROMPT_TOKENS_KEPT = 8
# Answers that wait to be indexed, at most: while guesses rest nobody asks for them.
MOST_WAITING = 256


class Text(Protocol):
    """A sequence of the engine: its lists grow, and are read when a guess is wanted."""

    @property
    def request_id(self) -> str:
        """Name of the request."""

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """What was asked."""

    @property
    def output_token_ids(self) -> Sequence[int]:
        """What was answered so far."""


class Draft(NamedTuple):
    """Guessed tokens and the number of tokens before them that had occurred in the same order."""

    tokens: list[int]
    matched: int


NOTHING = Draft([], 0)


class Drafters(Protocol):
    """The guesses of one engine."""

    def propose(self, texts: Sequence[Text], most: int) -> list[Draft]:
        """Guess at most `most` tokens after each text, as it is now."""

    def offer(self, text: Text, tokens: Sequence[int]) -> None:
        """Take what a layer of the model thinks comes next."""

    def finish(self, text: Text) -> None:
        """A sequence has ended."""


class LookupDrafters:
    """Looks up what followed before: "ngram" in a sequence itself, "suffix" in answers, too.

    A sequence is read when somebody asks for a guess, so that one that is never asked costs
    nothing.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._answers = _ops_cpu.AnswerIndex(config.suffix_decoding_max_cached_tokens)
        self._waiting: deque[list[int]] = deque(maxlen=MOST_WAITING)
        self._known: dict[str, tuple[_ops_cpu.Drafter, int]] = {}  # and output tokens read

    def propose(self, texts: Sequence[Text], most: int) -> list[Draft]:
        """See Drafters; one call of native code for all."""
        while self._waiting:
            self._answers.add(self._waiting.popleft())
        drafters, news = [], []
        for text in texts:
            output = text.output_token_ids
            known = self._known.get(text.request_id)
            if known is None:
                drafter, new = self.create(), [*text.prompt_token_ids, *output]
            else:
                drafter, read = known
                new = list(output[read:])
            self._known[text.request_id] = drafter, len(output)
            drafters.append(drafter)
            news.append(new)
        return [Draft(*found) for found in _ops_cpu.propose_all(drafters, news, most)]

    def offer(self, text: Text, tokens: Sequence[int]) -> None:
        """See Drafters; there is no layer."""

    def finish(self, text: Text) -> None:
        """See Drafters; the answer becomes something that others may repeat."""
        self._known.pop(text.request_id, None)
        if self._config.method == "suffix" and text.output_token_ids:
            start = text.prompt_token_ids[-PROMPT_TOKENS_KEPT:]
            self._waiting.append([*start, *text.output_token_ids])

    def create(self) -> _ops_cpu.Drafter:
        """A drafter that has read nothing."""
        config = self._config
        if config.method == "suffix":
            least = config.suffix_decoding_min_token_prob
            return _ops_cpu.SuffixDrafter(self._answers, least)
        return _ops_cpu.NgramDrafter(config.min_ngram_size, config.max_ngram_size)


class LayerDrafters:
    """Passes on what a layer of the model guessed at the end of the step before."""

    # All guesses of one layer are equally well founded.
    MATCHED = 1

    def __init__(self) -> None:
        self._offered: dict[str, tuple[int, list[int]]] = {}  # after so many output tokens

    def propose(self, texts: Sequence[Text], most: int) -> list[Draft]:
        """See Drafters; guesses of what followed fewer tokens no longer fit."""
        found = []
        for text in texts:
            after, tokens = self._offered.get(text.request_id, (0, []))
            fits = bool(tokens) and after == len(text.output_token_ids)
            found.append(Draft(tokens[:most], self.MATCHED) if fits else NOTHING)
        return found

    def offer(self, text: Text, tokens: Sequence[int]) -> None:
        """See Drafters."""
        self._offered[text.request_id] = len(text.output_token_ids), list(tokens)

    def finish(self, text: Text) -> None:
        """See Drafters."""
        self._offered.pop(text.request_id, None)


def create_drafters(config: SpeculativeConfig) -> Drafters:
    """The drafters of an engine."""
    return LayerDrafters() if config.method == "mtp" else LookupDrafters(config)
