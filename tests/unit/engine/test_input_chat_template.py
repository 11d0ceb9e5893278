"""Chat templates: what is rendered, who wins, and what a hostile template cannot do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from helpers import demo_tokenizer

from fastdeploy_lite.input.chat_template import (
    DEFAULT_TEMPLATE,
    load_template_argument,
    normalize_messages,
    render_chat,
)
from fastdeploy_lite.utils.errors import ConfigError, RequestError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
EXPECTED = (
    "<|begin_of_sentence|>Be brief.\nUser: Hi\nAssistant: Hello<|end_of_sentence|>User: Bye\n"
    "Assistant: "
)


def render(template: str, trusted: bool = True, messages: Any = CHAT, **variables: Any) -> str:
    return render_chat(
        messages, template=template, special_tokens={}, variables=variables, trusted=trusted
    )


def test_the_models_template_and_the_built_in_one_agree() -> None:
    tokenizer = demo_tokenizer()
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == EXPECTED
    assert render(DEFAULT_TEMPLATE) == EXPECTED
    assert tokenizer.apply_chat_template(CHAT) == tokenizer.encode_text(EXPECTED)
    open_turn = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=False)
    assert open_turn == EXPECTED.removesuffix("Assistant: ")


def test_content_forms_become_text() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": {"answer": "é"}},
    ]
    rendered = render("{% for m in messages %}[{{ m.content }}]{% endfor %}", messages=messages)
    assert rendered == '[ab][][{"answer": "é"}]'


def test_tool_call_arguments_are_objects_for_the_template() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert render(template, messages=messages) == '{"x": [1, "é"]}'
    assert call["function"]["arguments"] == '{"x": [1, "é"]}', "the input is left alone"  # type: ignore[index]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
        (["text"], "expected objects with 'role'"),
        ([{"content": "x"}], "expected objects with 'role'"),
        ([{"role": 3, "content": "x"}], "expected objects with 'role'"),
        ([{"role": "user", "content": [3]}], "not supported"),
    ],
)
def test_messages_that_cannot_be_used(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        render(DEFAULT_TEMPLATE, messages=messages)
    assert (caught.value.param, caught.value.code) == ("messages", "invalid_value")


def test_templates_may_refuse_and_see_variables_and_tools() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert (
        render_chat(CHAT, template="{{ tools | tojson }}", special_tokens={}, tools=[{"a": "<é>"}])
        == '[{"a": "<é>"}]'
    )
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_variables_cannot_replace_the_messages() -> None:
    assert render("{{ messages | length }}", messages=CHAT, tools="x") == "4"
    text = render_chat(
        CHAT, template="{{ messages|length }}", special_tokens={}, variables={"messages": []}
    )
    assert text == "4"


LOOP = "{% for a in range(99999) %}"
HOSTILE = {
    "endless loop": LOOP + LOOP + "{% endfor %}{% endfor %}",
    "gigabytes by repetition": "{{ 'a' * 10**10 }}",
    "gigabytes by padding": "{{ 'a' | center(10**10) }}",
    "gigabytes by format": "{{ '%10000000000d' | format(1) }}",
    "power tower": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "long output": LOOP + "{{ 'a' * 1000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format walk": "{{ '{0.__class__}'.format(1) }}",
    "attribute by filter": "{{ messages | attr('__class__') }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "globals": "{{ raise_exception.__globals__ }}",
    "syntax": "{% for %}",
    "too long": "x" * 70000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_an_error_within_bounded_time(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        text = render(HOSTILE[name], trusted=False)
        # An unsafe attribute that is merely undefined prints nothing; that is as good as an error.
        assert text == ""
        raise RequestError("refused by printing nothing", param="chat_template")
    assert caught.value.param == "chat_template"
    assert time.monotonic() - started < 30  # 2 s of a processor, 10 s of a busy machine
    assert "\n" not in str(caught.value)


def test_an_honest_template_from_the_network_renders_the_same() -> None:
    assert render(DEFAULT_TEMPLATE, trusted=False) == EXPECTED
    surrogate = [{"role": "user", "content": "\ud800"}]
    assert render("{{ messages[0].content | length }}", trusted=False, messages=surrogate) == "1"


def test_a_developer_speaks_as_the_system() -> None:
    """Templates know three roles, and would drop what OpenAI's newer clients send."""
    only_system = "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    assert render(only_system, messages=[{"role": "developer", "content": "Obey"}]) == "Obey"


def test_template_argument_is_a_file_or_source(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("from file")
    assert load_template_argument(str(file)) == "from file"
    assert load_template_argument("{{ source }}") == "{{ source }}"
    assert load_template_argument(None) is None
    with pytest.raises(ConfigError, match="cannot be opened"):
        load_template_argument("no_such_file.jinja")


@pytest.mark.parametrize("source", ["{% for %}", "a\n{{ b", "{% if x %}{% endfor %}", "{{ 1 +"])
def test_a_template_that_is_no_jinja_ends_the_start(tmp_path: Path, source: str) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(source)
    for given in (source, str(file)):
        with pytest.raises(ConfigError, match=r"is not Jinja: line \d+: "):
            load_template_argument(given)


@pytest.mark.parametrize("trusted", [True, False])
def test_generation_marks_are_text_like_any(trusted: bool) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{%- generation %}<{{ m.content }}>{% endgeneration -%}"
        "{% endif %}{% endfor %}"
    )
    assert render(template, trusted) == "<Hello>"


@pytest.mark.parametrize("name", ["self", "context", "loop", "range", "caller", "kwargs", "a b"])
def test_any_name_may_be_a_variable(name: str) -> None:
    assert render("{{ messages | length }}", **{name: 1}) == "4"


@pytest.mark.parametrize("calls", [5, True, 1.5, "x", {"function": {}}, {"a": 1}])
@pytest.mark.parametrize("role", ["user", "assistant", "tool", "x"])
def test_calls_that_are_no_list_are_refused(calls: Any, role: str) -> None:
    with pytest.raises(RequestError, match="tool_calls must be a list") as caught:
        normalize_messages([{"role": role, "content": "a", "tool_calls": calls}])
    assert caught.value.param == "messages"


JUNK: list[Any] = [None, True, 5, -1.5, 10**30, "", "x", "{", "[[1", [], [1], ["x"], {}, {"a": 1}]


@pytest.mark.parametrize(
    "template",
    [None, "{{ messages | tojson }}", "{{ messages[0].tool_calls[0].function.arguments.a }}"],
)
@pytest.mark.parametrize(
    "name", ["role", "content", "tool_calls", "name", "tool_call_id", "function"]
)
def test_no_member_of_a_message_is_an_internal_error(template: str | None, name: str) -> None:
    """Prompt or refusal, whatever a member is; calls, functions and arguments among them."""
    for junk in JUNK:
        inner = [{name: junk}, {"function": junk}, {"function": {"name": junk, "arguments": junk}}]
        for message in (
            {"role": "user", "content": "a", name: junk},
            {"role": "assistant", "content": None, "tool_calls": inner},
            {"role": "tool", "content": [{"type": "text", "text": junk}, {name: junk}]},
        ):
            try:
                text = render_chat([message], template=template, special_tokens={})
            except RequestError as error:
                assert error.param == "messages"
            else:
                assert isinstance(text, str)
