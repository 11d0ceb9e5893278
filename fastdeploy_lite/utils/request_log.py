"""What is logged about requests, and how much of their text.

`FD_LOG_REQUESTS=0` logs nothing about them; `FD_LOG_REQUESTS_LEVEL` says how much: 0 life cycle,
1 stages too, 2 (default) content cut to `FD_LOG_MAX_LEN` characters, 3 all content. At levels 0 and
1 no text of a prompt or an answer reaches a log.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any

from fastdeploy_lite import envs

FULL_CHARACTERS = 4 << 20  # also at level 3 one record has an end
HIDDEN = "<not logged>"
_DEEPEST = 32


class RequestLogLevel(IntEnum):
    """Upstream's levels."""

    LIFECYCLE = 0
    STAGES = 1
    CONTENT = 2
    FULL = 3


def is_logged(level: RequestLogLevel) -> bool:
    """Whether records of a level are wanted."""
    return bool(envs.FD_LOG_REQUESTS) and level <= envs.FD_LOG_REQUESTS_LEVEL


def log_request(
    logger: logging.Logger, level: RequestLogLevel, message: str, *values: object
) -> None:
    """Log something about a request, if its level is wanted.

    Args:
        logger: Where to.
        level: How deep it goes.
        message: With `%` placeholders.
        *values: For them.
    """
    if is_logged(level):
        logger.info(message, *values, stacklevel=2)


def content(value: Any) -> str:
    """Text of a prompt or an answer as it may stand in a log.

    Args:
        value: A text, plain data, or a pydantic model (its set fields).

    Returns:
        JSON, cut at the limit of the present level; a mark where content is not wanted.
    """
    if not is_logged(RequestLogLevel.CONTENT):
        return HIDDEN
    full = is_logged(RequestLogLevel.FULL)
    return shortened(value, FULL_CHARACTERS if full else envs.FD_LOG_MAX_LEN)


def shortened(value: Any, limit: int) -> str:
    """The first characters of a value's JSON, without looking at the rest of it.

    Args:
        value: Plain data, or a pydantic model.
        limit: Characters.

    Returns:
        At most `limit` characters and a mark.
    """
    parts: list[str] = []
    room = limit
    for part in _pieces(value, limit):
        parts.append(part[: max(room, 0)])
        room -= len(part)
        if room < 0:
            return "".join(parts) + "\u2026 (cut)"
    return "".join(parts)


def _pieces(value: Any, limit: int, depth: int = 0) -> Iterator[str]:
    """The JSON in pieces of which none is much longer than the limit."""
    fields = getattr(value, "model_fields_set", None)  # a pydantic model; utils import none
    if fields is not None:
        value = {name: getattr(value, name) for name in sorted(fields) if hasattr(value, name)}
    if isinstance(value, str):
        yield _text(value, limit)
    elif isinstance(value, Mapping | list | tuple) and depth > _DEEPEST:
        yield "\u2026"
    elif isinstance(value, Mapping):
        yield "{"
        for number, (key, inner) in enumerate(value.items()):
            yield f"{', ' if number else ''}{_text(str(key), limit)}: "
            yield from _pieces(inner, limit, depth + 1)
        yield "}"
    elif isinstance(value, list | tuple):
        yield "["
        for number, inner in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(inner, limit, depth + 1)
        yield "]"
    elif value is None or isinstance(value, bool | float):
        yield json.dumps(value)
    elif isinstance(value, int):
        yield str(value) if abs(value) < 1 << 64 else "<integer>"
    else:
        yield f"<{type(value).__name__}>"


def _text(value: str, limit: int) -> str:
    return json.dumps(value[: limit + 1], ensure_ascii=False)
