"""Arguments of a dataclass against its annotations: Python checks none, and `"no"` is true."""

from __future__ import annotations

import numbers
import operator
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from fastdeploy_lite.utils.errors import ConfigError, quote

_NAMES: Mapping[type, str] = {
    bool: "True or False", int: "an integer", float: "a number", str: "text", dict: "a dict",
    list: "a list", type(None): "None",
}  # fmt: skip


def check_types(instance: Any) -> None:
    """Check every field of a dataclass, and store it as the type that it is said to have.

    Args:
        instance: Annotated with bool, int, float, str, dict, list, their unions with None, or Any.

    Raises:
        ConfigError: A value is none of what its field may be.
    """
    for name, hint in typing.get_type_hints(type(instance)).items():
        if hint is not Any:
            setattr(instance, name, _as_one_of(_kinds(hint), name, getattr(instance, name)))


def _kinds(hint: Any) -> tuple[type, ...]:
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    parts = typing.get_args(hint) if is_union else (hint,)
    return tuple(typing.get_origin(part) or part for part in parts)


def _as_one_of(kinds: tuple[type, ...], name: str, value: Any) -> Any:
    plain = _plain(value)
    is_whole = isinstance(plain, int) and not isinstance(plain, bool)
    if type(plain) in kinds or (isinstance(plain, kinds) and not isinstance(plain, bool)):
        return plain
    if is_whole and float in kinds:
        return plain
    if is_whole and bool in kinds and plain in (0, 1):
        return bool(plain)
    expected = " or ".join(_NAMES.get(kind, kind.__name__) for kind in kinds)
    raise ConfigError(f"{name}: expected {expected}, got {quote(value)}")


def _plain(value: Any) -> Any:
    """Numbers, paths and tuples as the types that annotations name."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):  # NumPy's too
        return operator.index(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    return list(value) if isinstance(value, tuple) else value
