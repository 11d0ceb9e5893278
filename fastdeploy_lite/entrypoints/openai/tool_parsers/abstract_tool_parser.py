"""The interface of tool parsers and their registry.

A parser of this package gives a `CallStream` for each output, which gives out what is certain,
once: text that is no call, and calls that are closed and well-formed.  A whole text is a stream of
one piece, so that every way of cutting a text into pieces ends with the same calls and content.  A
plug-in written for upstream overrides `extract_tool_calls` and `extract_tool_calls_streaming`.
"""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fastdeploy_lite.entrypoints.openai.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from fastdeploy_lite.utils.errors import ConfigError, quote
from fastdeploy_lite.utils.registry import Registered, registered, registering


@dataclass(slots=True)
class FoundCall:
    """A call; `arguments` is the JSON text of an object."""

    name: str
    arguments: str = "{}"


@dataclass(slots=True)
class Found:
    """What one piece of an output brought.

    Attributes:
        content: Text outside of calls.
        calls: Calls.
        deltas: Pieces of calls, from plug-ins that stream them.
    """

    content: str = ""
    calls: list[FoundCall] = field(default_factory=list)
    deltas: list[DeltaToolCall] | None = None


class CallStream(Protocol):
    """Finds the calls of one output; linear in the output."""

    def feed(self, piece: str, final: bool) -> Found:
        """Take in the next piece of the text after the reasoning.

        Args:
            piece: New text.
            final: Whether nothing follows.

        Returns:
            What is certain now and was not before.
        """
        ...


class ToolParser:
    """Base class.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.model_tokenizer = tokenizer

    def begin(self) -> CallStream:
        """Follow a new output."""
        raise NotImplementedError

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        """Upstream's interface: parse a whole output.

        Args:
            model_output: Output after the reasoning.
            request: The request, unused here.

        Returns:
            The calls; text outside of them, malformed and unclosed calls too, is the content.
        """
        found = self.begin().feed(model_output, True)
        calls = [
            ToolCall(function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in found.calls
        ]
        return ExtractedToolCallInformation(
            tools_called=bool(calls), tool_calls=calls, content=found.content
        )

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        """Upstream's interface: parse one stream step.

        Args:
            previous_text: Text before the step.
            current_text: Text after it.
            delta_text: The difference; unused here, like the token ids.
            previous_token_ids: Ids before the step.
            current_token_ids: Ids after it.
            delta_token_ids: The difference.
            request: The request, unused here.

        Returns:
            The new parts, or None when nothing new is certain.
        """
        stream = self.begin()
        before = stream.feed(previous_text, False)
        new = stream.feed(current_text[len(previous_text) :], False)
        calls = [
            delta
            for index, call in enumerate(new.calls, start=len(before.calls))
            for delta in call_deltas(index, call)
        ]
        if not calls and not new.content:
            return None
        return DeltaMessage(content=new.content or None, tool_calls=calls or None)


def call_deltas(index: int, call: FoundCall, call_id: str | None = None) -> list[DeltaToolCall]:
    """What a stream sends for a call: its name, then its arguments.

    Args:
        index: Of the call.
        call: The call.
        call_id: Its id; None makes one.

    Returns:
        Two deltas.
    """
    name = DeltaFunctionCall(name=call.name)
    arguments = DeltaFunctionCall(arguments=call.arguments)
    call_id = call_id or f"chatcmpl-tool-{uuid.uuid4().hex}"
    return [
        DeltaToolCall(index=index, type="function", id=call_id, function=name),
        DeltaToolCall(index=index, function=arguments),
    ]


class ToolParserManager:
    """The registry of tool parsers."""

    tool_parsers: ClassVar[dict[str, type[ToolParser]]] = {}

    @classmethod
    def register_module(
        cls, name: str | Sequence[str], force: bool = True
    ) -> Callable[[Registered], Registered]:
        """Class decorator that registers a parser; see `registering`."""
        return registering(cls.tool_parsers, "tool parser", name, force)

    @classmethod
    def get_tool_parser(cls, name: str) -> type[ToolParser]:
        """The class that `--tool-call-parser` names; see `registered`."""
        return registered(cls.tool_parsers, "tool parser", name)

    @classmethod
    def import_tool_parser(cls, plugin_path: str) -> None:
        """Run a Python file that registers parsers.

        Args:
            plugin_path: Path of the file.

        Raises:
            ConfigError: The file does not exist or fails; the cause is chained.
        """
        path = Path(plugin_path)
        spec = importlib.util.spec_from_file_location(f"fastdeploy_lite_plugin_{path.stem}", path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ConfigError(f"--tool-parser-plugin: no Python file at {quote(plugin_path)}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[spec.name]
            raise ConfigError(
                f"--tool-parser-plugin {quote(plugin_path)} failed: {type(error).__name__}: {error}"
            ) from error
