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
        for keyword, _, child in schemas_inside(node):
            stack.append((node if keyword in ("allOf", "anyOf", "oneOf") else None, child))


def schemas_inside(node: Mapping[str, Any]) -> Iterator[tuple[str, str | int | None, Any]]:
    """The schemas directly inside one.

    Args:
        node: A JSON schema.

    Yields:
        The keyword, the key or position below it (None where the schema is the value), the schema.
    """
    for keyword, value in node.items():
        if keyword in _NAMED and isinstance(value, Mapping):
            yield from ((keyword, name, child) for name, child in value.items())
        elif keyword in _MANY and isinstance(value, list):
            yield from ((keyword, i, child) for i, child in enumerate(value))
        elif keyword in _ONE:
            yield keyword, None, value


def _closed(node: Any, combined: bool, path: str, shared: set[str]) -> Any:
    if not isinstance(node, Mapping):
        return node
    result = dict(node)
    within = _is_combined(node)
    for keyword, key, child in schemas_inside(node):
        branch = keyword in ("allOf", "anyOf", "oneOf") and (within or combined)
        place = f"{path}/{keyword}" if key is None else f"{path}/{keyword}/{key}"
        put_schema(result, keyword, key, _closed(child, branch, place, shared), node)
    lists = "properties" in node or "patternProperties" in node
    open_ = any(keyword in node for keyword in (*_OPEN, *_COMBINERS))
    if lists and not open_ and not combined and path not in shared:
        result["additionalProperties"] = False
    return result


def put_schema(
    target: dict[str, Any], keyword: str, key: Any, child: Any, source: Mapping[str, Any]
) -> None:
    """Put a schema that `schemas_inside` gave back where it was, changed.

    Args:
        target: A shallow copy of `source`; what it shares with it is copied first.
        keyword: See `schemas_inside`.
        key: See `schemas_inside`.
        child: The new schema.
        source: What was walked; it stays as it is.
    """
    if key is None:
        target[keyword] = child
        return
    if target[keyword] is source[keyword]:
        target[keyword] = source[keyword].copy()
    target[keyword][key] = child
