"""`tool_choice` that demands a call: the constraint on the output, and how it is read.

A named function: the output is the JSON of its arguments. `required`: the output is a JSON list of
`{"name": ..., "arguments": {...}}`. Both hold for every model and need no tool parser.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fastdeploy_lite.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    DeltaFunctionCall,
    DeltaToolCall,
    FunctionCall,
    NamedToolChoice,
    ToolCall,
)

# A function without `parameters` takes none.
NO_ARGUMENTS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}
_REFERENCES = ("#/$defs/", "#/definitions/")


def forced_name(body: ChatCompletionRequest) -> str | None:
    """The function that must be called: its name, "" for any of the tools, None for none."""
    if isinstance(body.tool_choice, NamedToolChoice):
        return body.tool_choice.function.name
    return "" if body.tool_choice == "required" else None


def schema(body: ChatCompletionRequest) -> dict[str, Any] | None:
    """The JSON schema that the output must follow; None if no call is demanded."""
    name = forced_name(body)
    if name is None:
        return None
    parameters = {t.function.name: t.function.parameters or NO_ARGUMENTS for t in body.tools or []}
    if name:
        return parameters[name]
    definitions: dict[str, Any] = {}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool}, "arguments": _hoisted(i, value, definitions)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, (tool, value) in enumerate(parameters.items())
    ]
    result: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if body.parallel_tool_calls is False:
        result["maxItems"] = 1
    return {**result, "$defs": definitions} if definitions else result


def _hoisted(index: int, parameters: Mapping[str, Any], definitions: dict[str, Any]) -> Any:
    """`parameters` with its definitions moved to the root, under names of their own."""

    def renamed(node: Any) -> Any:
        if isinstance(node, list):
            return [renamed(item) for item in node]
        if not isinstance(node, Mapping):
            return node
        found = {key: renamed(value) for key, value in node.items()}
        target = found.get("$ref")
        start = next((r for r in _REFERENCES if str(target).startswith(r)), None)
        if isinstance(target, str) and start is not None:
            found["$ref"] = f"#/$defs/{index}.{target[len(start) :]}"
        return found

    moved = renamed(parameters)
    for group in ("$defs", "definitions"):
        held = moved.pop(group, None)
        if isinstance(held, Mapping):  # what is no schema, the compiler refuses by its place
            definitions.update((f"{index}.{name}", value) for name, value in held.items())
        elif held is not None:
            moved[group] = held
    return moved


class _Call(msgspec.Struct):
    """An element of a list of calls; the arguments stay as they were written, numbers included."""

    name: str
    arguments: msgspec.Raw


@dataclass(slots=True)
class CallReader:
    """Reads a constrained output as it comes.

    Attributes:
        name: Of the only function; "" for a list of calls.
        calls: Calls that are complete, or whose arguments come in.
    """

    name: str
    calls: list[ToolCall] = field(default_factory=list)
    _waiting: str = ""
    _depth: int = 0
    _in_string: bool = False
    _is_escaped: bool = False

    def feed(self, text: str) -> list[DeltaToolCall]:
        """Take in new text; returns what is new of the calls."""
        if self.name:
            return self._feed_arguments(text)
        deltas = []
        for element in self._elements(text):
            call = msgspec.json.decode(element, type=_Call)
            deltas.append(self._begin(call.name, bytes(call.arguments).decode()))
        return deltas

    def _feed_arguments(self, text: str) -> list[DeltaToolCall]:
        if not self.calls:
            text = text.lstrip()
            return [self._begin(self.name, text)] if text else []
        if not text:
            return []
        self.calls[0].function.arguments += text
        return [DeltaToolCall(index=0, function=DeltaFunctionCall(arguments=text))]

    def _begin(self, name: str, arguments: str) -> DeltaToolCall:
        call = ToolCall(
            id=f"chatcmpl-tool-{uuid.uuid4().hex}",
            function=FunctionCall(name=name, arguments=arguments),
        )
        self.calls.append(call)
        function = DeltaFunctionCall(name=name, arguments=arguments)
        index = len(self.calls) - 1
        return DeltaToolCall(index=index, id=call.id, type="function", function=function)

    def _elements(self, text: str) -> list[str]:
        """The list's elements that `text` completes; each character is looked at once."""
        found, start = [], 0
        for place, character in enumerate(text):
            if self._in_string:
                ends = character == '"' and not self._is_escaped
                self._is_escaped = character == "\\" and not self._is_escaped
                self._in_string = not ends
            elif character == '"':
                self._in_string = True
            elif character in "[{":
                self._depth += 1
                if self._depth == 2:
                    self._waiting, start = "", place
            elif character in "]}":
                self._depth -= 1
                if self._depth == 1:
                    found.append(self._waiting + text[start : place + 1])
        if self._depth >= 2:
            self._waiting += text[start:]
        return found
