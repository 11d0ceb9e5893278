"""Guesses of the next tokens of sequences, from their own tokens, earlier answers or a layer."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.speculation.config import SpeculativeConfig

# An answer is remembered with the end of its prompt, so that its first words can be guessed.
PROMPT_TOKENS_KEPT = 8
# An answer that is longer than this is remembered in parts, which begin with the end of the one
# before.
ANSWER_PART = 512
# Tokens that one look indexes, about half a millisecond, and those of answers among them: looks are
# rare while nothing is gained, and one that only indexes answers finds nothing.
READ_AT_ONCE, ANSWERS_AT_ONCE = 2048, 256
# So many new tokens of a sequence are always read: it is up to date, or will be.
ALWAYS_READ = 32
# Texts up to this length are indexed. Longer ones are only searched, which takes 20 bytes a token
# instead of 150, and this share of the time to read.
MOST_INDEXED, SEARCHED_COST = 16_384, 1 / 8


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


class _Reader:
    """Reads one sequence for its drafter, as far as there is time."""

    __slots__ = ("_text", "cost", "drafter", "is_behind", "read")

    def __init__(self, text: Text, drafter: _ops_cpu.Drafter, cost: float) -> None:
        self.drafter, self.cost = drafter, cost
        self.read = 0  # tokens
        self.is_behind = True  # tokens of the sequence are not read yet
        self._text = text

    def next_tokens(self, most: int) -> Sequence[int]:
        """The next tokens to read, at most so many."""
        prompt, output = self._text.prompt_token_ids, self._text.output_token_ids
        start, known = self.read, len(prompt)
        unread = known + len(output) - start
        self.read = end = start + min(unread, most)
        self.is_behind = unread > most
        if start >= known:
            return output[start - known : end - known]
        return [*prompt[start:end], *output[: max(end - known, 0)]]


class LookupDrafters:
    """Looks up what followed before: "ngram" in a sequence itself, "suffix" in answers, too.

    A sequence is read when somebody asks for a guess, so that one that is never asked costs
    nothing, and a long one over several looks, so that none of them holds up a step.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._answers = _ops_cpu.AnswerIndex(config.suffix_decoding_max_cached_tokens)
        self._parts: deque[array[int]] = deque()  # of answers, to be indexed
        self._num_waiting = 0  # tokens of them
        self._readers: dict[str, _Reader] = {}

    def propose(self, texts: Sequence[Text], most: int) -> list[Draft]:
        """See Drafters; one call of native code for all that are read to their end."""
        left: float = READ_AT_ONCE - self._index_answers(ANSWERS_AT_ONCE)
        drafts = [NOTHING] * len(texts)
        ready, drafters, news = [], [], []
        for index, text in enumerate(texts):
            reader = self._reader(text)
            new = reader.next_tokens(max(int(left / reader.cost), ALWAYS_READ))
            left -= reader.cost * len(new)
            if reader.is_behind:
                reader.drafter.extend(new)
                continue
            ready.append(index)
            drafters.append(reader.drafter)
            news.append(new)
        for index, found in zip(ready, _ops_cpu.propose_all(drafters, news, most), strict=True):
            drafts[index] = Draft(*found)
        return drafts

    def offer(self, text: Text, tokens: Sequence[int]) -> None:
        """See Drafters; there is no layer."""

    def finish(self, text: Text) -> None:
        """See Drafters; the answer becomes something that others may repeat."""
        self._readers.pop(text.request_id, None)
        most = self._config.suffix_decoding_max_cached_tokens
        if self._config.method != "suffix" or not most:
            return
        answer = array("i", [*text.prompt_token_ids[-PROMPT_TOKENS_KEPT:], *text.output_token_ids])
        for start in range(0, max(len(answer) - PROMPT_TOKENS_KEPT, 1), ANSWER_PART):
            part = answer[start : start + PROMPT_TOKENS_KEPT + ANSWER_PART]
            self._parts.append(part)
            self._num_waiting += len(part)
        while self._num_waiting > most and len(self._parts) > 1:  # nor would the index keep it
            self._num_waiting -= len(self._parts.popleft())

    def _index_answers(self, most: int) -> int:
        """Index at least `most` tokens of what waits, the latest first; how many they were."""
        indexed, parts = 0, []
        while self._parts and indexed < most:
            parts.append(self._parts.pop())
            indexed += len(parts[-1])
        for part in reversed(parts):
            self._answers.add(part)
        self._num_waiting -= indexed
        return indexed

    def _reader(self, text: Text) -> _Reader:
        reader = self._readers.get(text.request_id)
        if reader is None:
            is_long = len(text.prompt_token_ids) > MOST_INDEXED or self._config.method == "ngram"
            drafter = self.create(0 if is_long else MOST_INDEXED)
            reader = _Reader(text, drafter, SEARCHED_COST if is_long else 1.0)
            self._readers[text.request_id] = reader
        return reader

    def create(self, most_indexed: int = MOST_INDEXED) -> _ops_cpu.Drafter:
        """A drafter that has read nothing; above `most_indexed` tokens it only searches."""
        config = self._config
        if config.method == "suffix":
            least = config.suffix_decoding_min_token_prob
            return _ops_cpu.SuffixDrafter(self._answers, least, most_indexed)
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
