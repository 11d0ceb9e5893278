"""Environment variables, read anew on every access.

`envs.FD_LOG_DIR` is the present value of that variable, converted to its type; the names and the
defaults are upstream's.  Variables of upstream that steer clusters, other hardware or its own
kernels have no meaning here and are not listed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fastdeploy_lite.utils.errors import ConfigError, quote


def _text(default: str | None) -> Callable[[str | None], str | None]:
    return lambda value: default if value is None else value


def _integer(default: int) -> Callable[[str | None], int]:
    return lambda value: default if value is None or not value.strip() else int(value)


def _boolean(default: bool) -> Callable[[str | None], bool]:
    def parse(value: str | None) -> bool:
        if value is None or not value.strip():
            return default
        words = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
        return words[value.strip().lower()]

    return parse


def _names(value: str | None) -> list[str]:
    return [name.strip() for name in (value or "").split(",") if name.strip()]


def _plugins(value: str | None) -> list[str] | None:
    return None if value is None else _names(value)


VARIABLES: dict[str, Callable[[str | None], Any]] = {
    # where things lie
    "FD_LOG_DIR": _text("log"),
    "FD_LOG_BACKUP_COUNT": _integer(7),
    "FD_DEBUG": _boolean(False),
    "FD_MODEL_SOURCE": _text("AISTUDIO"),
    "FD_MODEL_CACHE": _text(None),
    # limits
    "FD_MAX_STOP_SEQS_NUM": _integer(5),
    "FD_STOP_SEQS_MAX_LEN": _integer(8),
    "FD_SUPPORT_MAX_CONNECTIONS": _integer(1024),
    "FD_USE_GET_SAVE_OUTPUT_V1": _boolean(False),
    "FD_ENC_DEC_BLOCK_NUM": _integer(2),
    # behaviour
    "FD_API_KEY": _names,
    "FD_DISABLE_CHUNKED_PREFILL": _boolean(False),
    "FD_DISABLED_RECOVER": _boolean(False),
    "ENABLE_V1_KVCACHE_SCHEDULER": _boolean(True),
    "FD_LIMIT_THINKING_CONTENT_TRUNCATE_STR": _text("</think>"),
    "FD_PLUGINS": _plugins,
    "FD_BUILDING_ARCS": _names,
    # this project's own
    "FD_LITE_DEVICE": _text(None),
    "FD_LITE_NUM_THREADS": _integer(0),
    "FD_LITE_STRICT_STATUS": _boolean(False),
    "FD_LITE_STRIP_STOP_TEXT": _boolean(False),
    "FD_LITE_MAX_BODY_BYTES": _integer(32 * 1024 * 1024),
    "FD_LITE_SEND_SECONDS": _integer(60),
}


def __getattr__(name: str) -> Any:
    """The present value of an environment variable.

    Raises:
        AttributeError: The name is not in `VARIABLES`.
        ConfigError: The value cannot be converted.
    """
    convert = VARIABLES.get(name)
    if convert is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = os.environ.get(name)
    try:
        return convert(value)
    except (ValueError, KeyError):
        raise ConfigError(
            f"Environment variable {name}: cannot use {quote(value)}; see docs/serving.md"
        ) from None


def __dir__() -> list[str]:
    return sorted(VARIABLES)


def snapshot() -> dict[str, Any]:
    """Present values of all variables, keys of the service masked; for reports and logs."""
    values = {name: __getattr__(name) for name in VARIABLES}
    values["FD_API_KEY"] = ["***"] * len(values["FD_API_KEY"])
    return values
