"""The reasoning parsers of the package; rules as upstream's, see docs/serving.md."""

from __future__ import annotations

from fastdeploy_lite.reasoning.abs_reasoning_parsers import (
    ContentFilter,
    ReasoningParser,
    ReasoningParserManager,
    WithoutEnd,
)
from fastdeploy_lite.utils.marker_search import MarkerSearch, Opening

_TOOL_CALL = "<tool_call>"
_RESPONSE, _RESPONSE_END = "<response>", "</response>"


class _NoToolCall(ContentFilter):
    """A text that opens with a tool call is no content."""

    def __init__(self) -> None:
        self._opening: Opening | None = Opening("\n", _TOOL_CALL)
        self._hidden = False

    def feed(self, piece: str, final: bool) -> str:
        """See the base class."""
        if self._opening is None:
            return "" if self._hidden else piece
        opened = self._opening.feed(piece, final)
        if opened is None:
            return ""
        self._opening = None
        self._hidden = bool(opened[0])
        return "" if self._hidden else opened[1]


class _InsideResponse(ContentFilter):
    """The inside of `<response>`, without the line breaks next to the tags.

    An answer that carries no tag at all is shown as it is rather than lost.

    Args:
        hides_calls: Whether a text that opens with a tool call is hidden.
    """

    def __init__(self, hides_calls: bool) -> None:
        markers = (_RESPONSE, _TOOL_CALL) if hides_calls else (_RESPONSE,)
        self._opening: Opening | None = Opening("\n", *markers)
        self._tag = ""
        self._search = MarkerSearch(_RESPONSE_END)
        self._closed = False
        self._started = False
        self._breaks: list[str] = []

    def feed(self, piece: str, final: bool) -> str:
        """See the base class."""
        if self._opening is not None:
            opened = self._opening.feed(piece, final)
            if opened is None:
                return ""
            self._opening = None
            self._tag, piece = opened
            if not self._tag:
                piece = piece.lstrip("\n")
        if not self._tag:
            return piece
        if self._tag == _TOOL_CALL or self._closed:
            return ""
        inside, marker, _ = self._search.feed(piece, final)
        self._closed = bool(marker)
        return self._without_breaks(inside)

    def _without_breaks(self, inside: str) -> str:
        """Drop line breaks at the start; hold those that may turn out to be at the end."""
        if not self._started:
            inside = inside.lstrip("\n")
        text = inside.rstrip("\n")
        before = "".join(self._breaks) if text else ""
        if text:
            self._started = True
            self._breaks.clear()
        self._breaks.append(inside[len(text) :])
        return before + text


@ReasoningParserManager.register_module("ernie-45-vl")
class Ernie45VLReasoningParser(ReasoningParser):
    """Applied when the model thinks; without an end marker everything is then reasoning."""

    def without_end(self, thinking: bool | None) -> WithoutEnd:
        """See the base class."""
        return WithoutEnd.REASONING if thinking else WithoutEnd.CONTENT


@ReasoningParserManager.register_module(["ernie-45-vl-thinking", "erine-45-vl-thinking"])
class Ernie45VLThinkingReasoningParser(ReasoningParser):
    """Without an end marker everything is content, unless the prompt opened the thinking."""

    assumes_thinking = True

    def without_end(self, thinking: bool | None) -> WithoutEnd:
        """See the base class."""
        if thinking is None:
            return WithoutEnd.CONTENT_AT_LAST
        return WithoutEnd.REASONING if thinking else WithoutEnd.CONTENT

    def content_filter(self, finds_calls: bool) -> ContentFilter:
        """A tool call is no content."""
        return ContentFilter() if finds_calls else _NoToolCall()


@ReasoningParserManager.register_module("ernie-x1")
class ErnieX1ReasoningParser(ReasoningParser):
    """Always thinking; the answer stands in `<response>`, tool calls beside it."""

    assumes_thinking = True

    def without_end(self, thinking: bool | None) -> WithoutEnd:
        """See the base class."""
        return WithoutEnd.REASONING

    def content_filter(self, finds_calls: bool) -> ContentFilter:
        """The inside of `<response>`."""
        return _InsideResponse(not finds_calls)


@ReasoningParserManager.register_module("qwen3")
class Qwen3ReasoningParser(ReasoningParser):
    """`<think>…</think>`, the start marker optional; no end marker means no reasoning.

    A stream whose prompt did not open the thinking is therefore held back until the marker or the
    end of the output decides; with an opened one it flows at once, and its truncation is reasoning.
    """

    assumes_thinking = True

    def without_end(self, thinking: bool | None) -> WithoutEnd:
        """See the base class."""
        if thinking is None:
            return WithoutEnd.CONTENT_AT_LAST
        return WithoutEnd.REASONING if thinking else WithoutEnd.CONTENT


@ReasoningParserManager.register_module(["deepseek_r1", "deepseek-r1", "deepseek"])
class DeepSeekR1ReasoningParser(ReasoningParser):
    """Thinks unless the prompt closed the thinking; no end marker: everything is reasoning."""

    assumes_thinking = True

    def without_end(self, thinking: bool | None) -> WithoutEnd:
        """See the base class."""
        return WithoutEnd.CONTENT if thinking is False else WithoutEnd.REASONING


@ReasoningParserManager.register_module("think")
class ThinkReasoningParser(ReasoningParser):
    """The generic one: reasoning exactly when the prompt or the output opens with `<think>`."""

    def without_end(self, thinking: bool | None) -> WithoutEnd:
        """See the base class."""
        return WithoutEnd.REASONING if thinking else WithoutEnd.AS_IT_OPENS
