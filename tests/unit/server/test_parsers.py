"""Reasoning and tool parsers: upstream's rules, and streams that end like the whole text."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_lite.entrypoints.openai.output_parser import (
    OutputParser,
    OutputParsers,
    thinking_switch,
)
from fastdeploy_lite.entrypoints.openai.tool_parsers import ToolParserManager
from fastdeploy_lite.reasoning import ReasoningParserManager
from fastdeploy_lite.utils.errors import ConfigError

REASONING = sorted(ReasoningParserManager.reasoning_parsers)
TOOLS = ["ernie-45-vl-thinking", "ernie-x1", "hermes"]
CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京", "days": 2}}\n</tool_call>'
)


def reason(name: str, text: str, status: str | None = None) -> tuple[str, str]:
    parser = ReasoningParserManager.get_reasoning_parser(name)(None)
    return parser.extract_reasoning_content(text, None, status)


@pytest.mark.parametrize("name", ["ernie-45-vl", "ernie-45-vl-thinking", "qwen3", "deepseek_r1"])
def test_text_before_the_marker_is_reasoning(name: str) -> None:
    assert reason(name, "because</think>so", "think_start") == ("because", "so")


def test_ernie_45_vl_without_thinking_is_content() -> None:
    assert reason("ernie-45-vl", "a</think>b", "think_end") == ("", "a</think>b")


def test_ernie_45_vl_without_marker_is_reasoning() -> None:
    assert reason("ernie-45-vl", "still thinking", "think_start") == ("still thinking", "")


def test_ernie_45_vl_thinking_without_marker_is_content() -> None:
    assert reason("ernie-45-vl-thinking", "an answer") == ("", "an answer")


def test_ernie_45_vl_thinking_tool_call_is_no_content() -> None:
    assert reason("ernie-45-vl-thinking", f"why</think>\n\n{CALL}") == ("why", "")


def test_ernie_45_vl_thinking_is_found_under_the_typo_too() -> None:
    get = ReasoningParserManager.get_reasoning_parser
    assert get("erine-45-vl-thinking") is get("ernie-45-vl-thinking")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a</think>\n<response>\nhello\n</response>\n", ("a", "hello")),
        ("a</think><response>unclosed", ("a", "unclosed")),
        ("a</think>\n\n" + CALL, ("a", "")),
        ("never ends", ("never ends", "")),
        ("a</think>\nno tag", ("a", "no tag")),
    ],
)
def test_ernie_x1(text: str, expected: tuple[str, str]) -> None:
    assert reason("ernie-x1", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think>b", ("a", "b")),
        ("a</think>b", ("a", "b")),
        ("<think>never ends", ("", "<think>never ends")),
    ],
)
def test_qwen3(text: str, expected: tuple[str, str]) -> None:
    assert reason("qwen3", text) == expected


def test_generic_think_parser() -> None:
    assert reason("think", "\n<think>a</think>b") == ("a", "b")
    assert reason("think", "<think>cut off") == ("cut off", "")
    assert reason("think", "no marker </think>") == ("", "no marker </think>")


def test_a_tokenizer_without_the_marker_is_refused() -> None:
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(ConfigError, match="</think>"):
        ReasoningParserManager.get_reasoning_parser("ernie-x1")(Tokenizer())


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="ernie-45-vl-thinking"):
        ReasoningParserManager.get_reasoning_parser("nope")
    with pytest.raises(ConfigError, match="hermes"):
        ToolParserManager.get_tool_parser("nope")


@pytest.mark.parametrize("name", TOOLS)
def test_one_call(name: str) -> None:
    found = ToolParserManager.get_tool_parser(name)(None).extract_tool_calls(CALL, None)
    assert found.tools_called
    assert found.content == ""
    [call] = found.tool_calls
    assert call.id.startswith("chatcmpl-tool-")
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "北京", "days": 2}


@pytest.mark.parametrize("name", TOOLS)
def test_several_calls_and_missing_braces(name: str) -> None:
    text = CALL + '\n<tool_call>"name": "b", "arguments": {"x": [1, "}</tool_call>"]}</tool_call>'
    found = ToolParserManager.get_tool_parser(name)(None).extract_tool_calls(text, None)
    assert found.tools_called
    assert [c.function.name for c in found.tool_calls] == ["get_weather", "b"]
    assert json.loads(found.tool_calls[1].function.arguments) == {"x": [1, "}</tool_call>"]}


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {"a": "unfin',
        '<tool_call>{"name": "f", "arguments": {"a": 1}}',
        '<tool_call>{"name": "f", "arguments": {a: 1}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>nothing</tool_call>",
        '<tool_call>{"name": "f", "arguments": {}} and more</tool_call>',
    ],
)
def test_broken_calls_are_content(name: str, text: str) -> None:
    found = ToolParserManager.get_tool_parser(name)(None).extract_tool_calls(text, None)
    assert not found.tools_called
    assert found.content == text


def test_truncated_call_is_parsed_partially() -> None:
    parser = ToolParserManager.get_tool_parser("ernie-x1")(None)
    found = parser.extract_tool_calls('<tool_call>{"name": "f", "arguments": {"a": "un', None)
    assert not found.tools_called
    assert found.tool_calls[0].function.arguments == '{"a": "un'


def test_arguments_encoded_as_text_or_absent() -> None:
    parser = ToolParserManager.get_tool_parser("hermes")(None)
    text = '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>'
    text += '<tool_call>{"name": "g"}</tool_call>'
    found = parser.extract_tool_calls(text, None)
    assert [c.function.arguments for c in found.tool_calls] == ['{"a": 1}', "{}"]


def test_response_before_a_call_means_no_call() -> None:
    parser = ToolParserManager.get_tool_parser("ernie-x1")(None)
    assert not parser.extract_tool_calls(f"<response>x</response>{CALL}", None).tools_called


def test_vl_thinking_needs_blank_before_the_call() -> None:
    parser = ToolParserManager.get_tool_parser("ernie-45-vl-thinking")(None)
    found = parser.extract_tool_calls(f"I call {CALL}", None)
    assert (found.tools_called, found.content) == (False, f"I call {CALL}")
    assert parser.extract_tool_calls(f"\n \n{CALL}", None).tools_called


def test_hermes_keeps_the_text_before_the_call() -> None:
    found = ToolParserManager.get_tool_parser("hermes")(None).extract_tool_calls(f"ok {CALL}", None)
    assert (found.tools_called, found.content) == (True, "ok")


PIECES = st.sampled_from(
    ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>", "\n", " ",
     "word", "<", "</", "<tool", '{"name": "f", "arguments": {"a": "b\\""}}', '{"name": "g"', "}",
     '"', ", ", '"arguments": {', "李白", CALL]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=10).map("".join)


def read_stream(parser: OutputParser, pieces: list[str]) -> tuple[str, str, list[list[str]]]:
    """Reasoning, content and [name, arguments] of the calls, from the deltas of a stream."""
    thought, content = "", ""
    calls: dict[int, list[str]] = {}
    for i, piece in enumerate(pieces):
        delta = parser.feed(piece, [], final=i == len(pieces) - 1)
        thought, content = thought + delta.reasoning, content + delta.content
        for call in delta.tool_calls or []:
            entry = calls.setdefault(call.index, ["", ""])
            entry[0] += call.function.name or ""
            entry[1] += call.function.arguments or ""
    return thought, content, [calls[i] for i in sorted(calls)]


def read_whole(parser: OutputParser, text: str) -> tuple[str, str, list[list[str]]]:
    parsed = parser.parse(text)
    functions = [call.function for call in parsed.tool_calls or []]
    return parsed.reasoning or "", parsed.content, [[f.name, f.arguments] for f in functions]


parsers_and_texts = given(
    text=TEXTS,
    reasoning=st.sampled_from([None, *REASONING]),
    tool=st.sampled_from([None, *TOOLS]),
    thinking=st.sampled_from([None, True, False]),
    data=st.data(),
)


@settings(max_examples=200, deadline=None)
@parsers_and_texts
def test_any_chunking_ends_like_the_whole_text(
    text: str, reasoning: str | None, tool: str | None, thinking: bool | None, data: st.DataObject
) -> None:
    parsers = OutputParsers.create(None, reasoning, tool)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
    stream, whole = OutputParser(parsers, thinking), OutputParser(parsers, thinking)
    streamed = read_stream(stream, pieces)
    assert streamed == read_whole(whole, text)
    assert stream.tools_called == whole.tools_called == bool(streamed[2])
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in streamed[2])


@settings(max_examples=200, deadline=None)
@parsers_and_texts
def test_a_stream_is_the_beginning_of_its_result_at_every_cut(
    text: str, reasoning: str | None, tool: str | None, thinking: bool | None, data: st.DataObject
) -> None:
    """What was sent before an output is cut off stands in the whole answer of the cut output."""
    parsers = OutputParsers.create(None, reasoning, tool)
    cut = data.draw(st.integers(0, len(text)))
    stream = OutputParser(parsers, thinking)
    delta = stream.feed(text[:cut], [], False)
    sent = [call.function.name for call in delta.tool_calls or [] if call.function.name]
    thought, content, calls = read_whole(OutputParser(parsers, thinking), text[:cut])
    assert thought.startswith(delta.reasoning)
    assert content.startswith(delta.content)
    assert [name for name, _ in calls][: len(sent)] == sent


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.sampled_from([CALL, " ", "\n", "word", "李白", "<", "</tool_call>"])),
    tool=st.sampled_from(TOOLS),
)
def test_nothing_that_was_written_is_lost(parts: list[str], tool: str) -> None:
    """Without a call the content is the text; with calls it is the rest, but for blanks."""
    text = "".join(parts)
    _, content, calls = read_whole(OutputParser(OutputParsers.create(None, None, tool)), text)
    if not calls:
        assert content == text
    else:
        assert len(calls) == parts.count(CALL)
        rest = "".join(part for part in parts if part != CALL)
        assert "".join(content.split()) == "".join(rest.split())


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    "bad",
    [
        '<tool_call>{"name": "f", "arguments": {"a": "unfin',
        '<tool_call>{"name": "f", "arguments": {"a": 1}}',
        '<tool_call>{"name": "f", "arguments": {a: 1}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud83d\\"}"}</tool_call>',
    ],
)
def test_a_bad_call_beside_a_good_one_is_content(tool: str, bad: str) -> None:
    parsers = OutputParsers.create(None, None, tool)
    for pieces in ([CALL + bad], list(CALL + bad)):
        _, content, calls = read_stream(OutputParser(parsers), pieces)
        assert [name for name, _ in calls] == ["get_weather"]
        content.encode()
        assert content == bad


def test_a_call_is_sent_when_it_is_closed() -> None:
    stream = OutputParser(OutputParsers.create(None, None, "hermes"))
    deltas = [stream.feed(character, [], False).tool_calls or [] for character in CALL]
    assert not any(deltas[:-1])
    first, second = deltas[-1]
    assert (first.type, first.function.name, first.index) == ("function", "get_weather", 0)
    assert json.loads(second.function.arguments) == {"city": "北京", "days": 2}


@pytest.mark.parametrize("reasoning", [None, "ernie-x1", "qwen3", "ernie-45-vl-thinking"])
@pytest.mark.parametrize("tool", [None, "hermes", "ernie-x1"])
@pytest.mark.parametrize("piece", [" ", "\n", "<tool_call>", '"', "\\", "<think>", "word "])
def test_parsing_is_linear(reasoning: str | None, tool: str | None, piece: str) -> None:
    """Eight times the pieces cost about eight times the time, not 64 times."""
    parsers = OutputParsers.create(None, reasoning, tool)

    def seconds(count: int) -> float:
        parser = OutputParser(parsers, True)
        parser.feed('</think><tool_call>{"a' if piece in ('"', "\\") else "</think>", (), False)
        started = time.process_time()
        for _ in range(count):
            parser.feed(piece, (), False)
        parser.feed("", (), True)
        return time.process_time() - started

    few = min(seconds(500) for _ in range(3))
    assert seconds(4000) < 25 * few + 0.01


PLUGIN = """
from fastdeploy_lite.entrypoints.openai.protocol import (
    DeltaFunctionCall, DeltaMessage, DeltaToolCall, ExtractedToolCallInformation, FunctionCall,
    ToolCall)
