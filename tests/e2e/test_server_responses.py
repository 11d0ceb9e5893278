"""`/v1/responses` by the openai SDK: text, events, tools, structured output, items as input."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pydantic
import pytest
from server_process import ServerProcess, running_server

QUESTION = "解析三首李白的诗"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(
        **{
            "model": "default",
            "input": QUESTION,
            "temperature": 0,
            "max_output_tokens": 24,
            **fields,
        }
    )


def chat_text(client: openai.OpenAI, messages: list[Any], **fields: Any) -> str:
    answer = client.chat.completions.create(
        model="default", messages=messages, temperature=0, max_tokens=24, **fields
    )
    return answer.choices[0].message.content or ""


def test_text_is_the_chat_routes(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.id.startswith("resp_")
    assert answer.output_text == chat_text(client, [{"role": "user", "content": QUESTION}])
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    usage = answer.usage
    assert usage.output_tokens == 24
    assert usage.total_tokens == usage.input_tokens + 24


def test_events_add_up_to_the_answer(client: openai.OpenAI) -> None:
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]  # fmt: skip
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done",
                          "response.output_item.done", "response.incomplete"]  # fmt: skip
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    whole = ask(client)
    assert text == events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage


def test_previous_items_are_input(client: openai.OpenAI) -> None:
    first = ask(client, input="Hello", instructions="Be short.")
    items: list[Any] = [
        {"role": "user", "content": "Hello"},
        *(item.model_dump() for item in first.output),
        {"role": "user", "content": [{"type": "input_text", "text": "And now?"}]},
    ]
    second = ask(client, input=items, instructions="Be short.")
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And now?"},
    ]
    assert second.output_text == chat_text(client, messages)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_forced_calls_and_their_outputs(client: openai.OpenAI, stream: bool, choice: Any) -> None:
    fields = {"tools": [WEATHER], "tool_choice": choice, "max_output_tokens": 200,
              "parallel_tool_calls": False}  # fmt: skip
    if stream:
        events = list(ask(client, stream=True, **fields))
        answer = events[-1].response
        deltas = [e for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(e.delta for e in deltas) == answer.output[0].arguments
    else:
        answer = ask(client, **fields)
    assert answer.status == "completed"
    call = answer.output[0]
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    items: list[Any] = [{"role": "user", "content": "?"}, call.model_dump(), result]
    assert ask(client, input=items, tools=[WEATHER]).output_text


class Poet(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    born: bool
    digit: int = pydantic.Field(ge=0, le=9)


def test_structured_output(client: openai.OpenAI) -> None:
    answer = client.responses.parse(
        model="default", input=QUESTION, text_format=Poet, max_output_tokens=100, temperature=0
    )
    assert isinstance(answer.output_parsed, Poet)


def test_logprobs(client: openai.OpenAI) -> None:
    answer = ask(client, include=["message.output_text.logprobs"], top_logprobs=2,
                 max_output_tokens=4)  # fmt: skip
    rows = answer.output[0].content[0].logprobs
    assert len(rows) == 4
    assert all(len(row.top_logprobs) == 2 for row in rows)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": []}, "input"), ({"input": None}, "input"), ({"input": [7]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"), ({"background": True}, "background"),
        ({"tool_choice": "required"}, None), ({"max_output_tokens": 0}, None),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, None),
        ({"tool_choice": "perhaps"}, "tool_choice"), ({"top_logprobs": 100}, "top_logprobs"),
    ],
)  # fmt: skip
def test_bad_input(http: httpx.Client, fields: dict[str, Any], param: str | None) -> None:
    answer = http.post("/v1/responses", json={"input": "hi", **fields})
    assert answer.status_code == 400, answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param


def test_reasoning_is_an_item(tmp_path_factory: pytest.TempPathFactory) -> None:
    flags = ("--max-model-len", "512", "--reasoning-parser", "ernie-x1")
    with running_server(tmp_path_factory.mktemp("reasoning"), flags) as server:
        check_reasoning(server)


def check_reasoning(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        whole = ask(client, max_output_tokens=8)
        assert whole.output[0].type == "reasoning"
        events = list(ask(client, max_output_tokens=8, stream=True))
        text = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
        assert text == whole.output[0].content[0].text
        assert whole.usage.output_tokens_details.reasoning_tokens > 0
