"""Log-probabilities of prompts and answers over HTTP, as harnesses that score choices ask for."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

TEXT = "床前明月光，疑是地上霜。"


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"prompt": TEXT, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(http: httpx.Client, path: str, **fields: Any) -> list[dict[str, Any]]:
    body = {"temperature": 0, "stream": True, **fields}
    with http.stream("POST", path, json=body) as answer:
        lines = [line[5:].strip() for line in answer.iter_lines() if line.startswith("data:")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def tokens(http: httpx.Client, text: str) -> list[int]:
    return http.post("/tokenize", json={"prompt": text}).json()["tokens"]


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_scores_the_prompt(http: httpx.Client, max_tokens: int) -> None:
    """`token_logprobs` begins with the prompt's; what prompt_logprobs says is the reference."""
    answer = complete(http, echo=True, logprobs=2, max_tokens=max_tokens, prompt_logprobs=2)
    (choice,) = answer["choices"]
    assert choice["text"].startswith(TEXT)
    found, expected = choice["logprobs"], choice["prompt_logprobs"]
    ids = tokens(http, TEXT)
    count = len(ids) + answer["usage"]["completion_tokens"]
    assert [len(found[name]) for name in found] == [count] * 4
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    for place in range(1, len(ids)):
        own = expected[place][str(ids[place])]
        assert found["token_logprobs"][place] == own["logprob"]
        best = {
            e["decoded_token"]: e["logprob"] for e in expected[place].values() if e["rank"] <= 2
        }
        assert sorted(found["top_logprobs"][place].values()) == sorted(best.values())
        is_greedy = own["rank"] == 1
        top = max(found["top_logprobs"][place].values())
        assert (found["token_logprobs"][place] == top) == is_greedy
    assert answer["usage"]["completion_tokens"] == max_tokens
    if max_tokens == 0:
        assert choice["text"] == TEXT
    assert choice["finish_reason"] == "length"


def test_offsets_point_into_the_text(http: httpx.Client) -> None:
    (choice,) = complete(http, echo=True, logprobs=0, max_tokens=12)["choices"]
    found = choice["logprobs"]
    assert found["text_offset"] == sorted(found["text_offset"])
    for name, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not name.startswith(("bytes:", "<")):
            assert choice["text"][offset : offset + len(name)] == name
    (alone,) = complete(http, logprobs=0, max_tokens=12)["choices"]
    assert alone["logprobs"]["text_offset"][0] == 0


def test_a_stream_adds_up_to_the_whole(http: httpx.Client) -> None:
    fields = {"echo": True, "logprobs": 2, "max_tokens": 9}
    (choice,) = complete(http, **fields)["choices"]
    parts = [
        part
        for event in events(http, "/v1/completions", prompt=TEXT, **fields)
        for part in event["choices"]
    ]
    assert "".join(part["text"] for part in parts) == choice["text"]
    for name, values in choice["logprobs"].items():
        assert [v for p in parts if p["logprobs"] for v in p["logprobs"][name]] == values


def test_only_scoring_streams_nothing_but_the_prompt(http: httpx.Client) -> None:
    found = events(
        http, "/v1/completions", prompt=TEXT, echo=True, max_tokens=0, logprobs=1,
        stream_options={"include_usage": True},
    )  # fmt: skip
    parts = [part for event in found for part in event["choices"]]
    assert "".join(part["text"] for part in parts) == TEXT
    assert parts[-1]["finish_reason"] == "length"
    assert found[-1]["usage"]["completion_tokens"] == 0


def test_max_tokens_0_needs_echo(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 0})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_tokens"


def test_one_usage_event_for_all_choices(http: httpx.Client) -> None:
    found = events(
        http, "/v1/completions", prompt=[TEXT, "春眠"], n=2, max_tokens=4, seed=1,
        stream_options={"include_usage": True},
    )  # fmt: skip
    with_usage = [event for event in found if event.get("usage")]
    assert with_usage == [found[-1]]
    assert found[-1]["choices"] == []
    expected = len(tokens(http, TEXT)) + len(tokens(http, "春眠"))
    assert found[-1]["usage"]["prompt_tokens"] == expected
    assert found[-1]["usage"]["completion_tokens"] == 16


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 4}


def test_chat_streams_bring_prompt_logprobs_first(http: httpx.Client) -> None:
    path = "/v1/chat/completions"
    whole = http.post(path, json={**CHAT, "temperature": 0, "prompt_logprobs": 1}).json()
    found = events(http, path, **CHAT, prompt_logprobs=1)
    expected = whole["choices"][0]["prompt_logprobs"]
    assert found[0]["choices"][0]["prompt_logprobs"] == expected
    assert not any("prompt_logprobs" in e["choices"][0] for e in found[1:] if e["choices"])


def test_the_shapes_of_alternatives(http: httpx.Client) -> None:
    fields: dict[str, Any] = {**CHAT, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = http.post("/v1/chat/completions", json=fields).json()["choices"][0]["logprobs"]
    assert whole["content"][0]["top_logprobs"][0]["top_logprobs"] is None
    for event in events(http, "/v1/chat/completions", **fields):
        for choice in event["choices"]:
            for entry in (choice.get("logprobs") or {}).get("content", []):
                assert all("top_logprobs" not in best for best in entry["top_logprobs"])


def test_tokens_without_their_text(http: httpx.Client) -> None:
    fields = {**CHAT, "logprobs": True, "top_logprobs": 1, "prompt_logprobs": 0}
    body = {**fields, "include_logprobs_decode_token": False}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert {entry["token"] for entry in choice["logprobs"]["content"]} == {""}
    shown = [e["decoded_token"] for row in choice["prompt_logprobs"] if row for e in row.values()]
    assert set(shown) == {None}


def test_usage_begins_at_zero(http: httpx.Client) -> None:
    found = events(
        http, "/v1/chat/completions", **CHAT,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    assert found[0]["usage"]["completion_tokens"] == 0
    assert found[0]["usage"]["total_tokens"] == found[0]["usage"]["prompt_tokens"] > 0
    assert found[-1]["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None}])
def test_a_user_says_something(http: httpx.Client, message: dict[str, Any]) -> None:
    answer = http.post("/v1/chat/completions", json={"messages": [message], "max_tokens": 2})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
