"""Requests at and beyond every bound, by number: the same number is the same request."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETION, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"

NUMBERS: list[Any] = [
    0, -0.0, 1, -1, 2, 5, 7, 20, 21, 127, 128, 129, 255, 256, 8191, 8192, 2**31 - 1, 2**31,
    -(2**31) - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 922337203685477580,
    922337203685477581, 0.5, 1.0, 1.5, 2.0, -2.0, 2.0000001, 1e-320, 1e-45, 1e38, 3.5e38, 1e308,
    -1e308, float("inf"), float("-inf"), float("nan"), True, False, None, "", "1", [], {}, [1],
]  # fmt: skip
TEXTS: list[Any] = [
    "", " ", "hi", "\ud83d", "\udfff", "a\ud800b", "</s>", "<s>a", "<think>", "</think>",
    "<mask:1>", "<|begin_of_sentence|>", "<tool_call>", '<tool_call>{"name": "f", "arguments": ',
    "\x00", "\x85", "\n", "😀", "李白", "a" * 95, "a " * 47, "a" * 5000, "🇩🇪", "{{ x }}",
    "{% for %}", "[" * 200, "(a|b)*", "(", "\\", "(?=a)b", "a{1,99999}", "\\p{L}+",
    'root ::= "a"', "root ::= root", "::=",
    '{"type": "object"}', '{"const": "end</s>"}', '{"enum": []}', '{"$ref": "#"}', "true",
    "null", "1e999", None, True, 0, [], {},
]  # fmt: skip
SCHEMAS: list[Any] = [
    {}, {"const": "</s>"}, {"const": "\ud800"}, {"enum": []}, {"enum": [None, 1e308, "\x00"]},
    {"type": "integer", "minimum": -(10**30), "maximum": 2**63}, {"type": "boolean"},
    {"type": "number", "multipleOf": 0},
    {"type": "number", "multipleOf": 1e-320}, {"type": "string", "minLength": 2**31},
    {"type": "string", "maxLength": -1}, {"type": "string", "pattern": "("}, {"$ref": "#"},
    {"type": "string", "format": "date-time"}, {"$ref": "#/$defs/a"}, {"$ref": "http://x/y"},
    {"type": "array", "minItems": 2**31, "items": {}}, {"type": "array", "items": False},
    {"type": "object", "required": ["a"] * 100}, {"type": "object", "properties": {"</s>": True}},
    {"type": ["string", "null", "x"]}, {"allOf": [{"$ref": "#"}, {"type": "string"}]}, {"not": {}},
    {"$defs": [1]}, {"definitions": "x", "$ref": "#/definitions/x"}, {"properties": [1]},
    {"anyOf": []}, {"oneOf": [{}] * 50}, {"type": None}, {"minimum": float("nan")},
    {"type": "object", "patternProperties": {"(": {}}}, {"type": "object", "minProperties": 10**30},
]  # fmt: skip
NUMERIC = (
    "temperature", "top_p", "top_k", "min_p", "n", "seed", "max_tokens", "min_tokens",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logprobs", "top_logprobs",
    "prompt_logprobs", "max_completion_tokens", "reasoning_max_tokens", "response_max_tokens",
    "max_streaming_response_tokens", "best_of", "max_output_tokens",
)  # fmt: skip
TEXTUAL = (
    "model", "user", "request_id", "guided_regex", "guided_grammar", "guided_json", "suffix",
    "chat_template", "structural_tag", "guided_decoding_backend", "guided_whitespace_pattern",
    "tool_choice", "instructions", "previous_response_id", "truncation", "stop", "prompt",
)  # fmt: skip
BOUNDED = {  # lists by their limits
    "stop": (5, 1000), "stop_token_ids": (1, 16384), "bad_words": (1, 10000), "messages": (1, 40),
    "bad_words_token_ids": (1, 16384), "guided_choice": (1, 4096, 8192), "prompt": (1, 1024),
    "prompt_token_ids": (95, 96, 5000), "completion_token_ids": (1, 90), "tools": (1, 100),
    "input": (1, 40), "include": (1, 100),
}  # fmt: skip
FLAGS_OF_REQUESTS = (
    "stream", "echo", "return_token_ids", "include_stop_str_in_output", "disable_chat_template",
    "temp_scaled_logprobs", "top_p_normalized_logprobs", "include_logprobs_decode_token",
    "guided_json_object", "include_draft_logprobs", "ignore_eos", "continue_final_message",
    "add_generation_prompt", "parallel_tool_calls", "store", "background", "logprobs",
)  # fmt: skip
ROUTES = (
    "/health", "/ping", "/load", "/version", "/tokenizer_info", "/v1/models", "/v1/is_paused",
    "/metrics", "/config-info", "/openapi.json", "/", "/nope", "/v1/embeddings", "/v1/reward",
    "/update_model_weight", "/v1/sleep", "/check_redundant", "/tokenize", "/detokenize", CHAT,
    "/v1/abort", "/controller/scheduler",
)  # fmt: skip
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "X")
JSON_TYPES = (
    "application/json", "application/json; charset=utf-8", "application/problem+json", "text/plain",
    "", "multipart/form-data", "application/x-www-form-urlencoded", "\xff", "json" * 100,
)  # fmt: skip
BODY_BYTES, BODY_VALUES, PLACES = 4 << 20, 2**18, 8  # limits of bodies; weight of a container


@dataclass(slots=True)
class Message:
    """One request.

    Attributes:
        port: "port", "metrics" or "controller".
        method: Of HTTP.
        path: With query.
        data: The body.
        headers: Beside those that every request has.
    """

    path: str
    data: bytes = b""
    port: str = "port"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": JSON_TYPES[0]})


def bounded_list(rng: random.Random, name: str) -> list[Any]:
    size = max(rng.choice(BOUNDED[name]) + rng.choice((-1, 0, 1)), 0)
    kinds: list[Any] = [7, "a", "</s>", "\ud83d", 2**31, -1, 1.5, None, [1], [2**40], {},
                        {"role": "user", "content": "hi"}, {"role": "tool", "content": {"a": 1}},
                        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
                        {"role": "user", "content": [{"type": "text", "text": "\x00"}]},
                        {"role": "user", "content": "a", "tool_calls": 5, "name": [1]},
                        {"role": "assistant", "tool_calls": {"function": 1}, "content": 1},
                        {"role": "tool", "tool_call_id": {}, "content": [7]},
                        {"type": "function_call", "name": "f", "arguments": "{", "call_id": 1},
                        {"type": "function_call_output", "output": {"a": [1e308]}},
                        {"type": "function", "name": "f", "parameters": {"type": "x"}},
                        {"type": "function", "function": {"name": "f"}}]  # fmt: skip
    if rng.random() < 0.7:
        return [rng.choice(kinds)] * size
    return [rng.choice(kinds) for _ in range(size)]


def _constraint(rng: random.Random) -> dict[str, Any]:
    schema = rng.choice([*SCHEMAS, True, False])
    if rng.random() < 0.3:
        schema = {"type": "object", "properties": {str(rng.choice(TEXTS)): schema}}
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tag = {"type": "structural_tag", "triggers": ["<a>"],
           "structures": [{"begin": "<a>", "schema": schema, "end": "</a>"}]}  # fmt: skip
    return rng.choice((
        {"guided_json": schema}, {"response_format": wrapped}, {"response_format": tag},
        {"structural_tag": json.dumps(tag)},
        {"text": {"format": {"type": "json_schema", "schema": schema}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
         "tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
    ))  # fmt: skip


def _processor(rng: random.Random) -> dict[str, Any]:
    name = rng.choice(("logit_bias", "thinking_budget", "think_stop_sentence", "stop_flags", "x"))
    value = rng.choice(NUMBERS + TEXTS)
    if name == "logit_bias":
        value = {str(rng.choice(NUMBERS)): rng.choice(NUMBERS)}
    return {"logits_processors_args": {name: value}}


def body_of(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A generation request with some fields out of bounds."""
    path = rng.choice((CHAT, COMPLETION, CHAT, COMPLETION, RESPONSES))
    body: dict[str, Any] = {"max_tokens": rng.choice((1, 2, 8))}
    text = rng.choice([t for t in TEXTS if isinstance(t, str)])
    if path == CHAT:
        body["messages"] = [{"role": rng.choice(("user", "assistant", "x")), "content": text}]
    elif path == RESPONSES:
        body["input"] = rng.choice((text, [{"role": "user", "content": text}], rng.choice(TEXTS)))
    else:
        body["prompt"] = rng.choice(TEXTS)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
        kind = rng.randrange(9)
        if kind == 0:
            body[rng.choice(NUMERIC)] = rng.choice(NUMBERS)
        elif kind == 1:
            body[rng.choice(TEXTUAL)] = rng.choice(TEXTS)
        elif kind == 2:
            name = rng.choice(list(BOUNDED))
            body[name] = bounded_list(rng, name)
        elif kind <= 4:
            body[rng.choice(FLAGS_OF_REQUESTS)] = rng.choice((True, True, False, None, 1))
        elif kind == 5:
            body.update(_processor(rng))
        elif kind == 6:
            body["logit_bias"] = {str(rng.choice(NUMBERS)): rng.choice(NUMBERS)}
        elif kind == 7:
            body.update(_constraint(rng))
        else:
            name = rng.choice(("chat_template_kwargs", "metadata", "stream_options", "reasoning"))
            body[name] = {rng.choice(("enable_thinking", "include_usage", "x", "messages")):
                          rng.choice(NUMBERS + TEXTS)}  # fmt: skip
    return path, body


