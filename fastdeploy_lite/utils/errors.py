"""The error classes that cross module boundaries.

Every message is one line: it is printed on consoles, written to logs and sent in HTTP bodies, and
it may quote names taken from damaged files or from users, who must not be able to forge log lines.
"""

from __future__ import annotations

import os
from typing import Any

_LONGEST_QUOTE = 120


def one_line(text: object) -> str:
    """Return `text` as one printable line: control and line-breaking characters are escaped."""
    text = str(text)
    if text.isprintable():  # a hundred times as fast, and nearly always so
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quote(value: object) -> str:
    """Return the `repr` of a value found in a file or request, cut to fit a message."""
    try:
        text = repr(_beginning(value, [_LONGEST_QUOTE]))
    except (ValueError, RecursionError):  # integers beyond Python's digit limit, endless nesting
        text = f"<{type(value).__name__}>"
    text = one_line(text[: _LONGEST_QUOTE + 1])
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."


def _beginning(value: Any, room: list[int]) -> Any:
    """As much of plain data as a quote may show: requests bring lists of a million items.

    Args:
        value: Whatever was found.
        room: Items that may still be looked at; counted down.

    Returns:
        The value, or a copy that begins like it and is longer than a quote.
    """
    room[0] -= 1
    if isinstance(value, str | bytes):
        return value[: _LONGEST_QUOTE + 1]
    if isinstance(value, int) and value.bit_length() > 4 * _LONGEST_QUOTE:
        room[0] = -1  # it fills a quote alone, and takes its time
    if type(value) in (list, tuple, dict):
        items: list[Any] = []
        for item in value.items() if type(value) is dict else value:
            if room[0] < 0:
                break
            items.append(_beginning(item, room))
        return type(value)(items)
    return value


class FastDeployError(Exception):
    """Base of all errors that a user can cause and repair; the message is always one line."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class CheckpointError(FastDeployError, ValueError):
    """A checkpoint file is missing, damaged, or does not hold what config.json promises."""


class ConfigError(FastDeployError, ValueError):
    """A configuration file, argument or environment variable has a value that cannot be used."""


class VariableError(ConfigError):
    """An environment variable has a value that cannot be used; a program ends with `STATUS`."""

    STATUS = 2  # as for a wrong argument


def exit_status(error: BaseException) -> int:
    """Status that a program ends with which could not begin for this reason."""
    return VariableError.STATUS if isinstance(error, VariableError) else 1


class RequestError(FastDeployError, ValueError):
    """A request is at fault. `param` names its field, `code` is a short machine-readable reason."""

    def __init__(
        self, message: object = "", *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def explain(error: BaseException) -> str:
    """One line that says what is wrong and, where that adds something, what lies behind it.

    Args:
        error: What ended the program.

    Returns:
        The message, which names what to do where there is something, then the causes that it does
        not quote already.
    """
    text = _described(error)
    below = error.__cause__
    while below is not None:
        reason = _described(below)
        if str(below) and str(below) not in text:
            text += f" (because of {reason})"
        below = below.__cause__
    return one_line(text)


def _described(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, FastDeployError):
        return text
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return f"{type(error).__name__}: {text}"
