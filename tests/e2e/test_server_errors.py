"""Bad input: status, message, type, param and code of each case of upstream's table."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from server_process import ServerProcess

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
RESPONSES = "/v1/responses"

CASES: list[tuple[str, dict[str, Any], str, str | None, str]] = [
    (CHAT, {}, "Field required", "messages", "missing_required_parameter"),
    (CHAT, {"messages": "hi"}, "Input should be a valid list", "messages", "invalid_value"),
    (CHAT, {"top_p": 1.5}, "Input should be less than or equal to 1", "top_p", "invalid_value"),
    (CHAT, {"temperature": -1}, "greater than or equal to 0", "temperature", "invalid_value"),
    (CHAT, {"seed": -1}, "greater than or equal to 0", "seed", "invalid_value"),
    (CHAT, {"presence_penalty": 3}, "less than or equal to 2", "presence_penalty", "invalid_value"),
    (CHAT, {"repetition_penalty": 0}, "greater than 0", "repetition_penalty", "invalid_value"),
    (CHAT, {"max_tokens": 10.5},
     "Input should be a valid integer, got a number with a fractional part", "max_tokens",
     "invalid_value"),
    (CHAT, {"guided_regex": "a", "guided_choice": ["b"]},
     "Value error, You can only use one kind of guided decoding", "body", "invalid_value"),
    (CHAT, {"stream_options": {}},
     "Value error, Stream options can only be defined when `stream=True`.", "body",
     "invalid_value"),
    (CHAT, {"max_tokens": 0}, "max_tokens can be defined [1,", "max_tokens", "invalid_value"),
    (CHAT, {"max_tokens": -3}, "max_tokens can be defined [1,", "max_tokens", "invalid_value"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 3000}]}, "Input text is too long",
     "messages", "context_length_exceeded"),
    (CHAT, {"min_tokens": 3000}, "Input text is too long", "messages", "context_length_exceeded"),
    (CHAT, {"stop": list("abcdef")}, "exceeds the limit max_stop_seqs_num", "stop",
     "invalid_value"),
    (CHAT, {"stop": "one two three four five six seven eight nine"},
     "exceeds the limit stop_seqs_max_len", "stop", "invalid_value"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "must be less than or equal to 20",
     "top_logprobs", "invalid_value"),
    (CHAT, {"logprobs": True, "top_logprobs": -2}, "greater than or equal to 0", "top_logprobs",
     "invalid_value"),
    (CHAT, {"top_logprobs": "x"}, "valid integer", "top_logprobs", "invalid_value"),
    (CHAT, {"top_logprobs": 2}, "'logprobs': true", "top_logprobs", "invalid_value"),
    (CHAT, {"reasoning_max_tokens": 0}, "reasoning_max_tokens must be at least 1",
     "reasoning_max_tokens", "invalid_value"),
    (CHAT, {"bad_words": [str(i) for i in range(10001)]}, "the limit is 10000", "bad_words",
     "invalid_value"),
    (CHAT, {"messages": []}, "messages can not be an empty list, unless prompt_token_ids is passed",
     "messages", "invalid_value"),
    (CHAT, {"metadata": {"raw_request": True}}, "not supported", "raw_request", "invalid_value"),
    (CHAT, {"metadata": {"top_p": 7}}, "less than or equal to 1", "top_p", "invalid_value"),
    (CHAT, {"n": 0}, "greater than or equal to 1", "n", "invalid_value"),
    (CHAT, {"n": 100000}, "less than or equal to 128", "n", "invalid_value"),
    (CHAT, {"messages": [{"content": "x"}]}, "role", "messages", "invalid_value"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url",
     "messages", "invalid_value"),
    (CHAT, {"chat_template": "{% for %}"}, "template", "chat_template", "invalid_value"),
    (CHAT, {"chat_template": "{{ ''.__class__.__mro__ }}"}, "template", "chat_template",
     "invalid_value"),
    (CHAT, {"prompt_token_ids": [999999]}, "outside the model's vocabulary", "prompt_token_ids",
     "invalid_value"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias", "logit_bias", "invalid_value"),
    (CHAT, {"guided_json": {"type": "array", "uniqueItems": True}}, "uniqueItems", "guided_json",
     "invalid_value"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema":
            {"type": "array", "uniqueItems": True}}}}, "uniqueItems", "response_format",
     "invalid_value"),
    (CHAT, {"response_format": {"type": "structural_tag", "structures": [{"begin": "<a>",
            "schema": {"type": 3}, "end": "</a>"}], "triggers": ["<a>"]}}, "structural_tag",
     "response_format", "invalid_value"),
    (COMPLETION, {"prompt": "a", "response_format": {"type": "json_schema", "json_schema":
            {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}}, "uniqueItems",
     "response_format", "invalid_value"),
    (CHAT, {"guided_regex": "("}, "unclosed group", "guided_regex", "invalid_value"),
    (CHAT, {"guided_choice": ["李"], "bad_words": ["李"],
            "bad_words_token_ids": list(range(14, 1030))}, "leave no token", None,
     "invalid_value"),
    (CHAT, {"guided_regex": ""}, "empty output", "guided_regex", "invalid_value"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens can be defined [1,",
     "max_completion_tokens", "invalid_value"),
    (RESPONSES, {"input": "word " * 3000, "truncation": "auto"}, "Input text is too long", "input",
     "context_length_exceeded"),
    (RESPONSES, {"input": "hi", "max_output_tokens": 0}, "max_output_tokens can be defined [1,",
     "max_output_tokens", "invalid_value"),
    (RESPONSES, {"input": "hi", "text": {"format": {"type": "json_schema", "name": "x", "schema":
            {"type": "array", "uniqueItems": True}}}}, "uniqueItems", "text", "invalid_value"),
    (RESPONSES, {"input": "hi", "conversation": "conv_1"}, "nothing is stored here",
     "conversation", "unsupported_value"),
    (COMPLETION, {}, "Field required", "prompt", "missing_required_parameter"),
    (COMPLETION, {"prompt": []}, "empty list", "prompt", "invalid_value"),
    (COMPLETION, {"prompt": "a", "prompt_token_ids": []}, "empty list", "prompt_token_ids",
     "invalid_value"),
    (COMPLETION, {"prompt": "a", "logprobs": 21}, "must be less than or equal to 20", "logprobs",
     "invalid_value"),
    (COMPLETION, {"prompt": ["a"] * 100, "n": 100}, "the limit is 1024 sequences", "n",
     "invalid_value"),
    (COMPLETION, {"prompt": "a", "stream": True, "prompt_logprobs": 21}, "less than or equal to 20",
     "prompt_logprobs", "invalid_value"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "words", "param", "code"), CASES)
def test_bad_input(
    http: httpx.Client, path: str, fields: dict, words: str, param: str | None, code: str
) -> None:
    needs_messages = path == CHAT and fields and "messages" not in fields
    body = {"messages": HELLO, **fields} if needs_messages else fields
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == code
    if param is not None:
        assert error["param"] == param
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b"{" * 100_000]
)
def test_bodies_that_are_no_request(http: httpx.Client, content: bytes) -> None:
    for path in (CHAT, COMPLETION):
        answer = http.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_sdk_sees_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="less than or equal to 1") as caught:
        client.chat.completions.create(model="x", messages=HELLO, top_p=2)
    assert (caught.value.param, caught.value.code) == ("top_p", "invalid_value")


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    for answer in (http.get("/nope"), http.post("/nope", content=b"x" * 1000)):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
    answer = http.get(CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_errors_in_streams_come_before_the_stream(http: httpx.Client) -> None:
    answer = http.post(CHAT, json={"messages": HELLO, "max_tokens": 0, "stream": True})
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/update_model_weight", 404, "Dynamic Load Weight Disabled."),
        ("GET", "/clear_load_weight", 404, "Dynamic Load Weight Disabled."),
        ("POST", "/rearrange_experts", 400, "redundant expert is disabled"),
        ("POST", "/check_redundant", 400, "redundant expert is disabled"),
        ("POST", "/get_per_expert_tokens_stats", 400, "redundant expert is disabled"),
        ("POST", "/v1/sleep", 404, "Dynamic Load Weight Disabled."),
    ],
)
def test_routes_that_are_off(
    http: httpx.Client, method: str, path: str, status: int, text: str
) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert text in answer.text


def test_a_large_body_is_refused(server: ServerProcess) -> None:
    big = json.dumps({"messages": [{"role": "user", "content": "x" * (33 << 20)}]})
    answer = httpx.post(f"{server.url}{CHAT}", content=big, timeout=120)
    assert answer.status_code == 413


def test_one_bad_request_does_not_disturb_another(http: httpx.Client) -> None:
    body = {"messages": HELLO, "max_tokens": 10, "temperature": 0}
    before = http.post(CHAT, json=body).json()["choices"]
    for path, fields, *_ in CASES[::5]:
        http.post(path, json=fields)
    assert http.post(CHAT, json=body).json()["choices"] == before