def _sized(rng: random.Random) -> Message:
    """Bodies one below, at and one above the limits of bytes and of values."""
    step = rng.choice((-1, 0, 1))
    path = rng.choice((CHAT, COMPLETION, RESPONSES, "/tokenize", "/detokenize"))
    if rng.random() < 0.5:
        head = b'{"max_tokens":1,"messages":[],"tokens":[],"input":"x","prompt":"'
        fill = BODY_BYTES - len(head) - 2 + step
        return Message(path, head + rng.choice((b"x", b"\\", b"\xff", b" ")) * fill + b'"}')
    values = BODY_VALUES - PLACES * 2 + step
    return Message(path, b'{"tokens":[' + b"1," * values + b"1]}")


def _text_route(rng: random.Random) -> Message:
    """Bodies of the routes beside generation."""
    path, name = rng.choice((
        ("/tokenize", "prompt"), ("/tokenize", "messages"), ("/detokenize", "tokens"),
        ("/v1/abort", "request_id"), ("/v1/abort", "request_ids"),
        ("/v1/abort_requests", "req_ids"), ("/v1/abort_requests", "abort_all"),
        ("/v1/embeddings", "input"),
        ("/controller/scheduler", "reset"), ("/controller/reset_scheduler", "x"),
    ))  # fmt: skip
    value = rng.choice(NUMBERS + TEXTS)
    if rng.random() < 0.4:
        value = [value] * rng.choice((0, 1, 2, 1000))
    elif rng.random() < 0.2:
        value = [{"role": rng.choice(TEXTS), "content": value}]
    body: Any = {name: value}
    if rng.random() < 0.2:
        body = value
    port = "controller" if path.startswith("/controller") else "port"
    return Message(path, json.dumps(body).encode(), port)


