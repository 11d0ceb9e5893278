"""Calls as JSON between `<tool_call>` and `</tool_call>`: ERNIE's form and that of Hermes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from fastdeploy_lite.entrypoints.openai.protocol import (
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from fastdeploy_lite.entrypoints.openai.tool_parsers.abstract_tool_parser import (
    CallStream,
    Found,
    FoundCall,
    ToolParser,
    ToolParserManager,
)
from fastdeploy_lite.utils.marker_search import MarkerSearch, held_length

OPEN, CLOSE, RESPONSE = "<tool_call>", "</tool_call>", "<response>"
_SPACE = " \t\r\n"
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?P<end>"?)|[{}\[\]]', re.DOTALL)
_DELIMITER = re.compile(r"[,}<\s]")
_IN_STRING = re.compile(r'\\.|"', re.DOTALL)
_OUT_OF_STRING = re.compile(f'"|{CLOSE}')


@dataclass(slots=True)
class _Member:
    """A member of the call's object: its key, the JSON text of its value, whether that is whole."""

    key: str
    value: str
    whole: bool


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _value_end(text: str, start: int) -> int:
    """Position after the JSON value at `start`, or -1 when it is not whole.

    Containers end where their brackets balance, strings at their quote, other values before a
    delimiter.  Whether the value is valid JSON is not asked here.
    """
    if text[start : start + 1] not in ("{", "[", '"'):
        delimiter = _DELIMITER.search(text, start)
        return delimiter.start() if delimiter else -1
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(text, start):
        mark = token.group()
        if mark[0] == '"':
            if not token.group("end"):
                return -1
        else:
            depth += 1 if mark in "{[" else -1
        if depth <= 0:
            return token.end()
    return -1


def _members(text: str, position: int) -> tuple[list[_Member], int]:
    """Read `{"key": value, …`; the outer braces may be missing.

    Returns:
        The members and the position where reading stopped: after the object, at the first thing
        that is not a member, or at the end of the text.
    """
    members: list[_Member] = []
    position = _skip(text, position)
    if text.startswith("{", position):
        position = _skip(text, position + 1)
    while text.startswith('"', position):
        key_end = _value_end(text, position)
        colon = _skip(text, key_end) if key_end >= 0 else len(text)
        if not text.startswith(":", colon):
            break
        start = _skip(text, colon + 1)
        end = _value_end(text, start)
        whole = end >= 0
        members.append(
            _Member(text[position:key_end], text[start:end] if whole else text[start:], whole)
        )
        if not whole:
            return members, len(text)
        position = _skip(text, end)
        if not text.startswith(",", position):
            break
        position = _skip(text, position + 1)
    if text.startswith("}", position):
        position += 1
    return members, position


def load_json(text: str) -> Any:
    """Parse JSON that any other parser reads, too; None when it is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def is_encodable(text: str) -> bool:
    """Whether a text that was written with escapes is one: they can spell lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_name(members: list[_Member]) -> str | None:
    named = next((m for m in members if m.key == '"name"' and m.whole), None)
    name = load_json(named.value) if named else None
    return name if isinstance(name, str) and name and is_encodable(name) else None


def _read_arguments(members: list[_Member]) -> str | None:
    """The JSON text of the arguments, an empty object where there are none."""
    given = next((m for m in members if m.key in ('"arguments"', '"parameters"')), None)
    if given is None or given.value == "null":
        return "{}"
    text: Any = given.value
    if text.startswith('"'):  # some models write them as a string that holds JSON
        text = load_json(text)
    if not isinstance(text, str) or not isinstance(load_json(text), dict):
        return None
    return text if is_encodable(text) else None


def _read_call(body: str) -> FoundCall | None:
    """The call between two tags; None when it is malformed."""
    members, end = _members(body, 0)
    name, arguments = _read_name(members), _read_arguments(members)
    if name is None or arguments is None or body[end:].strip(_SPACE):
        return None
    return FoundCall(name, arguments)


