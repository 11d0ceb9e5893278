"""The interface of reasoning parsers and their registry.

A parser of this package gives a `ReasoningStream` and a `ContentFilter` for each output.  They give
out what is certain to stay, once; a whole text is a stream of one piece.  Therefore any way of
cutting a text into pieces gives the result of the whole text, by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar

from fastdeploy_lite.utils.errors import ConfigError
from fastdeploy_lite.utils.marker_search import MarkerSearch, Opening
from fastdeploy_lite.utils.registry import Registered, registered, registering


@dataclass(slots=True)
class ReasoningDelta:
    """New text of one stream step."""

    reasoning_content: str = ""
    content: str = ""


class WithoutEnd(Enum):
    """What an output is that lacks the end-of-thinking marker."""

    CONTENT = auto()  # known from the start: the model does not think
    REASONING = auto()  # known from the start: it was cut while thinking
    CONTENT_AT_LAST = auto()  # nobody knows before the end, which makes it an answer
    AS_IT_OPENS = auto()  # reasoning exactly if it opens with the start marker


class ReasoningStream:
    """Cuts one output at the end of its thinking; linear in the output.

    Args:
        start, end: The markers.
        without_end: What an output without the end marker is.
    """

    def __init__(self, start: str, end: str, without_end: WithoutEnd) -> None:
        self._rule = without_end
        self._opening: Opening | None = Opening("\n ", start)
        self._search = MarkerSearch(end)
        self._done = without_end is WithoutEnd.CONTENT
        self._raw: list[str] = []
        self._head: list[str] = []

    def feed(self, piece: str, final: bool) -> tuple[str, str]:
        """Take in the next piece.

        Args:
            piece: New text.
            final: Whether nothing follows.

        Returns:
            New reasoning, and new text after it, as far as both are certain.
        """
        if self._done:
            return "", piece
        if self._rule is WithoutEnd.CONTENT_AT_LAST:
            self._raw.append(piece)
        if self._opening is not None:
            opened = self._opening.feed(piece, final)
            if opened is None:
                return "", ""
            self._opening = None
            marker, piece = opened
            if self._rule is WithoutEnd.AS_IT_OPENS and not marker:
                self._done = True
                return "", piece
        head, marker, tail = self._search.feed(piece, final)
        self._done = bool(marker)
        if self._rule is not WithoutEnd.CONTENT_AT_LAST:
            return head, tail
        self._head.append(head)
        if marker:
            return "".join(self._head), tail
        return "", "".join(self._raw) if final else ""


class ContentFilter:
    """What of the text after the reasoning is shown as content: here, all of it."""

    def feed(self, piece: str, final: bool) -> str:
        """Take in the next piece of that text.

        Args:
            piece: New text.
            final: Whether nothing follows.

        Returns:
            New content.
        """
        return piece


class ReasoningParser:
    """Base class.

    A parser of this package implements `without_end` (and perhaps `content_filter`).  A plug-in
    written for upstream overrides `extract_reasoning_content` and
    `extract_reasoning_content_streaming`.

    Args:
        tokenizer: The model's tokenizer; must know `think_end_token`.

    Raises:
        ConfigError: The tokenizer does not contain the end-of-thinking marker.
    """

    think_start_token: ClassVar[str] = "<think>"
    think_end_token: ClassVar[str] = "</think>"
    # Whether the model is taken to think when neither prompt nor request says so.
    assumes_thinking: ClassVar[bool] = False

    def __init__(self, tokenizer: Any) -> None:
        self.model_tokenizer = tokenizer
        vocabulary = getattr(tokenizer, "get_vocab", None)
        if vocabulary is not None and self.think_end_token not in vocabulary():
            raise ConfigError(
                f"Reasoning parser {type(self).__name__}: the tokenizer has no token "
                f"{self.think_end_token}; start without --reasoning-parser"
            )

    def without_end(self, thinking: bool | None) -> WithoutEnd:
        """The rule for an output without the end marker.

        Args:
            thinking: Whether the prompt left the model thinking; None when nobody knows.

        Returns:
            The rule.
        """
        raise NotImplementedError

    def begin(self, thinking: bool | None) -> ReasoningStream:
        """Follow a new output; see `without_end`."""
        rule = self.without_end(thinking)
        return ReasoningStream(self.think_start_token, self.think_end_token, rule)

    def content_filter(self, finds_calls: bool) -> ContentFilter:
        """What is shown of the text after the reasoning of a new output.

        Args:
            finds_calls: Whether a tool parser has taken the calls out of that text.

        Returns:
            The filter.
        """
        return ContentFilter()

    def _parts(self, text: str, model_status: Any, final: bool) -> tuple[str, str]:
        reasoning, tail = self.begin(_thinking(model_status)).feed(text, final)
        return reasoning, self.content_filter(False).feed(tail, final)

    def extract_reasoning_content(
        self, model_output: str, request: Any, model_status: Any = None
    ) -> tuple[str, str]:
        """Upstream's interface: parse a whole output.

        Args:
            model_output: The text.
            request: The request, unused here.
            model_status: `"think_start"` when the prompt left the model thinking.

        Returns:
            Reasoning and content.
        """
        return self._parts(model_output, model_status, True)

    def extract_reasoning_content_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        model_status: Any = None,
    ) -> ReasoningDelta | None:
        """Upstream's interface: parse one stream step.

        Args:
            previous_text: Text before the step.
            current_text: Text after it.
            delta_text: The difference; unused here, like the token ids.
            previous_token_ids: Ids before the step.
            current_token_ids: Ids after it.
            delta_token_ids: The difference.
            model_status: See `extract_reasoning_content`.

        Returns:
            The new text, or None when nothing new is certain.
        """
        old_reasoning, old_content = self._parts(previous_text, model_status, False)
        reasoning, content = self._parts(current_text, model_status, False)
        delta = ReasoningDelta(reasoning[len(old_reasoning) :], content[len(old_content) :])
        return delta if delta.reasoning_content or delta.content else None


def _thinking(model_status: Any) -> bool | None:
    if isinstance(model_status, str):
        return model_status == "think_start"
    return None


class ReasoningParserManager:
    """The registry of reasoning parsers."""

    reasoning_parsers: ClassVar[dict[str, type[ReasoningParser]]] = {}

    @classmethod
    def register_module(
        cls, name: str | Sequence[str], force: bool = True
    ) -> Callable[[Registered], Registered]:
        """Class decorator that registers a parser; see `registering`."""
        return registering(cls.reasoning_parsers, "reasoning parser", name, force)

    @classmethod
    def get_reasoning_parser(cls, name: str) -> type[ReasoningParser]:
        """The class that `--reasoning-parser` names; see `registered`."""
        return registered(cls.reasoning_parsers, "reasoning parser", name)
