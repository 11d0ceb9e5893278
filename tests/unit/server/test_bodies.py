"""Bodies: bounded before they are decoded, decoded once, refused by the name of their field."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import time
import typing
from typing import Any

import pytest
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import handicap
from pydantic import BaseModel, FailFast
from test_middleware import drive

from fastdeploy_lite.entrypoints.openai import bodies, errors, middleware
from fastdeploy_lite.entrypoints.openai.bodies import BodyScan, BoundedBody, decode, parse
from fastdeploy_lite.entrypoints.openai.protocol import (
    AbortRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from fastdeploy_lite.entrypoints.openai.responses_protocol import ResponsesRequest
from fastdeploy_lite.utils.errors import RequestError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.just('a"\\,[{:'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


def weight_of(value: Any) -> int:
    """What `BodyScan` states, written with the decoded value."""
    heavy = bodies.CONTAINER_WEIGHT
    if isinstance(value, list):
        return heavy + max(len(value) - 1, 0) + sum(map(weight_of, value))
    if isinstance(value, dict):
        inner = sum(map(weight_of, value.values()))
        return heavy + max(len(value) - 1, 0) + heavy * len(value) + inner
    return int(isinstance(value, str))


def levels_of(value: Any) -> int:
    """Nesting, written with the decoded value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, dict | list) + max(map(levels_of, inner), default=0)


@settings(max_examples=300, deadline=None)
@given(JSON, st.booleans(), st.randoms(use_true_random=False))
def test_the_scan_counts_values_at_any_cut(value: Any, ascii_: bool, rng: random.Random) -> None:
    data = json.dumps(value, ensure_ascii=ascii_).encode()
    scan, at = BodyScan(), 0
    while at < len(data):
        end = at + rng.choice((1, 2, 3, 1000))
        scan.feed(data[at:end])
        at = end
    assert (scan.size, scan.weight) == (len(data), weight_of(value))
    assert scan.deepest == levels_of(value)


@pytest.mark.parametrize(("text", "width"), [("abc", 1), ("é" * 9, 1), ("中", 2), ("a😀", 4)])
def test_the_scan_bounds_decoded_text(text: str, width: int) -> None:
    for ascii_ in (True, False):
        data = json.dumps(text, ensure_ascii=ascii_).encode()
        scan = BodyScan()
        scan.feed(data)
        assert scan.decoded_bytes(data) >= len(text) * width
        assert scan.decoded_bytes(data) <= 4 * len(data)


# Reading ----------------------------------------------------------------------------------------


async def length(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    await middleware.refuse(send, 200, {"length": len(message["body"])})


def bounded(limit: int = 10, values: int = 100) -> BoundedBody:
    return BoundedBody(length, limit, values)


def test_bodies_arrive_whole() -> None:
    assert asyncio.run(drive(bounded(), [b"abc", b"de"])) == (200, {"length": 5})


def test_large_bodies_are_refused_before_their_end() -> None:
    status, body = asyncio.run(drive(bounded(), [b"x" * 6, b"x" * 6, b"never read"]))
    assert status == 413
    assert "10 bytes" in body["error"]["message"]


@pytest.mark.parametrize("declared", [b"11", b"99999999999999999999999999999"])
def test_a_declared_size_is_enough_to_refuse(declared: bytes) -> None:
    headers = [(b"content-length", declared)]
    assert asyncio.run(drive(bounded(), [], headers=headers))[0] == 413


def test_many_values_are_refused_before_their_end() -> None:
    parts = [b"[" + b"1," * 60, b"1," * 60, b"never read"]
    status, body = asyncio.run(drive(bounded(10_000), parts))
    assert status == 400
    assert "more than 100 values" in body["error"]["message"]


def test_deep_nesting_is_refused_before_its_end() -> None:
    level = b'{"a":['
    parts = [level * 64, b"[", b"never read"]
    status, body = asyncio.run(drive(bounded(10_000, 10_000), parts))
    assert status == 400
    assert "nested deeper than 128 levels" in body["error"]["message"]
    whole = level * 64 + b"]}" * 64 + b"[" * 100
    assert asyncio.run(drive(bounded(10_000, 10_000), [whole]))[0] == 200


def test_wide_text_is_limited_by_what_it_decodes_to() -> None:
    data = json.dumps({"a": "x" * 600 + "😀"}, ensure_ascii=False).encode()
    assert asyncio.run(drive(bounded(1000), [data]))[0] == 413
    assert asyncio.run(drive(bounded(2000), [data]))[0] == 200


def test_slow_bodies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)
    status, _ = asyncio.run(drive(bounded(), [b"x"], hang=True))
    assert status == 408


