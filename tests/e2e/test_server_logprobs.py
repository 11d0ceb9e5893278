"""Scoring prompts, and log-probabilities in every form."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
from test_server_chat import events

PATH, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "床前明月光，hello moon"
GREEDY = {"temperature": 0}


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post(PATH, json={"prompt": PROMPT, **GREEDY, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_echo_scores_the_prompt(http: httpx.Client) -> None:
    """Each prompt token has the score that it gets as the continuation of what is before it."""
    answer = complete(http, max_tokens=1, logprobs=1, echo=True, return_token_ids=True)
    [choice] = answer["choices"]
    ids = choice["prompt_token_ids"]
    rows = choice["logprobs"]
    count = len(ids) + 1
    assert all(len(rows[key]) == count for key in rows)
    assert rows["token_logprobs"][0] is None
    assert rows["top_logprobs"][0] is None
    for i in range(1, len(ids)):
        body = {"prompt": ids[:i], "max_tokens": 2, "logprobs": 5, "logit_bias": {str(ids[i]): 100}}
        after = complete(http, **body, return_token_ids=True)["choices"][0]
        assert after["completion_token_ids"][0] == ids[i]
        assert after["logprobs"]["token_logprobs"][0] == pytest.approx(
            rows["token_logprobs"][i], abs=1e-5
        )
    assert choice["text"].startswith(PROMPT)
    offsets = rows["text_offset"]
    assert offsets == sorted(offsets)
    ends = [*offsets[1:], len(choice["text"])]
    pieces = [choice["text"][a:b] for a, b in zip(offsets, ends, strict=True)]
    for piece, token in zip(pieces[: len(ids)], rows["tokens"], strict=False):
        assert piece == token or token.startswith("bytes:")


def test_echoed_stream_equals_the_whole(http: httpx.Client) -> None:
    body = {"prompt": [PROMPT, "moon"], "max_tokens": 6, "echo": True, "logprobs": 2, "n": 2}
    whole = {c["index"]: c for c in complete(http, **body)["choices"]}
    parts: dict[int, dict[str, list[Any]]] = {}
    for chunk in events(http, PATH, {**body, **GREEDY}):
        for choice in chunk["choices"]:
            rows = parts.setdefault(choice["index"], {})
            for key, values in (choice["logprobs"] or {}).items():
                rows.setdefault(key, []).extend(values)
    assert parts == {index: choice["logprobs"] for index, choice in whole.items()}


@pytest.mark.parametrize("path", [PATH, CHAT])
def test_ids_and_their_text_in_every_chunk(http: httpx.Client, path: str) -> None:
    ask: dict[str, Any] = (
        {"prompt": PROMPT} if path == PATH else {"messages": [{"role": "user", "content": PROMPT}]}
    )
    body = {**ask, "max_tokens": 8, "return_token_ids": True, **GREEDY}
    whole = http.post(path, json=body).json()["choices"][0]
    expected = whole if path == PATH else whole["message"]
    _, *chunks = (chunk["choices"][0] for chunk in events(http, path, body))
    parts = chunks if path == PATH else [chunk["delta"] for chunk in chunks]
    assert "".join(part["completion_tokens"] for part in parts) == expected["completion_tokens"]
    ids = [i for part in parts for i in part["completion_token_ids"]]
    assert ids == expected["completion_token_ids"]


def test_tokenizer_info(http: httpx.Client) -> None:
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == "</s>"
    assert "chat_template" in info
    json.dumps(info)


def test_greedy_text_has_the_best_score(http: httpx.Client) -> None:
    """What an evaluation asks: the likelihood of each of several continuations."""
    best = complete(http, max_tokens=6)["choices"][0]["text"]

    def score(text: str) -> float:
        rows = complete(http, prompt=PROMPT + text, max_tokens=1, logprobs=1, echo=True)
        values = rows["choices"][0]["logprobs"]["token_logprobs"][1:-1]
        return math.fsum(values)

    assert score(best) > score("zebra quartz") + 1


@pytest.mark.parametrize(
    "fields", [{"guided_choice": ["甲", "乙"]}, {"top_p": 0, "top_p_normalized_logprobs": True}]
)
def test_what_could_not_come_is_no_alternative(http: httpx.Client, fields: dict[str, Any]) -> None:
    """They stood there as `<unk>` with -3.4e38: fewer than were asked for are listed instead."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, **GREEDY, **fields}
    chat = {**body, "logprobs": True, "top_logprobs": 5}
    rows = http.post(CHAT, json=chat).json()["choices"][0]["logprobs"]["content"]
    chunks = [chunk["choices"][0].get("logprobs") for chunk in events(http, CHAT, chat)]
    assert [row["token"] for c in chunks if c for row in c["content"]] == [r["token"] for r in rows]
    for row in [*rows, *(row for c in chunks if c for row in c["content"])]:
        assert 1 <= len(row["top_logprobs"]) <= 5
        assert row["top_logprobs"][0]["token"] == row["token"]
        assert all(best["logprob"] > -1000 for best in row["top_logprobs"])
    assert any(len(row["top_logprobs"]) < 5 for row in rows)
    text = complete(http, max_tokens=3, logprobs=5, **fields)["choices"][0]["logprobs"]
    assert all(value > -1000 for best in text["top_logprobs"] for value in best.values())
    assert len(text["tokens"]) == len(text["top_logprobs"])