class _OpenCall:
    """The text after an opening tag, until it is known to be a call or none."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._tail = ""  # may be the beginning of an escape or of the closing tag
        self._begun = False
        self._in_string = False

    def feed(self, piece: str) -> tuple[FoundCall | None, str, str] | None:
        """Take in the next piece.

        Returns:
            None while it is open; then the call or None, its text, and what follows it.
        """
        text, self._tail = self._tail + piece, ""
        first = text if self._begun else text.lstrip(_SPACE)
        if not first:
            self._parts.append(text)
            return None
        if not self._begun and first[0] not in '{"':  # a tag, but no call: an answer after all
            return None, "".join(self._parts), text
        self._begun = True
        close = self._find_close(text)
        if close < 0:
            return None
        body = "".join(self._parts) + text[:close]
        return _read_call(body), body + CLOSE, text[close + len(CLOSE) :]

    def _find_close(self, text: str) -> int:
        position = 0
        while True:
            expression = _IN_STRING if self._in_string else _OUT_OF_STRING
            found = expression.search(text, position)
            if found is None:
                break
            if found.group() == CLOSE:
                return found.start()
            position = found.end()
            if found.group() == '"':
                self._in_string = not self._in_string
        rest = text[max(position, len(text) - len(CLOSE)) :]
        held = held_length(rest, ("\\_",) if self._in_string else (CLOSE,))
        self._parts.append(text[: len(text) - held])
        self._tail = text[len(text) - held :]
        return -1

    def text(self) -> str:
        """All of it."""
        return "".join(self._parts) + self._tail


class TaggedCalls:
    """Finds calls between tags.

    A closed and well-formed call is a call; everything else is content, wherever it stands, but the
    blanks before a call and at the end of an output with calls.

    Args:
        blank_before: Nothing but blanks may stand before the first call; else there is none.
        instead: A marker before the first call that means that there is none.
    """

    def __init__(self, blank_before: bool = False, instead: tuple[str, ...] = ()) -> None:
        self._blank_before = blank_before
        self._search = MarkerSearch(OPEN, *instead)
        self._call: _OpenCall | None = None
        self._blanks: list[str] = []
        self._said = self._called = self._is_answer = False

    def feed(self, piece: str, final: bool) -> Found:
        """See `CallStream`."""
        new = Found()
        content: list[str] = []
        rest: str | None = piece
        while rest is not None:
            rest = self._advance(rest, final, new.calls, content)
        if final:
            self._close(content)
        new.content = "".join(content)
        return new

    def _advance(
        self, piece: str, final: bool, calls: list[FoundCall], content: list[str]
    ) -> str | None:
        """Read up to the next tag; returns what is left to read, None for nothing."""
        if self._is_answer:
            content.append(piece)
            return None
        if self._call is None:
            return self._read_text(piece, final, content)
        ended = self._call.feed(piece)
        if ended is None:
            return None
        self._call = None
        call, text, rest = ended
        if call is None:
            self._say(OPEN + text, content)
        else:
            calls.append(call)
            self._called = True
            self._blanks.clear()
            self._search = MarkerSearch(OPEN)
        return rest

    def _read_text(self, piece: str, final: bool, content: list[str]) -> str | None:
        before, marker, rest = self._search.feed(piece, final)
        self._say(before, content)
        if not marker:
            return None
        if marker != OPEN or (self._blank_before and self._said and not self._called):
            self._is_answer = True
            content.extend(self._blanks)
            self._blanks.clear()
            return marker + rest
        self._call = _OpenCall()
        return rest

    def _say(self, text: str, content: list[str]) -> None:
        """Give text out; blanks at its end may turn out to stand before a call."""
        said = text.rstrip(_SPACE)
        if said:
            content.extend(self._blanks)
            self._blanks.clear()
            content.append(said)
            self._said = True
        self._blanks.append(text[len(said) :])

    def _close(self, content: list[str]) -> None:
        if self._call is not None:  # never closed
            self._say(OPEN + self._call.text(), content)
            self._call = None
        if not self._called:
            content.extend(self._blanks)
        self._blanks.clear()


class _TaggedToolParser(ToolParser):
    """See `TaggedCalls`."""

    def begin(self) -> CallStream:
        """See the base class."""
        return TaggedCalls()


@ToolParserManager.register_module("hermes")
class HermesToolParser(_TaggedToolParser):
    """Text and calls."""


@ToolParserManager.register_module("ernie-x1")
class ErnieX1ToolParser(_TaggedToolParser):
    """Calls or a `<response>`: a response before the first call means that there is no call."""

    def begin(self) -> CallStream:
        """See the base class."""
        return TaggedCalls(instead=(RESPONSE,))

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        """See the base class; a call that was cut off shows partially, though `tools_called` is
        false, as upstream's."""
        found = super().extract_tool_calls(model_output, request)
        start = model_output.find(OPEN)
        if found.tools_called or start < 0 or RESPONSE in model_output[:start]:
            return found
        members, _ = _members(model_output, start + len(OPEN))
        name = _read_name(members)
        given = next((m.value for m in members if m.key == '"arguments"'), "")
        if name is not None:
            found.tool_calls = [ToolCall(function=FunctionCall(name=name, arguments=given))]
        return found


@ToolParserManager.register_module("ernie-45-vl-thinking")
class Ernie45VLThinkingToolParser(_TaggedToolParser):
    """Nothing but blank may stand before the first call; else the text is an answer."""

    def begin(self) -> CallStream:
        """See the base class."""
        return TaggedCalls(blank_before=True)