def test_a_client_that_leaves_gets_nothing() -> None:
    assert asyncio.run(drive(bounded(), [])) == (0, None)


def test_the_slowest_bodies_make_room() -> None:
    async def run() -> None:
        app = bounded(1000, 10_000)
        slow = [asyncio.create_task(drive(app, [b"x" * 900], hang=True)) for _ in range(4)]
        await asyncio.sleep(0.01)
        quick = await drive(app, [b"y" * 450, b"y" * 450])
        assert quick == (200, {"length": 900})
        status, body = await slow[0]
        assert (status, body["error"]["code"]) == (503, "connection_error")
        assert not slow[1].done()
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    asyncio.run(run())


# Decoding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (rb'{"stop": ["\ud83d"]}', "stop"),
        (rb'{"a": 1, "guided_choice": ["x", "\udfff"]}', "guided_choice"),
        (rb'{"messages": [{"role": "user", "content": "a\ud800"}]}', "messages"),
        (rb'{"response_format": {"json_schema": {"schema": {"\ud800": 1}}}}', "response_format"),
        (rb'{"metadata": {"x": {"y": ["\udc00"]}}}', "metadata"),
        (rb'{"\ud800": 1}', "body"),
        (rb'"\ud800"', "body"),
        (b'{"user": "\xed\xa0\x80"}', "user"),
        (b'{"user": "\xff"}', "body"),
        (b"[" * 100_000, "body"),
        (b"", "body"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "body"),
    ],
)
def test_text_that_is_none_is_refused_by_field(body: bytes, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode(body)
    assert caught.value.param == param
    str(caught.value).encode()


def test_long_integers_are_told_in_words_for_the_client() -> None:
    with pytest.raises(RequestError, match="an integer has more than 4300 digits") as caught:
        decode(b'{"seed": ' + b"9" * 5000 + b"}")
    assert "sys." not in str(caught.value)


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br, gzip"])
def test_compressed_bodies_are_refused_by_name(encoding: str) -> None:
    compressed = request(gzip.compress(b'{"tokens": [1]}'))
    compressed.scope["headers"].append((b"content-encoding", encoding.encode()))
    with pytest.raises(RequestError, match=f"Content-Encoding '{encoding}' is not supported"):
        asyncio.run(parse(compressed, DetokenizeRequest))
    plain = request(b'{"tokens": [1]}')
    plain.scope["headers"].append((b"content-encoding", b"Identity"))
    assert asyncio.run(parse(plain, DetokenizeRequest)).tokens == [1]


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_decoding_is_json(value: Any) -> None:
    assert decode(json.dumps(value).encode()) == value
    assert decode(json.dumps(value, ensure_ascii=False).encode()) == value


def test_pairs_of_surrogates_are_characters() -> None:
    assert decode(rb'{"a": "\ud83d\ude00"}') == {"a": "😀"}


def request(body: bytes, content_type: str = "application/json") -> Request:
    headers = [(b"content-type", content_type.encode())]
    return Request({"type": "http", "headers": headers, bodies.KEY: body})


def refusal(model: Any, body: bytes) -> tuple[float, dict[str, Any]]:
    """Seconds of this process's own time until the refusal, and its error."""
    started = time.process_time()
    with pytest.raises((RequestValidationError, RequestError)) as caught:
        asyncio.run(parse(request(body), model))
    seconds = time.process_time() - started
    error = caught.value
    if isinstance(error, RequestValidationError):
        assert len(error.errors()) < 10  # the first fault, not one per value
        answer = errors.from_validation(error.errors())
    else:
        answer = errors.from_exception(error)
    assert answer.status_code == 400
    return seconds, json.loads(bytes(answer.body))["error"]


MANY = 60_000


@pytest.mark.parametrize(
    ("model", "fields", "param"),
    [
        (CompletionRequest, {"prompt": [1.5] * MANY}, "prompt"),
        (CompletionRequest, {"prompt": [[1.5]] * MANY}, "prompt"),
        (CompletionRequest, {"prompt": ["a", 1] * MANY}, "prompt"),
        (CompletionRequest, {"prompt": [None] * MANY}, "prompt"),
        (CompletionRequest, {"prompt": "", "prompt_token_ids": ["x"] * MANY}, "prompt_token_ids"),
        (CompletionRequest, {"prompt": "", "stop": [1] * MANY}, "stop"),
        (CompletionRequest, {"prompt": "", "bad_words": [1] * MANY}, "bad_words"),
        (CompletionRequest, {"prompt": "", "stop_token_ids": [""] * MANY}, "stop_token_ids"),
        (CompletionRequest, {"prompt": "", "guided_choice": [1] * MANY}, "guided_choice"),
        (
            CompletionRequest,
            {"prompt": "", "logit_bias": {str(i): "x" for i in range(MANY // 4)}},
            "logit_bias",
        ),
        (ChatCompletionRequest, {"messages": [], "tools": [{}] * MANY}, "tools"),
        (ChatCompletionRequest, {"messages": {}}, "messages"),
        (
            ChatCompletionRequest,
            {"messages": [], "response_format": {"type": "structural_tag",
                                                 "structures": [1] * MANY}},
            "response_format",
        ),
        (DetokenizeRequest, {"tokens": [-1] * MANY}, "tokens"),
    ],
)  # fmt: skip
def test_a_thousand_faults_cost_as_much_as_one(
    model: Any, fields: dict[str, Any], param: str
) -> None:
    seconds, error = refusal(model, json.dumps(fields).encode())
    assert error["param"] == param  # the field, not a branch of its type
    assert seconds < 0.5 * handicap()  # it was seconds; the stall is measured in test_server_limits


def lists_in(kind: Any, where: str) -> list[tuple[str, Any]]:
    """All list types inside an annotation, each with its own metadata."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return lists_of(kind)
    metadata = ()
    if typing.get_origin(kind) is typing.Annotated:
        kind, *metadata = typing.get_args(kind)
    found = [(where, (kind, metadata))] if typing.get_origin(kind) is list else []
    return found + [item for inner in typing.get_args(kind) for item in lists_in(inner, where)]


def lists_of(model: type[BaseModel]) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(model, include_extras=True)
    fields = [(f"{model.__name__}.{name}", hints[name]) for name in model.model_fields]
    return [item for where, kind in fields for item in lists_in(kind, where)]


@pytest.mark.parametrize(
    "model",
    [ChatCompletionRequest, CompletionRequest, ResponsesRequest, TokenizeRequest,
     DetokenizeRequest, AbortRequest],
)  # fmt: skip
def test_every_list_of_a_body_stops_at_its_first_fault(model: type[BaseModel]) -> None:
    found = lists_of(model)
    assert found
    for where, (kind, metadata) in found:
        takes_all = typing.get_args(kind) == (Any,)
        assert takes_all or any(isinstance(m, FailFast) for m in metadata), f"{where}: {kind}"


def test_other_sites_cannot_post_forms() -> None:
    with pytest.raises(RequestError, match="Content-Type must be application/json"):
        asyncio.run(parse(request(b'{"messages": []}', "text/plain"), ChatCompletionRequest))
