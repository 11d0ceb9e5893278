"""The terminal's conversation: what is sent, kept, dropped, saved; Markdown in blocks."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_lite.entrypoints.cli.client import api_base
from fastdeploy_lite.entrypoints.cli.conversation import AnswerText, Conversation, Message, converse
from fastdeploy_lite.entrypoints.cli.terminal import split_blocks
from fastdeploy_lite.utils.errors import FastDeployError, RequestError


class Echo:
    """Repeats the last message, one letter at a time; a token is a letter."""

    model = "echo"

    def __init__(self, limit: int, reserve: int = 0, counts: bool = True) -> None:
        self.limit, self.reserve, self.counts = limit, reserve, counts
        self.sent: list[list[Message]] = []
        self.closed = 0

    def usage(self, messages: list[Message]) -> tuple[int, int] | None:
        size = sum(len(m["content"]) for m in messages)
        return (size, self.limit) if self.counts else None

    def answer(self, messages: list[Message]) -> Generator[AnswerText, None, None]:
        if sum(len(m["content"]) for m in messages) > self.limit:
            raise RequestError("Input text is too long")
        self.sent.append(list(messages))
        try:
            for letter in messages[-1]["content"]:
                yield AnswerText(letter)
        finally:
            self.closed += 1


def say(backend: Echo, conversation: Conversation, text: str) -> tuple[str, list[str]]:
    notes: list[str] = []
    answer = "".join(p.text for p in converse(backend, conversation, text, notes))
    return answer, notes


def test_a_turn_is_recorded() -> None:
    backend, conversation = Echo(100), Conversation()
    conversation.set_system("s")
    assert say(backend, conversation, "ab") == ("ab", [])
    assert say(backend, conversation, "c") == ("c", [])
    assert [m["content"] for m in backend.sent[1]] == ["s", "ab", "ab", "c"]
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "s"}]
    conversation.set_system("")
    assert conversation.messages == []


@pytest.mark.parametrize("counts", [True, False])
def test_oldest_turns_are_dropped_with_a_note(counts: bool) -> None:
    """Whether the backend counts tokens beforehand, or refuses."""
    backend, conversation = Echo(10, counts=counts), Conversation()
    conversation.set_system("s")
    assert say(backend, conversation, "aaa")[1] == []
    answer, notes = say(backend, conversation, "bbbb")
    assert answer == "bbbb"
    assert notes == ["the context is full: the 2 oldest messages are no longer sent"]
    assert [m["content"] for m in backend.sent[-1]] == ["s", "bbbb"]
    assert len(conversation.messages) == 5  # nothing is forgotten, only not sent
    _, notes = say(backend, conversation, "cc")
    assert notes == ["the context is full: the 2 oldest messages are no longer sent"]
    assert [m["content"] for m in backend.sent[-1]] == ["s", "cc"]


def test_room_for_the_answer_is_kept() -> None:
    backend, conversation = Echo(20, reserve=1000), Conversation()
    say(backend, conversation, "aaaa")
    say(backend, conversation, "bbbb")
    assert say(backend, conversation, "cc")[1] == [
        "the context is full: the 2 oldest messages are no longer sent"
    ]


@pytest.mark.parametrize("counts", [True, False])
def test_a_message_that_never_fits_is_refused_and_forgotten(counts: bool) -> None:
    backend, conversation = Echo(3, counts=counts), Conversation()
    say(backend, conversation, "a")
    with pytest.raises(RequestError):
        say(backend, conversation, "bbbbbb")
    assert [m["content"] for m in conversation.messages] == ["a", "a"]


def test_a_stopped_answer_stays_as_far_as_it_came() -> None:
    backend, conversation = Echo(100), Conversation()
    pieces = converse(backend, conversation, "abcdef", [])
    assert [next(pieces).text, next(pieces).text] == ["a", "b"]
    pieces.close()
    assert backend.closed == 1
    assert conversation.messages[-1] == {"role": "assistant", "content": "ab"}


def test_save_and_load(tmp_path: Path) -> None:
    first, second = Conversation(), Conversation()
    first.set_system("系统")
    say(Echo(100), first, "问")
    first.save(tmp_path / "c.json")
    second.load(tmp_path / "c.json")
    assert second.messages == first.messages
    (tmp_path / "list.json").write_text(json.dumps(first.messages))
    second.load(tmp_path / "list.json")
    assert second.messages == first.messages


@pytest.mark.parametrize(
    "text",
    ["", "{", "3", "{}", '[{"role": "user"}]', '[{"role": "x", "content": "y"}]', "[[]]",
     '[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]'],
)  # fmt: skip
def test_other_files_are_refused_and_change_nothing(tmp_path: Path, text: str) -> None:
    path, conversation = tmp_path / "bad.json", Conversation()
    conversation.add("user", "kept")
    path.write_text(text)
    with pytest.raises(FastDeployError, match=r"bad\.json") as caught:
        conversation.load(path)
    assert "\n" not in str(caught.value)
    assert conversation.messages == [{"role": "user", "content": "kept"}]


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(FastDeployError, match="cannot read"):
        Conversation().load(tmp_path / "absent")
    with pytest.raises(FastDeployError, match="cannot write"):
        Conversation().save(tmp_path / "absent" / "x")


@pytest.mark.parametrize(
    ("given_url", "base"),
    [("localhost:8000", "http://localhost:8000/v1"), ("http://h/", "http://h/v1"),
     ("https://h/v1/", "https://h/v1"), ("http://h/llm", "http://h/llm/v1")],
)  # fmt: skip
def test_addresses_with_and_without_v1(given_url: str, base: str) -> None:
    assert api_base(given_url) == base


@given(st.lists(st.sampled_from(["a", "\n", "```", "~~~", " ", "- x"])).map("".join))
def test_blocks_are_a_partition_and_never_change_again(text: str) -> None:
    whole, rest = split_blocks(text)
    assert whole + rest == text
    for end in range(len(text)):
        assert whole.startswith(split_blocks(text[:end])[0])


def test_a_fence_is_not_cut() -> None:
    assert split_blocks("a\n\n```\nx\n\ny") == ("a\n\n", "```\nx\n\ny")
    assert split_blocks("```\nx\n\ny\n```\n\nb") == ("```\nx\n\ny\n```\n\n", "b")
