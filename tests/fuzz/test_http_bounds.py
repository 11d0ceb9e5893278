"""Values at and beyond every bound, in every field, in bodies that a schema would never make.

Extreme numbers, text that is none (lone surrogates) or that looks like control tokens, lists and
bodies one below, at and one above each limit. No 5xx but the documented ones, no hang, and the
same answer afterwards. The suite sends some hundreds; `FD_LITE_FUZZ_REQUESTS=20000` that many.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from server_process import ServerProcess, running_server

REQUESTS = int(os.environ.get("FD_LITE_FUZZ_REQUESTS", "400"))
DOCUMENTED = {501, 503}
FLAGS = ("--max-model-len", "96", "--max-num-seqs", "16", "--enable-logprob",
         "--num-gpu-blocks-override", "64", "--reasoning-parser", "think",
         "--tool-call-parser", "hermes")  # fmt: skip
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"

NUMBERS: list[Any] = [
    0, -0.0, 1, -1, 2, 5, 7, 20, 21, 127, 128, 129, 255, 256, 8191, 8192, 2**31 - 1, 2**31,
    -(2**31) - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 922337203685477580,
    922337203685477581, 0.5, 1.0, 1.5, 2.0, -2.0, 2.0000001, 1e-320, 1e-45, 1e38, 3.5e38, 1e308,
    -1e308, float("inf"), float("-inf"), float("nan"), True, False, None, "", "1", [], {}, [1],
]  # fmt: skip
TEXTS: list[Any] = [
    "",
    " ",
    "hi",
    "\ud83d",
    "\udfff",
    "a\ud800b",
    "</s>",
    "<s>a",
    "<think>",
    "</think>",
    "<mask:1>",
    "<|begin_of_sentence|>",
    "<tool_call>",
    '<tool_call>{"name": "f", "arguments": ',
    "\x00",
    "\x85",
    "\n",
    "😀",
    "李白",
    "a" * 95,
    "a " * 47,
    "a" * 5000,
    "🇩🇪",
    "{{ x }}",
    "{% for %}",
    "[" * 200,
    "(a|b)*",
    "(",
    "\\",
    '{"type": "object"}',
    '{"const": "end</s>"}',
    None,
    True,
    0,
    [],
    {},
]
NUMERIC = (
    "temperature", "top_p", "top_k", "min_p", "n", "seed", "max_tokens", "min_tokens",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logprobs", "top_logprobs",
    "prompt_logprobs", "max_completion_tokens", "reasoning_max_tokens", "response_max_tokens",
    "max_streaming_response_tokens", "best_of",
)  # fmt: skip
TEXTUAL = (
    "model", "user", "request_id", "guided_regex", "guided_grammar", "guided_json", "suffix",
    "chat_template", "structural_tag", "guided_decoding_backend", "guided_whitespace_pattern",
)  # fmt: skip
BOUNDED = {  # lists by their limits
    "stop": (5, 1000), "stop_token_ids": (1, 16384), "bad_words": (1, 10000), "messages": (1, 40),
    "bad_words_token_ids": (1, 16384), "guided_choice": (1, 4096, 8192), "prompt": (1, 1024),
    "prompt_token_ids": (95, 96, 5000), "completion_token_ids": (1, 90), "tools": (1, 100),
}  # fmt: skip
FLAGS_OF_REQUESTS = (
    "stream", "echo", "return_token_ids", "include_stop_str_in_output", "disable_chat_template",
    "temp_scaled_logprobs", "top_p_normalized_logprobs", "include_logprobs_decode_token",
    "guided_json_object", "include_draft_logprobs",
)  # fmt: skip


def bounded_list(rng: random.Random, name: str) -> list[Any]:
    size = max(rng.choice(BOUNDED[name]) + rng.choice((-1, 0, 1)), 0)
    kinds: list[Any] = [7, "a", "</s>", "\ud83d", 2**31, -1, 1.5, None, [1], [2**40], {},
                        {"role": "user", "content": "hi"}, {"role": "tool", "content": {"a": 1}},
                        {"type": "function", "function": {"name": "f"}}]  # fmt: skip
    if rng.random() < 0.7:
        return [rng.choice(kinds)] * size
    return [rng.choice(kinds) for _ in range(size)]


def body_of(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice((CHAT, COMPLETION))
    body: dict[str, Any] = {"max_tokens": rng.choice((1, 2, 8))}
    if path == CHAT:
        text = rng.choice([t for t in TEXTS if isinstance(t, str)])
        body["messages"] = [{"role": rng.choice(("user", "assistant", "x")), "content": text}]
    else:
        body["prompt"] = rng.choice(TEXTS)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
        kind = rng.randrange(6)
        if kind == 0:
            body[rng.choice(NUMERIC)] = rng.choice(NUMBERS)
        elif kind == 1:
            body[rng.choice(TEXTUAL)] = rng.choice(TEXTS)
        elif kind == 2:
            name = rng.choice(list(BOUNDED))
            body[name] = bounded_list(rng, name)
        elif kind == 3:
            body[rng.choice(FLAGS_OF_REQUESTS)] = rng.choice((True, False, None, 1))
        elif kind == 4:
            args = rng.choice(("logit_bias", "thinking_budget", "think_stop_sentence", "x"))
            value = {str(rng.choice(NUMBERS)): rng.choice(NUMBERS)} if args == "logit_bias" else (
                rng.choice(NUMBERS + TEXTS))  # fmt: skip
            body.update({"logits_processors_args": {args: value}})
        else:
            body["logit_bias"] = {str(rng.choice(NUMBERS)): rng.choice(NUMBERS)}
    return path, body


def sized(rng: random.Random) -> tuple[str, bytes]:
    """Bodies one below, at and one above the limits of bytes and of values."""
    path, step = rng.choice((CHAT, COMPLETION, "/tokenize", "/detokenize")), rng.choice((-1, 0, 1))
    if rng.random() < 0.5:
        head = b'{"max_tokens":1,"messages":[],"tokens":[],"prompt":"'
        fill = (4 << 20) - len(head) - 2 + step
        return path, head + rng.choice((b"x", b"\\", b"\xff", b" ")) * fill + b'"}'
    values = 2**18 - 8 * 2 + step
    return path, b'{"tokens":[' + b"1," * values + b"1]}"


def message(rng: random.Random) -> tuple[str, bytes]:
    kind = rng.random()
    if kind < 0.02:
        return sized(rng)
    path, body = body_of(rng)
    data = json.dumps(body).encode()
    if kind < 0.06:  # damaged JSON
        at = rng.randrange(len(data))
        data = (
            data[:at] + rng.choice((b"", b"\x00", b"\xff", b"[", b'"', b"1e999")) + data[at + 1 :]
        )
    return path, data


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose answers are short."""
    with running_server(tmp_path_factory.mktemp("bounds"), FLAGS) as process:
        yield process


@pytest.mark.timeout(7200)
def test_bounds(server: ServerProcess) -> None:
    probe = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
    before = httpx.post(f"{server.url}{COMPLETION}", json=probe).json()["choices"]
    statuses: Counter[int] = Counter()
    engine = server.engine().pid

    def send(number: int) -> None:
        path, data = message(random.Random(number))
        header = {"content-type": "application/json"}
        started = time.monotonic()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answer = client.post(path, content=data, headers=header)
        statuses[answer.status_code] += 1
        shown = f"request {number}: {path} {data[:300]!r}: {answer.status_code} {answer.text[:300]}"
        assert answer.status_code < 500 or answer.status_code in DOCUMENTED, shown
        assert "internal_error" not in answer.text, shown  # in a stream, too
        assert time.monotonic() - started < 60, shown

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(send, range(REQUESTS)):
            pass
    assert statuses[200] > REQUESTS // 20, statuses
    assert statuses[400] > REQUESTS // 20, statuses
    server.wait_idle()
    assert server.engine().pid == engine
    assert httpx.post(f"{server.url}{COMPLETION}", json=probe).json()["choices"] == before