def _odd_request(rng: random.Random) -> Message:
    """Methods, paths, queries and headers that no client sends."""
    path = rng.choice(ROUTES) + rng.choice(
        ("", "", "/", "?x=%ff", "/%00", "%2e%2e/", "/" + "a" * 9000)
    )
    headers = {"content-type": rng.choice(JSON_TYPES)}
    for name in ("authorization", "x-request-id", "origin", "accept", "traceparent", "expect"):
        if rng.random() < 0.2:
            headers[name] = rng.choice(("", "*", "100-continue", "\xe9" * 40, "a" * 7000, "null"))
    data = rng.choice(
        (b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"a":' * 5000, b"1" * 5000)
    )
    port = rng.choice(("port", "port", "metrics", "controller"))
    return Message(path, data, port, rng.choice(METHODS), headers)


def _nested(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """A body with one value wrapped in as many levels as are allowed, or a few more."""
    value: Any = rng.choice(("x", {"type": "string"}))
    key = rng.choice(("items", "a", "properties", "$ref", "content"))
    for _ in range(rng.choice((30, 60, 64, 100, 120, 126, 127, 128, 129, 400))):
        value = {key: value} if rng.random() < 0.8 else [value]
    name = rng.choice(("guided_json", "metadata", "suffix", "chat_template_kwargs", "messages",
                       "logits_processors_args", "tools", "input", "reasoning"))  # fmt: skip
    wrapped: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hi", "x": value}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": value}}],
        "input": [{"type": "function_call_output", "output": value}],
    }
    return {**body, name: wrapped.get(name, value), "tool_choice": rng.choice(("required", "auto"))}


def _damaged(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    piece = rng.choice((b"", b"\x00", b"\xff", b"[", b'"', b"1e999", b"\\ud800", b"-", b"9" * 5000))
    return data[:at] + piece + data[at + 1 :]


def message(number: int) -> Message:
    """The request of a number."""
    rng = random.Random(number)
    kind = rng.random()
    if kind < 0.01:
        return _sized(rng)
    if kind < 0.05:
        return _odd_request(rng)
    if kind < 0.12:
        return _text_route(rng)
    path, body = body_of(rng)
    if kind < 0.14:
        body = _nested(rng, body)
    data = json.dumps(body).encode()
    return Message(path, _damaged(rng, data) if 0.14 < kind < 0.18 else data)
