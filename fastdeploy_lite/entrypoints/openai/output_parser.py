"""From generated text to reasoning, content and tool calls, whole or while it streams.

One `OutputParser` follows one choice, piece by piece; a whole answer is what its stream adds up to.
Plug-ins written for upstream are asked through upstream's methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdeploy_lite.entrypoints.openai.forced_calls import CallReader
from fastdeploy_lite.entrypoints.openai.protocol import DeltaToolCall, FunctionCall, ToolCall
from fastdeploy_lite.entrypoints.openai.tool_parsers import (
    CallStream,
    Found,
    FoundCall,
    ToolParser,
    ToolParserManager,
    call_deltas,
)
from fastdeploy_lite.reasoning import (
    ContentFilter,
    ReasoningParser,
    ReasoningParserManager,
    ReasoningStream,
)


@dataclass(slots=True)
class ParsedDelta:
    """What one stream step adds."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[DeltaToolCall] | None = None


@dataclass(slots=True)
class ParsedOutput:
    """A whole output, taken apart; `reasoning` is None without a reasoning parser."""

    reasoning: str | None
    content: str
    tool_calls: list[ToolCall] | None = None


@dataclass(frozen=True, slots=True)
class OutputParsers:
    """The parsers that a service was started with, either of which may be absent."""

    reasoning: ReasoningParser | None = None
    tool: ToolParser | None = None

    @classmethod
    def create(
        cls,
        tokenizer: Any,
        reasoning_parser: str | None = None,
        tool_call_parser: str | None = None,
        tool_parser_plugin: str | None = None,
    ) -> OutputParsers:
        """Look the parsers up by name.

        Args:
            tokenizer: The model's tokenizer.
            reasoning_parser: Name or None.
            tool_call_parser: Name or None.
            tool_parser_plugin: Python file that registers more parsers, or None.

        Returns:
            The parsers.

        Raises:
            ConfigError: A name is unknown, the plug-in fails, or the tokenizer lacks the marker.
        """
        if tool_parser_plugin:
            ToolParserManager.import_tool_parser(tool_parser_plugin)
        reasoning = tool = None
        if reasoning_parser:
            reasoning = ReasoningParserManager.get_reasoning_parser(reasoning_parser)(tokenizer)
        if tool_call_parser:
            tool = ToolParserManager.get_tool_parser(tool_call_parser)(tokenizer)
        return cls(reasoning, tool)


def thinking_switch(
    chat_template_kwargs: dict[str, Any] | None, metadata: dict[str, Any] | None
) -> bool | None:
    """Read the request's thinking switch.

    `chat_template_kwargs.options.thinking_mode` wins (`close` and `false` are off, anything else
    on), then `chat_template_kwargs.enable_thinking`, then `metadata.enable_thinking`.

    Args:
        chat_template_kwargs: Variables for the template.
        metadata: Upstream's obsolete side channel.

    Returns:
        On, off, or None when the request does not say.
    """
    given = chat_template_kwargs or {}
    options = given.get("options")
    if isinstance(options, dict) and options.get("thinking_mode") is not None:
        return str(options["thinking_mode"]).lower() not in ("close", "false")
    for source in (given, metadata or {}):
        if source.get("enable_thinking") is not None:
            return bool(source["enable_thinking"])
    return None


