"""What FastDeploy's own tests of its service assert, asked of this server; see docs/parity.md.

Where the server differs by design the test asserts the difference, so that the table stays true.
"""

from __future__ import annotations

import enum
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ASK: list[Any] = [{"role": "user", "content": "非洲的首都是？"}]
# The bodies of the original's tests all start from these fields.
COMMON = {"model": "default", "temperature": 0, "top_p": 0, "seed": 33}
SCORED = {**COMMON, "logprobs": True, "top_logprobs": 5}


def post(http: httpx.Client, path: str = CHAT, **fields: Any) -> dict[str, Any]:
    """A whole answer, which must be a 200."""
    prompt = {"prompt": "水果的营养价值是如何的？"} if path == COMPLETION else {"messages": ASK}
    answer = http.post(path, json={"max_tokens": 10, **COMMON, **prompt, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refuse(http: httpx.Client, path: str = CHAT, **fields: Any) -> dict[str, Any]:
    """The error of a body that is refused."""
    answer = http.post(path, json={**COMMON, "messages": ASK, **fields})
    assert answer.status_code == 400, answer.text
    return dict(answer.json()["error"])


def stream(http: httpx.Client, path: str = CHAT, **fields: Any) -> Iterator[dict[str, Any]]:
    """The events of a stream; as the original's reader, every line is an event or blank."""
    prompt = {"prompt": "水果的营养价值是如何的？"} if path == COMPLETION else {"messages": ASK}
    body = {"max_tokens": 10, **COMMON, **prompt, "stream": True, **fields}
    with http.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    yield from (json.loads(line.removeprefix("data: ")) for line in lines)


def content(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def pieces(answer: dict[str, Any]) -> list[str]:
    return [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]


class TestChat:
    """The basic checks of the chat route."""

    def test_every_event_of_a_chat_has_content(self, http: httpx.Client) -> None:
        events = list(stream(http))
        text = "".join(event["choices"][0]["delta"]["content"] for event in events)
        assert text == content(post(http))

    def test_the_same_seed_gives_the_same_tokens_and_scores(self, http: httpx.Client) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        runs = [list(stream(http, **SCORED, stream_options=options)) for _ in range(2)]
        texts = [[e["choices"][0]["delta"]["content"] for e in run[:-1]] for run in runs]
        assert texts[0] == texts[1]
        scores = [[e["choices"][0]["logprobs"]["content"][0] for e in run[1:-1]] for run in runs]
        assert scores[0] == scores[1]

    @pytest.mark.parametrize("path", [CHAT, COMPLETION])
    @pytest.mark.parametrize("streamed", [False, True])
    def test_usage_adds_up(self, http: httpx.Client, path: str, streamed: bool) -> None:
        fields: dict[str, Any] = {"max_tokens": 50, "metadata": {"min_tokens": 10}}
        options = {"include_usage": True, "continuous_usage_stats": True}
        if streamed:
            answer = list(stream(http, path, **fields, stream_options=options))[-1]
        else:
            answer = post(http, path, **fields)
        usage = answer["usage"]
        assert 10 <= usage["completion_tokens"] <= 50
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    def test_one_token(self, http: httpx.Client) -> None:
        answer = post(http, max_tokens=1, metadata={"min_tokens": 1})
        assert answer["usage"]["completion_tokens"] == 1
        assert answer["choices"][0]["finish_reason"] == "length"

    @pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
    @pytest.mark.parametrize("n", [1, 2])
    def test_the_limit_ends_each_choice(self, client: openai.OpenAI, limit: str, n: int) -> None:
        fields: dict[str, Any] = {"model": "default", "messages": ASK, "n": n, limit: 5,
                                  "extra_body": {"min_tokens": 5}}  # fmt: skip
        whole = client.chat.completions.create(**fields)
        assert [choice.finish_reason for choice in whole.choices] == ["length"] * n
        ends = {}
        for event in client.chat.completions.create(**fields, stream=True):
            choice = event.choices[0]
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
        assert ends == dict.fromkeys(range(n), "length")

    def test_stop_texts(self, http: httpx.Client) -> None:
        whole = post(http, **SCORED, max_tokens=40)
        stop = next(piece for piece in pieces(whole)[3:] if len(piece.strip()) > 1)
        cut = post(http, **SCORED, max_tokens=40, stop=[stop])
        assert content(cut) == content(whole)[: content(whole).index(stop) + len(stop)]
        assert stop in pieces(cut)
        assert cut["choices"][0]["finish_reason"] == "stop"

    @pytest.mark.parametrize("stop", ["", "!@#$%^&", "\n\n", ["。", "！", "？"]])
    def test_odd_stop_texts_are_taken(self, http: httpx.Client, stop: Any) -> None:
        assert content(post(http, stop=stop))

    @pytest.mark.parametrize("path", [CHAT, COMPLETION])
    @pytest.mark.parametrize("streamed", [False, True])
    def test_bad_words_by_text_and_by_id(
        self, http: httpx.Client, path: str, streamed: bool
    ) -> None:
        def tokens(**fields: Any) -> list[int]:
            fields |= {"max_tokens": 20, "return_token_ids": True}
            if not streamed:
                (choice,) = post(http, path, **fields)["choices"]
                body = choice["message"] if path == CHAT else choice
                return list(body["completion_token_ids"])
            choices = [event["choices"][0] for event in stream(http, path, **fields)][1:]
            bodies = [choice["delta"] if path == CHAT else choice for choice in choices]
            return [token for body in bodies for token in body["completion_token_ids"]]

        bad = tokens()[6:10]
        texts = [http.post("/detokenize", json={"tokens": [i]}).json()["prompt"] for i in bad]
        assert not set(bad) & set(tokens(bad_words_token_ids=bad))
        assert not set(bad) & set(tokens(bad_words=[text for text in texts if text]))

    @pytest.mark.parametrize(
        "text",
        ["", "    ", "\x00\x01\x02", "' OR '1'='1';", "<script>alert('XSS');</script>",
         "Hello, 世界！Bonjour, le monde! こんにちは"],
    )  # fmt: skip
    def test_odd_questions_are_answered(self, http: httpx.Client, text: str) -> None:
        answer = post(http, messages=[{"role": "user", "content": text}], min_tokens=5)
        assert answer["object"] == "chat.completion"
        assert content(answer)

    @pytest.mark.parametrize("model", ["", "non-existent-model", "!@#"])
    def test_any_model_name_is_answered(self, http: httpx.Client, model: str) -> None:
        assert content(post(http, model=model))

    @pytest.mark.parametrize("fields", [{"metadata": None}, {"invalid_field": "x"}])
    def test_fields_that_do_no_harm(self, http: httpx.Client, fields: dict[str, Any]) -> None:
        assert content(post(http, **fields))

    def test_a_conversation_of_several_turns(self, http: httpx.Client) -> None:
        turns = ["牛顿是谁？", "牛顿是一位物理学家。", "他提出了什么理论？"]
        roles = itertools.cycle(["user", "assistant"])
        messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
        assert content(post(http, messages=messages))

    def test_raw_prompt_is_the_templates(self, http: httpx.Client) -> None:
        hello = "Hello, how are you?"
        whole = post(http, messages=[{"role": "user", "content": hello}])
        raw = f"<|begin_of_sentence|>User: {hello}\nAssistant: "
        own = post(http, messages=[{"role": "user", "content": raw}], disable_chat_template=True)
        assert content(own) == content(whole)

    def test_min_tokens(self, http: httpx.Client) -> None:
        answer = post(http, temperature=1, top_p=1, min_tokens=1000, max_tokens=1010)
        assert answer["usage"]["completion_tokens"] >= 1000

    @pytest.mark.parametrize("messages", [[], [{}], [{"role": "user"}], [{"content": "hello"}]])
    def test_messages_that_are_none(self, http: httpx.Client, messages: list[Any]) -> None:
        refuse(http, messages=messages)


class TestRefusals:
    """The original's cases of bad input: its older releases had `detail`, the newer `error`."""

    def test_no_messages(self, http: httpx.Client) -> None:
        answer = http.post(CHAT, json=COMMON)
        assert answer.json()["error"]["param"] == "messages"
        assert "Field required" in answer.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("fields", "words"),
        [({"messages": "我"}, "Input should be a valid list"),
         ({"top_p": 1.5}, "less than or equal to 1"),
         ({"stop": ["11", "22", "33", "44", "55", "66", "77"]},
          "exceeds the limit max_stop_seqs_num"),
         ({"stop": ["11", "今天天气比明天好多了，请问你会出门还是和我一起玩"]},
          "exceeds the limit stop_seqs_max_len"),
         ({"messages": [{"role": "user", "content": "a，" * 200_000}]}, "Input text is too long"),
         ({"max_tokens": -10}, "max_tokens can be defined [1,"),
         ({"max_tokens": 0}, "max_tokens can be defined [1,"),
         ({"max_tokens": 10.5},
          "Input should be a valid integer, got a number with a fractional part"),
         ({"prompt_logprobs": 25},
          "Number of prompt_logprobs requested (25) exceeds maximum allowed value (20)")],
    )  # fmt: skip
    def test_words(self, http: httpx.Client, fields: dict[str, Any], words: str) -> None:
        assert words in refuse(http, **fields)["message"]

    def test_a_limit_beyond_the_context_is_cut(self, http: httpx.Client) -> None:
        answer = post(http, max_tokens=10_000_000, stop=["的", "。", ".", "a"])
        assert answer["usage"]["completion_tokens"] < 10_000_000


class TestCompletions:
    """The completion route."""

    def test_echo(self, http: httpx.Client) -> None:
        prompts = ["水果的营养价值是如何的？", "水的化学式是什么？"]
        for prompt in (prompts[0], prompts):
            answer = post(http, COMPLETION, prompt=prompt, echo=True)
            asked = [prompt] if isinstance(prompt, str) else prompt
            for choice, own in zip(answer["choices"], asked, strict=True):
                assert choice["text"].startswith(own)

    @pytest.mark.parametrize("ids", [False, True])
    def test_an_echoed_stream(self, http: httpx.Client, ids: bool) -> None:
        """With `return_token_ids` a choice's first event is the prompt's, the echo comes next."""
        prompts = ["水果的营养价值是如何的？", "水的化学式是什么？"]
        fields = {"echo": True, "max_tokens": 2, "return_token_ids": ids, "prompt": prompts}
        seen: dict[int, list[str]] = {0: [], 1: []}
        for event in stream(http, COMPLETION, **fields):
            for choice in event["choices"]:
                seen[choice["index"]].append(choice["text"])
        assert all(seen[index][int(ids)].startswith(own) for index, own in enumerate(prompts))

    def test_ends(self, http: httpx.Client) -> None:
        assert post(http, COMPLETION)["choices"][0]["finish_reason"] == "length"
        ended = post(http, COMPLETION, guided_choice=["苹果是水果"], max_tokens=100)
        assert ended["choices"][0]["finish_reason"] == "stop"

    @pytest.mark.parametrize("field", ["prompt", "prompt_token_ids"])
    @pytest.mark.parametrize("ids", [[5, 6, 27, 45, 107, 3, 39, 18, 93], [[5, 6, 7], [1, 2, 3]]])
    def test_prompts_of_ids(self, client: openai.OpenAI, field: str, ids: list[Any]) -> None:
        flat = isinstance(ids[0], int)
        fields: dict[str, Any] = {"model": "default", "prompt": "", "max_tokens": 5}
        fields |= {"prompt": ids} if field == "prompt" else {"extra_body": {field: ids}}
        count = len(ids) if flat else sum(map(len, ids))
        whole = client.completions.create(**fields)
        assert len(whole.choices) == (1 if flat else len(ids))
        assert whole.usage is not None and whole.usage.prompt_tokens == count
        total = 0
        options = {"include_usage": True}
        for event in client.completions.create(**fields, stream=True, stream_options=options):
            if event.choices:
                assert event.usage is None
            else:
                total += event.usage.prompt_tokens
        assert total == count

    def test_a_prefix_within_a_batch_counts_as_cached(self, http: httpx.Client) -> None:
        ids = [10 + (7 * place) % 4000 for place in range(200)]
        answer = post(http, COMPLETION, prompt=[ids, [*ids, 5], ids], max_tokens=2)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 2 * 192

    def test_several_choices_stream(self, client: openai.OpenAI) -> None:
        fields: dict[str, Any] = {"model": "default", "prompt": "Hello", "n": 2, "max_tokens": 30}
        events = list(client.completions.create(**fields, stream=True))
        assert {event.choices[0].index for event in events} == {0, 1}
        assert all(isinstance(event.choices[0].text, str) for event in events)

    def test_the_closing_token_of_a_limit(self, http: httpx.Client) -> None:
        """By design: at the limit no closing token is added (upstream's `max_tokens` counts it)."""
        fields = {"max_tokens": 5, "include_stop_str_in_output": True}
        assert not content(post(http, **fields)).endswith("</s>")
        ended = post(http, **fields | {"max_tokens": 50}, guided_choice=["Yes"])
        assert content(ended) == "Yes</s>"
        assert content(post(http, max_tokens=50, guided_choice=["Yes"])) == "Yes"


class TestTokens:
    """`return_token_ids`, `prompt_token_ids`, log-probabilities."""

    @pytest.mark.parametrize("path", [CHAT, COMPLETION])
    @pytest.mark.parametrize("wanted", [False, True])
    def test_ids_and_texts_of_a_whole_answer(
        self, http: httpx.Client, path: str, wanted: bool
    ) -> None:
        (choice,) = post(http, path, return_token_ids=wanted)["choices"]
        body = choice["message"] if path == CHAT else choice
        names = ("prompt_token_ids", "completion_token_ids", "prompt_tokens", "completion_tokens")
        if not wanted:
            assert [body[name] for name in names] == [None] * 4
            return
        asked = ASK[0]["content"] if path == CHAT else "水果的营养价值是如何的？"
        assert asked in body["prompt_tokens"]
        assert body["content" if path == CHAT else "text"] in body["completion_tokens"]
        assert body["reasoning_content"] is None
        assert len(body["completion_token_ids"]) == 10

    @pytest.mark.parametrize("path", [CHAT, COMPLETION])
    @pytest.mark.parametrize("wanted", [False, True])
    def test_ids_and_texts_of_a_stream(
        self, client: openai.OpenAI, path: str, wanted: bool
    ) -> None:
        extra = {"extra_body": {"return_token_ids": wanted}, "max_tokens": 5, "stream": True}
        fields: dict[str, Any] = {"model": "default", **extra}
        if path == CHAT:
            choices = [
                event.choices[0].delta
                for event in client.chat.completions.create(messages=ASK, **fields)
            ]
        else:
            choices = [e.choices[0] for e in client.completions.create(prompt="你是谁", **fields)]
        if not wanted:
            assert all(c.prompt_token_ids is c.completion_token_ids is None for c in choices)
            return
        first, *rest = choices
        assert isinstance(first.prompt_token_ids, list) and first.completion_token_ids is None
        assert ("非洲的首都是？" if path == CHAT else "你是谁") in first.prompt_tokens
        for choice in rest:
            assert choice.prompt_token_ids is None
            assert isinstance(choice.completion_token_ids, list)
            text = choice.content if path == CHAT else choice.text
            assert choice.reasoning_content or text in choice.completion_tokens

    @pytest.mark.parametrize("n", [1, 2])
    @pytest.mark.parametrize("streamed", [False, True])
    def test_a_chat_of_ids(self, client: openai.OpenAI, n: int, streamed: bool) -> None:
        ids = [52, 62, 27, 45, 10, 32, 39, 18, 93]
        fields: dict[str, Any] = {"model": "default", "messages": [], "max_tokens": 5, "n": n,
                                  "extra_body": {"prompt_token_ids": ids}}  # fmt: skip
        if not streamed:
            whole = client.chat.completions.create(**fields)
            assert len(whole.choices) == n
            assert whole.usage is not None and whole.usage.prompt_tokens == 9
            return
        options = {"include_usage": True}
        seen = set()
        for event in client.chat.completions.create(**fields, stream=True, stream_options=options):
            if event.choices:
                assert event.usage is None
                seen.add(event.choices[0].index)
            else:
                assert event.usage.prompt_tokens == 9
        assert seen == set(range(n))

    def test_logprobs_of_a_chat(self, http: httpx.Client) -> None:
        answer = post(http, **SCORED, max_tokens=3)
        first = answer["choices"][0]["logprobs"]["content"][0]
        best = first["top_logprobs"][0]
        assert best == {name: first[name] for name in ("token", "logprob", "bytes")} | {
            "top_logprobs": None
        }
        assert bytes(best["bytes"]).decode() == best["token"]
        event = next(e for e in stream(http, **SCORED) if e["choices"][0]["delta"]["content"])
        streamed = event["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]
        assert streamed == {name: best[name] for name in ("token", "logprob", "bytes")}

    def test_no_logprobs(self, http: httpx.Client) -> None:
        fields = {"logprobs": False, "top_logprobs": None}
        assert post(http, **fields)["choices"][0]["logprobs"] is None
        events = [event["choices"][0] for event in stream(http, **fields)]
        assert all(choice["logprobs"] is None for choice in events if choice["delta"]["content"])

    def test_more_alternatives_begin_with_fewer(self, http: httpx.Client) -> None:
        few, many = (
            post(http, **SCORED | {"top_logprobs": count})["choices"][0]["logprobs"]["content"]
            for count in (5, 10)
        )
        for small, large in zip(few, many, strict=True):
            assert large["top_logprobs"][:5] == small["top_logprobs"]

    def test_scores_follow_temperature_and_top_p_when_asked(self, http: httpx.Client) -> None:
        def score(**fields: Any) -> float:
            event = next(
                e for e in stream(http, **SCORED | fields) if e["choices"][0]["delta"]["content"]
            )
            return float(event["choices"][0]["logprobs"]["content"][0]["logprob"])

        plain = score()
        assert score(top_p_normalized_logprobs=True) == 0
        assert score(temperature=0.8, temp_scaled_logprobs=True) > plain

    @pytest.mark.parametrize("path", [CHAT, COMPLETION])
    @pytest.mark.parametrize("n", [1, 3])
    @pytest.mark.parametrize("count", [0, 3])
    def test_prompt_logprobs(self, http: httpx.Client, path: str, n: int, count: int) -> None:
        answer = post(http, path, prompt_logprobs=count, n=n, return_token_ids=True)
        assert len(answer["choices"]) == n
        for choice in answer["choices"]:
            ids = (choice["message"] if path == CHAT else choice)["prompt_token_ids"]
            self.check_prompt(choice["prompt_logprobs"], ids, count)

    def check_prompt(self, found: list[Any], ids: list[int], count: int) -> None:
        assert len(found) == len(ids) and found[0] is None
        for own, entries in zip(ids[1:], found[1:], strict=True):
            ranks = sorted(entry["rank"] for entry in entries.values())
            assert len(entries) in {count, count + 1}
            assert entries[str(own)]["logprob"] < 0
            assert count == 0 or ranks[0] == 1
            assert all(entry["decoded_token"] is not None for entry in entries.values())

    def test_prompt_logprobs_of_several_prompts(self, http: httpx.Client) -> None:
        prompts = ["牛顿的三大运动定律是什么？", "什么是机器学习？"]
        answer = post(http, COMPLETION, prompt=prompts, n=3, prompt_logprobs=3)
        assert len(answer["choices"]) == 6
        assert all(choice["prompt_logprobs"][0] is None for choice in answer["choices"])

    @pytest.mark.parametrize("path", [CHAT, COMPLETION])
    def test_prompt_logprobs_stream_first(self, http: httpx.Client, path: str) -> None:
        """A chat's later events have no such key, a completion's have null."""
        first, *rest = stream(http, path, prompt_logprobs=3, return_token_ids=True)
        choice = first["choices"][0]
        ids = (choice["delta"] if path == CHAT else choice)["prompt_token_ids"]
        self.check_prompt(choice["prompt_logprobs"], ids, 3)
        for event in rest:
            assert event["choices"][0].get("prompt_logprobs") is None
            assert ("prompt_logprobs" in event["choices"][0]) == (path == COMPLETION)

    def test_no_prompt_logprobs(self, http: httpx.Client) -> None:
        for path in (CHAT, COMPLETION):
            assert post(http, path)["choices"][0]["prompt_logprobs"] is None

    @pytest.mark.parametrize("path", [CHAT, COMPLETION])
    def test_tokens_stay_unnamed(self, http: httpx.Client, path: str) -> None:
        fields: dict[str, Any] = {"prompt_logprobs": 1, "include_logprobs_decode_token": False}
        fields |= SCORED if path == CHAT else {}
        (choice,) = post(http, path, **fields)["choices"]
        for entries in choice["prompt_logprobs"][1:]:
            assert all(entry["decoded_token"] is None for entry in entries.values())
        for entry in choice["logprobs"]["content"] if path == CHAT else ():
            assert entry["token"] in ("", None) and entry["logprob"] < 0
            assert len(entry["top_logprobs"]) == 5

    @pytest.mark.parametrize("temperature", [0, 1])
    def test_a_prompt_scores_as_the_answer_did(
        self, http: httpx.Client, temperature: float
    ) -> None:
        """The answer's tokens as part of a prompt: the same scores, the prompt's unchanged."""
        fields: dict[str, Any] = {"temperature": temperature, "top_p": 1, "prompt_logprobs": 0}
        wanted = {"logprobs": True, "top_logprobs": 0, "return_token_ids": True}
        (answer,) = post(http, **fields, **wanted, max_tokens=200, min_tokens=100)["choices"]
        prompt, own = (answer["message"][f"{n}_token_ids"] for n in ("prompt", "completion"))
        whole = [{"role": "user", "content": ""}]
        again = post(http, **fields, messages=whole, prompt_token_ids=prompt + own, max_tokens=1)
        scores = [
            next(iter(row.values()))["logprob"] if row else None
            for row in again["choices"][0]["prompt_logprobs"]
        ]
        before = [
            next(iter(row.values()))["logprob"] if row else None
            for row in answer["prompt_logprobs"]
        ]
        assert scores[: len(prompt)] == before
        expected = [entry["logprob"] for entry in answer["logprobs"]["content"]]
        assert scores[len(prompt) :] == pytest.approx(expected, abs=2e-3)


class BookType(str, enum.Enum):
    """The kinds of the documented example."""

    romance = "Romance"
    historical = "Historical"
    adventure = "Adventure"
    mystery = "Mystery"
    dystopian = "Dystopian"


class BookDescription(pydantic.BaseModel):
    """The documented example of structured output."""

    author: str
    title: str
    genre: BookType


class TestDocumentedExamples:
    """What upstream's documents show of structured output."""

    def test_books_come_to_their_end(self, http: httpx.Client) -> None:
        """A small model needs the keys closed and the indentation bounded: 9 of 10 at least."""
        question = (
            "Generate a JSON describing a literary work, including author, title and book type."
        )
        schema = {"name": "book-description", "schema": BookDescription.model_json_schema()}
        body = {
            "messages": [{"role": "user", "content": question}], "max_tokens": 600,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }  # fmt: skip
        ended = 0
        for seed in range(10):
            answer = http.post(CHAT, json={**body, "seed": seed}).json()
            if answer["choices"][0]["finish_reason"] == "stop":
                BookDescription.model_validate_json(content(answer))
                ended += 1
        assert ended >= 9

    @pytest.mark.parametrize("streamed", [False, True])
    @pytest.mark.parametrize(
        ("fields", "pattern"),
        [({"guided_choice": ["Ping An Finance Centre", "KK100"]}, "Ping An Finance Centre|KK100"),
         ({"guided_regex": r"^https:\/\/www\.[a-zA-Z]+\.com\/?$\n", "max_tokens": 200},
          r"https://www\.[a-zA-Z]+\.com/?\n"),
         ({"guided_grammar": 'root ::= "<h1" style? ">" text "</h1>"\n'
           'style ::= " style=" dq weight dq\nweight ::= "font-weight: " ("normal" | "bold")\n'
           'text ::= [A-Z] [a-z0-9 ]? [a-z]?\ndq ::= ["]\n'},
          r'<h1( style="font-weight: (normal|bold)")?>[A-Z][a-z0-9 ]?[a-z]?</h1>')],
    )  # fmt: skip
    def test_the_other_constraints(
        self, http: httpx.Client, fields: dict[str, Any], pattern: str, streamed: bool
    ) -> None:
        fields = {"max_tokens": 50, "temperature": 1, "top_p": 1, **fields}
        if streamed:
            deltas = [event["choices"][0]["delta"] for event in stream(http, **fields)]
            text = "".join(delta["content"] for delta in deltas)
        else:
            text = content(post(http, **fields))
        assert re.fullmatch(pattern, text), text


def test_metrics_have_the_names(http: httpx.Client) -> None:
    post(http)
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = [line for line in answer.text.splitlines() if line and not line.startswith("#")]
    values = {line.split("{")[0].split(" ")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
    names = (
        "num_requests_running num_requests_waiting time_to_first_token_seconds_sum "
        "time_per_output_token_seconds_sum e2e_request_latency_seconds_sum "
        "request_inference_time_seconds_sum request_queue_time_seconds_sum "
        "request_prefill_time_seconds_sum request_decode_time_seconds_sum prompt_tokens_total "
        "generation_tokens_total request_prompt_tokens_sum request_generation_tokens_sum "
        "gpu_cache_usage_perc request_params_max_tokens_sum request_success_total"
    )
    for name in names.split():
        assert values[f"fastdeploy:{name}"] >= 0
    assert "env_config" in http.get("/config-info").json()
