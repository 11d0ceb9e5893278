"""Forced calls with references in their schemas, dropped tools, continued messages."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pydantic
import pytest

PATH = "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def tool(name: str, parameters: dict[str, Any] | None) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CITY = {"$ref": "#/$defs/City"}
TOOLS = [
    tool("weather", {
        "type": "object",
        "properties": {"city": CITY, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"City": {"enum": ["Paris", "Rome"]}},
    }),
    tool("route", {
        "type": "object",
        "properties": {"to": CITY},
        "required": ["to"],
        "additionalProperties": False,
        "$defs": {"City": {"enum": ["Oslo"]}},
    }),
]  # fmt: skip


def is_valid(name: str, arguments: str) -> bool:
    value = json.loads(arguments)
    if name == "weather":
        return value["city"] in ("Paris", "Rome") and 1 <= value["days"] <= 9
    return name == "route" and value == {"to": "Oslo"}


def calls_of(client: openai.OpenAI, stream: bool, **fields: Any) -> tuple[list[Any], str, str]:
    """Calls as (name, arguments), content and finish reason."""
    answer = client.chat.completions.create(
        model="default", messages=HELLO, tools=TOOLS, stream=stream, max_tokens=400, **fields
    )
    if not stream:
        [choice] = answer.choices
        calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
        return calls, choice.message.content or "", choice.finish_reason
    parts: dict[int, list[str]] = {}
    content, reason = "", ""
    for chunk in answer:
        [choice] = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            entry = parts.setdefault(call.index, ["", ""])
            entry[0] += call.function.name or ""
            entry[1] += call.function.arguments or ""
    return [tuple(parts[i]) for i in sorted(parts)], content, reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_required(client: openai.OpenAI, stream: bool, seed: int) -> None:
    fields = {"tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
    calls, content, reason = calls_of(client, stream, **fields)
    assert (len(calls), content, reason) == (1, "", "tool_calls")
    assert all(is_valid(*call) for call in calls)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["weather", "route"])
def test_named(client: openai.OpenAI, stream: bool, name: str) -> None:
    choice: Any = {"type": "function", "function": {"name": name}}
    calls, content, reason = calls_of(client, stream, tool_choice=choice)
    assert ([call[0] for call in calls], content, reason) == ([name], "", "stop")
    assert is_valid(*calls[0])


def test_dropped_tools_are_said_once(server: Any, http: httpx.Client) -> None:
    for _ in range(2):
        http.post(PATH, json={"messages": HELLO, "tools": TOOLS, "max_tokens": 2})
    server.says("shows no tools", "data_processor.log")
    http.post(PATH, json={"messages": HELLO, "tools": TOOLS, "max_tokens": 2})
    logs = "".join(path.read_text() for path in (server.folder / "log").glob("*.log"))
    assert logs.count("shows no tools") == 1


class Poet(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    alive: bool
    digit: int = pydantic.Field(ge=0, le=9)


def test_parse(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="default", messages=HELLO, response_format=Poet, max_tokens=100
    )
    assert isinstance(answer.choices[0].message.parsed, Poet)


def test_the_final_message_is_continued(client: openai.OpenAI) -> None:
    """Cut anywhere, a greedy answer goes on as it would have gone on."""
    question: list[Any] = [{"role": "user", "content": "解析三首李白的诗"}]
    fields: dict[str, Any] = {"model": "default", "temperature": 0}
    whole = client.chat.completions.create(messages=question, max_tokens=30, **fields)
    text = whole.choices[0].message.content or ""
    raw = {"continue_final_message": True, "add_generation_prompt": False}
    head = text[: len(text) // 2]
    messages = [*question, {"role": "assistant", "content": head}]
    rest = client.chat.completions.create(
        messages=messages, max_tokens=30, extra_body=raw, **fields
    ).choices[0].message.content  # fmt: skip
    assert text.startswith((head + (rest or ""))[: len(text)])
    assert len(rest or "") > 5


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": HELLO, "continue_final_message": True},
        {"messages": [*HELLO, {"role": "assistant", "content": "a"}],
         "continue_final_message": True, "add_generation_prompt": True},
    ],
)  # fmt: skip
def test_what_cannot_be_continued(http: httpx.Client, fields: dict[str, Any]) -> None:
    answer = http.post(PATH, json={"max_tokens": 3, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "continue_final_message"
