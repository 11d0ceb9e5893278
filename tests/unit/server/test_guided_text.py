"""Constraints whose text names control tokens, is huge, or makes a compiler slow."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import handicap

from fastdeploy_lite.guided.closed_objects import close_objects
from fastdeploy_lite.guided.compiler import GuidedDecoder
from fastdeploy_lite.guided.matcher import Matcher
from fastdeploy_lite.guided.spec import GuidedSpec
from fastdeploy_lite.guided.translation import MAX_CHOICES, strip_anchors
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.errors import RequestError

CONTROL = ["<s>", "</s>", "<think>", "</think>", "<|begin_of_sentence|>", "<mask:1>", "<pad>",
           "<0x41>", "<unk>", "<tool_call>"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(demo_dir: Path) -> Ernie4_5Tokenizer:
    return Ernie4_5Tokenizer.from_pretrained(demo_dir, eos_token_ids=[2, 7])


@pytest.fixture(scope="module")
def decoder(tokenizer: Ernie4_5Tokenizer) -> GuidedDecoder:
    return GuidedDecoder(tokenizer)


def allowed(matcher: Matcher, tokenizer: Ernie4_5Tokenizer) -> list[int]:
    row = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    matcher.fill_bitmask(row)
    bits = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
    return [int(i) for i in bits]


def sample(matcher: Matcher, tokenizer: Ernie4_5Tokenizer, seed: int, most: int = 400) -> str:
    rng, text = np.random.default_rng(seed), b""
    for _ in range(most):
        choices = allowed(matcher, tokenizer)
        assert choices
        if any(i in tokenizer.eos_token_ids for i in choices):
            break
        token = int(rng.choice(choices))
        assert tokenizer.token_bytes(token), f"control token {token} in an answer"
        assert matcher.accept(token)
        text += tokenizer.token_bytes(token)
    return text.decode()


@pytest.mark.parametrize("special", CONTROL)
@pytest.mark.parametrize("frame", ["{}", "a{}", "{}b", "{0}{0}", "a {} b"])
def test_names_of_control_tokens_are_text(
    decoder: GuidedDecoder, tokenizer: Ernie4_5Tokenizer, special: str, frame: str
) -> None:
    text = frame.format(special)
    for spec, expected in (
        (GuidedSpec("choice", json.dumps([text])), text),
        (GuidedSpec("json_schema", json.dumps({"const": text})), json.dumps(text)),
        (GuidedSpec("json_schema", json.dumps({"enum": [text]})), json.dumps(text)),
        (GuidedSpec("grammar", f"start: {json.dumps(text)}"), text),
    ):
        for seed in range(2):
            found = sample(decoder.compile(spec).matcher(), tokenizer, seed)
            assert found == expected or json.loads(found) == text


@given(st.lists(st.sampled_from([*CONTROL, "a", " ", "é", "你好", "\n", "<", "😀"]), max_size=8))
@settings(max_examples=200, deadline=None)
def test_as_text_spells_the_text_without_control_tokens(
    tokenizer: Ernie4_5Tokenizer, parts: list[str]
) -> None:
    text = "".join(parts)
    for markers in (True, False):
        ids = tokenizer.encode_as_text(text, markers)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        names = {tokenizer.convert_ids_to_tokens(i) for i in ids} & set(CONTROL)
        assert names <= ({"<think>", "</think>", "<tool_call>"} if markers else set())


def test_a_marker_is_written_as_the_model_writes_it(
    decoder: GuidedDecoder, tokenizer: Ernie4_5Tokenizer
) -> None:
    end = tokenizer.token_id("</think>")
    matcher = decoder.compile(GuidedSpec("regex", "a</think>b")).matcher()
    assert matcher.accept(tokenizer.encode_plain("a")[0])
    assert end in allowed(matcher, tokenizer)


@pytest.mark.parametrize("count", [2000, MAX_CHOICES])
def test_as_many_choices_as_documented(
    decoder: GuidedDecoder, tokenizer: Ernie4_5Tokenizer, count: int
) -> None:
    choices = [f"{i * 7919 % 100003}/x" for i in range(count)]
    grammar = decoder.compile(GuidedSpec("choice", json.dumps(choices)))
    for seed in range(3):
        assert sample(grammar.matcher(), tokenizer, seed) in choices


def test_a_choice_may_begin_another(decoder: GuidedDecoder, tokenizer: Ernie4_5Tokenizer) -> None:
    matcher = decoder.compile(GuidedSpec("choice", '["a", "ab", "a\\nb.*"]')).matcher()
    (a,) = tokenizer.encode_plain("a")
    assert matcher.accept(a)
    assert {2, *tokenizer.encode_plain("b")} <= set(allowed(matcher, tokenizer))


@pytest.mark.parametrize("required", [True, False])
def test_schemas_with_many_properties(
    decoder: GuidedDecoder, tokenizer: Ernie4_5Tokenizer, required: bool
) -> None:
    names = [f"p{i}" for i in range(800)]
    schema = {"type": "object", "properties": {n: {"type": "boolean"} for n in names}}
    if required:
        schema["required"] = names[:3]
    grammar = decoder.compile(GuidedSpec("json_schema", json.dumps(schema)))
    for seed in range(2):
        value = json.loads(sample(grammar.matcher(), tokenizer, seed, 4000))
        assert set(value) <= set(names)


@pytest.mark.parametrize(
    "pattern",
    ["[" * 16000, "[^" * 8000, "(" * 16000, "(?" * 8000, "\\" * 16000, "[]" * 8000, "[\\]" * 5000,
     "^" * 16000, "$" * 16000, "(?:" * 5000, "a|" * 8000, "[a" * 8000 + "]"],
    ids=lambda p: p[:4],
)  # fmt: skip
def test_anchors_are_stripped_in_linear_time(pattern: str) -> None:
    started = time.thread_time()
    strip_anchors(pattern)
    assert time.thread_time() - started < 0.5 * handicap()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"^\w+@\w+\.com$\n", r"\w+@\w+\.com\n"),
        ("^a$\n", "a\n"),
        (r"(a$\n|b$)", r"(a\n|b)"),
        (r"a\$\n", r"a\$\n"),
        (r"[$]\n", r"[$]\n"),
        (r"^a\n$", r"a\n"),
        (r"a[", r"a["),
        (r"[[]^", r"[[]^"),
    ],
)
def test_a_line_break_after_the_end(pattern: str, expected: str) -> None:
    assert strip_anchors(pattern) == expected


# Undeclared properties ---------------------------------------------------------------------------

BOOK = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "author": {"type": "object", "properties": {"name": {"type": "string"}}},
        "tags": {"type": "array", "items": {"type": "object", "properties": {"t": {}}}},
    },
    "required": ["title"],
}


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    before = json.dumps(schema)
    result = close_objects(schema)
    assert json.dumps(schema) == before, "the argument is left alone"
    return result


def test_objects_are_closed_where_they_list_properties() -> None:
    result = closed(BOOK)
    assert result["additionalProperties"] is False
    assert result["properties"]["author"]["additionalProperties"] is False
    assert result["properties"]["tags"]["items"]["additionalProperties"] is False
    assert closed({"type": "object"}) == {"type": "object"}
    said = {"properties": {"a": {}}, "additionalProperties": {"type": "string"}}
    assert closed(said) == said
    data = {"const": {"properties": {}}, "default": {"properties": {"a": 1}}}
    assert closed(data) == data
    named = {"properties": {"properties": {"type": "object"}}}
    assert closed(named) == {**named, "additionalProperties": False}


def test_objects_of_several_schemas_stay_open() -> None:
    part = {"properties": {"a": {}}}
    for schema in (
        {"allOf": [part, {"properties": {"b": {}}}]},
        {"properties": {"b": {}}, "anyOf": [part, {"required": ["b"]}]},
        {"allOf": [{"$ref": "#/$defs/x"}, part], "$defs": {"x": {"properties": {"c": {}}}}},
        {"properties": {"b": {}}, "$ref": "#/$defs/x", "$defs": {"x": {"properties": {"c": {}}}}},
    ):
        assert closed(schema) == schema
    either = closed({"anyOf": [part, {"type": "null"}]})
    assert either["anyOf"][0]["additionalProperties"] is False


@pytest.mark.parametrize("closes", [True, False])
def test_an_undeclared_key_is_forbidden_by_default(
    decoder: GuidedDecoder, tokenizer: Ernie4_5Tokenizer, closes: bool
) -> None:
    spec = GuidedSpec("json_schema", json.dumps(BOOK), closes_objects=closes)
    matcher = decoder.compile(spec).matcher()
    for token in tokenizer.encode_plain('{"title":"x","z'):
        if not matcher.accept(token):
            assert closes
            return
    assert not closes


def test_the_limit_of_a_row_is_met_at_admission_or_not_at_all(decoder: GuidedDecoder) -> None:
    """Rules that predict more than the parser's row holds are refused when compiled."""
    rules = "\n".join(f'r{i}: "k{i}" r{i}?' for i in range(2500))
    body = "start: " + " | ".join(f"r{i}" for i in range(2500)) + "\n" + rules
    spec = GuidedSpec("grammar", body)
    try:
        matcher = decoder.compile(spec).matcher()
    except RequestError:
        return
    assert matcher.accept(decoder._source.encode_as_text("k")[0])
