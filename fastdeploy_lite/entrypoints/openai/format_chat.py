"""`POST /v1/chat/completions`: a conversation in; reasoning, content and tool calls out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastdeploy_lite.entrypoints.openai import logprobs_format
from fastdeploy_lite.entrypoints.openai.answer import Answer
from fastdeploy_lite.entrypoints.openai.choices import Choice, Piece
from fastdeploy_lite.entrypoints.openai.forced_calls import CallReader, forced_name
from fastdeploy_lite.entrypoints.openai.handler import Events, Pieces
from fastdeploy_lite.entrypoints.openai.output_parser import OutputParser, thinking_switch
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
    merge_extra,
    opens_answer,
    sampling_params,
)
from fastdeploy_lite.entrypoints.openai.service import Service
from fastdeploy_lite.entrypoints.openai.streams import DONE, event
from fastdeploy_lite.request.messages import EngineRequest
from fastdeploy_lite.request.outputs import LogprobsLists, PromptLogprobs
from fastdeploy_lite.request.user_request import Request

Chat = Answer[ChatCompletionRequest]


class ChatFormat:
    """See `AnswerFormat`."""

    name = "chat"
    closing = DONE

    def open(self, body: ChatCompletionRequest, service: Service, arrival: float) -> Chat:
        """See `AnswerFormat`."""
        service.check_model(body.model)
        body = merge_extra(body, body.metadata, "metadata")
        name = answer_id("chatcmpl", body.request_id, body.user)
        return open_chat(body, name, service, arrival)

    def parser(self, answer: Chat, request: EngineRequest, service: Service) -> OutputParser:
        """See `AnswerFormat`."""
        body = answer.body
        name = forced_name(body)
        return OutputParser(
            service.parsers,
            request.thinking,
            body,
            use_tools=body.tool_choice != "none",
            demanded=None if name is None else CallReader(name),
        )

    def failure(self, status: int, body: dict[str, Any]) -> dict[str, Any]:
        """See `AnswerFormat`."""
        return body

    def field_of(self, body: ChatCompletionRequest, name: str | None) -> str | None:
        """See `AnswerFormat`."""
        return name

    # Whole answers -------------------------------------------------------------------------------

    def whole(self, answer: Chat, service: Service) -> dict[str, Any]:
        """See `AnswerFormat`."""
        choices = [self._choice(answer, choice, service) for choice in answer.choices]
        texts = [choice.message.reasoning_content or "" for choice in choices]
        return ChatCompletionResponse(
            id=answer.id,
            created=answer.created,
            model=answer.model,
            choices=choices,
            usage=_usage(answer, texts, service),
        ).model_dump()

    def _choice(
        self, answer: Chat, choice: Choice, service: Service
    ) -> ChatCompletionResponseChoice:
        body, parsed = answer.body, choice.parser.result()
        message = ChatMessage(
            content=parsed.content,
            reasoning_content=parsed.reasoning,
            tool_calls=parsed.tool_calls,
        )
        if body.return_token_ids:
            message.prompt_token_ids = choice.request.prompt_token_ids
            message.completion_token_ids = choice.token_ids
            message.prompt_tokens = choice.prompt_text
            message.completion_tokens = "".join(choice.text)
        return ChatCompletionResponseChoice(
            index=choice.index,
            message=message,
            logprobs=chat_logprobs_of(answer, choice.logprobs, service),
            prompt_logprobs=_prompt_logprobs(answer, choice.prompt_logprobs),
            finish_reason=finish_reason(answer, choice),
            speculate_metrics=choice.speculation,
        )

    # Streams -------------------------------------------------------------------------------------

    async def events(self, answer: Chat, pieces: Pieces, service: Service) -> Events:
        """See `AnswerFormat`."""
        options = answer.body.stream_options
        continuous = options is not None and bool(options.continuous_usage_stats)
        packer = _Packer(answer.body.max_streaming_response_tokens or 1)
        streams: dict[int, _Unsent] = {}
        reasoning = [""] * len(answer.choices)

        def event_of(choices: list[Any], later: int = 0) -> dict[str, Any]:
            usage = _usage(answer, reasoning, service, later) if continuous else None
            return _event(answer, choices, usage)

        async for piece in pieces:
            index = piece.choice.index
            if index not in streams:
                opening = event_of([_opening(answer, piece)], -len(piece.token_ids))
                # The first event ends with one more space, as upstream's.
                yield opening if streams else event(opening, space=" ")
                streams[index] = _Unsent()
            reasoning[index] += piece.parsed.reasoning
            ready = packer.add(_delta(answer, piece, streams[index], service), piece.finished)
            if ready:
                yield event_of(ready)
        if options is not None and options.include_usage is not False:
            yield _event(answer, [], _usage(answer, reasoning, service))


def open_chat(body: ChatCompletionRequest, name: str, service: Service, arrival: float) -> Chat:
    """Read the body of a conversation.

    Args:
        body: The request, side channels merged.
        name: Id of the answer.
        service: Whose limits hold.
        arrival: When it came, seconds since the epoch.

    Returns:
        The answer under way.

    Raises:
        RequestError: The body cannot be used.
    """
    opens = opens_answer(body.add_generation_prompt, body.continue_final_message)
    top = chat_logprobs(body, service)
    switch = thinking_switch(body.chat_template_kwargs, body.metadata)
    variables = dict(body.chat_template_kwargs or {})
    if switch is not None:
        variables["enable_thinking"] = switch
    offered = [] if body.tool_choice == "none" else body.tools or []
    tools = [tool.model_dump(exclude_unset=True) for tool in offered]
    reasoning = service.parsers.reasoning
    request = Request(
        request_id=name,
        messages=body.messages,
        prompt_token_ids=body.prompt_token_ids or None,
        sampling_params=sampling_params(body, service, top),
        tools=tools or None,
        chat_template=body.chat_template,
        chat_template_kwargs=variables,
        trusted_template=False,
        disable_chat_template=bool(body.disable_chat_template),
        add_generation_prompt=opens,
        continue_final_message=bool(body.continue_final_message),
        completion_token_ids=body.completion_token_ids,
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        arrival_time=arrival,
    )
    if reasoning is not None and body.messages:
        request.thinking_switch = switch
        request.assumes_thinking = reasoning.assumes_thinking
    shows_prompt = bool(body.return_token_ids)
    return Answer(body, name, service.model_name, int(arrival), top, [request], shows_prompt)


def finish_reason(answer: Chat, choice: Choice) -> str | None:
    """Why a choice ended: `tool_calls` where it ended by itself with a call.

    A call that was demanded by its name is no news: OpenAI says `stop` then.
    """
    if forced_name(answer.body) or not choice.parser.tools_called:
        return choice.finish_reason
    return "tool_calls" if choice.finish_reason == "stop" else choice.finish_reason


def chat_logprobs_of(
    answer: Chat, rows: list[LogprobsLists], service: Service, streamed: bool = False
) -> dict[str, Any] | None:
    """The log-probabilities that an answer shows of some tokens; None where there are none."""
    if answer.top is None or not rows:
        return None
    decode = answer.body.include_logprobs_decode_token is not False
    joined = logprobs_format.join(rows)
    return logprobs_format.chat_logprobs(service.tokenizer, joined, answer.top, decode, streamed)


def _prompt_logprobs(answer: Chat, rows: PromptLogprobs | None) -> list[Any] | None:
    decode = answer.body.include_logprobs_decode_token is not False
    return logprobs_format.prompt_logprobs(rows, decode)


def _usage(answer: Chat, reasoning: list[str], service: Service, later: int = 0) -> UsageInfo:
    encode = service.tokenizer.encode_text
    return answer.usage(sum(len(encode(text)) for text in reasoning if text), later)


def _event(answer: Chat, choices: list[Any], usage: UsageInfo | None) -> dict[str, Any]:
    value: dict[str, Any] = {
        "id": answer.id,
        "object": "chat.completion.chunk",
        "created": answer.created,
        "model": answer.model,
        "choices": choices,
    }
    if usage is not None:
        value["usage"] = usage.model_dump()
    return value


def _opening(answer: Chat, piece: Piece) -> dict[str, Any]:
    choice, body = piece.choice, answer.body
    delta: dict[str, Any] = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "",
        "tool_calls": None,
        "prompt_token_ids": choice.request.prompt_token_ids if body.return_token_ids else None,
        "completion_token_ids": None,
    }
    if body.return_token_ids:
        delta["prompt_tokens"] = choice.prompt_text
    value: dict[str, Any] = {"index": choice.index, "delta": delta}
    if body.prompt_logprobs is not None:
        rows = _prompt_logprobs(answer, piece.prompt_logprobs)
        value["prompt_logprobs"] = rows
    return value


def _delta(answer: Chat, piece: Piece, unsent: _Unsent, service: Service) -> dict[str, Any] | None:
    """The choice object of one step; None when there is nothing to show yet."""
    parsed, choice = piece.parsed, piece.choice
    unsent.add(piece)
    if not (piece.finished or parsed.content or parsed.reasoning or parsed.tool_calls):
        return None
    calls = [call.model_dump(exclude_none=True) for call in parsed.tool_calls or []]
    delta: dict[str, Any] = {
        "content": parsed.content,
        "reasoning_content": parsed.reasoning,
        "tool_calls": calls or None,
        "prompt_token_ids": None,
        "completion_token_ids": None,
    }
    if answer.body.return_token_ids:
        delta["completion_token_ids"] = unsent.token_ids
        delta["completion_tokens"] = "".join(unsent.text)
    value = {
        "index": choice.index,
        "delta": delta,
        "logprobs": chat_logprobs_of(answer, unsent.logprobs, service, streamed=True),
        "draft_logprobs": None,
        "arrival_time": choice.arrival_time(),
    }
    if piece.finished:
        value["finish_reason"] = finish_reason(answer, choice)
        value["speculate_metrics"] = choice.speculate_metrics()
    unsent.clear()
    return value


@dataclass(slots=True)
class _Unsent:
    """Tokens whose text has not been sent: half a character, or a marker being read."""

    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[LogprobsLists] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Keep a step's tokens."""
        self.token_ids.extend(piece.token_ids)
        self.text.append(piece.text)
        if piece.logprobs is not None:
            self.logprobs.append(piece.logprobs)

    def clear(self) -> None:
        """All sent."""
        self.token_ids, self.text, self.logprobs = [], [], []


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
