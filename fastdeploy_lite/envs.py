"""Environment variables, read anew on every access.

`envs.FD_LOG_DIR` is the present value of that variable, converted to its type; the names and the
defaults are upstream's.  Variables of upstream that steer clusters, other hardware or its own
kernels have no meaning here and are not listed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastdeploy_lite.utils.errors import VariableError, quote


class UnusableError(ValueError):
    """A value cannot be used; the text says what can, where only the machine knows."""


@dataclass(frozen=True)
class Variable:
    """How the text of one variable becomes a value.

    Attributes:
        default: The value where it is not set, or blank.
        read: Converts a text; ValueError or KeyError where it cannot.
        expected: What it takes, in words.
    """

    default: Any
    read: Callable[[str], Any]
    expected: str

    def __call__(self, text: str | None) -> Any:
        """The value of a text; None is that of a variable that is not set."""
        if text is None or (self.read is not str and not text.strip()):
            return self.default
        return self.read(text)


def _text(default: str | None) -> Variable:
    return Variable(default, str, "any text")


def _boolean(default: bool) -> Variable:
    words = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    return Variable(default, lambda text: words[text.strip().lower()], f"one of {', '.join(words)}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _list() -> Variable:
    return Variable([], _names, "names with commas between")


def _keys(text: str | None) -> list[str]:
    """Refuses a variable that is set and holds no key: the door would stand open unnoticed."""
    names = _names(text or "")
    if text is not None and not names:
        raise ValueError
    return names


def _one_of(default: str | None, *choices: str) -> Variable:
    found = {choice.lower(): choice for choice in choices}
    return Variable(
        default, lambda text: found[text.strip().lower()], f"one of {', '.join(choices)}"
    )


def _at_least(least: int, default: int, most: int = 10**9) -> Variable:
    def read(text: str) -> int:
        if not re.fullmatch(r"\s*\d+\s*", text, re.ASCII):  # `int` takes 1_0, native code does not
            raise ValueError
        number = int(text)
        if not least <= number <= most:
            raise ValueError
        return number

    return Variable(default, read, f"a whole number of at least {least} and at most {most}")


def _address(text: str) -> str:
    found = urlsplit(text.strip())
    if found.scheme not in ("http", "https") or not found.hostname:
        raise ValueError
    _ = found.port  # ValueError where it is none
    return text.strip()


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if any(not name.strip() or not equals for name, equals, _ in pairs):
        raise ValueError
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


class _InstructionSet(Variable):
    """What the native module reads itself. Only where it is set that module is needed here."""

    def __init__(self) -> None:
        super().__init__(None, self._known, "one of what this machine and build offer")

    @staticmethod
    def _known(text: str) -> str:
        from fastdeploy_lite import _ops_cpu  # noqa: PLC0415 - most that reads variables needs none

        name, offered = text.strip().lower(), _ops_cpu.available_isas()
        if name not in offered:
            raise UnusableError(f"one of {', '.join(offered)}, what this machine and build offer")
        return name


def _plugins(text: str | None) -> list[str] | None:
    return None if text is None else _names(text)


VARIABLES: dict[str, Callable[[str | None], Any]] = {
    # where things lie
    "FD_LOG_DIR": _text("log"),
    "FD_LOG_BACKUP_COUNT": _at_least(0, 7, 36500),
    "FD_MODEL_SOURCE": _one_of("AISTUDIO", "AISTUDIO", "MODELSCOPE", "HUGGINGFACE"),
    "FD_MODEL_CACHE": _text(None),
    # what is logged; the level of requests is 0 life cycle, 1 stages, 2 content, 3 everything
    "FD_LOG_LEVEL": _one_of(None, "DEBUG", "INFO", "WARNING", "ERROR"),
    "FD_DEBUG": _boolean(False),
    "FD_LOG_REQUESTS": _boolean(True),
    "FD_LOG_REQUESTS_LEVEL": _at_least(0, 2),
    "FD_LOG_MAX_LEN": _at_least(0, 2048),
    # traces
    "FD_TRACE": _one_of("off", "off", "local", "otel", "all"),
    "TRACES_ENABLE": _boolean(False),
    "TRACES_EXPORTER": _one_of("console", "console", "otlp"),
    "EXPORTER_OTLP_ENDPOINT": Variable(None, _address, "an http:// or https:// address"),
    "EXPORTER_OTLP_HEADERS": Variable({}, _pairs, "NAME=VALUE pairs with commas between"),
    "FD_SERVICE_NAME": _text("FastDeploy"),
    "FD_HOST_NAME": _text("localhost"),
    # limits
    "FD_MAX_STOP_SEQS_NUM": _at_least(0, 5),
    "FD_STOP_SEQS_MAX_LEN": _at_least(0, 8),
    "FD_SUPPORT_MAX_CONNECTIONS": _at_least(1, 1024),
    "FD_USE_GET_SAVE_OUTPUT_V1": _boolean(False),
    "FD_ENC_DEC_BLOCK_NUM": _at_least(0, 2),
    # behaviour
    "FD_API_KEY": _keys,
    "FD_DETERMINISTIC_MODE": _boolean(False),
    "FD_DISABLE_CHUNKED_PREFILL": _boolean(False),
    "FD_DISABLED_RECOVER": _boolean(False),
    "ENABLE_V1_KVCACHE_SCHEDULER": _boolean(True),
    "FD_LIMIT_THINKING_CONTENT_TRUNCATE_STR": _text("</think>"),
    "FD_GUIDANCE_DISABLE_ADDITIONAL": _boolean(True),
    "FD_PLUGINS": _plugins,
    "FD_BUILDING_ARCS": _list(),
    # this project's own
    "FD_LITE_DEVICE": _one_of(None, "auto", "cpu", "nvidia", "gpu"),
    "FD_LITE_NUM_THREADS": _at_least(1, 0, 4096),
    "FD_LITE_CPU_ISA": _InstructionSet(),
    "FD_LITE_HUGE_PAGES": _boolean(True),
    "FD_LITE_RACECHECK": _one_of("0", "0", "1"),  # native code reads it itself
    "FD_LITE_PEER_SUMS": _boolean(True),
    "FD_LITE_PACKED_CACHE": _text(None),
    "FD_LITE_RAY_WAIT_SECONDS": _at_least(0, 120),
    "FD_LITE_STEP_SECONDS": _at_least(0, 60),
    "FD_LITE_WINT2_ROW_ORDER": _one_of("auto", "auto", "natural", "permuted"),
    "FD_LITE_STRICT_STATUS": _boolean(False),
    "FD_LITE_COUNT_CLOSING_EOS": _boolean(False),
    "FD_LITE_STRIP_STOP_TEXT": _boolean(False),
    "FD_LITE_LOG_FORMAT": _one_of("text", "text", "json"),
    "FD_LITE_OPEN_METRICS": _boolean(False),
    "FD_LITE_MAX_BODY_BYTES": _at_least(1, 4 << 20),
    "FD_LITE_MAX_BODY_VALUES": _at_least(1, 1 << 18),
    "FD_LITE_HEAD_SECONDS": _at_least(1, 20),
    "FD_LITE_SEND_SECONDS": _at_least(1, 60),
    "FD_LITE_KEEPALIVE_SECONDS": _at_least(1, 15),
}
SECRETS = ("FD_API_KEY", "EXPORTER_OTLP_HEADERS")
# Upstream's names for clusters, other hardware and its own kernels begin like these.
_PREFIXES = ("FD_", "TRACES_", "EXPORTER_OTLP_")


def __getattr__(name: str) -> Any:
    """The present value of an environment variable.

    Raises:
        AttributeError: The name is not in `VARIABLES`.
        VariableError: The value cannot be converted.
    """
    convert = VARIABLES.get(name)
    if convert is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = os.environ.get(name)
    try:
        return convert(value)
    except (ValueError, KeyError) as error:
        expected = convert.expected if isinstance(convert, Variable) else "at least one name"
        if isinstance(error, UnusableError):
            expected = str(error)
        is_secret = name in SECRETS and any(letter.isalnum() for letter in value or "")
        found = "what it is set to" if is_secret else quote(value)
        raise VariableError(
            f"Environment variable {name}: cannot use {found}, expected {expected}; "
            "see docs/environment.md"
        ) from None


def __dir__() -> list[str]:
    return sorted(VARIABLES)


def snapshot() -> dict[str, Any]:
    """Present values of all variables, secrets masked; for reports and logs.

    Raises:
        VariableError: A value cannot be used.
    """
    values = {name: __getattr__(name) for name in VARIABLES}
    for name in SECRETS:
        values[name] = "***" if values[name] else values[name]
    return values


def check() -> list[str]:
    """Refuse variables that cannot be used before they matter.

    Returns:
        Lines on variables that do nothing.

    Raises:
        VariableError: A value cannot be used.
    """
    values = snapshot()
    lines = []
    if unknown := without_meaning():
        lines.append(f"Environment variables without a meaning here: {', '.join(unknown)}")
    if not values["ENABLE_V1_KVCACHE_SCHEDULER"]:
        lines.append("ENABLE_V1_KVCACHE_SCHEDULER=0 has no effect: there is one scheduler")
    return lines


def without_meaning() -> list[str]:
    """Variables that are set, look like one of these, and are none: misspelt or not available."""
    return sorted(n for n in os.environ if n.startswith(_PREFIXES) and n not in VARIABLES)
