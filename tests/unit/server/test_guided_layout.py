"""How much whitespace JSON gets: enough for every usual layout of the schema, and no more."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_lite.guided.layout import MAX_LEVELS, layout_options, nesting

TEXT = {"type": "string"}


def object_of(**members: Any) -> dict[str, Any]:
    return {"type": "object", "properties": members, "additionalProperties": False}


TREE = {"$ref": "#/$defs/n", "$defs": {"n": object_of(kids={"type": "array", "items": {
    "$ref": "#/$defs/n"}})}}  # fmt: skip
CASES: list[tuple[Any, int]] = [
    (TEXT, 0),
    ({"enum": [1, 2]}, 0),
    (object_of(a=TEXT, b=TEXT), 1),
    (object_of(a=object_of(b=TEXT)), 2),
    (object_of(a={"type": ["array", "null"], "items": TEXT}), 2),
    ({"anyOf": [TEXT, {"type": "array", "prefixItems": [TEXT], "items": False}]}, 1),
    ({"$ref": "#/$defs/x", "$defs": {"x": object_of(y=TEXT)}}, 1),
    ({"type": "object"}, MAX_LEVELS),
    ({}, MAX_LEVELS),
    (True, MAX_LEVELS),
    (TREE, MAX_LEVELS),
    (object_of(a={"type": "array"}), MAX_LEVELS),
    ({"$ref": "#/nowhere/at/all"}, MAX_LEVELS),
    ({"type": [["odd"], 3]}, 0),
]


@pytest.mark.parametrize(("schema", "levels"), CASES)
def test_levels(schema: Any, levels: int) -> None:
    assert nesting(schema) == levels


VALUES = st.recursive(
    st.integers(0, 9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab"), inner, max_size=2),
    max_leaves=12,
)


def schema_of(value: Any) -> dict[str, Any]:
    """A schema of which the value is one."""
    if isinstance(value, dict):
        return object_of(**{name: schema_of(member) for name, member in value.items()})
    if isinstance(value, list):
        places = [schema_of(member) for member in value]
        return {"type": "array", "prefixItems": places, "items": False}
    return {"type": "integer"}


@given(VALUES, st.sampled_from([1, 2, 4, "\t"]))
def test_every_usual_layout_has_room(value: Any, indent: int | str) -> None:
    """What `json.dumps` writes between the marks of a value matches the pattern, up to 8 levels."""
    schema = schema_of(value)
    if nesting(schema) == MAX_LEVELS:
        return
    pattern = layout_options(schema, True)["whitespace_pattern"]
    for gap in re.findall(r"\s+", json.dumps(value, indent=indent)):
        assert re.fullmatch(pattern, gap), (value, gap)


def test_a_wide_schema_with_shared_parts_is_read_once() -> None:
    """References that share parts must not multiply the work."""
    defs: dict[str, Any] = {"d0": TEXT}
    for i in range(1, 60):
        part = {"$ref": f"#/$defs/d{i - 1}"}
        defs[f"d{i}"] = {"anyOf": [part, part, object_of(a=part, b=part)]}
    assert nesting({"$ref": "#/$defs/d59", "$defs": defs}) == MAX_LEVELS
