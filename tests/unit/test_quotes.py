"""Quotes of what was found cost what they show, not what was found."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fastdeploy_lite.utils.errors import one_line, quote

CASES: list[Any] = [
    [1.23456789] * 300_000, [[[1.5] * 1000] * 1000], {f"key {i}": i for i in range(200_000)},
    "中" * 1_000_000, "\x85" * 1_000_000, b"\x00" * 1_000_000, [10**4000] * 500, ["\n" * 10**6] * 9,
    (("a" * 10**6, 1),) * 10**5, {"a" * 10**6: 1}, [[]] * 10**6,
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_is_long_is_not_read_to_its_end(number: int) -> None:
    started = time.thread_time()
    text = quote(CASES[number])
    assert time.thread_time() - started < 0.02  # reading all of it takes ten times as long
    assert len(text) == 120
    assert text.endswith("...")
    assert text.isprintable()


@pytest.mark.parametrize(
    "value",
    [1, -1.5, None, True, "a\nb", "'", b"\x00", [1, "a", {"b": (2,)}], {}, [], set(), 10**99],
)
def test_what_is_short_is_shown_whole(value: Any) -> None:
    assert quote(value) == one_line(repr(value))


@pytest.mark.parametrize(
    "value", ["x" * 500, list(range(100)), {str(i): [i] for i in range(99)}, ["ab" * 40] * 9]
)
def test_what_is_cut_begins_as_the_whole(value: Any) -> None:
    assert quote(value) == repr(value)[:117] + "..."


def test_what_has_no_text_is_named_by_its_kind() -> None:
    endless: list[Any] = []
    for _ in range(5000):
        endless = [endless]
    assert len(quote(endless)) == 120 or quote(endless) == "<list>"
    assert quote(10**5000) == "<int>"


def test_a_line_stays_one() -> None:
    assert one_line("a b") == "a b"
    assert one_line("a\nb\x85\u2028") == "a\\nb\\x85\\u2028"
    assert one_line(7) == "7"
