"""The suffix index against a search through all occurrences."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_lite import _ops_cpu

Text = list[int]
short_texts = st.lists(st.integers(0, 2), max_size=24)


def occurrences(texts: Sequence[Text], words: Text) -> list[int]:
    """Global positions where `words` ends, in the order in which the texts were read."""
    ends, offset = [], 0
    for text in texts:
        for end in range(len(words), len(text) + 1):
            if text[end - len(words) : end] == words:
                ends.append(offset + end)
        offset += len(text)
    return ends


def followed(texts: Sequence[Text], words: Text) -> dict[int, list[int]]:
    """Tokens that follow `words` somewhere, and where the longer words end."""
    found = {c: occurrences(texts, [*words, c]) for c in range(3)}
    return {c: ends for c, ends in found.items() if ends}


def search(
    texts: Sequence[Text], ends: Sequence[Text], most: int, least_share: float
) -> tuple[Text, list[float], int]:
    """The draft by its definition; `ends` are the candidates for the context, longest first."""
    words = next((w for w in ends if w and followed(texts, w)), [])
    if not words:
        return [], [], 0
    matched, tokens, shares, share = len(words), [], [], 1.0
    while len(tokens) < most:
        words = next((words[i:] for i in range(len(words)) if followed(texts, words[i:])), [])
        if not words:
            break
        choices = followed(texts, words)
        best = max(choices, key=lambda c: (len(choices[c]), choices[c][-1]))
        share *= len(choices[best]) / sum(map(len, choices.values()))
        if share < least_share:
            break
        tokens.append(best)
        shares.append(share)
        words = [*words, best]
    return tokens, shares, matched


@given(st.lists(short_texts, min_size=1, max_size=4), short_texts, st.integers(0, 6))
def test_a_proposal_is_what_followed_most_often(
    texts: list[Text], context: Text, most: int
) -> None:
    index = _ops_cpu.SuffixIndex()
    for text in texts:
        index.start_sequence()
        for token in text:
            index.extend([token])
    for least_share in (0.0, 0.3701):  # no fraction that rounding could move across
        draft = index.propose(context, most, least_share)
        ends = [context[i:] for i in range(len(context))]
        tokens, shares, matched = search(texts, ends, most, least_share)
        assert (draft.tokens, draft.matched) == (tokens, matched)
        assert draft.shares == pytest.approx(shares)
    assert index.num_tokens == sum(map(len, texts))


@given(short_texts, st.integers(0, 6))
def test_a_repeat_is_the_longest_end_that_occurred_before(text: Text, most: int) -> None:
    index = _ops_cpu.SuffixIndex()
    index.extend(text)
    ends = [text[i:] for i in range(1, len(text)) if len(occurrences([text], text[i:])) > 1]
    tokens, shares, matched = search([text], ends, most, 0.0)
    draft = index.propose_repeat(most, 0.0)
    assert (draft.tokens, draft.matched) == (tokens, matched)
    assert draft.shares == pytest.approx(shares)


def test_a_boundary_is_not_crossed() -> None:
    index = _ops_cpu.SuffixIndex()
    index.extend([1, 2])
    index.start_sequence()
    index.extend([3, 4])
    assert index.propose([2], 4, 0.0).tokens == []
    assert index.propose([9, 3], 4, 0.0).tokens == [4]


@pytest.mark.parametrize("kind", ["one token", "period 7", "random"])
def test_the_index_is_linear_in_time_and_memory(kind: str) -> None:
    rng = np.random.default_rng(5)
    count = 100_000
    texts = {
        "one token": np.zeros(count, int),
        "period 7": np.arange(count) % 7,
        "random": rng.integers(0, 100_000, count),
    }
    index = _ops_cpu.SuffixIndex()
    started = time.process_time()
    index.extend(texts[kind].tolist())
    assert time.process_time() - started < 2.0  # 0.05 s to 0.2 s on an idle core
    assert index.nbytes < 300 * count
    assert len(index.propose_repeat(8, 0.0).tokens) == (8 if kind != "random" else 0)
