"""The openai SDK against the demo model: chat, and upstream's end-to-end expectations."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import openai
import pytest
from server_process import ServerProcess

GREEDY = {"temperature": 0}
QUESTION: list[Any] = [{"role": "user", "content": "解析三首李白的诗"}]
HELLO: list[Any] = [{"role": "user", "content": "Hello, how are you?"}]


def ask(client: openai.OpenAI, messages: list[Any] = HELLO, **fields: Any) -> Any:
    extra = fields.pop("extra_body", {})
    return client.chat.completions.create(
        model="default", messages=messages, extra_body=extra, **{**GREEDY, **fields}
    )


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON events of a stream; checks its frame."""
    with http.stream("POST", path, json={"stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[len("data: ") :]) for line in lines[:-1]]


def test_answer(client: openai.OpenAI) -> None:
    answer = ask(client, QUESTION, max_tokens=64)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "demo"
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert "李白" in choice.message.content
    assert choice.finish_reason == "length"
    usage = answer.usage
    assert usage.completion_tokens == 64
    assert usage.total_tokens == usage.prompt_tokens + 64


def test_nulls_are_kept_in_whole_answers(http: httpx.Client) -> None:
    body = {"messages": HELLO, "max_tokens": 4, **GREEDY}
    answer = http.post("/v1/chat/completions", json=body).json()
    choice = answer["choices"][0]
    assert set(choice) == {"index", "message", "logprobs", "draft_logprobs", "prompt_logprobs",
                           "finish_reason", "speculate_metrics"}  # fmt: skip
    assert set(choice["message"]) == {
        "role", "content", "multimodal_content", "reasoning_content", "tool_calls",
        "prompt_token_ids", "completion_token_ids", "prompt_tokens", "completion_tokens",
    }  # fmt: skip
    nulls = {name for name, value in choice["message"].items() if value is None}
    assert nulls == set(choice["message"]) - {"role", "content"}
    assert set(answer["usage"]) == {
        "prompt_tokens",
        "total_tokens",
        "completion_tokens",
        "prompt_tokens_details",
        "completion_tokens_details",
    }


def test_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    whole = ask(client, QUESTION, max_tokens=40)
    chunks = list(ask(client, QUESTION, max_tokens=40, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert len(chunks) > 20


def test_stream_events_word_for_word(http: httpx.Client) -> None:
    with http.stream(
        "POST",
        "/v1/chat/completions",
        json={"messages": HELLO, "max_tokens": 4, "stream": True, **GREEDY},
    ) as reply:
        raw = reply.read().decode()
    parts = raw.split("\n\n")
    assert parts[0].endswith("} ")  # upstream's extra space
    assert not any(part.endswith(" ") for part in parts[1:])
    first, second, last = (json.loads(parts[i][6:]) for i in (0, 1, -3))
    assert first["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": None,
                  "prompt_token_ids": None, "completion_token_ids": None},
    }  # fmt: skip
    assert set(second["choices"][0]) == {"index", "delta", "logprobs", "draft_logprobs",
                                         "arrival_time"}  # fmt: skip
    assert set(second["choices"][0]["delta"]) == {
        "content", "reasoning_content", "tool_calls", "prompt_token_ids", "completion_token_ids",
    }  # fmt: skip
    assert last["choices"][0]["finish_reason"] == "length"
    assert "usage" not in last
    assert parts[-2:] == ["data: [DONE]", ""]


def test_usage_in_streams(http: httpx.Client) -> None:
    body = {"messages": HELLO, "max_tokens": 5, "n": 2, **GREEDY}
    path = "/v1/chat/completions"
    once = events(http, path, {**body, "stream_options": {"include_usage": True}})
    *others, last = once
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 10
    assert all("usage" not in event for event in others)
    options = {"include_usage": False, "continuous_usage_stats": True}
    always = events(http, path, {**body, "stream_options": options})
    assert all(event["usage"]["prompt_tokens"] > 0 for event in always)
    assert all(event["choices"] for event in always)


def test_several_choices(client: openai.OpenAI) -> None:
    fields = {"n": 3, "max_tokens": 12, "temperature": 2.0, "top_p": 1, "seed": 7,
              "extra_body": {"min_tokens": 11}}  # fmt: skip
    answer = ask(client, HELLO, **dict(fields))
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1
    assert answer.usage.completion_tokens == 36
    again = ask(client, HELLO, **dict(fields))
    assert [choice.message.content for choice in again.choices] == texts


def test_choices_per_event(http: httpx.Client) -> None:
    body = {"messages": QUESTION, "max_tokens": 10, "max_streaming_response_tokens": 4, **GREEDY}
    sizes = [len(event["choices"]) for event in events(http, "/v1/chat/completions", body)]
    assert sizes == [1, 4, 4, 2]


def test_equal_seeds_repeat(client: openai.OpenAI) -> None:
    fields = {"temperature": 0.9, "seed": 13, "max_tokens": 40, "extra_body": {"top_p": 0}}
    first = ask(client, QUESTION, **dict(fields)).choices[0].message.content
    assert ask(client, QUESTION, **dict(fields)).choices[0].message.content == first
    sampled = {"temperature": 1.0, "top_p": 0.95, "seed": 5, "max_tokens": 30}
    texts = {ask(client, QUESTION, **sampled).choices[0].message.content for _ in range(3)}
    assert len(texts) == 1


def test_ignore_eos_goes_on_to_the_limit(client: openai.OpenAI) -> None:
    ended = ask(client, HELLO, max_tokens=120)
    assert ended.choices[0].finish_reason == "stop"
    endless = ask(client, HELLO, max_tokens=120, extra_body={"ignore_eos": True})
    assert endless.choices[0].finish_reason == "length"
    assert endless.usage.completion_tokens == 120


def test_closing_token_shows_when_asked(client: openai.OpenAI, http: httpx.Client) -> None:
    extra = {"include_stop_str_in_output": True}
    answer = ask(client, max_tokens=5, extra_body=extra)
    assert answer.choices[0].message.content.endswith("</s>")
    body = {"messages": HELLO, "max_tokens": 5, **extra, **GREEDY}
    *_, last = events(http, "/v1/chat/completions", body)
    assert last["choices"][0]["delta"]["content"] == "</s>"
    plain = ask(client, max_tokens=5).choices[0].message.content
    assert "</s>" not in plain


def test_every_token_up_to_the_limit_is_the_models(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    three = ask(client, QUESTION, max_tokens=3, extra_body=extra)
    assert three.usage.completion_tokens == 3
    assert len(three.choices[0].message.completion_token_ids) == 3
    one = ask(client, max_tokens=1)
    assert one.usage.completion_tokens == 1
    assert one.choices[0].finish_reason == "length"
    assert one.choices[0].message.content


def test_min_tokens(client: openai.OpenAI) -> None:
    answer = ask(client, HELLO, max_tokens=310, extra_body={"min_tokens": 300})
    assert answer.usage.completion_tokens >= 300


def test_token_ids_in_streams(http: httpx.Client) -> None:
    body = {"messages": QUESTION, "max_tokens": 6, "return_token_ids": True, **GREEDY}
    first, *others = events(http, "/v1/chat/completions", body)
    delta = first["choices"][0]["delta"]
    assert isinstance(delta["prompt_token_ids"], list)
    assert delta["completion_token_ids"] is None
    assert delta["prompt_tokens"].endswith("Assistant: ")
    for event in others:
        delta = event["choices"][0]["delta"]
        assert delta["prompt_token_ids"] is None
        assert isinstance(delta["completion_token_ids"], list)
    ids = [i for e in others for i in e["choices"][0]["delta"]["completion_token_ids"]]
    assert len(ids) == 6


def test_prompt_token_ids(client: openai.OpenAI) -> None:
    ids = [300, 301, 302, 303, 304, 305, 306, 307, 308]
    answer = ask(client, [], max_tokens=4, extra_body={"prompt_token_ids": ids})
    assert answer.usage.prompt_tokens == 9


def test_raw_prompt_equals_the_template(client: openai.OpenAI) -> None:
    raw = "<|begin_of_sentence|>User: Hello, how are you?\nAssistant: "
    templated = ask(client, max_tokens=30).choices[0].message.content
    message = [{"role": "user", "content": raw}]
    direct = ask(client, message, max_tokens=30, extra_body={"disable_chat_template": True})
    assert direct.choices[0].message.content == templated


def test_bad_words(client: openai.OpenAI) -> None:
    ids_wanted = {"return_token_ids": True}
    plain = ask(client, QUESTION, max_tokens=30, extra_body=ids_wanted).choices[0].message
    banned = plain.completion_token_ids[6:10]
    by_id = ask(client, QUESTION, max_tokens=30,
                extra_body={**ids_wanted, "bad_words_token_ids": banned})  # fmt: skip
    assert not set(by_id.choices[0].message.completion_token_ids[:-1]) & set(banned)
    by_word = ask(client, QUESTION, max_tokens=30, extra_body={"bad_words": ["李"]})
    assert "李" not in by_word.choices[0].message.content


def test_logit_bias_in_both_forms(client: openai.OpenAI) -> None:
    token = 1210  # 李
    forced = ask(client, HELLO, max_tokens=4, logit_bias={str(token): 100})
    assert forced.choices[0].message.content == "李李李李"
    extra = {"logits_processors_args": {"logit_bias": {str(token): 100.0}}}
    assert ask(client, max_tokens=4, extra_body=extra).choices[0].message.content == "李李李李"


def test_stop_text_stays_and_ends(client: openai.OpenAI) -> None:
    answer = ask(client, QUESTION, max_tokens=200, stop=["。", "，"], logprobs=True)
    text = answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert len(re.findall("[。，]", text)) == 1
    assert text[-1] in "。，"
    tokens = [entry.token for entry in answer.choices[0].logprobs.content]
    assert tokens[-2] in ("。", "，")
    assert tokens[-1] == "</s>"


def test_logprobs(client: openai.OpenAI) -> None:
    answer = ask(client, QUESTION, max_tokens=6, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    for entry in content[:-1]:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        best = [top.logprob for top in entry.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert bytes(entry.bytes).decode() == entry.token
    none = ask(client, max_tokens=3, logprobs=True).choices[0].logprobs.content
    assert all(entry.top_logprobs == [] for entry in none)


def test_logprobs_stream(client: openai.OpenAI) -> None:
    whole = ask(client, QUESTION, max_tokens=8, logprobs=True, top_logprobs=2)
    chunks = list(ask(client, QUESTION, max_tokens=8, logprobs=True, top_logprobs=2, stream=True))
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    expected = whole.choices[0].logprobs.content
    assert [e.token for e in streamed] == [e.token for e in expected]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in expected])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"guided_choice": ["moon", "river"]}, r"moon|river"),
        ({"guided_regex": r"^\d{4}-\d{2}$"}, r"\d{4}-\d{2}"),
        ({"guided_grammar": 'root ::= "yes " [a-c] [a-c]? "!"'}, r"yes [abc]{1,2}!"),
    ],
)
def test_guided(client: openai.OpenAI, stream: bool, constraint: dict, pattern: str) -> None:
    answer = ask(client, QUESTION, max_tokens=64, stream=stream, extra_body=constraint)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(client: openai.OpenAI, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"poet": {"enum": ["李白", "杜甫"]}, "poems": {"type": "integer"}},
        "required": ["poet", "poems"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "poet", "schema": schema}}
    answer = ask(client, QUESTION, max_tokens=120, response_format=form, stream=stream)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    value = json.loads(text)
    assert value["poet"] in ("李白", "杜甫")
    assert isinstance(value["poems"], int)


