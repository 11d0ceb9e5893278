"""Outputs that were made to be tool calls: their schema, and how they are read in any pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fastdeploy_lite.entrypoints.openai.forced_calls import CallReader, schema
from fastdeploy_lite.entrypoints.openai.protocol import ChatCompletionRequest

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
POINT = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/P"}, "to": {"$ref": "#/definitions/P"}},
    "$defs": {"P": {"type": "array", "items": {"type": "number"}}},
    "definitions": {"P": {"$ref": "#/$defs/P"}},
}


def request(choice: Any, parameters: dict[str, Any] | None = None, **fields: Any) -> Any:
    tools = {"weather": WEATHER, "point": parameters or POINT}
    return ChatCompletionRequest(
        messages=[{"role": "user", "content": "hello"}],
        tools=[
            {"type": "function", "function": {"name": name, "parameters": value}}
            for name, value in tools.items()
        ],
        tool_choice=choice,
        **fields,
    )


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_a_named_function_asks_for_its_arguments() -> None:
    assert schema(request(named("weather"))) == WEATHER
    assert schema(request("auto")) is schema(request("none")) is schema(request(None)) is None


def test_required_asks_for_a_list_of_calls() -> None:
    found = schema(request("required"))
    assert found is not None
    first, second = found["items"]["anyOf"]
    assert first["properties"] == {"name": {"const": "weather"}, "arguments": WEATHER}
    assert second["properties"]["arguments"]["properties"] == {
        "at": {"$ref": "#/$defs/1.P"},
        "to": {"$ref": "#/$defs/1.P"},
    }
    assert set(found["$defs"]) == {"1.P"}
    assert "maxItems" not in found
    alone = schema(request("required", parallel_tool_calls=False))
    assert alone is not None
    assert alone["maxItems"] == 1


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("sometimes", "tool_choice"),
        (named("nobody"), "not one of the tools"),
        ({"type": "function"}, "tool_choice"),
        ({"type": "custom", "function": {"name": "weather"}}, "tool_choice"),
        (3, "tool_choice"),
    ],
)
def test_nonsense_is_refused(choice: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        request(choice)


def test_a_demand_needs_tools_and_no_other_constraint() -> None:
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(ValidationError, match="there are no tools"):
        ChatCompletionRequest(messages=messages, tool_choice="required")
    with pytest.raises(ValidationError, match="another constraint"):
        request("required", guided_regex="a+")
    with pytest.raises(ValidationError, match="another constraint"):
        request(named("weather"), response_format={"type": "json_object"})


values = st.recursive(
    st.none() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
calls = st.tuples(st.sampled_from(["a", "b"]), st.dictionaries(st.text(max_size=3), values))


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    st.lists(calls, min_size=1, max_size=3),
    st.lists(st.integers(0, 500)),
    st.sampled_from([None, 2]),
)
def test_a_list_of_calls_is_read_in_any_pieces(
    made: list[tuple[str, dict[str, Any]]], cuts: list[int], indent: int | None
) -> None:
    plain = [{"name": name, "arguments": arguments} for name, arguments in made]
    text = json.dumps(plain, ensure_ascii=False, indent=indent)
    whole = CallReader("")
    whole.feed(text)
    reader = CallReader("")
    deltas = [delta for piece in pieces(text, cuts) for delta in reader.feed(piece)]
    for reading in (whole, reader):
        assert [(c.function.name, json.loads(c.function.arguments)) for c in reading.calls] == made
    assert [(d.index, d.id) for d in deltas] == [(i, c.id) for i, c in enumerate(reader.calls)]


@given(st.dictionaries(st.text(max_size=4), values), st.lists(st.integers(0, 500)))
def test_arguments_of_a_named_function_stream(arguments: dict[str, Any], cuts: list[int]) -> None:
    text = " \n" + json.dumps(arguments)
    reader = CallReader("weather")
    deltas = [delta for piece in pieces(text, cuts) for delta in reader.feed(piece)]
    joined = "".join(d.function.arguments or "" for d in deltas if d.function)
    assert json.loads(joined) == arguments
    assert reader.calls[0].function.arguments == joined
    assert [d.function.name for d in deltas if d.function] == ["weather"] + [None] * (
        len(deltas) - 1
    )


def test_numbers_of_a_call_stay_as_they_were_written() -> None:
    for number in ("9" * 5000, "1e999", "-0.0", "0.1000"):
        reader = CallReader("")
        reader.feed('[{"name": "a", "arguments": {"x": ' + number + "}}]")
        assert reader.calls[0].function.arguments == '{"x": ' + number + "}"


@pytest.mark.parametrize("group", ["$defs", "definitions"])
@pytest.mark.parametrize("value", [[1], "x", 3, True])
def test_definitions_that_are_none_reach_the_compiler(group: str, value: Any) -> None:
    parameters = {"type": "object", group: value}
    demanded = schema(request("required", parameters))
    assert demanded is not None
    assert demanded["items"]["anyOf"][1]["properties"]["arguments"] == parameters


def test_a_list_that_was_cut_gives_its_whole_calls_only() -> None:
    reader = CallReader("")
    reader.feed('[{"name": "a", "arguments": {"x": "]}"}}, {"name": "b", "argum')
    assert [call.function.name for call in reader.calls] == ["a"]
