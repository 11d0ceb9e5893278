"""Parsers that find tool calls in a model's output.

`ToolParserManager.register_module(name)` is the plug-in point, as upstream's.
"""

from fastdeploy_lite.entrypoints.openai.tool_parsers.abstract_tool_parser import (
    CallStream,
    Found,
    FoundCall,
    ToolParser,
    ToolParserManager,
    call_deltas,
)
from fastdeploy_lite.entrypoints.openai.tool_parsers.tagged import (
    Ernie45VLThinkingToolParser,
    ErnieX1ToolParser,
    HermesToolParser,
)

__all__ = [
    "CallStream",
    "Ernie45VLThinkingToolParser",
    "ErnieX1ToolParser",
    "Found",
    "FoundCall",
    "HermesToolParser",
    "ToolParser",
    "ToolParserManager",
    "call_deltas",
]
