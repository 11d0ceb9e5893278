"""What every layer may use; upstream's names that scripts import from here are forwarded lazily.

Loggers: `console_logger` prints once a server or engine has set up logging, the others write to the
files of `FD_LOG_DIR` (`fastdeploy_lite.utils.logging`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser
    from fastdeploy_lite.utils.logging import get_logger
    from fastdeploy_lite.utils.ports import get_random_port, is_port_available

__all__ = [
    "FlexibleArgumentParser",
    "api_server_logger",
    "console_logger",
    "data_processor_logger",
    "get_logger",
    "get_random_port",
    "is_port_available",
    "llm_logger",
    "retrive_model_from_server",
    "scheduler_logger",
]

_LAZY = {
    "FlexibleArgumentParser": "fastdeploy_lite.utils.argument_parser",
    "get_logger": "fastdeploy_lite.utils.logging",
    "get_random_port": "fastdeploy_lite.utils.ports",
    "is_port_available": "fastdeploy_lite.utils.ports",
}
_LOGGERS = {
    "api_server_logger": "api_server",
    "console_logger": "console",
    "data_processor_logger": "data_processor",
    "llm_logger": "fastdeploy",
    "scheduler_logger": "scheduler",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LOGGERS:
        return __getattr__("get_logger")(_LOGGERS[name])
    if name == "retrive_model_from_server":  # upstream's spelling
        return _model_folder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _model_folder(model_name_or_path: str, revision: str | None = "master") -> str:
    """Return a model's local folder, downloading it where that is needed, as upstream's helper.

    Raises:
        CheckpointError: The model is neither here nor to be had.
    """
    # By name, because this module must not depend on the layer above that does the work.
    hub = importlib.import_module("fastdeploy_lite.checkpoint.hub")
    return str(hub.resolve_model(model_name_or_path, revision))
