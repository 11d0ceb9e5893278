"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from fastdeploy_lite.entrypoints.openai import logprobs_format
from fastdeploy_lite.entrypoints.openai.choices import Choice, run
from fastdeploy_lite.entrypoints.openai.errors import json_response
from fastdeploy_lite.entrypoints.openai.forced_calls import CallReader, forced_name
from fastdeploy_lite.entrypoints.openai.output_parser import (
    OutputParser,
    ParsedDelta,
    thinking_switch,
)
from fastdeploy_lite.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    ChatMessage,
    UsageInfo,
)
from fastdeploy_lite.entrypoints.openai.request_building import (
    answer_id,
    chat_logprobs,
    check_count,
    merge_extra,
    sampling_params,
)
from fastdeploy_lite.entrypoints.openai.service import Service
from fastdeploy_lite.entrypoints.openai.serving_base import (
    Collected,
    collect,
    expand,
    log,
    log_request,
    prepare,
    respond,
    stream_response,
    usage_of,
)
from fastdeploy_lite.entrypoints.openai.streams import event
from fastdeploy_lite.request.outputs import LogprobsLists, RequestOutput
from fastdeploy_lite.request.user_request import Request
from fastdeploy_lite.utils.errors import RequestError


@dataclass(slots=True)
class _Chat:
    """One chat request under way."""

    body: ChatCompletionRequest
    id: str
    created: int
    top: int | None
    sequences: list[Choice] = field(default_factory=list)
    parsers: list[OutputParser] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)