def test_json_object(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_object"}
    answer = ask(client, QUESTION, max_tokens=400, response_format=form, temperature=1.0, seed=1)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.lstrip().startswith("{")


def test_messages_of_many_forms(client: openai.OpenAI) -> None:
    parts: list[Any] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "content": {"result": 1}, "tool_call_id": "1"},
    ]
    assert ask(client, parts, max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": None}, {"unknown_field": {"a": 1}}, {"stop": ""}, {"max_tokens": 10_000_000,
         "stop": ["。"]}, {"model": ""}, {"model": "anything"}, {"user": "me\n\x00"},
        {"metadata": {"max_tokens": 3}}, {"tools": []}, {"top_k": -1}, {"seed": 0},
    ],
)  # fmt: skip
def test_accepted_without_error(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"messages": HELLO, "max_tokens": 3, **GREEDY, **fields}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 5e-324}, {"repetition_penalty": 1e308}, {"temperature": 5e-324},
        {"temperature": 1e308, "seed": 1}, {"logit_bias": {"5": 1e308}}, {"min_p": 5e-324},
        {"repetition_penalty": 1e-300, "temperature": 1e-300, "logit_bias": {"5": -1e308}},
    ],
)  # fmt: skip
def test_numbers_beyond_float32(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"messages": QUESTION, "max_tokens": 4, **fields}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("content", ["", "  ", "\x00\x01\x7f", "👩‍👩‍👧‍👦" * 20])
def test_odd_content_is_accepted(http: httpx.Client, content: str) -> None:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 3}
    data = json.dumps(body)
    answer = http.post("/v1/chat/completions", content=data,
                       headers={"content-type": "application/json"})  # fmt: skip
    assert answer.status_code == 200, answer.text


