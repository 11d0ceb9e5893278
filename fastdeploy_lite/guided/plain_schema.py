"""JSON schemas as they are read: numbers that JSON has, keywords that say something.

Generators write keywords out whose value excludes nothing (`uniqueItems: false`), and formats that
are remarks (`password`, `binary`). The compiler knows neither and would refuse the schema.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from fastdeploy_lite.guided.closed_objects import put_schema, schemas_inside

# Formats that the compiler enforces; any other is an annotation, as JSON Schema has it.
ENFORCED_FORMATS = frozenset({
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid",
})  # fmt: skip
_ALLOW_ALL: tuple[Any, ...] = (True, {})
# Keywords that the compiler does not know, and values with which they exclude nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "not": (False,),
    "propertyNames": _ALLOW_ALL,
    "unevaluatedProperties": _ALLOW_ALL,
    "unevaluatedItems": _ALLOW_ALL,
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
}
# Keywords that say nothing where none of the others stands beside them.
_IDLE_ALONE: Mapping[str, tuple[str, ...]] = {
    "if": ("then", "else"), "then": ("if",), "else": ("if",),
    "minContains": ("contains",), "maxContains": ("contains",),
}  # fmt: skip


def read_json(text: str) -> Any:
    """Parse JSON, and only JSON: Python would read `NaN`, and 1e400 as infinity.

    Args:
        text: Of a constraint.

    Returns:
        Plain data.

    Raises:
        ValueError: It is no JSON, or holds a number that a double cannot.
    """
    return json.loads(text, parse_constant=_no_number, parse_float=_finite)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is beyond what a double holds")
    return number


def plain_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what excludes no value.

    Args:
        schema: A JSON schema.

    Returns:
        A new schema that allows the same values.
    """
    kept = {name: value for name, value in schema.items() if not _is_idle(name, value, schema)}
    for keyword, key, child in schemas_inside(kept):
        if isinstance(child, Mapping):
            put_schema(kept, keyword, key, plain_schema(child), schema)
    return kept


def _is_idle(name: str, value: Any, schema: Mapping[str, Any]) -> bool:
    if name == "format":
        return isinstance(value, str) and value not in ENFORCED_FORMATS
    if name in _IDLE_ALONE:
        return not any(other in schema for other in _IDLE_ALONE[name])
    # 0 == False in Python, but not in JSON
    return any(value == idle and type(value) is type(idle) for idle in _NEUTRAL.get(name, ()))
