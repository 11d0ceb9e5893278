"""`POST /v1/responses`: the same conversations, answered with typed items and events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from fastdeploy_lite.entrypoints.openai.answer import Answer
from fastdeploy_lite.entrypoints.openai.choices import Choice, Piece
from fastdeploy_lite.entrypoints.openai.format_chat import ChatFormat, chat_logprobs_of, open_chat
from fastdeploy_lite.entrypoints.openai.handler import Events, Pieces
from fastdeploy_lite.entrypoints.openai.output_parser import OutputParser
from fastdeploy_lite.entrypoints.openai.protocol import ChatCompletionRequest, DeltaToolCall
from fastdeploy_lite.entrypoints.openai.request_building import answer_id
from fastdeploy_lite.entrypoints.openai.responses_protocol import (
    ResponsesRequest,
    as_chat,
    field_of,
)
from fastdeploy_lite.entrypoints.openai.service import Service
from fastdeploy_lite.entrypoints.openai.streams import typed_event
from fastdeploy_lite.request.messages import EngineRequest
from fastdeploy_lite.request.outputs import LogprobsLists

Responses = Answer[ChatCompletionRequest]
Item = dict[str, Any]
_ECHOED = (
    "instructions", "max_output_tokens", "temperature", "top_p", "top_logprobs", "user", "metadata",
)  # fmt: skip


class ResponsesFormat:
    """See `AnswerFormat`."""

    name = "responses"
    closing = b""

    def open(self, body: ResponsesRequest, service: Service, arrival: float) -> Responses:
        """See `AnswerFormat`."""
        service.check_model(body.model)
        name = answer_id("resp", body.request_id, None, separator="_")
        answer = open_chat(as_chat(body), name, service, arrival)
        answer.original = body
        return answer

    def parser(self, answer: Responses, request: EngineRequest, service: Service) -> OutputParser:
        """See `AnswerFormat`."""
        return ChatFormat().parser(answer, request, service)

    def failure(self, status: int, body: dict[str, Any]) -> bytes:
        """See `AnswerFormat`."""
        error = body["error"]
        data = {"type": "error", "code": error["code"], "message": error["message"],
                "param": error["param"], "sequence_number": -1}  # fmt: skip
        return typed_event(data)

    def field_of(self, body: ResponsesRequest, name: str | None) -> str | None:
        """See `AnswerFormat`."""
        return field_of(body, name)

    def whole(self, answer: Responses, service: Service) -> dict[str, Any]:
        """See `AnswerFormat`."""
        [choice] = answer.choices
        return _response(answer, _status(choice), _items(answer, choice, service), service)

    async def events(self, answer: Responses, pieces: Pieces, service: Service) -> Events:
        """See `AnswerFormat`."""
        writer = _EventWriter(answer, service)
        for kind in ("response.created", "response.in_progress"):
            yield writer.event(kind, response=_response(answer, "in_progress", [], service))
        async for piece in pieces:
            for data in writer.write(piece):
                yield data
        [choice] = answer.choices
        status = _status(choice)
        whole = _response(answer, status, writer.items, service)
        yield writer.event(f"response.{status}", response=whole)


def _status(choice: Choice) -> str:
    if choice.finish_reason in ("length", "abort"):
        return "incomplete"
    return "completed"


def _response(
    answer: Responses, status: str, items: list[Item], service: Service
) -> dict[str, Any]:
    body: ResponsesRequest = answer.original
    given = body.model_dump(by_alias=True, exclude_none=True, include={"tools", "text"})
    ended = status != "in_progress"
    reason = None
    if status == "incomplete":
        aborted = answer.choices[0].finish_reason == "abort"
        reason = {"reason": "content_filter" if aborted else "max_output_tokens"}
    choice = body.tool_choice
    return {
        "id": answer.id,
        "object": "response",
        "created_at": answer.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": reason,
        "model": answer.model,
        "output": items,
        **{name: getattr(body, name) for name in _ECHOED},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": body.reasoning or {"effort": None, "summary": None},
        "store": False,
        "text": given.get("text") or {"format": {"type": "text"}},
        "tool_choice": choice if isinstance(choice, str) else _plain(choice) or "auto",
        "tools": given.get("tools") or [],
        "truncation": "disabled",
        "usage": _usage(answer, service) if ended else None,
    }


def _plain(choice: Any) -> Any:
    return None if choice is None else choice.model_dump()


def _usage(answer: Responses, service: Service) -> dict[str, Any]:
    reasoning = answer.choices[0].parser.result().reasoning or ""
    tokens = len(service.tokenizer.encode_text(reasoning)) if reasoning else 0
    usage = answer.usage()
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": tokens},
        "total_tokens": usage.total_tokens,
    }


# Items -------------------------------------------------------------------------------------------


def _items(answer: Responses, choice: Choice, service: Service) -> list[Item]:
    """The items of an answer that has ended, in the order of its stream."""
    parsed = choice.parser.result()
    items = []
    if parsed.reasoning:
        items.append(_reasoning(_new_id("rs"), parsed.reasoning))
    if parsed.content or not parsed.tool_calls:
        rows = _text_logprobs(answer, choice.logprobs, service)
        items.append(_message(_new_id("msg"), parsed.content, rows))
    items += [
        _call(call.id, call.function.name, call.function.arguments)
        for call in parsed.tool_calls or []
    ]
    items[-1]["status"] = _status(choice)
    return items


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _reasoning(name: str, text: str | None, status: str = "completed") -> Item:
    content = [] if text is None else [{"type": "reasoning_text", "text": text}]
    return {"id": name, "type": "reasoning", "summary": [], "content": content, "status": status}


def _text_part(text: str, logprobs: list[Any] | None = None) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def _message(
    name: str, text: str | None, logprobs: list[Any] | None, status: str = "completed"
) -> Item:
    content = [] if text is None else [_text_part(text, logprobs)]
    return {
        "id": name, "type": "message", "role": "assistant", "status": status, "content": content,
    }  # fmt: skip


def _call(name: str, function: str, arguments: str, status: str = "completed") -> Item:
    return {
        "id": "fc_" + name.rpartition("-")[2],
        "type": "function_call",
        "call_id": name,
        "name": function,
        "arguments": arguments,
        "status": status,
    }


def _text_logprobs(
    answer: Responses, rows: list[LogprobsLists], service: Service
) -> list[Any] | None:
    found = chat_logprobs_of(answer, rows, service, streamed=True)
    return None if found is None else list(found["content"])


# Events ------------------------------------------------------------------------------------------


class _EventWriter:
    """Turns pieces into typed events; one item is open at a time.

    Attributes:
        items: Those that are closed.
    """

    def __init__(self, answer: Responses, service: Service) -> None:
        self.items: list[Item] = []
        self._answer = answer
        self._service = service
        self._number = 0
        self._kind = ""  # of the open item
        self._id = ""
        self._text: list[str] = []
        self._logprobs: list[Any] = []
        self._call = ("", "")  # id and function of the open call
        self._rows: list[LogprobsLists] = []  # of tokens whose text has not been sent

    def event(self, kind: str, **fields: Any) -> bytes:
        """One event; they are numbered from 0."""
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return typed_event(data)

    def write(self, piece: Piece) -> Iterator[bytes]:
        """The events of one step."""
        parsed = piece.parsed
        if piece.logprobs is not None:
            self._rows.append(piece.logprobs)
        if parsed.reasoning:
            yield from self._add("reasoning", parsed.reasoning)
        if parsed.content:
            yield from self._add("message", parsed.content)
        for delta in parsed.tool_calls or []:
            yield from self._add_to_call(delta)
        if piece.finished:
            if not self._kind and not self.items:
                yield from self._open("message")
            yield from self._close(_status(piece.choice))

    def _add(self, kind: str, text: str) -> Iterator[bytes]:
        if self._kind != kind:
            yield from self._close("completed")
            yield from self._open(kind)
        self._text.append(text)
        if kind == "reasoning":
            yield self._part_event("response.reasoning_text.delta", delta=text)
            return
        rows = _text_logprobs(self._answer, self._rows, self._service) or []
        self._rows = []
        self._logprobs += rows
        yield self._part_event("response.output_text.delta", delta=text, logprobs=rows)

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        place = {"item_id": self._id, "output_index": len(self.items), "content_index": 0}
        return self.event(kind, **place, **fields)

    def _open(self, kind: str) -> Iterator[bytes]:
        self._kind, self._id = kind, _new_id("rs" if kind == "reasoning" else "msg")
        self._text, self._logprobs = [], []
        item = self._item("in_progress", None)
        yield self.event("response.output_item.added", output_index=len(self.items), item=item)
        yield self._part_event("response.content_part.added", part=self._part(""))

    def _item(self, status: str, text: str | None) -> Item:
        if self._kind == "reasoning":
            return _reasoning(self._id, text, status)
        return _message(self._id, text, self._logprobs, status)

    def _part(self, text: str) -> dict[str, Any]:
        if self._kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return _text_part(text, self._logprobs)

    def _close(self, status: str) -> Iterator[bytes]:
        if not self._kind:
            return
        text = "".join(self._text)
        if self._kind == "call":
            yield from self._close_call(text, status)
            return
        if self._kind == "reasoning":
            yield self._part_event("response.reasoning_text.done", text=text)
        else:
            rows = self._logprobs
            yield self._part_event("response.output_text.done", text=text, logprobs=rows)
        yield self._part_event("response.content_part.done", part=self._part(text))
        item = self._item(status, text)
        yield self.event("response.output_item.done", output_index=len(self.items), item=item)
        self.items.append(item)
        self._kind = ""

    def _add_to_call(self, delta: DeltaToolCall) -> Iterator[bytes]:
        function = delta.function
        if delta.id is not None:
            yield from self._close("completed")
            self._kind, self._text = "call", []
            self._call = (delta.id, (function.name if function else None) or "")
            item = self._call_item("", "in_progress")
            yield self.event("response.output_item.added", output_index=len(self.items), item=item)
        if function is not None and function.arguments:
            self._text.append(function.arguments)
            kind = "response.function_call_arguments.delta"
            yield self._call_event(kind, delta=function.arguments)

    def _call_item(self, arguments: str, status: str) -> Item:
        name, function = self._call
        return _call(name, function, arguments, status)

    def _call_event(self, kind: str, **fields: Any) -> bytes:
        name = self._call_item("", "")["id"]
        return self.event(kind, item_id=name, output_index=len(self.items), **fields)

    def _close_call(self, arguments: str, status: str) -> Iterator[bytes]:
        item = self._call_item(arguments, status)
        kind = "response.function_call_arguments.done"
        yield self._call_event(kind, name=item["name"], arguments=arguments)
        yield self.event("response.output_item.done", output_index=len(self.items), item=item)
        self.items.append(item)
        self._kind = ""
