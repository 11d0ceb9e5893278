"""A stream is its whole answer in pieces, whatever the request asks for.

Bodies at and beyond every bound (`http_messages`) are sent twice, whole and streamed, with a seed
and as many features together as they happen to name: both are refused with the same words, or both
say the same. The suite sends some; `FD_LITE_FUZZ_REQUESTS=4000` that many, from number
`FD_LITE_FUZZ_FIRST` on.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from http_messages import CHAT, RESPONSES, body_of
from server_process import ServerProcess, running_server

REQUESTS = int(os.environ.get("FD_LITE_FUZZ_REQUESTS", "100"))
FIRST = int(os.environ.get("FD_LITE_FUZZ_FIRST", "0"))
FLAGS = ("--max-model-len", "160", "--max-num-seqs", "16", "--enable-logprob",
         "--num-gpu-blocks-override", "64", "--reasoning-parser", "think",
         "--tool-call-parser", "hermes")  # fmt: skip
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}  # fmt: skip
FEATURES: list[dict[str, Any]] = [
    {"n": 2}, {"stop": ["e", "的", "a b"]}, {"min_tokens": 9}, {"temperature": 1.3},
    {"frequency_penalty": 1.5}, {"ignore_eos": True}, {"include_stop_str_in_output": True},
    {"stop_token_ids": [300, 301]}, {"return_token_ids": True}, {"top_k": 3},
    {"max_streaming_response_tokens": 4}, {"bad_words": ["the"]}, {"logit_bias": {"300": 4}},
]  # fmt: skip
CHATS: list[dict[str, Any]] = [
    {"logprobs": True, "top_logprobs": 2}, {"reasoning_max_tokens": 2},
    {"tools": [TOOL], "tool_choice": "required"}, {"guided_regex": "<think>[ab]{2}</think>[cd]{3}"},
    {"tools": [TOOL], "guided_choice": [f"x {CALL}", f"<think>y</think> {CALL}\n{CALL}z"]},
    {"tools": [TOOL], "guided_choice": [CALL[:-4], CALL[4:], CALL[:-25] + CALL]},
    {"guided_choice": ["<think>", "</think>", "<tool_call>", "a<tool_call>{}</tool_call>"]},
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"response_format": {"type": "json_object"}},
    {"tools": [TOOL], "guided_regex": '(a<tool_call>)?\\{"name": "f"(\\}</tool_call>)?'},
]  # fmt: skip
COMPLETIONS: list[dict[str, Any]] = [
    {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 1}, {"prompt": ["a", "b c"]},
    {"echo": True, "max_tokens": 0}, {"prompt": [[5, 6], [7]]}, {"guided_regex": "[ab]{3,9}"},
]  # fmt: skip
VARYING = ("id", "created", "created_at", "completed_at", "call_id", "item_id", "sequence_number")


def request_of(number: int) -> tuple[str, dict[str, Any]]:
    """The request of a number: most have features that go together, some are out of bounds."""
    rng = random.Random(number)
    path, odd = body_of(rng)
    own = CHATS if path == CHAT else [] if path == RESPONSES else COMPLETIONS
    body: dict[str, Any] = {"max_tokens": rng.choice((1, 3, 24, 40)), "temperature": 0}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": rng.choice(("hi", "<think>", "李白 " * 9))}]
    elif path == RESPONSES:
        body = {"input": "hi", "max_output_tokens": rng.choice((1, 9, 30)), "temperature": 0}
    else:
        body["prompt"] = rng.choice(("hi", "</s>", "🇩🇪 😀", "moon " * 20))
    if path != RESPONSES:
        for _ in range(rng.choice((1, 2, 3))):
            body.update(rng.choice(FEATURES + own))
    if rng.random() < 0.3:
        body.update(odd)
    body["seed"] = number
    body.pop("stream_options", None)
    return path, body


def stable(value: Any) -> Any:
    """Without ids and times, and without what is empty: a stream leaves it out."""
    if isinstance(value, dict):
        kept = {k: stable(v) for k, v in value.items() if k not in VARYING}
        return {k: v for k, v in kept.items() if v not in (None, "", [], {})}
    return [stable(item) for item in value] if isinstance(value, list) else value


def whole_choice(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message") or {}
    logprobs = choice.get("logprobs") or {}
    calls = [
        (c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or []
    ]
    return {
        "text": choice.get("text") or message.get("content") or "",
        "reasoning": (message or choice).get("reasoning_content") or "",
        "calls": calls,
        "end": choice["finish_reason"],
        "logprobs": stable(logprobs),
        "ids": (message or choice).get("completion_token_ids") or [],
    }


def streamed_choices(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What the events of a chat or of a completion add up to, by choice."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in event.get("choices", ()):
            empty = {
                "text": "",
                "reasoning": "",
                "calls": {},
                "end": None,
                "logprobs": {},
                "ids": [],
            }
            one = choices.setdefault(piece["index"], empty)
            delta = piece.get("delta") or piece
            one["text"] += delta.get("content") or delta.get("text") or ""
            one["reasoning"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or ():
                name, arguments = one["calls"].get(call["index"], ("", ""))
                said = call["function"]
                one["calls"][call["index"]] = (
                    name + (said.get("name") or ""), arguments + (said.get("arguments") or "")
                )  # fmt: skip
            for key, rows in (piece.get("logprobs") or {}).items():
                one["logprobs"].setdefault(key, []).extend(rows or [])
            one["ids"] += delta.get("completion_token_ids") or []
            assert one["end"] is None or not piece.get("finish_reason"), "two ends"
            one["end"] = piece.get("finish_reason") or one["end"]
    for one in choices.values():
        one["calls"] = [one["calls"][index] for index in sorted(one["calls"])]
        one["logprobs"] = stable(one["logprobs"])
    return choices


def ask_streamed(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status, and the events or the error."""
    options = {} if path == RESPONSES else {"stream_options": {"include_usage": True}}
    data = json.dumps({**body, "stream": True, **options}).encode()
    with client.stream("POST", path, content=data) as answer:
        text = answer.read().decode()
    if answer.status_code != 200:
        return answer.status_code, json.loads(text)["error"]
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    failed = next((e["error"] for e in events if e.get("error")), None)
    failed = failed or (events[-1].get("response") or {}).get("error")
    return (400, failed) if failed else (200, events)


