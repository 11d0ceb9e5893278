"""What the drafters guess, against searches written the plain way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.speculation.drafters import AnswerIndex, DrafterFactory, NgramDrafter
from fastdeploy_lite.utils.errors import ConfigError

texts = st.lists(st.integers(0, 2), max_size=40)


def looked_up(text: list[int], shortest: int, longest: int, most: int) -> tuple[list[int], int]:
    """The longest, then latest, earlier occurrence of the text's end; a loop goes round."""
    for size in range(min(longest, len(text) - 1), shortest - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                grown = list(text)
                for i in range(most):
                    grown.append(grown[end + i])
                return grown[len(text) :], size
    return [], 0


@given(texts, st.integers(1, 3), st.integers(0, 4), st.integers(1, 6), st.data())
def test_ngram_copies_what_followed_the_longest_latest_match(
    text: list[int], shortest: int, extra: int, most: int, data: st.DataObject
) -> None:
    drafter = NgramDrafter(shortest, shortest + extra)
    cut = data.draw(st.integers(0, len(text)))
    drafter.extend(text[:cut])
    for token in text[cut:]:
        drafter.extend([token])
    tokens, matched = looked_up(text, shortest, shortest + extra, most)
    assert drafter.propose(most) == (tokens, matched)


def test_ngram_grows_past_its_first_buffer() -> None:
    drafter = NgramDrafter(2, 5)
    drafter.extend([1, 2, 3])
    drafter.extend(list(range(10, 5000)))
    drafter.extend([1, 2])
    assert drafter.propose(3) == ([3, 10, 11], 2)


def test_suffix_learns_from_earlier_answers() -> None:
    factory = DrafterFactory(SpeculativeConfig("suffix"))
    first = factory.create([100, 101])
    assert first.propose(4).tokens == []
    first.extend([5, 6, 7])
    first.extend([8, 9])
    first.finish()
    second = factory.create([200, 101])
    assert second.propose(4).tokens == [5, 6, 7, 8]  # the prompt ends like the first one
    second.extend([6])
    assert second.propose(8).tokens == [7, 8, 9]


def test_suffix_prefers_what_is_likelier_to_come_true() -> None:
    factory = DrafterFactory(SpeculativeConfig("suffix"))
    for _ in range(3):
        earlier = factory.create([1])
        earlier.extend([2, 3, 4, 5])
        earlier.finish()
    drafter = factory.create([3, 9, 8, 3, 7, 6, 2, 3])
    assert drafter.propose(4).tokens == [4, 5]


def test_suffix_stops_where_the_text_branches() -> None:
    factory = DrafterFactory(SpeculativeConfig("suffix", suffix_decoding_min_token_prob=0.6))
    drafter = factory.create([1, 2, 3, 1, 2, 4, 1, 2, 5, 1])
    assert drafter.propose(4).tokens == [2]


@given(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=30), st.integers(0, 100))
def test_the_memory_of_answers_is_bounded(answers: list[list[int]], most: int) -> None:
    index = AnswerIndex(most)
    for answer in answers:
        index.add(answer)
        assert index.num_tokens <= most
    newest = answers[-1][-(most // 2) :] if answers and most >= 2 else []
    if len(newest) > 1:
        assert index.propose(newest[:-1], 1, 0.0).tokens


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs a method"),
        ({"method": "magic"}, "found 'magic', expected one of ngram, suffix, mtp, naive"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "found 0, expected an integer from 1"),
        ({"method": "ngram", "num_speculative_tokens": 33}, "from 1 to 32"),
        ({"method": "ngram", "num_speculative_tokens": True}, "found True"),
        ({"method": "ngram", "min_ngram_size": 6}, "max_ngram_size: found 5"),
        ({"method": "suffix", "suffix_decoding_min_token_prob": 2}, r"a number in \[0, 1\]"),
        ({"method": "suffix", "adaptive": 1}, "adaptive: found 1, expected true or false"),
        ({"method": "ngram", "prompt_lookup": 3}, "unknown keys prompt_lookup"),
    ],
)
def test_refusals(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig.from_mapping(values)
