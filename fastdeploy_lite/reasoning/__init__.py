"""Parsers that separate a model's thinking from its answer.

`ReasoningParserManager.register_module(name)` is the plug-in point, as upstream's.
"""

from fastdeploy_lite.reasoning.abs_reasoning_parsers import (
    ContentFilter,
    ReasoningDelta,
    ReasoningParser,
    ReasoningParserManager,
    ReasoningStream,
    WithoutEnd,
)
from fastdeploy_lite.reasoning.parsers import (
    DeepSeekR1ReasoningParser,
    Ernie45VLReasoningParser,
    Ernie45VLThinkingReasoningParser,
    ErnieX1ReasoningParser,
    Qwen3ReasoningParser,
    ThinkReasoningParser,
)

__all__ = [
    "ContentFilter",
    "DeepSeekR1ReasoningParser",
    "Ernie45VLReasoningParser",
    "Ernie45VLThinkingReasoningParser",
    "ErnieX1ReasoningParser",
    "Qwen3ReasoningParser",
    "ReasoningDelta",
    "ReasoningParser",
    "ReasoningParserManager",
    "ReasoningStream",
    "ThinkReasoningParser",
    "WithoutEnd",
]