from fastdeploy_lite.entrypoints.openai.tool_parsers import ToolParser, ToolParserManager


@ToolParserManager.register_module("at-sign")
class AtSign(ToolParser):
    def extract_tool_calls(self, model_output, request):
        if not model_output.startswith("@"):
            return ExtractedToolCallInformation(tools_called=False, content=model_output)
        call = ToolCall(function=FunctionCall(name=model_output[1:], arguments="{}"))
        return ExtractedToolCallInformation(tools_called=True, tool_calls=[call], content="")

    def extract_tool_calls_streaming(self, previous_text, current_text, delta_text,
            previous_token_ids, current_token_ids, delta_token_ids, request):
        if not current_text.startswith("@"):
            return DeltaMessage(content=delta_text)
        name = delta_text.lstrip("@")
        call = DeltaToolCall(index=0, function=DeltaFunctionCall(name=name))
        return DeltaMessage(tool_calls=[call]) if name else None
"""


def test_plugin_file(tmp_path: Path) -> None:
    path = tmp_path / "at_sign.py"
    path.write_text(PLUGIN)
    parsers = OutputParsers.create(None, "think", "at-sign", str(path))
    parsed = OutputParser(parsers).parse("<think>x</think>@go")
    assert parsed.tool_calls is not None
    assert (parsed.reasoning, parsed.tool_calls[0].function.name) == ("x", "go")
    stream = OutputParser(parsers)
    assert stream.feed("<think>x</think>@", [1], False).reasoning == "x"
    calls = stream.feed("go", [2], True).tool_calls
    assert calls is not None
    assert calls[0].function.name == "go"
    assert stream.tools_called


def test_plugin_that_fails_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("raise KeyError('oops')")
    with pytest.raises(ConfigError, match=r"bad\.py.*KeyError.*oops"):
        OutputParsers.create(None, None, "hermes", str(path))
    with pytest.raises(ConfigError, match="no Python file"):
        OutputParsers.create(None, None, "hermes", str(tmp_path / "absent.py"))


@pytest.mark.parametrize(
    ("kwargs", "metadata", "expected"),
    [
        (None, None, None),
        ({"enable_thinking": False}, {"enable_thinking": True}, False),
        ({}, {"enable_thinking": True}, True),
        ({"enable_thinking": True, "options": {"thinking_mode": "close"}}, None, False),
        ({"enable_thinking": False, "options": {"thinking_mode": "deep"}}, None, True),
    ],
)
def test_thinking_switch(kwargs: dict, metadata: dict, expected: bool | None) -> None:
    assert thinking_switch(kwargs, metadata) is expected