def test_text_that_is_no_unicode_is_refused(http: httpx.Client) -> None:
    data = json.dumps({"messages": [{"role": "user", "content": "a\ud800"}], "max_tokens": 3})
    answer = http.post("/v1/chat/completions", content=data,
                       headers={"content-type": "application/json"})  # fmt: skip
    assert answer.status_code == 400
    assert "messages[0].content" in answer.json()["error"]["message"]


def test_metadata_merges_and_explicit_fields_win(http: httpx.Client) -> None:
    body = {"messages": HELLO, "metadata": {"max_tokens": 7, "temperature": 0}}
    path = "/v1/chat/completions"
    assert http.post(path, json=body).json()["usage"]["completion_tokens"] <= 7
    body["max_tokens"] = 3
    assert http.post(path, json=body).json()["usage"]["completion_tokens"] == 3


def test_ids(client: openai.OpenAI) -> None:
    assert ask(client, max_tokens=1, extra_body={"request_id": "abc"}).id == "chatcmpl-abc"
    assert ask(client, max_tokens=1, user="me").id.startswith("chatcmpl-me-")


def test_concurrent_requests_with_metadata(server: ServerProcess) -> None:
    async def many() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            one = client.chat.completions.create
            calls = (one(model="dummy", messages=HELLO, max_tokens=40,
                         extra_body={"metadata": {"min_tokens": 30}, "top_p": 0})
                     for _ in range(10))  # fmt: skip
            return list(await asyncio.gather(*calls))

    answers = asyncio.run(many())
    assert all(30 <= a.usage.completion_tokens <= 40 for a in answers)
    assert len({a.choices[0].message.content for a in answers}) == 1


def test_async_stream(server: ServerProcess) -> None:
    async def read() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            stream = await client.chat.completions.create(
                model="demo", messages=HELLO, max_tokens=10, temperature=0, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    assert asyncio.run(read())


def test_cached_tokens(client: openai.OpenAI) -> None:
    long: list[Any] = [{"role": "user", "content": "a b c d e f g h i j " * 20}]
    ask(client, long, max_tokens=2)
    usage = ask(client, long, max_tokens=2).usage
    assert usage.prompt_tokens_details.cached_tokens >= 64
    assert usage.prompt_tokens_details.cached_tokens % 64 == 0
