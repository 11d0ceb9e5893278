"""JSON schemas without undeclared keys.

A schema that does not say otherwise allows any further property, which a small model left alone
uses until its length limit. Upstream forbids them by default, so this does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Keywords whose value is a schema, a list of schemas, or schemas by name.
_ONE = ("items", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames",
        "additionalProperties", "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Where several schemas describe one object, none of them knows all of its keys.
_COMBINERS = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas")
_OPEN = ("additionalProperties", "unevaluatedProperties")


def close_objects(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Forbid undeclared properties wherever a schema lists properties and says nothing of others.

    An object that several schemas describe together (`allOf`, or properties beside `anyOf` or
    `$ref`) stays as it is.

    Args:
        schema: A JSON schema.

    Returns:
        A new schema.
    """
    shared = {part["$ref"] for part in _combined(schema) if isinstance(part.get("$ref"), str)}
    result = _closed(schema, False, "#", shared)
    assert isinstance(result, dict)
    return result


def _combined(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Schemas that describe an object together with others."""
    for parent, part in _pairs(schema):
        if parent is not None and _is_combined(parent):
            yield part
        if "properties" in part and "$ref" in part:
            yield part


def _is_combined(parent: Mapping[str, Any]) -> bool:
    return "allOf" in parent or ("properties" in parent and any(c in parent for c in _COMBINERS))


def _pairs(schema: Any) -> Iterator[tuple[Mapping[str, Any] | None, Mapping[str, Any]]]:
    """Every schema inside, with the one that it is a branch of (None for other places)."""
    stack: list[tuple[Mapping[str, Any] | None, Any]] = [(None, schema)]
    while stack:
        parent, node = stack.pop()
        if not isinstance(node, Mapping):
            continue
        yield parent, node
        for keyword, _, child in _children(node):
            stack.append((node if keyword in ("allOf", "anyOf", "oneOf") else None, child))


def _children(node: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Keyword, path and value of the schemas directly inside one."""
    for keyword, value in node.items():
        if keyword in _NAMED and isinstance(value, Mapping):
            yield from ((keyword, f"/{keyword}/{name}", child) for name, child in value.items())
        elif keyword in _MANY and isinstance(value, list):
            yield from ((keyword, f"/{keyword}/{i}", child) for i, child in enumerate(value))
        elif keyword in _ONE:
            yield keyword, f"/{keyword}", value


def _closed(node: Any, combined: bool, path: str, shared: set[str]) -> Any:
    if not isinstance(node, Mapping):
        return node
    result = dict(node)
    within = _is_combined(node)
    for keyword, place, child in _children(node):
        branch = keyword in ("allOf", "anyOf", "oneOf") and (within or combined)
        value = _closed(child, branch, path + place, shared)
        holder = node[keyword]
        if isinstance(holder, Mapping) and keyword in _NAMED:
            if result[keyword] is holder:
                result[keyword] = dict(holder)
            result[keyword][place[len(keyword) + 2 :]] = value
        elif isinstance(holder, list):
            if result[keyword] is holder:
                result[keyword] = list(holder)
            result[keyword][int(place.rpartition("/")[2])] = value
        else:
            result[keyword] = value
    lists = "properties" in node or "patternProperties" in node
    open_ = any(keyword in node for keyword in (*_OPEN, *_COMBINERS))
    if lists and not open_ and not combined and path not in shared:
        result["additionalProperties"] = False
    return result
