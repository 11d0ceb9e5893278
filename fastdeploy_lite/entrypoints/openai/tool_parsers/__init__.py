"""Parsers that find tool calls in a model's output.

`ToolParserManager.register_module(name)` is the plug-in point, as upstream's.
"""

from fastdeploy_lite.entrypoints.openai.tool_parsers.abstract_tool_parser import (
    ToolCallScan,
    ToolParser,
    ToolParserManager,
    ToolScan,
)
from fastdeploy_lite.entrypoints.openai.tool_parsers.tagged import (
    Ernie45VLThinkingToolParser,
    ErnieX1ToolParser,
    HermesToolParser,
)

__all__ = [
    "Ernie45VLThinkingToolParser",
    "ErnieX1ToolParser",
    "HermesToolParser",
    "ToolCallScan",
    "ToolParser",
    "ToolParserManager",
    "ToolScan",
]
