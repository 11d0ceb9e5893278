"""The body of `POST /v1/responses`, and how it reads as a chat request."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationError

from fastdeploy_lite.entrypoints.openai.protocol import (
    MAX_TOOLS,
    ChatCompletionRequest,
    ChoiceWord,
    FirstFault,
    GenerationRequest,
    ToolChoiceForm,
)
from fastdeploy_lite.entrypoints.openai.request_building import MergedBodyError
from fastdeploy_lite.input.chat_template import part_text
from fastdeploy_lite.utils.errors import RequestError, quote

# Fields that mean the same in a chat request.
_SHARED = (
    *(name for name in GenerationRequest.model_fields if name not in ("stream_options", "n")),
    "chat_template", "chat_template_kwargs", "reasoning_max_tokens", "parallel_tool_calls",
    "top_logprobs",
)  # fmt: skip
_MOST_INCLUDED = 256
# What these refer to is kept by OpenAI's service: an answer without it would be another one.
_STORED_ELSEWHERE = ("previous_response_id", "conversation", "prompt")
_CHAT_FIELDS = {
    "messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text",
}  # fmt: skip


class ResponseTool(BaseModel):
    """A function that the model may call, in this interface's flat form."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(BaseModel):
    """Forces a call of one function."""

    type: Literal["function"]
    name: str


class ResponseAllowedTools(BaseModel):
    """Leaves some of the tools to the model."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseToolChoice], FirstFault(), Field(max_length=MAX_TOOLS)]


ResponseChoice = Annotated[
    ChoiceWord
    | Annotated[ResponseToolChoice, Tag("function")]
    | Annotated[ResponseAllowedTools, Tag("allowed_tools")],
    ToolChoiceForm,
]


class TextFormat(BaseModel):
    """The form of the text."""

    model_config = ConfigDict(populate_by_name=True)
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "schema"
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(BaseModel):
    """Options of the text."""

    model_config = ConfigDict(extra="allow")
    format: TextFormat | None = None


class ResponsesRequest(GenerationRequest):
    """Body of `POST /v1/responses`; the sampling fields of the other routes are taken, too."""

    input: str | Annotated[list[Any], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: Annotated[list[ResponseTool], FirstFault(), Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseChoice | None = None
    parallel_tool_calls: bool | None = True
    text: TextOptions | None = None
    reasoning: dict[str, Any] | None = None
    top_logprobs: int | None = None
    include: Annotated[list[str], FirstFault(), Field(max_length=_MOST_INCLUDED)] | None = None
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_max_tokens: int | None = None


def as_chat(body: ResponsesRequest) -> ChatCompletionRequest:
    """The chat request that asks the same.

    Args:
        body: The request.

    Returns:
        A checked chat request.

    Raises:
        RequestError: An item or an option cannot be used.
    """
    for field in _STORED_ELSEWHERE:
        if getattr(body, field) is not None:
            text = f"{field}: nothing is stored here; send the items themselves in input"
            raise RequestError(text, param=field, code="unsupported_value")
    if body.background:
        raise RequestError("background: only false is supported", param="background")
    given = body.model_dump(exclude_unset=True, by_alias=True)
    shared = {name: given[name] for name in _SHARED if name in given}
    values = {
        **shared,
        "messages": _messages(body),
        "n": 1,
        "max_completion_tokens": body.max_output_tokens,
        "tools": [_tool(tool) for tool in body.tools or []] or None,
        "tool_choice": _choice(body.tool_choice),
        "logprobs": "message.output_text.logprobs" in (body.include or ())
        or bool(body.top_logprobs),
    }
    form = _format(body)
    if form is not None:
        values["response_format"] = form
    try:
        return ChatCompletionRequest.model_validate(values)
    except ValidationError as error:
        raise MergedBodyError(list(error.errors())) from None


def _tool(tool: ResponseTool) -> dict[str, Any]:
    function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}


def _choice(choice: ResponseToolChoice | ResponseAllowedTools | str | None) -> Any:
    """In the chat route's form."""
    if isinstance(choice, ResponseToolChoice):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, ResponseAllowedTools):
        allowed = {"mode": choice.mode, "tools": [_choice(tool) for tool in choice.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def field_of(body: ResponsesRequest, name: str | None) -> str | None:
    """The field of a request that stands for one of the chat request that it reads as.

    Args:
        body: The request.
        name: Of the chat request's field.

    Returns:
        The name that the client knows.
    """
    if name == "response_format" and body.response_format is not None:
        return name
    return _CHAT_FIELDS.get(name or "", name)


def _format(body: ResponsesRequest) -> dict[str, Any] | None:
    form = body.text.format if body.text is not None else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": form.model_dump(by_alias=True, exclude={"type"})}


# Items -------------------------------------------------------------------------------------------


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for index, item in enumerate(body.input):
        _add_item(messages, item, f"input[{index}]")
    return messages


def _add_item(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    """Add an item; an answer's reasoning, text and calls become one message."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message" and isinstance(item.get("role"), str):
        content = item.get("content")
        # An assistant that only called a function has said nothing.
        content = "" if content is None and item["role"] == "assistant" else _text(content, where)
        message = {"role": item["role"], "content": content}
        if item["role"] == "assistant":
            _assistant(messages, "content").update(content=content)
        else:
            messages.append(message)
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        _assistant(messages, None).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = item.get("output")
        text = _text(output, where) if isinstance(output, str | list) else json.dumps(output)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
    elif kind == "reasoning":
        text = _text(item.get("content") or item.get("summary") or "", where)
        _assistant(messages, "reasoning_content").update(reasoning_content=text)
    else:
        raise RequestError(
            f"{where}: items of type {quote(kind if kind else item)} are not supported: this model "
            "reads messages, function calls and their outputs",
            param="input",
        )


def _assistant(messages: list[dict[str, Any]], field: str | None) -> dict[str, Any]:
    """The assistant's message that is being put together, a new one if it has `field` already."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != "assistant" or (field and last.get(field) is not None):
        last = {"role": "assistant", "content": None}
        messages.append(last)
    return last


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"{where}: content: expected text, found {quote(content)}", param="input"
        )
    return "".join(part_text(part, where, "input") for part in content)
