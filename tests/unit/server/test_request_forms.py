"""Bodies as newer SDKs and agents write them: choices among tools, parts, fields of their own."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fastdeploy_lite.entrypoints.openai import errors
from fastdeploy_lite.entrypoints.openai.protocol import ChatCompletionRequest
from fastdeploy_lite.entrypoints.openai.responses_protocol import (
    ResponsesRequest,
    as_chat,
    field_of,
)
from fastdeploy_lite.input.chat_template import normalize_messages
from fastdeploy_lite.utils.errors import RequestError

HELLO = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("now", "weather")]
FLAT = [{"type": "function", "name": name} for name in ("now", "weather")]


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": HELLO, "tools": TOOLS, **fields})


def responses(**fields: Any) -> ChatCompletionRequest:
    return as_chat(ResponsesRequest.model_validate({"input": "hi", **fields}))


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


# tool_choice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_are_all_that_the_model_is_offered(mode: str) -> None:
    body = chat(tool_choice=allowed(mode, "weather"))
    assert [tool.function.name for tool in body.tools or []] == ["weather"]
    assert body.tool_choice == mode


def test_allowed_tools_in_the_flat_form() -> None:
    choice = {"type": "allowed_tools", "mode": "required", "tools": FLAT[:1]}
    body = responses(tools=FLAT, tool_choice=choice)
    assert [tool.function.name for tool in body.tools or []] == ["now"]
    assert body.tool_choice == "required"


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("any", "'none', 'auto' or 'required'"),
        ({}, "whose type is 'function' or 'allowed_tools'"),
        ({"type": "web_search"}, "whose type is 'function' or 'allowed_tools'"),
        (True, "whose type is 'function' or 'allowed_tools'"),
        ({"type": "function"}, "Field required"),
        (allowed("never", "now"), "'auto' or 'required'"),
        (allowed("auto", "nope"), "names 'nope', which is not one of the tools ['now', 'weather']"),
        (allowed("required"), "demands a call, but there are no tools"),
    ],
)
def test_a_wrong_choice_is_told_in_the_words_of_its_form(choice: Any, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        chat(tool_choice=choice)
    assert words in caught.value.errors()[0]["msg"]


# Content parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "hi"},
        {"type": "input_text", "text": "hi"},
        {"type": "output_text", "text": "hi", "annotations": []},
        {"type": "refusal", "refusal": "hi"},
    ],
)
def test_parts_of_either_interface_are_text(part: dict[str, Any]) -> None:
    [message] = normalize_messages([{"role": "assistant", "content": [part]}])
    assert message["content"] == "hi"
    [turn] = responses(input=[{"role": "assistant", "content": [part]}]).messages
    assert turn["content"] == "hi"


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "text"}, "content part 'text': text: expected text, found None"),
        ({"type": "text", "text": 3}, "content part 'text': text: expected text, found 3"),
        ({"type": "refusal", "text": "no"}, "'refusal': refusal: expected text, found None"),
        ({"type": "image_url"}, "content part 'image_url' is not supported"),
        ({"type": ["text"]}, "is not supported"),
        (7, "content part 7 is not supported"),
    ],
)
def test_a_part_without_text_is_said_to_lack_it(part: Any, words: str) -> None:
    with pytest.raises(RequestError, match="messages") as caught:
        normalize_messages([{"role": "user", "content": [part]}])
    assert words in str(caught.value)
    with pytest.raises(RequestError, match=r"input\[0\]") as caught:
        responses(input=[{"role": "user", "content": [part]}])
    assert words in str(caught.value)


# Responses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("conversation", {"id": "conv_1"}),
        ("prompt", {"id": "pmpt_1", "variables": {"city": "Rome"}}),
    ],
)
def test_what_openai_stores_is_not_silently_left_out(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match="nothing is stored here") as caught:
        responses(**{field: value})
    assert (caught.value.param, caught.value.code) == (field, "unsupported_value")
    assert responses(**{field: None}).messages == HELLO


def test_an_assistant_may_have_said_nothing() -> None:
    items = [*HELLO, {"role": "assistant", "content": None}, *HELLO]
    assert responses(input=items).messages[1]["content"] == ""
    with pytest.raises(RequestError, match="expected text, found None"):
        responses(input=[{"role": "user", "content": None}])


def test_no_alternatives_are_no_logprobs() -> None:
    assert responses(top_logprobs=0).logprobs is False
    assert responses(top_logprobs=2).logprobs is True
    scored = responses(top_logprobs=0, include=["message.output_text.logprobs"])
    assert scored.logprobs is True


@pytest.mark.parametrize(
    ("fields", "name", "param"),
    [
        ({}, "messages", "input"),
        ({}, "max_completion_tokens", "max_output_tokens"),
        ({}, "response_format", "text"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format"),
        ({}, "top_p", "top_p"),
        ({}, None, None),
    ],
)
def test_errors_name_the_fields_of_the_route(fields: Any, name: Any, param: Any) -> None:
    body = ResponsesRequest.model_validate({"input": "hi", **fields})
    assert field_of(body, name) == param
    error = RequestError(f"{name}: wrong", param=name, code="invalid_value")
    assert errors.renamed(error, param).param == param
    assert str(errors.renamed(error, param)) == f"{param}: wrong"