class OutputParser:
    """The state of one choice.

    Args:
        parsers: The service's parsers.
        thinking: Whether the prompt left the model thinking; None when nobody knows.
        request: Handed to plug-ins.
        use_tools: Whether calls are looked for.
        demanded: Reads an output that was made to be calls, in place of the tool parser.

    Attributes:
        tools_called: Whether a call has been found.
    """

    def __init__(
        self,
        parsers: OutputParsers,
        thinking: bool | None = None,
        request: Any = None,
        use_tools: bool = True,
        demanded: CallReader | None = None,
    ) -> None:
        self.tools_called = False
        self._reasoning = parsers.reasoning
        self._tool = parsers.tool if use_tools and demanded is None else None
        self._demanded = None if demanded is None else _DemandedCalls(demanded)
        self._request = request
        self._tokens = _Tokens()
        self._text: list[str] = []
        self._pieces: tuple[list[str], list[str]] = ([], [])
        self._calls: list[ToolCall] = []
        self._split: ReasoningStream | _PluginReasoning | None = None
        if self._reasoning is not None:
            plugin = _is_plugin(self._reasoning)
            self._split = (
                _PluginReasoning(self._reasoning, request, self._tokens)
                if plugin
                else self._reasoning.begin(thinking)
            )
        self._find = self._begin_calls()
        self._filter = self._begin_filter()

    def _begin_calls(self) -> CallStream | None:
        """What finds calls; reads the text after the reasoning."""
        if self._tool is None:
            return self._demanded
        if _is_plugin(self._tool):
            return _PluginCalls(self._tool, self._request, self._tokens)
        return self._tool.begin()

    def _begin_filter(self) -> ContentFilter:
        own = self._reasoning is not None and not _is_plugin(self._reasoning)
        if self._reasoning is None or not own or self._demanded is not None:
            return ContentFilter()
        return self._reasoning.content_filter(self._tool is not None)

    def feed(self, delta_text: str, token_ids: Sequence[int], final: bool) -> ParsedDelta:
        """Add new text.

        Args:
            delta_text: The new text; may be empty.
            token_ids: Its tokens.
            final: Whether it is the last.

        Returns:
            What is certain now and was not before.
        """
        self._tokens.new = token_ids
        self._text.append(delta_text)
        reasoning, content = "", delta_text
        if self._split is not None:
            reasoning, content = self._split.feed(delta_text, final)
        calls = None
        if self._find is not None:
            found = self._find.feed(content, final)
            content, calls = found.content, self._deltas(found)
        content = self._filter.feed(content, final)
        self._tokens.take()
        self._pieces[0].append(reasoning)
        self._pieces[1].append(content)
        return ParsedDelta(reasoning, content, calls)

    def calls_so_far(self) -> list[ToolCall]:
        """The calls so far; those of plug-ins only once all the text was fed."""
        return self._calls if self._demanded is None else self._demanded.calls

    def result(self) -> ParsedOutput:
        """What the text amounts to, once all of it was fed."""
        plugins = (_PluginReasoning, _PluginCalls)
        if isinstance(self._split, plugins) or isinstance(self._find, plugins):
            return self._ask_plugins()
        reasoning = None if self._reasoning is None else "".join(self._pieces[0])
        return ParsedOutput(reasoning, "".join(self._pieces[1]), self.calls_so_far() or None)

    def _ask_plugins(self) -> ParsedOutput:
        """A plug-in's two methods may differ: whole answers come from the one for whole texts."""
        text = "".join(self._text)
        reasoning, content = None, text
        if isinstance(self._split, _PluginReasoning):
            reasoning, content = self._split.whole(text)
        elif self._reasoning is not None and isinstance(self._find, _PluginCalls):
            reasoning, content = "".join(self._pieces[0]), self._find.text
        calls: list[ToolCall] | None = None
        if isinstance(self._find, _PluginCalls):
            content, calls = self._find.whole(content)
        elif self._demanded is not None:
            content, calls = "", self._demanded.calls or None
        elif (find := self._begin_calls()) is not None:
            found = find.feed(content, True)
            content, calls = found.content, [_whole(call) for call in found.calls] or None
        self.tools_called = bool(calls)
        return ParsedOutput(reasoning, self._begin_filter().feed(content, True), calls)

    def parse(self, text: str) -> ParsedOutput:
        """Take a whole output apart; nothing may have been fed before.

        Args:
            text: The output without the closing EOS.

        Returns:
            Its parts.
        """
        self.feed(text, (), True)
        return self.result()

    def _deltas(self, found: Found) -> list[DeltaToolCall] | None:
        if found.deltas:
            self.tools_called = True
            return found.deltas
        if not found.calls:
            return None
        self.tools_called = True
        deltas = []
        for call in found.calls:
            whole = _whole(call)
            deltas += call_deltas(len(self._calls), call, whole.id)
            self._calls.append(whole)
        return deltas


def _whole(call: FoundCall) -> ToolCall:
    return ToolCall(function=FunctionCall(name=call.name, arguments=call.arguments))


class _DemandedCalls:
    """An output that was made to be calls holds nothing else."""

    def __init__(self, reader: CallReader) -> None:
        self._reader = reader

    @property
    def calls(self) -> list[ToolCall]:
        """Those so far."""
        return self._reader.calls

    def feed(self, piece: str, final: bool) -> Found:
        """See `CallStream`."""
        return Found(deltas=self._reader.feed(piece) or None)


# Plug-ins written for upstream --------------------------------------------------------------------


def _is_plugin(parser: ReasoningParser | ToolParser) -> bool:
    """Whether the parser speaks upstream's interface only."""
    if isinstance(parser, ReasoningParser):
        return type(parser).without_end is ReasoningParser.without_end
    return type(parser).begin is ToolParser.begin


class _Tokens:
    """The token ids of an output; `new` are those of the step under way."""

    def __init__(self) -> None:
        self._old: list[int] = []
        self.new: Sequence[int] = ()

    def step(self) -> tuple[list[int], list[int], list[int]]:
        """Previous, current and new ids, as upstream's methods take them."""
        previous, new = list(self._old), list(self.new)
        return previous, previous + new, new

    def take(self) -> None:
        """The step is over."""
        self._old.extend(self.new)
        self.new = ()


class _PluginReasoning:
    """A reasoning parser that takes the whole text at every step."""

    def __init__(self, parser: ReasoningParser, request: Any, tokens: _Tokens) -> None:
        self._parser = parser
        self._request = request
        self._tokens = tokens
        self._text = ""

    def feed(self, piece: str, final: bool) -> tuple[str, str]:
        """See `ReasoningStream`."""
        previous, self._text = self._text, self._text + piece
        delta = self._parser.extract_reasoning_content_streaming(
            previous, self._text, piece, *self._tokens.step(), self._request
        )
        if delta is None:
            return "", ""
        return delta.reasoning_content or "", delta.content or ""

    def whole(self, text: str) -> tuple[str, str]:
        """Reasoning and content of a whole output."""
        reasoning, content = self._parser.extract_reasoning_content(text, self._request)
        return reasoning, content or ""


class _PluginCalls:
    """A tool parser that takes the whole text at every step."""

    def __init__(self, parser: ToolParser, request: Any, tokens: _Tokens) -> None:
        self._parser = parser
        self._request = request
        self._tokens = tokens
        self.text = ""

    def feed(self, piece: str, final: bool) -> Found:
        """See `CallStream`."""
        previous, self.text = self.text, self.text + piece
        if not piece:
            return Found()
        message = self._parser.extract_tool_calls_streaming(
            previous, self.text, piece, *self._tokens.step(), self._request
        )
        if message is None:
            return Found()
        return Found(message.content or "", deltas=message.tool_calls)

    def whole(self, text: str) -> tuple[str, list[ToolCall] | None]:
        """Content and calls of a whole output."""
        found = self._parser.extract_tool_calls(text, self._request)
        if not found.tools_called:
            return text, None
        return found.content or "", found.tool_calls
