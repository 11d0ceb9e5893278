"""Where JSON under a constraint may hold whitespace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_LEVELS = 8
BLANKS_PER_LEVEL = 4
_COMBINATIONS = ("allOf", "anyOf", "oneOf")
_BRANCHES = ("if", "then", "else")
_RESTRICTING = {"type", "enum", "const", "$ref", "properties", "items", "prefixItems"}


def layout_options(schema: Any, any_whitespace: bool) -> dict[str, Any]:
    """llguidance's options for whitespace.

    Free whitespace is a blank, or a line break with the indentation that the schema's deepest value
    needs: every usual layout.  A small model that may write more blanks than its training texts
    have in that place does not find back to the answer.

    Args:
        schema: The JSON schema.
        any_whitespace: Whether JSON may be laid out freely; otherwise `", "` and `": "` separate.

    Returns:
        The options.
    """
    if not any_whitespace:
        return {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    blanks = BLANKS_PER_LEVEL * max(nesting(schema), 1)
    pattern = rf"\x20|\r?\n[\x20\t]{{0,{blanks}}}"
    return {"whitespace_flexible": True, "whitespace_pattern": pattern}


def nesting(schema: Any) -> int:
    """How many objects and lists the values of a schema hold in one another.

    Args:
        schema: The JSON schema.

    Returns:
        The levels, at most `MAX_LEVELS`, which also stands for unbounded.
    """
    level = [schema]
    for depth in range(MAX_LEVELS):
        inner = [child for node in _same_level(level, schema) for child in _children(node)]
        if not inner:
            return depth
        level = inner
    return MAX_LEVELS


def _same_level(nodes: Iterable[Any], root: Any) -> Iterator[Any]:
    """The schemas, and those that they combine or refer to, each once."""
    waiting, seen = list(nodes), set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, Mapping):
            for name in _COMBINATIONS:
                waiting += _list(node.get(name))
            waiting += [node[name] for name in _BRANCHES if name in node]
            if "$ref" in node:
                waiting.append(_referred(node["$ref"], root))


def _referred(reference: Any, root: Any) -> Any:
    node = root
    for part in str(reference).lstrip("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        node = node.get(key, True) if isinstance(node, Mapping) else True
    return node


def _children(node: Any) -> list[Any]:
    """The schemas of what a value holds; `True` holds anything."""
    if not isinstance(node, Mapping):
        return [True] if node is True else []
    types = node.get("type")
    named = {name for name in [types, *_list(types)] if isinstance(name, str)}
    if not _RESTRICTING & node.keys() and not any(name in node for name in _COMBINATIONS):
        named = {"object", "array"}
    found: list[Any] = []
    if "object" in named or "properties" in node:
        for name in ("properties", "patternProperties"):
            members = node.get(name)
            found += members.values() if isinstance(members, Mapping) else []
        found.append(node.get("additionalProperties", True))
    if "array" in named or "items" in node or "prefixItems" in node:
        found += _list(node.get("prefixItems"))
        found.append(node.get("items", True))
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
