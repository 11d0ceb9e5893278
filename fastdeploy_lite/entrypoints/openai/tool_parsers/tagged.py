"""Calls as JSON between `<tool_call>` and `</tool_call>`: ERNIE's form and that of Hermes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from fastdeploy_lite.entrypoints.openai.tool_parsers.abstract_tool_parser import (
    ToolCallScan,
    ToolParser,
    ToolParserManager,
    ToolScan,
)
from fastdeploy_lite.reasoning.abs_reasoning_parsers import certain_prefix, may_become

OPEN, CLOSE, RESPONSE = "<tool_call>", "</tool_call>", "<response>"
_SPACE = " \t\r\n"
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?P<end>"?)|[{}\[\]]', re.DOTALL)
_DELIMITER = re.compile(r"[,}<\s]")


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


def _load(text: str) -> Any:
    """Parse JSON; None when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_call(members: list[_Member], closed: bool) -> tuple[ToolCallScan | None, bool]:
    """A call from its members: what is certain of it, and whether it is well-formed."""
    named = next((m for m in members if m.key == '"name"' and m.whole), None)
    name = _load(named.value) if named else None
    if not isinstance(name, str) or not name:
        return None, False
    call = ToolCallScan(name)
    given = next((m for m in members if m.key in ('"arguments"', '"parameters"')), None)
    if given is None or (given.whole and given.value == "null"):
        if closed:
            call.arguments = "{}"
        return call, closed
    if given.value.startswith("{"):
        call.arguments = given.value
        return call, closed and given.whole and isinstance(_load(given.value), dict)
    return _read_encoded(call, given, closed)


def _read_encoded(call: ToolCallScan, given: _Member, closed: bool) -> tuple[ToolCallScan, bool]:
    """Some models write the arguments as a string that holds JSON."""
    inner = _load(given.value) if given.whole else None
    if not isinstance(inner, str) or not isinstance(_load(inner), dict):
        return call, False
    call.arguments = inner
    return call, closed


def scan_calls(text: str, start: int) -> tuple[list[ToolCallScan], bool]:
    """Read the calls from the first opening tag on.

    Args:
        text: Output so far.
        start: Position of the first `<tool_call>`.

    Returns:
        The calls as far as they are certain, and whether all are well-formed and closed.
    """
    calls: list[ToolCallScan] = []
    while start >= 0:
        members, position = _members(text, start + len(OPEN))
        close = text.find(CLOSE, position)
        call, good = _read_call(members, close >= 0)
        if call is not None:
            calls.append(call)
        if not good or text[position:close].strip():
            return calls, False
        start = text.find(OPEN, close)
    return calls, True


class _TaggedToolParser(ToolParser):
    """Text before the first tag is content; text between and after calls is dropped."""

    def scan(self, text: str, final: bool) -> ToolScan:
        """See the base class."""
        start = text.find(OPEN)
        if start < 0:
            content = text if final else certain_prefix(text, [OPEN])
            # Blank text may turn out to be the blank before a call.
            return ToolScan(content if final else content.rstrip(_SPACE))
        calls, complete = scan_calls(text, start)
        if final and not calls:  # a tag, but no call: an answer after all
            return ToolScan(text)
        return ToolScan(text[:start].rstrip(_SPACE), calls, complete)


@ToolParserManager.register_module("hermes")
class HermesToolParser(_TaggedToolParser):
    """Text, then calls."""


@ToolParserManager.register_module("ernie-x1")
class ErnieX1ToolParser(_TaggedToolParser):
    """Calls or a `<response>`: a response before the first call means that there is no call."""

    def scan(self, text: str, final: bool) -> ToolScan:
        """See the base class."""
        response, call = text.find(RESPONSE), text.find(OPEN)
        if response >= 0 and (call < 0 or response < call):
            return ToolScan(text)
        if not final and call < 0:
            return ToolScan(certain_prefix(text, [OPEN, RESPONSE]).rstrip(_SPACE))
        return super().scan(text, final)


@ToolParserManager.register_module("ernie-45-vl-thinking")
class Ernie45VLThinkingToolParser(_TaggedToolParser):
    """Nothing but blank may stand before the first call; else the text is an answer."""

    def scan(self, text: str, final: bool) -> ToolScan:
        """See the base class."""
        first = text.lstrip(_SPACE)
        if first.startswith(OPEN):
            return super().scan(text, final)
        undecided = not final and (not first or may_become(first, [OPEN]))
        return ToolScan("" if undecided else text)
