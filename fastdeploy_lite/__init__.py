"""FastDeploy-compatible serving of 2-bit CCQ ERNIE-4.5 MoE models on PaddlePaddle.

Importing the package does nothing but define these names: no framework, no device, no directory.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdeploy_lite.entrypoints.llm import LLM
    from fastdeploy_lite.models.registry import ModelRegistry
    from fastdeploy_lite.request.params import SamplingParams

__all__ = ["LLM", "ModelRegistry", "SamplingParams", "version"]

_LAZY = {
    "LLM": "fastdeploy_lite.entrypoints.llm",
    "ModelRegistry": "fastdeploy_lite.models.registry",
    "SamplingParams": "fastdeploy_lite.request.params",
}


def version() -> str:
    """What is installed: versions of this package and of Paddle, as text of several lines."""
    return "\n".join(
        [
            f"fastdeploy version: {_installed('fastdeploy-lite')}",
            f"paddle version: {_paddle_version()}",
        ]
    )


def _installed(distribution: str) -> str:
    from importlib import metadata  # noqa: PLC0415 - costs more than the rest of this module

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "Unknown"


def _paddle_version() -> str:
    names = ("paddlepaddle-gpu", "paddlepaddle")
    found = (f"{_installed(name)} ({name})" for name in names if _installed(name) != "Unknown")
    return next(found, "Unknown")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _installed("fastdeploy-lite")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
