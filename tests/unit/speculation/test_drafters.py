"""What the drafters guess, against searches written the plain way."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite._ops_cpu import AnswerIndex, NgramDrafter
from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.speculation.drafters import (
    ANSWER_PART,
    ANSWERS_AT_ONCE,
    MOST_INDEXED,
    READ_AT_ONCE,
    SEARCHED_COST,
    Drafters,
    LookupDrafters,
    _Reader,
    create_drafters,
)
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


def test_ngram_finds_what_is_far_away() -> None:
    drafter = NgramDrafter(2, 5)
    drafter.extend([1, 2, 3])
    drafter.extend(list(range(10, 5000)))
    drafter.extend([1, 2])
    assert drafter.propose(3) == ([3, 10, 11], 2)


@dataclass
class Said:
    """A sequence."""

    request_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int] = field(default_factory=list)


def guess(drafters: Drafters, text: Said, most: int) -> list[int]:
    return drafters.propose([text], most)[0].tokens


def test_suffix_learns_from_earlier_answers() -> None:
    drafters = create_drafters(SpeculativeConfig("suffix"))
    first = Said("a", [100, 101])
    assert guess(drafters, first, 4) == []
    first.output_token_ids += [5, 6, 7, 8, 9]
    drafters.finish(first)
    second = Said("b", [200, 101])
    assert guess(drafters, second, 4) == [5, 6, 7, 8]  # the prompt ends like the first one
    second.output_token_ids.append(6)
    assert guess(drafters, second, 8) == [7, 8, 9]


def test_suffix_learns_from_answers_that_were_never_guessed_about() -> None:
    config = SpeculativeConfig("suffix", suffix_decoding_min_token_prob=0.0)
    drafters = LookupDrafters(config)
    count = ANSWERS_AT_ONCE // 5 * 3
    for i in range(count):
        drafters.finish(Said(f"{i}", [1, 2], [5, 6, 100 + i]))
    assert guess(drafters, Said("x", [9, 5, 6]), 1) == [99 + count]  # the latest
    assert len(drafters._parts) == count - ANSWERS_AT_ONCE // 5 - 1  # one look reads no more
    guess(drafters, Said("y", [9]), 1)
    guess(drafters, Said("z", [9]), 1)
    assert not drafters._parts


def test_answers_that_wait_are_bounded() -> None:
    config = SpeculativeConfig("suffix", suffix_decoding_max_cached_tokens=1000)
    drafters = LookupDrafters(config)
    for i in range(100):
        drafters.finish(Said(f"{i}", [1], list(range(100 * i, 100 * i + 100))))
    assert sum(map(len, drafters._parts)) <= 1000
    assert guess(drafters, Said("x", [9998]), 4) == [9999]
    for method in ("ngram", "suffix"):
        config = SpeculativeConfig(method, suffix_decoding_max_cached_tokens=0)
        drafters = LookupDrafters(config)
        drafters.finish(Said("a", [1], [2, 3]))
        assert not drafters._parts


def test_a_long_answer_is_remembered_in_parts_that_go_on() -> None:
    drafters = create_drafters(SpeculativeConfig("suffix"))
    answer = list(range(10, 10 + 3 * ANSWER_PART))
    drafters.finish(Said("a", [5, 6], answer))
    for i in range(3):  # looks read it
        guess(drafters, Said(f"before{i}", [0]), 1)
    for i, token in enumerate(answer[:-1]):
        text = Said(f"{i}", [0, 0, token])
        assert guess(drafters, text, 1) == [token + 1], i


@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("length", [3 * READ_AT_ONCE, MOST_INDEXED + 1, 6 * MOST_INDEXED])
def test_a_long_prompt_is_read_over_several_looks(
    method: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafters = LookupDrafters(SpeculativeConfig(method))
    read = []

    def next_tokens(reader: _Reader, most: int) -> list[int]:
        read.append(whole(reader, most))
        return read[-1]

    whole = _Reader.next_tokens
    monkeypatch.setattr(_Reader, "next_tokens", next_tokens)
    text = Said("x", [*range(length), 70, 71, 72], [73])
    looks = 1
    while not guess(drafters, text, 2):
        looks += 1
    assert guess(drafters, text, 2) == [74, 75]
    text.output_token_ids += [74, 75]
    assert guess(drafters, text, 2) == [76, 77]
    assert [token for new in read for token in new] == [
        *text.prompt_token_ids,
        73,
        74,
        75,
    ]
    is_searched = method == "ngram" or length > MOST_INDEXED
    most = READ_AT_ONCE / SEARCHED_COST if is_searched else READ_AT_ONCE
    assert max(map(len, read)) <= most
    assert looks == -(-(length + 4) // most)


def test_sequences_share_what_one_look_reads() -> None:
    drafters = create_drafters(SpeculativeConfig("suffix"))
    long = [Said(f"{i}", [*range(READ_AT_ONCE), 70, 71]) for i in range(3)]
    short = Said("short", [1, 2, 3, 1, 2])
    found = [[draft.tokens for draft in drafters.propose([*long, short], 1)] for _ in range(4)]
    assert [draft for *_, draft in found] == [[3]] * 4
    assert [[bool(draft) for draft in drafts[:3]] for drafts in found] == [
        [False, False, False], [True, True, False], [True, True, True], [True, True, True],
    ]  # fmt: skip


@given(st.lists(st.integers(0, 2), min_size=11, max_size=40), st.integers(1, 6))
def test_a_text_above_the_limit_is_searched(text: list[int], most: int) -> None:
    drafter, plain = _ops_cpu.SuffixDrafter(AnswerIndex(100), 0.0, 10), NgramDrafter(1, 64)
    for start in range(0, len(text), 4):  # it grows beyond the limit
        drafter.extend(text[start : start + 4])
        plain.extend(text[start : start + 4])
    assert drafter.propose(most) == plain.propose(most)


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 64), (2, 5), (4, 4)])
def test_ngram_agrees_with_a_search_while_a_text_grows(shortest: int, longest: int) -> None:
    rng = random.Random(longest)
    text = [rng.randrange(4) for _ in range(700)]
    drafter = NgramDrafter(shortest, longest)
    for i in range(len(text)):
        drafter.extend(text[i : i + 1])
        if i % 7 == 0:
            known = text[: i + 1]
            assert drafter.propose(3) == looked_up(known, shortest, longest, 3), i


def test_a_word_that_stands_everywhere_takes_no_time() -> None:
    drafter = NgramDrafter(2, 5)
    drafter.extend([token for i in range(200_000) for token in (1, 10 + i)] + [1])
    started = time.process_time()
    for _ in range(50):
        assert drafter.propose(4) == ([], 0)
    assert time.process_time() - started < 0.02  # 0.1 s to look at every place of the word


def test_looking_is_bounded_in_a_text_with_endless_near_matches() -> None:
    drafter = NgramDrafter(2, 64)
    drafter.extend(([1] * 63 + [2]) * 60_000 + [3] + [1] * 63)
    started = time.process_time()
    tokens, matched = drafter.propose(4)
    assert matched >= 62
    assert len(tokens) == 4
    assert time.process_time() - started < 0.01  # 0.1 s to compare them all


def test_a_suffix_is_followed_while_the_answers_change() -> None:
    """The place of a sequence in the index of answers is kept from guess to guess."""
    drafters = create_drafters(SpeculativeConfig("suffix"))
    text = Said("x", [1, 2, 3])
    assert guess(drafters, text, 3) == []
    drafters.finish(Said("a", [7], [2, 3, 4, 5]))
    assert guess(drafters, text, 3) == [4, 5]
    text.output_token_ids.append(4)
    assert guess(drafters, text, 3) == [5]
    for i in range(3):
        drafters.finish(Said(f"b{i}", [8], [3, 4, 6]))
    assert guess(drafters, text, 3) == [5]  # three tokens agree with the first answer
    text.output_token_ids += [6, 3, 4]
    assert guess(drafters, text, 1) == [6]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=9), st.booleans()), max_size=8),
    st.integers(0, 60),
)
def test_a_followed_suffix_is_the_one_that_is_looked_up_anew(
    parts: list[tuple[list[int], bool]], most: int
) -> None:
    index = _ops_cpu.AnswerIndex(most)
    drafter = _ops_cpu.SuffixDrafter(index, 0.0, 1000)
    read: list[int] = []
    for part, is_answer in parts:
        if is_answer:
            index.add(part)
        else:
            drafter.extend(part)
            read += part
        fresh = _ops_cpu.SuffixDrafter(index, 0.0, 1000)
        fresh.extend(read)
        assert drafter.propose(4) == fresh.propose(4)


def test_suffix_prefers_what_is_likelier_to_come_true() -> None:
    drafters = create_drafters(SpeculativeConfig("suffix"))
    for i in range(3):
        drafters.finish(Said(f"{i}", [1], [2, 3, 4, 5]))
    assert guess(drafters, Said("x", [3, 9, 8, 3, 7, 6, 2, 3]), 4) == [4, 5]


def test_suffix_stops_where_the_text_branches() -> None:
    config = SpeculativeConfig("suffix", suffix_decoding_min_token_prob=0.6)
    text = Said("x", [1, 2, 3, 1, 2, 4, 1, 2, 5, 1])
    assert guess(create_drafters(config), text, 4) == [2]


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
        ({"method": "ngram", "prompt_lookup": 3}, "unknown keys 'prompt_lookup', expected some of"),
        ({"method": "ngram", 5: 3}, "unknown keys 5, expected some of adaptive, "),
    ],
)
def test_refusals(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig.from_mapping(values)


def test_what_a_method_does_not_look_at_is_said(caplog: pytest.LogCaptureFixture) -> None:
    values: dict[str, object] = {"max_ngram_size": 9, "quantization": "wint4", "model": "m"}
    expected = {"ngram": {"quantization", "model"}, "suffix": set(values), "naive": set(values)}
    for method, idle in expected.items():
        caplog.clear()
        with caplog.at_level("WARNING", logger="fastdeploy"):
            SpeculativeConfig.from_mapping({"method": method, **values})
        assert {record.args[0] for record in caplog.records if record.args} == idle
    caplog.clear()
    with caplog.at_level("WARNING", logger="fastdeploy"):
        SpeculativeConfig.from_mapping({"method": "suffix", "adaptive": False})
    assert not caplog.records
