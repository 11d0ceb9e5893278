"""Weight formats: one object each, found by name.

A format says how a matrix lies in files and in host memory (`base.WeightFormat`); nothing else of
the package has a table by format, except the native ops that multiply by it.
"""

from __future__ import annotations

from fastdeploy_lite.formats.base import Arrays, TensorSpec, WeightFormat
from fastdeploy_lite.formats.ccq import CCQ
from fastdeploy_lite.formats.dense import Dense
from fastdeploy_lite.formats.int4 import Int4
from fastdeploy_lite.formats.int8 import Int8

__all__ = [
    "Arrays",
    "TensorSpec",
    "WeightFormat",
    "config_names",
    "from_config_name",
    "get",
    "names",
    "register",
]

_FORMATS: dict[str, WeightFormat] = {
    format_.name: format_ for format_ in (Dense(), Int8(), Int4(), CCQ())
}


def register(format_: WeightFormat) -> WeightFormat:
    """Make a format known under its name, in place of one of that name; returns it."""
    _FORMATS[format_.name] = format_
    return format_


def get(name: str) -> WeightFormat:
    """Return the format of that name; KeyError when there is none."""
    return _FORMATS[name]


def names() -> tuple[str, ...]:
    """Return the names of all formats."""
    return tuple(_FORMATS)


def from_config_name(name: str) -> WeightFormat:
    """Return the format that config.json calls `name`; KeyError when there is none."""
    return {f.config_name: f for f in _FORMATS.values() if f.config_name is not None}[name]


def config_names() -> tuple[str, ...]:
    """Return what config.json may say as `dense_quant_type` and `moe_quant_type`."""
    return tuple(f.config_name for f in _FORMATS.values() if f.config_name is not None)
