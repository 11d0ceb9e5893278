"""The reasoning parsers of the package; rules as upstream's, see docs/serving.md."""

from __future__ import annotations

from fastdeploy_lite.reasoning.abs_reasoning_parsers import (
    ReasoningParser,
    ReasoningParserManager,
    certain_prefix,
    may_become,
)

_TOOL_CALL = "<tool_call>"
_RESPONSE, _RESPONSE_END = "<response>", "</response>"


class _EndMarkerParser(ReasoningParser):
    """Everything before the end marker is reasoning; subclasses say what its absence means."""

    def _cut(self, text: str) -> tuple[str, str] | None:
        head, marker, tail = text.partition(self.think_end_token)
        if not marker:
            return None
        return self._without_start(head, True), tail

    def _without_start(self, head: str, final: bool) -> str:
        """Drop a leading start marker: some templates leave it to the model to write it."""
        stripped = head.lstrip("\n ")
        if stripped.startswith(self.think_start_token):
            return stripped[len(self.think_start_token) :]
        if not final and may_become(stripped, [self.think_start_token]):
            return ""
        return head

    def _all_reasoning(self, text: str, final: bool) -> tuple[str, str]:
        certain = text if final else certain_prefix(text, [self.think_end_token])
        return self._without_start(certain, final), ""

    def _all_content(self, text: str, final: bool) -> tuple[str, str]:
        """Without an end marker this is an answer; a stream cannot know before its end."""
        return ("", text) if final else ("", "")


@ReasoningParserManager.register_module("ernie-45-vl")
class Ernie45VLReasoningParser(_EndMarkerParser):
    """Applied when the model thinks; without an end marker everything is then reasoning."""

    def split(self, text: str, thinking: bool | None, final: bool) -> tuple[str, str]:
        """See the base class."""
        if not thinking:
            return "", text
        return self._cut(text) or self._all_reasoning(text, final)


@ReasoningParserManager.register_module(["ernie-45-vl-thinking", "erine-45-vl-thinking"])
class Ernie45VLThinkingReasoningParser(_EndMarkerParser):
    """Without an end marker everything is content, unless the prompt opened the thinking."""

    assumes_thinking = True

    def split(self, text: str, thinking: bool | None, final: bool) -> tuple[str, str]:
        """See the base class."""
        if thinking is False:
            return "", text
        missing = self._all_reasoning if thinking else self._all_content
        return self._cut(text) or missing(text, final)

    def present(self, tail: str, final: bool) -> str:
        """A tool call is no content."""
        first = tail.lstrip("\n")
        if first.startswith(_TOOL_CALL) or (not final and may_become(first, [_TOOL_CALL])):
            return ""
        return tail


@ReasoningParserManager.register_module("ernie-x1")
class ErnieX1ReasoningParser(_EndMarkerParser):
    """Always thinking; the answer stands in `<response>`, tool calls beside it."""

    assumes_thinking = True

    def split(self, text: str, thinking: bool | None, final: bool) -> tuple[str, str]:
        """See the base class."""
        return self._cut(text) or self._all_reasoning(text, final)

    def present(self, tail: str, final: bool) -> str:
        """The inside of `<response>`, without the line breaks next to the tags.

        An answer that carries no tag at all is shown as it is rather than lost.
        """
        first = tail.lstrip("\n")
        if first.startswith(_TOOL_CALL):
            return ""
        if not first.startswith(_RESPONSE):
            undecided = not final and may_become(first, [_RESPONSE, _TOOL_CALL])
            return "" if undecided else first
        inside, closed, _ = first[len(_RESPONSE) :].partition(_RESPONSE_END)
        if closed or final:
            return inside.strip("\n")
        return certain_prefix(inside, [_RESPONSE_END]).strip("\n")


@ReasoningParserManager.register_module("qwen3")
class Qwen3ReasoningParser(_EndMarkerParser):
    """`<think>…</think>`, the start marker optional; no end marker means no reasoning.

    A stream whose prompt did not open the thinking is therefore held back until the marker or the
    end of the output decides; with an opened one it flows at once, and its truncation is reasoning.
    """

    assumes_thinking = True

    def split(self, text: str, thinking: bool | None, final: bool) -> tuple[str, str]:
        """See the base class."""
        if thinking is False:
            return "", text
        missing = self._all_reasoning if thinking else self._all_content
        return self._cut(text) or missing(text, final)


@ReasoningParserManager.register_module(["deepseek_r1", "deepseek-r1", "deepseek"])
class DeepSeekR1ReasoningParser(_EndMarkerParser):
    """Thinks unless the prompt closed the thinking; no end marker: everything is reasoning."""

    assumes_thinking = True

    def split(self, text: str, thinking: bool | None, final: bool) -> tuple[str, str]:
        """See the base class."""
        if thinking is False:
            return "", text
        return self._cut(text) or self._all_reasoning(text, final)


@ReasoningParserManager.register_module("think")
class ThinkReasoningParser(_EndMarkerParser):
    """The generic one: reasoning exactly when the prompt or the output opens with `<think>`."""

    def split(self, text: str, thinking: bool | None, final: bool) -> tuple[str, str]:
        """See the base class."""
        if not thinking:
            first = text.lstrip("\n ")
            if not first.startswith(self.think_start_token):
                undecided = not final and may_become(first, [self.think_start_token])
                return "", "" if undecided else text
        return self._cut(text) or self._all_reasoning(text, final)
