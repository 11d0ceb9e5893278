"""`tool_choice` through the real SDK: what is demanded is called, whatever the model would say."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from server_process import ServerProcess

MESSAGES: Any = [{"role": "user", "content": "解析三首李白的诗"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["北京", "Berlin"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def ask(client: openai.OpenAI, choice: Any, **fields: Any) -> Any:
    return client.chat.completions.create(
        model="default", messages=MESSAGES, tools=TOOLS, tool_choice=choice, max_tokens=200,
        **fields,
    )  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
def test_a_named_function_is_called(client: openai.OpenAI, seed: int) -> None:
    choice = ask(client, named("weather"), seed=seed).choices[0]
    (call,) = choice.message.tool_calls
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "days"}
    assert choice.finish_reason == "stop"
    assert not choice.message.content


@pytest.mark.parametrize("seed", [1, 2])
def test_required_calls_one_at_least(client: openai.OpenAI, seed: int) -> None:
    choice = ask(client, "required", seed=seed, parallel_tool_calls=False).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name in ("weather", "now")
    assert isinstance(json.loads(call.function.arguments), dict)
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", [named("weather"), "required"])
def test_a_stream_brings_the_same_call(client: openai.OpenAI, choice: Any) -> None:
    fields = {"seed": 3, "parallel_tool_calls": False}
    (whole,) = ask(client, choice, **fields).choices[0].message.tool_calls
    name, arguments, reason = "", "", None
    for chunk in ask(client, choice, stream=True, **fields):
        for part in chunk.choices:
            assert not part.delta.content
            for call in part.delta.tool_calls or []:
                name += call.function.name or ""
                arguments += call.function.arguments or ""
            reason = part.finish_reason or reason
    assert (name, json.loads(arguments)) == (
        whole.function.name,
        json.loads(whole.function.arguments),
    )
    assert reason == ("tool_calls" if choice == "required" else "stop")


@pytest.mark.parametrize("choice", ["none", "auto"])
def test_nothing_is_demanded(client: openai.OpenAI, choice: Any) -> None:
    message = ask(client, choice, temperature=0).choices[0].message
    assert "李白" in message.content
    assert not message.tool_calls


@pytest.mark.parametrize("choice", ["maybe", named("absent"), {"type": "function"}, 5, []])
def test_nonsense_is_a_400(client: openai.OpenAI, choice: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, choice)
    assert "tool_choice" in str(caught.value.body)


def test_a_bad_schema_of_a_tool_is_a_400(server: ServerProcess, client: openai.OpenAI) -> None:
    bad: Any = [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "no such type"}}}
    ]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="default", messages=MESSAGES, tools=bad, tool_choice="required"
        )
    assert "tool_choice" in str(caught.value.body)