class ChatHandler:
    """Answers chat requests.

    Args:
        service: The service.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, body: ChatCompletionRequest, http: HttpRequest) -> Response:
        """Answer one request.

        Args:
            body: The validated body.
            http: The HTTP request.

        Returns:
            JSON, a stream, or an error.
        """
        return await respond(http, self._create(body))

    async def _create(self, body: ChatCompletionRequest) -> Response:
        chat = await self._prepare(body, time.time())
        if chat.body.stream:
            return stream_response(self._stream(chat), completion=False)
        results = await collect(self._service, chat.id, chat.sequences)
        return json_response(self._answer(chat, results).model_dump())

    async def _prepare(self, body: ChatCompletionRequest, arrival: float) -> _Chat:
        service = self._service
        service.check_alive()
        service.check_model(body.model)
        body = merge_extra(body, body.metadata, "metadata")
        chat = _Chat(
            body,
            answer_id("chatcmpl", body.request_id, body.user),
            int(arrival),
            chat_logprobs(body, service),
        )
        check_count(1, body.n or 1)
        log_request("chat", body, chat.id)
        switch = thinking_switch(body.chat_template_kwargs, body.metadata)
        request = self._request(chat, switch, arrival)
        prepared, text = await service.prepare(prepare, request, switch)
        for i, copy in enumerate(expand(service, chat.id, prepared, body.n or 1)):
            chat.sequences.append(Choice(i, copy, text))
            chat.parsers.append(self._parser(body, prepared.thinking))
            chat.reasoning.append("")
        return chat

    def _parser(self, body: ChatCompletionRequest, thinking: bool | None) -> OutputParser:
        name = forced_name(body)
        return OutputParser(
            self._service.parsers,
            thinking,
            body,
            use_tools=body.tool_choice != "none",
            demanded=None if name is None else CallReader(name),
        )

    def _request(self, chat: _Chat, switch: bool | None, arrival: float) -> Request:
        body = chat.body
        _check_users(body.messages)
        variables = dict(body.chat_template_kwargs or {})
        if switch is not None:
            variables["enable_thinking"] = switch
        offered = [] if body.tool_choice == "none" else body.tools or []
        tools = [tool.model_dump(exclude_unset=True) for tool in offered]
        return Request(
            request_id=chat.id,
            messages=body.messages,
            prompt_token_ids=body.prompt_token_ids or None,
            sampling_params=sampling_params(body, self._service, chat.top),
            tools=tools or None,
            chat_template=body.chat_template,
            chat_template_kwargs=variables,
            trusted_template=False,
            disable_chat_template=bool(body.disable_chat_template),
            completion_token_ids=body.completion_token_ids,
            include_stop_str_in_output=bool(body.include_stop_str_in_output),
            arrival_time=arrival,
        )

    # Whole answers -------------------------------------------------------------------------------

    def _answer(self, chat: _Chat, results: dict[int, Collected]) -> ChatCompletionResponse:
        choices = [self._choice(chat, sequence, results) for sequence in chat.sequences]
        return ChatCompletionResponse(
            id=chat.id,
            created=chat.created,
            model=self._service.model_name,
            choices=choices,
            usage=self._usage(chat),
        )

    def _choice(
        self, chat: _Chat, sequence: Choice, results: dict[int, Collected]
    ) -> ChatCompletionResponseChoice:
        result, parser = results[sequence.index], chat.parsers[sequence.index]
        parsed = parser.parse(result.text)
        chat.reasoning[sequence.index] = parsed.reasoning or ""
        message = ChatMessage(
            content=parsed.content,
            reasoning_content=parsed.reasoning,
            tool_calls=parsed.tool_calls,
        )
        if chat.body.return_token_ids:
            message.prompt_token_ids = sequence.request.prompt_token_ids
            message.completion_token_ids = sequence.token_ids
            message.prompt_tokens = sequence.prompt_text
            message.completion_tokens = result.text
        return ChatCompletionResponseChoice(
            index=sequence.index,
            message=message,
            logprobs=self._logprobs(chat, result.logprobs),
            prompt_logprobs=self._prompt_logprobs(chat, result.prompt_logprobs),
            finish_reason=_finish_reason(sequence, parser),
            speculate_metrics=sequence.speculation,
        )

    def _logprobs(self, chat: _Chat, parts: list[LogprobsLists]) -> dict[str, Any] | None:
        if chat.top is None or not parts:
            return None
        decode = chat.body.include_logprobs_decode_token is not False
        rows = logprobs_format.join(parts)
        in_stream = bool(chat.body.stream)
        return logprobs_format.chat_logprobs(
            self._service.tokenizer, rows, chat.top, decode, in_stream
        )

    @staticmethod
    def _prompt_logprobs(chat: _Chat, rows: list[Any] | None) -> list[Any] | None:
        decode = chat.body.include_logprobs_decode_token is not False
        return logprobs_format.prompt_logprobs(rows, decode)

    def _usage(self, chat: _Chat) -> UsageInfo:
        encode = self._service.tokenizer.encode_text
        reasoning = sum(len(encode(text)) for text in chat.reasoning if text)
        return usage_of(chat.sequences, 1, reasoning)

    @staticmethod
    def _usage_before(chat: _Chat) -> UsageInfo:
        """Before anything was generated."""
        usage = usage_of(chat.sequences, 1)
        usage.total_tokens, usage.completion_tokens = usage.prompt_tokens, 0
        return usage

    # Streams -------------------------------------------------------------------------------------

    async def _stream(self, chat: _Chat) -> AsyncGenerator[dict[str, Any] | bytes, None]:
        options = chat.body.stream_options
        continuous = options is not None and bool(options.continuous_usage_stats)
        packer = _Packer(chat.body.max_streaming_response_tokens or 1)
        pending = [_Pending() for _ in chat.sequences]
        opened: set[int] = set()
        async with aclosing(run(self._service, chat.id, chat.sequences)) as outputs:
            async for sequence, output in outputs:
                if sequence.index not in opened:
                    opening = self._event(chat, [self._opening(chat, sequence, output)], False)
                    if continuous:
                        opening["usage"] = self._usage_before(chat).model_dump()
                    yield event(opening, space="" if opened else " ")
                    if not opened:
                        log.info("First stream event of %s", chat.id)
                    opened.add(sequence.index)
                choice = self._delta(chat, sequence, output, pending[sequence.index])
                ready = packer.add(choice, output.finished)
                if ready:
                    yield self._event(chat, ready, continuous)
        if options is not None and options.include_usage is not False:
            yield {**self._event(chat, [], False), "usage": self._usage(chat).model_dump()}

    def _event(self, chat: _Chat, choices: list[Any], continuous: bool) -> dict[str, Any]:
        value: dict[str, Any] = {
            "id": chat.id,
            "object": "chat.completion.chunk",
            "created": chat.created,
            "model": self._service.model_name,
            "choices": choices,
        }
        if continuous:
            value["usage"] = self._usage(chat).model_dump()
        return value

    def _opening(self, chat: _Chat, sequence: Choice, output: RequestOutput) -> dict[str, Any]:
        with_ids = bool(chat.body.return_token_ids)
        delta: dict[str, Any] = {
            "role": "assistant",
            "content": "",
            "reasoning_content": "",
            "tool_calls": None,
            "prompt_token_ids": sequence.request.prompt_token_ids if with_ids else None,
            "completion_token_ids": None,
        }
        if with_ids:
            delta["prompt_tokens"] = sequence.prompt_text
        choice: dict[str, Any] = {"index": sequence.index, "delta": delta}
        if output.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(chat, output.prompt_logprobs)
        return choice

    def _delta(
        self, chat: _Chat, sequence: Choice, output: RequestOutput, pending: _Pending
    ) -> dict[str, Any] | None:
        """The choice object of one step; None when there is nothing to show yet."""
        parser = chat.parsers[sequence.index]
        tokens = output.outputs.token_ids
        parsed = parser.feed(output.outputs.text, tokens, output.finished)
        chat.reasoning[sequence.index] += parsed.reasoning
        pending.token_ids.extend(tokens)
        if output.outputs.top_logprobs is not None:
            pending.logprobs.append(output.outputs.top_logprobs)
        if not (output.finished or parsed.content or parsed.reasoning or parsed.tool_calls):
            return None
        choice = {
            "index": sequence.index,
            "delta": self._delta_fields(chat, parsed, pending),
            "logprobs": self._logprobs(chat, pending.logprobs),
            "draft_logprobs": None,
            "arrival_time": sequence.arrival_time(),
        }
        if output.finished:
            choice["finish_reason"] = _finish_reason(sequence, parser)
            choice["speculate_metrics"] = sequence.speculate_metrics()
        pending.clear()
        return choice

    @staticmethod
    def _delta_fields(chat: _Chat, parsed: ParsedDelta, pending: _Pending) -> dict[str, Any]:
        calls = parsed.tool_calls
        ids = list(pending.token_ids) if chat.body.return_token_ids else None
        return {
            "content": parsed.content,
            "reasoning_content": parsed.reasoning,
            "tool_calls": [c.model_dump(exclude_none=True) for c in calls] if calls else None,
            "prompt_token_ids": None,
            "completion_token_ids": ids,
        }


def _check_users(messages: Sequence[Any]) -> None:
    for index, message in enumerate(messages):
        is_user = isinstance(message, Mapping) and message.get("role") == "user"
        if is_user and message.get("content") is None:
            raise RequestError(
                f"messages[{index}].content: a user's message needs content", param="messages"
            )


def _finish_reason(sequence: Choice, parser: OutputParser) -> str | None:
    is_named = parser.demanded is not None and parser.demanded.name != ""
    if sequence.finish_reason == "stop" and parser.tools_called and not is_named:
        return "tool_calls"  # a call that was demanded by its name is no news (OpenAI: "stop")
    return sequence.finish_reason


@dataclass(slots=True)
class _Pending:
    """Tokens whose text has not been sent: half a character, or a marker being read."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobsLists] = field(default_factory=list)

    def clear(self) -> None:
        """All sent."""
        self.token_ids.clear()
        self.logprobs.clear()


class _Packer:
    """Puts up to `size` choice objects into one event; a finished choice flushes."""

    def __init__(self, size: int) -> None:
        self._size = max(size, 1)
        self._waiting: list[dict[str, Any]] = []

    def add(self, choice: dict[str, Any] | None, flush: bool) -> list[dict[str, Any]]:
        """Add a choice object; returns what is to be sent now."""
        if choice is not None:
            self._waiting.append(choice)
        if not flush and len(self._waiting) < self._size:
            return []
        ready, self._waiting = self._waiting, []
        return ready
