"""Structured output: what each constraint allows, refuses, and costs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_lite.guided import compiler
from fastdeploy_lite.guided.matcher import Grammar, Matcher
from fastdeploy_lite.guided.plain_schema import ENFORCED_FORMATS
from fastdeploy_lite.guided.spec import GuidedSpec
from fastdeploy_lite.guided.translation import strip_anchors
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.utils.errors import RequestError

PADDED = 8192 + 32  # as if the embedding had more rows than the tokenizer has pieces


@pytest.fixture(scope="module")
def tokenizer(demo_dir: Path) -> Ernie4_5Tokenizer:
    return Ernie4_5Tokenizer.from_pretrained(demo_dir, eos_token_ids=[2, 7])


Compile = Callable[..., Grammar]


@pytest.fixture(scope="module")
def compile_spec(tokenizer: Ernie4_5Tokenizer) -> Compile:
    def run(kind: str, value: object = "", **options: object) -> Grammar:
        text = value if isinstance(value, str) else json.dumps(value)
        return compiler.compile(GuidedSpec(kind, text, **options), tokenizer, PADDED)

    return run


def allowed(matcher: Matcher) -> set[int]:
    row = np.zeros(PADDED // 32, np.int32)
    matcher.fill_bitmask(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")))


def complete(matcher: Matcher, tokenizer: Ernie4_5Tokenizer, seed: int, limit: int = 400) -> str:
    """Sample uniformly among the allowed tokens until the end."""
    rng, ids = np.random.default_rng(seed), []
    for _ in range(limit):
        choices = sorted(allowed(matcher))
        assert choices
        ends = [i for i in choices if i in tokenizer.eos_token_ids]
        if ends:
            break
        token = int(rng.choice(choices))
        assert matcher.accept(token)
        ids.append(token)
    return tokenizer.decode(ids)


def accepts(matcher: Matcher, tokenizer: Ernie4_5Tokenizer, text: str) -> bool:
    """Whether some path of the model leads to exactly this text."""
    for byte in text.encode():
        token = tokenizer.token_id(f"<0x{byte:02X}>")
        if not matcher.accept(token):
            return False
    return 2 in allowed(matcher)


@pytest.mark.parametrize("seed", range(5))
def test_choice_is_one_of_them(
    compile_spec: Compile, tokenizer: Ernie4_5Tokenizer, seed: int
) -> None:
    choices = ["yes", "no", 'a "quoted"\nline', "李白", "yes, but"]
    matcher = compile_spec("choice", choices).matcher()
    assert complete(matcher, tokenizer, seed) in choices


@pytest.mark.parametrize("seed", range(5))
def test_json_schema(compile_spec: Compile, tokenizer: Ernie4_5Tokenizer, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Li Bai", "杜甫"]}, "year": {"type": "integer",
                       "minimum": 700, "maximum": 770}, "alive": {"type": "boolean"}},
        "required": ["name", "year", "alive"],
        "additionalProperties": False,
    }  # fmt: skip
    value = json.loads(complete(compile_spec("json_schema", schema).matcher(), tokenizer, seed))
    assert value["name"] in ("Li Bai", "杜甫")
    assert 700 <= value["year"] <= 770
    assert isinstance(value["alive"], bool)


TAG = {
    "type": "structural_tag",
    "structures": [
        {
            "begin": "<f>",
            "schema": {"type": "object", "properties": {"a": {"type": "boolean"}}},
            "end": "</f>",
        }
    ],
    "triggers": ["<f>"],
}


def test_json_layout_is_free_unless_disabled(
    compile_spec: Compile, tokenizer: Ernie4_5Tokenizer
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    free = compile_spec("json_schema", schema)
    assert accepts(free.matcher(), tokenizer, '{\n  "a" : 1 }')
    strict = compile_spec("json_schema", schema, any_whitespace=False)
    assert accepts(strict.matcher(), tokenizer, '{"a": 1}')
    assert not accepts(strict.matcher(), tokenizer, '{"a" :1}')


def test_json_whitespace_is_bounded(compile_spec: Compile, tokenizer: Ernie4_5Tokenizer) -> None:
    grammar = compile_spec("json_object")
    for empty in ("{  }", "{\n\n}", "{\n" + " " * 33 + "}"):
        assert not accepts(grammar.matcher(), tokenizer, empty), empty
    for laid_out in ('{\r\n\t\t"a": 1\n}', "{\n" + " " * 32 + '"a" : [1 , 2] }'):
        assert accepts(grammar.matcher(), tokenizer, laid_out), laid_out
    flat = {"type": "object", "properties": {"a": {"type": "integer"}}}
    flat = compile_spec("json_schema", flat | {"additionalProperties": False})
    for blanks, answer in ((4, True), (5, False)):
        text = "{\n" + " " * blanks + '"a": 1}'
        assert accepts(flat.matcher(), tokenizer, text) is answer
    for whitespace, answer in ((True, True), (False, False)):
        tag = compile_spec("structural_tag", TAG, any_whitespace=whitespace).matcher()
        assert accepts(tag, tokenizer, '<f>{\n  "a": true}</f>') is answer
    tag = compile_spec("structural_tag", TAG).matcher()
    assert not accepts(tag, tokenizer, '<f>{  "a": true}</f>')


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"^\d{3}-[a-z]+$", "123-ab", "12-ab"),
        (r"\A(cat|dog)\Z", "dog", "cow"),
        (r"^a$|^b$", "b", "c"),
        (r"(^x|^y)z$", "yz", "z"),
        (r"\^a\$", "^a$", "a"),
        (r"[^$]+", "abc", "$"),
        ("春.{1,3}", "春眠不", "夏"),
    ],
)
def test_regex_with_anchors(
    compile_spec: Compile, tokenizer: Ernie4_5Tokenizer, pattern: str, good: str, bad: str
) -> None:
    grammar = compile_spec("regex", pattern)
    assert accepts(grammar.matcher(), tokenizer, good)
    assert not accepts(grammar.matcher(), tokenizer, bad)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("^a$", "a"), ("a^b", "a^b"), ("a$b", "a$b"), (r"a\$", r"a\$"), ("[$^]", "[$^]"),
     ("(?:^a|b$)$", "(?:a|b)"), ("^(^a)(b$)$", "(a)(b)"), ("x(^a)", "x(^a)"), ("", "")],
)  # fmt: skip
def test_only_redundant_anchors_go(pattern: str, expected: str) -> None:
    assert strip_anchors(pattern) == expected


@pytest.mark.parametrize(
    "grammar",
    ['root ::= "yes" | "no " num\nnum ::= [0-9]+', 'start: "yes" | "no " NUM\nNUM: /[0-9]+/'],
)
def test_grammars_in_both_notations(
    compile_spec: Compile, tokenizer: Ernie4_5Tokenizer, grammar: str
) -> None:
    compiled = compile_spec("grammar", grammar)
    assert accepts(compiled.matcher(), tokenizer, "no 42")
    assert accepts(compiled.matcher(), tokenizer, "yes")
    assert not accepts(compiled.matcher(), tokenizer, "no x")


def test_structural_tag(compile_spec: Compile, tokenizer: Ernie4_5Tokenizer) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],
              "additionalProperties": False}  # fmt: skip
    tag = {"structures": [{"begin": "<f=g>", "schema": schema, "end": "</f>"}], "triggers": ["<f="]}
    compiled = compile_spec("structural_tag", tag)
    assert accepts(compiled.matcher(), tokenizer, 'free text <f=g>{"x": 1}</f> more')
    assert accepts(compiled.matcher(), tokenizer, "only text")
    assert not accepts(compiled.matcher(), tokenizer, '<f=g>{"y": 1}</f>')


LIST: dict[str, Any] = {"type": "array", "items": {"enum": [1]}, "maxItems": 2}


@pytest.mark.parametrize(
    "idle",
    [
        {"uniqueItems": False},
        {"not": False},
        {"propertyNames": {}},
        {"propertyNames": True},
        {"unevaluatedProperties": True},
        {"unevaluatedItems": {}},
        {"dependentRequired": {}},
        {"dependentSchemas": {}},
        {"dependencies": {}},
        {"if": {"const": 2}},
        {"then": {"const": 2}, "else": False},
        {"minContains": 3},
    ],
)
def test_keywords_that_exclude_nothing_are_left_out(
    compile_spec: Compile, tokenizer: Ernie4_5Tokenizer, idle: dict[str, Any]
) -> None:
    inner = {**LIST, **idle}
    schema = {"type": "object", "properties": {"uniqueItems": {"anyOf": [inner]}},
              "required": ["uniqueItems"]}  # fmt: skip
    compiled = compile_spec("json_schema", schema)
    assert accepts(compiled.matcher(), tokenizer, '{"uniqueItems": [1, 1]}')
    assert not accepts(compiled.matcher(), tokenizer, '{"uniqueItems": [1, 1, 1]}')
    assert inner == {**LIST, **idle}


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("uniqueItems", 0), ("not", 0), ("propertyNames", {"pattern": "a"}), ("if", True)],
)
def test_keywords_that_exclude_something_are_not(
    compile_spec: Compile, keyword: str, value: Any
) -> None:
    with pytest.raises(RequestError):
        compile_spec("json_schema", {**LIST, keyword: value, "then": False})


@pytest.mark.parametrize("form", ["password", "binary", "uri-reference", "int64", "no such"])
def test_other_formats_are_remarks(
    compile_spec: Compile, tokenizer: Ernie4_5Tokenizer, form: str
) -> None:
    schema = {"type": "string", "format": form, "maxLength": 3}
    compiled = compile_spec("json_schema", schema)
    assert accepts(compiled.matcher(), tokenizer, '"a b"')
    assert not accepts(compiled.matcher(), tokenizer, '"a bc"')


@pytest.mark.parametrize("form", sorted(ENFORCED_FORMATS))
def test_formats_are_enforced(
    compile_spec: Compile, tokenizer: Ernie4_5Tokenizer, form: str
) -> None:
    compiled = compile_spec("json_schema", {"type": "string", "format": form})
    assert not accepts(compiled.matcher(), tokenizer, '"a b"')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"const": 1e400}', "the number 1e400 is beyond"),
        ('{"enum": [-1e999]}', "the number -1e999 is beyond"),
        ('{"const": NaN}', "NaN is no JSON number"),
        ('{"maximum": Infinity}', "Infinity is no JSON number"),
        ('{"minimum": -Infinity}', "-Infinity is no JSON number"),
    ],
)
def test_numbers_that_json_does_not_have(compile_spec: Compile, text: str, words: str) -> None:
    """They became null: another constraint than the one that was asked for."""
    with pytest.raises(RequestError, match=words):
        compile_spec("json_schema", text)
    tag = '{"structures": [{"begin": "<a>", "schema": %s}], "triggers": ["<a>"]}'
    with pytest.raises(RequestError, match=words):
        compile_spec("structural_tag", tag % text)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"not": {"type": "string"}}, "not"),
        ("json_schema", {"type": "nonsense"}, "nonsense"),
        ("json_schema", {"$ref": "#"}, "nothing satisfies"),
        ("json_schema", {"enum": []}, "Unsatisfiable"),
        ("json_schema", {"$ref": "http://example.org/schema"}, "example.org"),
        ("json_schema", "{broken", "property name"),
        ("json_schema", [1], "object"),
        ("regex", "(unclosed", "unclosed group"),
        ("regex", "(?=ahead)", "look-around"),
        ("regex", r"\bword", "lookarounds"),
        ("choice", [], "non-empty list"),
        ("choice", ["a", ""], "non-empty string"),
        ("grammar", "root ::= missing", "missing"),
        ("grammar", "", "root"),
        ("grammar", "start: (" * 3000, "nested deeper"),
        ("structural_tag", {"structures": []}, "structures"),
        ("structural_tag", {"structures": [{"begin": "a"}], "triggers": ["b"]}, "trigger"),
        ("regex", "", "empty output"),
        ("regex", "^$", "empty output"),
        ("grammar", 'root ::= ""', "empty output"),
        ("regex", "x" * 70000, "65536"),
        ("choice", ["a"] * 5000, "4096"),
    ],
)
def test_refusals_name_the_cause(
    compile_spec: Compile, kind: str, value: object, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        compile_spec(kind, value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert caught.value.param is not None


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "(((a|b){1,200}c){1,200}d){1,200}"),
        ("regex", "(.*a.*b.*c){50}"),
        ("regex", "((a{0,100}){0,100}){0,100}" * 20),
        ("regex", "(" * 5000 + ")" * 5000),
        ("json_schema", {"anyOf": [{"type": "string", "pattern": "^a+$"}] * 1000}),
        ("json_schema", {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}),
        ("choice", [f"item number {i}" for i in range(3000)]),
        ("grammar", "start: " + "(A B C)* " * 3000 + "\nA: /a/\nB: /b/\nC: /c/"),
        ("grammar", "root ::= " + " | ".join(f'"a{i}"' for i in range(5000))),
    ],
)
def test_hostile_constraints_cost_little(compile_spec: Compile, kind: str, value: object) -> None:
    started = time.process_time()
    try:
        matcher = compile_spec(kind, value).matcher()
        matcher.fill_bitmask(np.zeros(PADDED // 32, np.int32))
    except RequestError as error:
        assert "\n" not in str(error)
    assert time.process_time() - started < 5.0  # below 0.2 s as a rule


def test_deep_schema_is_refused(compile_spec: Compile) -> None:
    schema: dict = {"type": "string"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="nested deeper than 64"):
        compile_spec("json_schema", schema)


def test_constraint_waits_for_the_end_of_thinking(
    compile_spec: Compile, tokenizer: Ernie4_5Tokenizer
) -> None:
    matcher = compile_spec("choice", ["yes", "no"], start_after="</think>").matcher()
    for token in tokenizer.encode_text("let me think < about </think>"):
        assert len(allowed(matcher)) == PADDED
        assert not matcher.is_active
        assert matcher.accept(token)
    assert matcher.is_active
    assert not matcher.is_finished
    assert complete(matcher, tokenizer, 0) in ("yes", "no")


def test_only_the_end_may_follow_a_finished_constraint(
    compile_spec: Compile, tokenizer: Ernie4_5Tokenizer
) -> None:
    matcher = compile_spec("choice", ["yes"]).matcher()
    complete(matcher, tokenizer, 0)
    assert matcher.is_finished
    assert allowed(matcher) == {2, 7}
    assert not matcher.accept(300)
    assert matcher.accept(2)


def test_tokens_that_are_not_text_are_never_allowed(compile_spec: Compile) -> None:
    matcher = compile_spec("regex", "(.|\n)*").matcher()
    ids = allowed(matcher)
    assert not ids & {0, 1, 3, 6, 9}
    assert max(ids) < 8192
    assert len(ids) > 8000


@pytest.mark.parametrize("text", ['start: "a" start', 'start: b\nb: "x" b'])
def test_a_grammar_of_one_endless_text_is_refused(compile_spec: Compile, text: str) -> None:
    """Its first token was allowed, and then not taken: the answer was a 500."""
    with pytest.raises(
        RequestError, match=r"Invalid grammar for guided decoding: .*Too many items"
    ):
        compile_spec("grammar", text)


def test_a_constraint_that_fails_at_a_token_says_so(tokenizer: Ernie4_5Tokenizer) -> None:
    decoder = compiler.GuidedDecoder(tokenizer, PADDED)
    raw = compiler.llguidance.LLMatcher(
        decoder._tokenizer, compiler.grammar_text(GuidedSpec("grammar", 'start: "a" start'))
    )
    matcher = Matcher(Grammar(raw, tokenizer, None))
    with pytest.raises(
        RequestError, match=r"constraint failed during generation: .*Too many items"
    ):
        matcher.accept(*allowed(matcher))


def test_a_refused_token_leaves_the_state_alone(
    compile_spec: Compile, tokenizer: Ernie4_5Tokenizer
) -> None:
    matcher = compile_spec("regex", "ab").matcher()
    before = allowed(matcher)
    assert not matcher.accept(tokenizer.token_id("<0x7A>"))
    assert allowed(matcher) == before


def test_matchers_of_one_grammar_are_independent_and_cached(
    compile_spec: Compile, tokenizer: Ernie4_5Tokenizer
) -> None:
    grammar = compile_spec("choice", ["one", "two"])
    assert compile_spec("choice", ["one", "two"]) is grammar
    first, second = grammar.matcher(), grammar.matcher()
    start = allowed(second)
    complete(first, tokenizer, 0)
    assert allowed(second) == start


@settings(max_examples=60, deadline=None)
@given(value=st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "items", "properties", "enum", "anyOf", "$ref", "minimum", "x",
                         "pattern", "maxLength", "const", "required"]), x, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_no_schema_crashes_the_compiler(compile_spec: Compile, value: object) -> None:
    try:
        compile_spec("json_schema", value).matcher()
    except RequestError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(["regex", "grammar", "structural_tag", "choice"]), text=st.text())
def test_no_text_crashes_the_compiler(compile_spec: Compile, kind: str, text: str) -> None:
    try:
        compile_spec(kind, text).matcher()
    except RequestError as error:
        assert "\n" not in str(error)
