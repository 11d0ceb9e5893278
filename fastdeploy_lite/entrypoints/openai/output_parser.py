"""From generated text to reasoning, content and tool calls, whole or while it streams.

One `OutputParser` follows one choice.  It drives the parsers of this package through their pure
functions, and plug-ins written for upstream through upstream's methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdeploy_lite.entrypoints.openai.forced_calls import CallReader
from fastdeploy_lite.entrypoints.openai.protocol import DeltaToolCall, ToolCall
from fastdeploy_lite.entrypoints.openai.tool_parsers import ToolParser, ToolParserManager, ToolScan
from fastdeploy_lite.reasoning import ReasoningParser, ReasoningParserManager


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


@dataclass(slots=True)
class OutputParser:
    """The state of one choice.

    Attributes:
        parsers: The service's parsers.
        thinking: Whether the prompt left the model thinking; None when nobody knows.
        request: Handed to plug-ins.
        use_tools: Whether calls are looked for.
        demanded: Reads an output that was made to be calls; None for a free one.
    """

    parsers: OutputParsers
    thinking: bool | None = None
    request: Any = None
    use_tools: bool = True
    demanded: CallReader | None = None
    tools_called: bool = False
    text: str = ""
    _token_ids: list[int] = field(default_factory=list)
    _reasoning: str = ""
    _content: str = ""
    _tail: str = ""
    _scan: ToolScan = field(default_factory=ToolScan)

    def feed(self, delta_text: str, token_ids: Sequence[int], final: bool) -> ParsedDelta:
        """Add new text.

        Args:
            delta_text: The new text; may be empty.
            token_ids: Its tokens.
            final: Whether it is the last.

        Returns:
            What is certain now and was not before.
        """
        if self.parsers.reasoning is None and self._tool is None and self.demanded is None:
            return ParsedDelta(content=delta_text)
        previous, self.text = self.text, self.text + delta_text
        before = len(self._token_ids)
        self._token_ids.extend(token_ids)
        step = _Step(previous, self.text, self._token_ids, before)
        reasoning, tail_delta = self._split(step, final)
        delta = self._read_tail(tail_delta, step, final)
        delta.reasoning = reasoning
        return delta

    def parse(self, text: str) -> ParsedOutput:
        """Take a whole output apart.

        Args:
            text: The output without the closing EOS.

        Returns:
            Its parts; with a tool call the content is what precedes it.
        """
        reasoning, tail = None, text
        parser = self.parsers.reasoning
        if parser is not None and not _is_plugin(parser):
            reasoning, tail = parser.split(text, self.thinking, True)
        elif parser is not None:
            reasoning, tail = parser.extract_reasoning_content(text, self.request)
        content, calls = tail or "", None
        if self.demanded is not None:
            self.demanded.feed(content)
            calls = self.demanded.calls or None
            self.tools_called = calls is not None
            return ParsedOutput(reasoning, "", calls)
        if self._tool is not None:
            found = self._tool.extract_tool_calls(content, self.request)
            self.tools_called = found.tools_called
            if found.tools_called:
                content, calls = found.content or "", found.tool_calls
        if parser is not None and not _is_plugin(parser):
            content = parser.present(content, True)
        return ParsedOutput(reasoning, content, calls)

    @property
    def _tool(self) -> ToolParser | None:
        return self.parsers.tool if self.use_tools else None

    def _split(self, step: _Step, final: bool) -> tuple[str, str]:
        """New reasoning, and new text after it."""
        parser = self.parsers.reasoning
        if parser is None:
            return "", step.current[len(step.previous) :]
        if _is_plugin(parser):
            new = step.current[len(step.previous) :]
            delta = parser.extract_reasoning_content_streaming(
                step.previous, step.current, new, *step.ids(), self.request
            )
            if delta is None:
                return "", ""
            return delta.reasoning_content or "", delta.content or ""
        old_reasoning, old_tail = self._reasoning, self._tail
        self._reasoning, tail = parser.split(step.current, self.thinking, final)
        return self._reasoning[len(old_reasoning) :], tail[len(old_tail) :]

    def _read_tail(self, tail_delta: str, step: _Step, final: bool) -> ParsedDelta:
        previous, self._tail = self._tail, self._tail + tail_delta
        if self.demanded is not None:
            new = self.demanded.feed(tail_delta)
            self.tools_called = bool(self.demanded.calls)
            return ParsedDelta(tool_calls=new or None)
        if self._tool is None:
            return ParsedDelta(content=self._present(self._tail, final))
        if _is_plugin(self._tool):
            return self._ask_plugin(self._tool, previous, tail_delta, step)
        old, self._scan = self._scan, self._tool.scan(self._tail, final)
        message = self._tool.difference(old, self._scan)
        self.tools_called = bool(self._scan.calls) and self._scan.complete
        calls = message.tool_calls if message is not None else None
        return ParsedDelta(content=self._present(self._scan.content, final), tool_calls=calls)

    def _present(self, content: str, final: bool) -> str:
        """New content, after the reasoning parser's view of it."""
        parser = self.parsers.reasoning
        if parser is not None and not _is_plugin(parser):
            content = parser.present(content, final)
        old, self._content = self._content, content
        return content[len(old) :]

    def _ask_plugin(
        self, tool: ToolParser, previous: str, tail_delta: str, step: _Step
    ) -> ParsedDelta:
        if not tail_delta:
            return ParsedDelta()
        message = tool.extract_tool_calls_streaming(
            previous, self._tail, tail_delta, *step.ids(), self.request
        )
        if message is None:
            return ParsedDelta()
        self.tools_called |= bool(message.tool_calls)
        return ParsedDelta(content=message.content or "", tool_calls=message.tool_calls)


@dataclass(slots=True)
class _Step:
    """One stream step: texts, all token ids and how many of them are old."""

    previous: str
    current: str
    token_ids: list[int]
    num_previous: int

    def ids(self) -> tuple[list[int], list[int], list[int]]:
        """Previous, current and new ids, as upstream's plug-in methods take them."""
        previous, new = self.token_ids[: self.num_previous], self.token_ids[self.num_previous :]
        return previous, list(self.token_ids), new


def _is_plugin(parser: ReasoningParser | ToolParser) -> bool:
    """Whether the parser speaks upstream's interface only."""
    own = "split" if isinstance(parser, ReasoningParser) else "scan"
    base = ReasoningParser if isinstance(parser, ReasoningParser) else ToolParser
    return getattr(type(parser), own) is getattr(base, own)
