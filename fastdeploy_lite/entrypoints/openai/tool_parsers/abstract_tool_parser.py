"""The interface of tool parsers and their registry.

A parser of this package is a pure function `scan` of the text so far that returns what is certain;
its results only grow.  A stream sends the differences, so that every way of cutting a text into
deltas ends with the same calls as the whole text.  A plug-in written for upstream overrides
`extract_tool_calls` and `extract_tool_calls_streaming` instead.
"""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

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
class ToolCallScan:
    """One call, as far as it is certain; `arguments` is a beginning of JSON text."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class ToolScan:
    """What the text so far holds.

    Attributes:
        content: Text outside the calls.
        calls: The calls in their order.
        complete: Whether every call is well-formed and closed.
    """

    content: str = ""
    calls: list[ToolCallScan] = field(default_factory=list)
    complete: bool = True


class ToolParser:
    """Base class.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.model_tokenizer = tokenizer

    def scan(self, text: str, final: bool) -> ToolScan:
        """Find the calls.

        Args:
            text: Output after the reasoning, so far.
            final: Whether it is complete.

        Returns:
            What is certain.
        """
        raise NotImplementedError

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        """Upstream's interface: parse a whole output.

        Args:
            model_output: Output after the reasoning.
            request: The request, unused here.

        Returns:
            The calls; `tools_called` is false when one of them is cut off or malformed, and the
            whole text is then the content.
        """
        found = self.scan(model_output, True)
        calls = [
            ToolCall(function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in found.calls
        ]
        called = bool(calls) and found.complete
        content = found.content if called or not calls else model_output
        return ExtractedToolCallInformation(tools_called=called, tool_calls=calls, content=content)

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
        return self.difference(self.scan(previous_text, False), self.scan(current_text, False))

    def difference(self, old: ToolScan, new: ToolScan) -> DeltaMessage | None:
        """What a stream sends to get from one scan to the next.

        Args:
            old: What was sent.
            new: What is certain now.

        Returns:
            The delta, or None when they are equal.
        """
        deltas: list[DeltaToolCall] = []
        for index, call in enumerate(new.calls):
            sent = old.calls[index].arguments if index < len(old.calls) else None
            deltas += self._call_deltas(index, call, sent)
        content = new.content[len(old.content) :]
        if not deltas and not content:
            return None
        return DeltaMessage(content=content or None, tool_calls=deltas or None)

    def _call_deltas(self, index: int, call: ToolCallScan, sent: str | None) -> list[DeltaToolCall]:
        deltas = []
        if sent is None:
            first = DeltaFunctionCall(name=call.name)
            name = f"chatcmpl-tool-{uuid.uuid4().hex}"
            deltas.append(DeltaToolCall(index=index, type="function", id=name, function=first))
        piece = call.arguments[len(sent or "") :]
        if piece:
            function = DeltaFunctionCall(arguments=piece)
            deltas.append(DeltaToolCall(index=index, function=function))
        return deltas


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
