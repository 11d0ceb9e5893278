"""The interface of reasoning parsers and their registry.

A parser of this package is a pure function of the text so far: `split` and `present` return what
is certain to stay, so that their results only ever grow.  A stream sends the differences; therefore
any way of cutting a text into deltas gives the result of the whole text, by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastdeploy_lite.utils.errors import ConfigError
from fastdeploy_lite.utils.registry import Registered, registered, registering


@dataclass(slots=True)
class ReasoningDelta:
    """New text of one stream step."""

    reasoning_content: str = ""
    content: str = ""


def certain_prefix(text: str, markers: Sequence[str]) -> str:
    """`text` without a tail that may be the beginning of one of `markers`.

    Args:
        text: Text so far, which does not contain a marker.
        markers: What may follow.

    Returns:
        The part that can be sent at once.
    """
    longest = max(
        (n for m in markers for n in range(1, len(m)) if text.endswith(m[:n])),
        default=0,
    )
    return text[: len(text) - longest]


def may_become(text: str, markers: Sequence[str]) -> bool:
    """Whether `text` is a proper beginning of one of `markers`."""
    return any(len(text) < len(m) and m.startswith(text) for m in markers)


class ReasoningParser:
    """Base class.

    A parser of this package implements `split` (and perhaps `present`).  A plug-in written for
    upstream overrides `extract_reasoning_content` and `extract_reasoning_content_streaming`.

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

    def split(self, text: str, thinking: bool | None, final: bool) -> tuple[str, str]:
        """Cut the output at the end of the thinking.

        Args:
            text: Output so far.
            thinking: Whether the prompt left the model thinking; None when nobody knows.
            final: Whether the output is complete.

        Returns:
            The reasoning and the text after it, as far as both are certain.
        """
        raise NotImplementedError

    def present(self, tail: str, final: bool) -> str:
        """What of the text after the reasoning is shown as content.

        Args:
            tail: Text after the reasoning.
            final: Whether it is complete.

        Returns:
            The content, as far as it is certain.
        """
        return tail

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
        reasoning, tail = self.split(model_output, _thinking(model_status), True)
        return reasoning, self.present(tail, True)

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
        thinking = _thinking(model_status)
        old_reasoning, old_tail = self.split(previous_text, thinking, False)
        reasoning, tail = self.split(current_text, thinking, False)
        old_content, content = self.present(old_tail, False), self.present(tail, False)
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