def difference(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Status, and how the two answers of a body differ; "" if they do not."""
    data = json.dumps({**body, "stream": False}).encode()
    whole = client.post(path, content=data)
    status, events = ask_streamed(client, path, body)
    if (whole.status_code == 200) != (status == 200):
        return status, f"{whole.status_code} {whole.text[:600]} / {status} {str(events)[:600]}"
    if status != 200:
        said = whole.json()["error"]["message"]
        same = said == events["message"]
        return status, "" if same else f"{said} / {events['message']}"
    answer = whole.json()
    if path == RESPONSES:
        first, second = stable(answer), stable(events[-1]["response"])
        for one in (first, second):
            one.get("usage", {}).pop("input_tokens_details", None)
        return status, "" if first == second else f"{first} / {second}"
    first = {c["index"]: whole_choice(c) for c in answer["choices"]}
    second = streamed_choices(events)
    if first != second:
        return status, f"{first}\n/ {second}"
    counted = next(e["usage"] for e in reversed(events) if e.get("usage"))
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = [tuple(u[name] for name in names) for u in (answer["usage"], counted)]
    return status, "" if usage[0] == usage[1] else f"usage {usage}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with every parser on."""
    with running_server(tmp_path_factory.mktemp("streams"), FLAGS) as process:
        yield process


@pytest.mark.timeout(7200)
def test_streams_equal_whole_answers(server: ServerProcess) -> None:
    statuses: Counter[int] = Counter()
    failures = []
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=server.url, timeout=120, headers=headers) as client:
        for number in range(FIRST, FIRST + REQUESTS):
            path, body = request_of(number)
            status, found = difference(client, path, body)
            statuses[status] += 1
            if found:
                failures.append(f"{number}: {path} {str(body)[:600]}\n{found}")
            if len(failures) > 10:
                break
    assert not failures, "\n\n".join(failures)
    assert statuses[200] > REQUESTS // 3, statuses
    server.wait_idle()
