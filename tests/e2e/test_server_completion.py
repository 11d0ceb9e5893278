"""The openai SDK against the demo model: completions."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import openai
import pytest
from test_server_chat import events

GREEDY = {"temperature": 0}
PATH = "/v1/completions"


def complete(client: openai.OpenAI, prompt: Any, **fields: Any) -> Any:
    extra = fields.pop("extra_body", {})
    return client.completions.create(
        model="default", prompt=prompt, extra_body=extra, **{**GREEDY, **fields}
    )


def test_answer(client: openai.OpenAI, http: httpx.Client) -> None:
    answer = complete(client, "床前明月光", max_tokens=8)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert "霜" in answer.choices[0].text or answer.choices[0].text
    choice = http.post(PATH, json={"prompt": "a", "max_tokens": 2}).json()["choices"][0]
    assert set(choice) >= {
        "index", "text", "prompt_token_ids", "completion_token_ids", "prompt_tokens",
        "completion_tokens", "arrival_time", "logprobs", "draft_logprobs", "reasoning_content",
        "finish_reason", "tool_calls",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("hello", 1), (["hello", "moon"], 2), ([300, 301], 1), ([[300, 301], [302]], 2)],
)
def test_prompt_forms(client: openai.OpenAI, prompt: Any, count: int) -> None:
    answer = complete(client, prompt, max_tokens=3)
    assert len(answer.choices) == count
    if isinstance(prompt, list) and count == 2 and isinstance(prompt[0], list):
        assert answer.usage.prompt_tokens == 3


def test_choices_are_prompt_major(client: openai.OpenAI) -> None:
    single = [complete(client, p, max_tokens=6).choices[0].text for p in ("moon", "river")]
    answer = complete(client, ["moon", "river"], n=2, max_tokens=6)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices] == [single[0]] * 2 + [single[1]] * 2
    assert answer.usage.completion_tokens == 24


def test_token_ids_replace_the_prompt(client: openai.OpenAI) -> None:
    ids = [300, 301, 302, 303, 304, 305, 306, 307, 308]
    answer = complete(client, "", max_tokens=2, extra_body={"prompt_token_ids": ids})
    assert answer.usage.prompt_tokens == 9


def test_echo(client: openai.OpenAI, http: httpx.Client) -> None:
    plain = complete(client, "hello moon", max_tokens=5).choices[0].text
    echoed = complete(client, "hello moon", max_tokens=5, echo=True).choices[0].text
    assert echoed == "hello moon" + plain
    body = {"prompt": "hello moon", "max_tokens": 5, "echo": True, **GREEDY}
    texts = [e["choices"][0]["text"] for e in events(http, PATH, body)]
    assert texts[0].startswith("hello moon")
    assert not any("hello moon" in text for text in texts[1:])
    assert "".join(texts) == echoed


def test_stream(client: openai.OpenAI, http: httpx.Client) -> None:
    whole = complete(client, "床前明月光", max_tokens=12).choices[0].text
    chunks = list(complete(client, "床前明月光", max_tokens=12, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"
    first = events(http, PATH, {"prompt": "a", "max_tokens": 3})[0]["choices"][0]
    assert set(first) >= {
        "index",
        "text",
        "prompt_token_ids",
        "completion_token_ids",
        "tool_calls",
        "reasoning_content",
        "arrival_time",
        "logprobs",
    }


def test_one_usage_event_for_all_choices(http: httpx.Client) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 3, "min_tokens": 3,
            "stream_options": {"include_usage": True}}  # fmt: skip
    [usage] = [e for e in events(http, PATH, body) if "usage" in e]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 12
    whole = http.post(PATH, json={"prompt": ["a", "b"], "n": 2, "max_tokens": 3, "min_tokens": 3})
    assert usage["usage"]["prompt_tokens"] == whole.json()["usage"]["prompt_tokens"]


def test_token_ids_stream(http: httpx.Client) -> None:
    body = {"prompt": "hello", "max_tokens": 4, "return_token_ids": True, **GREEDY}
    first, *others = (e["choices"][0] for e in events(http, PATH, body))
    assert first["text"] == ""
    assert isinstance(first["prompt_token_ids"], list)
    assert first["completion_token_ids"] is None
    assert all(c["prompt_token_ids"] is None for c in others)
    assert [len(c["completion_token_ids"]) for c in others] == [1, 1, 1, 1]


def test_closing_token(client: openai.OpenAI) -> None:
    constraint = {"guided_choice": ["hello"]}
    extra = {"include_stop_str_in_output": True, **constraint}
    assert complete(client, "hello", extra_body=extra).choices[0].text == "hello</s>"
    assert complete(client, "hello", extra_body=constraint).choices[0].text == "hello"


def test_logprobs(client: openai.OpenAI, http: httpx.Client) -> None:
    rows = complete(client, "床前明月光", max_tokens=5, logprobs=2).choices[0].logprobs
    assert len(rows.tokens) == len(rows.token_logprobs) == len(rows.top_logprobs) == 5
    assert all(len(best) <= 2 for best in rows.top_logprobs)
    assert all(t in best for t, best in zip(rows.tokens[:-1], rows.top_logprobs[:-1], strict=True))
    assert rows.text_offset == [0, *itertools.accumulate(map(len, rows.tokens[:-1]))]
    body = {"prompt": "a", "max_tokens": 3, "logprobs": 0}
    assert all(e["choices"][0]["logprobs"] is None for e in events(http, PATH, body))


def test_guided_choice_stream_and_not(client: openai.OpenAI) -> None:
    extra = {"guided_choice": ["red", "blue"]}
    whole = complete(client, "The sky is ", max_tokens=10, extra_body=extra).choices[0].text
    chunks = complete(client, "The sky is ", max_tokens=10, extra_body=extra, stream=True)
    assert whole in ("red", "blue")
    assert "".join(c.choices[0].text for c in chunks) == whole


def test_suffix_plays_the_role_of_metadata(http: httpx.Client) -> None:
    body = {"prompt": "hello", "suffix": {"max_tokens": 2}}
    assert http.post(PATH, json=body).json()["usage"]["completion_tokens"] == 2
    plain = {"prompt": "hello", "suffix": "text is ignored", "max_tokens": 2}
    assert http.post(PATH, json=plain).status_code == 200
