"""From a conversation to the prompt's text: where the template comes from, what it may see."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdeploy_lite.input.template_rendering import TemplateError, check, render, render_untrusted
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError, RequestError, quote
from fastdeploy_lite.utils.files import is_there, read_small

MAX_UNTRUSTED_CHARACTERS = 64 << 10
TEMPLATE_FILE = "chat_template.jinja"

# Content parts that are text, of OpenAI's two interfaces, and the key that holds it. Clients mix
# them when they hand an earlier answer on.
TEXT_PARTS = {
    "text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal",
    "summary_text": "text", "reasoning_text": "text",
}  # fmt: skip

# ERNIE 4.5's text form, for a checkpoint that brings none: docs/checkpoint_format.md, "Tokenizer
# and chat form".
DEFAULT_TEMPLATE = """\
{{- cls_token | default('<|begin_of_sentence|>') -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'User: ' + message['content'] + '\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'Assistant: ' + message['content'] + (sep_token | default('<|end_of_sentence|>')) -}}
{%- else -%}
{{- message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}
"""


def load_model_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The model's own template: chat_template.jinja, else tokenizer_config.json's.

    Args:
        folder: Of the model.
        tokenizer_config: Content of tokenizer_config.json.

    Returns:
        Jinja source, or None when the model brings none.

    Raises:
        CheckpointError: The file cannot be read, or the key is not a template.
    """
    file = folder / TEMPLATE_FILE
    if is_there(file):
        try:
            return read_small(file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: cannot be read as UTF-8 text: {error}") from None
    value = tokenizer_config.get("chat_template")
    if isinstance(value, list):  # several named templates
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, Mapping)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template: found {quote(value)}, expected "
            "Jinja source"
        )
    return value


def load_template_argument(value: str | None) -> str | None:
    """The `chat_template` argument of a server or of `LLM`: a file, or Jinja source.

    Args:
        value: Path or source; None stays None.

    Returns:
        Jinja source.

    Raises:
        ConfigError: It names a file that cannot be opened and does not look like Jinja, or it
            breaks Jinja's rules.
    """
    if value is None:
        return None
    try:
        source = Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if not any(mark in value for mark in "{}\n"):
            raise ConfigError(
                f"chat_template {quote(value)} cannot be opened ({error}) and is not Jinja source"
            ) from None
        source = value
    try:
        check(source)
    except TemplateError as error:
        raise ConfigError(f"chat_template {quote(value)} is not Jinja: {error}") from None
    return source


def render_chat(
    messages: Sequence[Any],
    *,
    template: str | None,
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
    trusted: bool = True,
    continues: bool = False,
) -> str:
    """Render a conversation into the prompt's text.

    Args:
        messages: Mappings with `role` and `content`.
        template: Jinja source; None takes ERNIE 4.5's text form.
        special_tokens: Variables such as `cls_token`.
        tools: Tool definitions.
        add_generation_prompt: Whether to open the assistant's turn.
        variables: Further variables (`enable_thinking` ...).
        trusted: Whether the template comes from whoever runs the program.
        continues: Whether the prompt ends with the last message's text, open to be continued.

    Returns:
        The prompt.

    Raises:
        RequestError: Messages or template cannot be used.
    """
    source = DEFAULT_TEMPLATE if template is None else template
    conversation = normalize_messages(messages)
    mark = _mark_end(conversation) if continues else ""
    context = {
        **special_tokens,
        "add_generation_prompt": add_generation_prompt,
        **(variables or {}),
        "messages": conversation,
        "tools": list(tools) if tools else None,
    }
    try:
        if not trusted and len(source) > MAX_UNTRUSTED_CHARACTERS:
            raise TemplateError(f"it is longer than {MAX_UNTRUSTED_CHARACTERS} characters")
        text = render(source, context) if trusted else render_untrusted(source, context)
    except TemplateError as failure:
        raise RequestError(
            f"The chat template cannot be rendered: {failure}",
            param="messages" if trusted else "chat_template",
            code="invalid_value",
        ) from None
    return _cut_at(mark, text) if continues else text


def _mark_end(conversation: list[dict[str, Any]]) -> str:
    """Mark where the last message's text ends, so that it is found again in the prompt."""
    last = conversation[-1] if conversation else {}
    if last.get("role") != "assistant" or not last.get("content"):
        raise _cannot_continue("the last message must be the assistant's, with text")
    mark = secrets.token_hex(16)
    last["content"] += mark
    return mark


def _cut_at(mark: str, text: str) -> str:
    end = text.rfind(mark)
    if end < 0:
        raise _cannot_continue("the chat template does not show the last message as it is")
    return text[:end]


def _cannot_continue(reason: str) -> RequestError:
    return RequestError(
        f"continue_final_message: {reason}", param="continue_final_message", code="invalid_value"
    )


def normalize_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Bring messages into the form that templates expect: `content` is one text.

    Args:
        messages: As a client sent them.

    Returns:
        New mappings; the input is left alone.

    Raises:
        RequestError: A message is not a mapping with a role, or holds an image.
    """
    return [_normalize(message) for message in messages]


def _normalize(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(
            f"messages: expected objects with 'role' and 'content', found {quote(message)}",
            param="messages",
            code="invalid_value",
        )
    if message["role"] == "user" and message.get("content") is None:
        raise RequestError(
            "messages: a user's message needs content, found none",
            param="messages",
            code="invalid_value",
        )
    result = {**message, "content": _text(message.get("content"))}
    if message["role"] == "developer":  # OpenAI's newer name; templates would drop the message
        result["role"] = "system"
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list | tuple):
            raise RequestError(
                f"messages: tool_calls must be a list, found {quote(calls)}",
                param="messages",
                code="invalid_value",
            )
        result["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return result


def _text(content: Any) -> str:
    if content is None:  # an assistant message that only calls tools
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part_text(part, "messages", "messages") for part in content)
    try:
        return json.dumps(content, ensure_ascii=False)  # a tool's result as an object
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"messages: content cannot be written as JSON: {error}",
            param="messages",
            code="invalid_value",
        ) from None


def part_text(part: Any, where: str, param: str) -> str:
    """The text of one content part.

    Args:
        part: Text, or an object with a type that `TEXT_PARTS` knows.
        where: Place of the part, for messages.
        param: Field of the request that holds it.

    Returns:
        The text.

    Raises:
        RequestError: It is something else, an image for instance, or has no text.
    """
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    key = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        reason = (
            f"content part {quote(kind if kind else part)} is not supported: this model "
            'reads text only; send {"type": "text", "text": ...}'
        )
    elif not isinstance(part.get(key), str):
        reason = f"content part {quote(kind)}: {key}: expected text, found {quote(part.get(key))}"
    else:
        return str(part[key])
    raise RequestError(f"{where}: {reason}", param=param, code="invalid_value")


def _with_parsed_arguments(call: Any) -> Any:
    """Templates print arguments with `tojson`; clients send them as JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
