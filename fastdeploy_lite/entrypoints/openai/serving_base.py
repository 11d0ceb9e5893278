"""What chat and completions have in common: preparing sequences, collecting, usage."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from fastdeploy_lite.entrypoints.openai import errors
from fastdeploy_lite.entrypoints.openai.choices import Choice, run
from fastdeploy_lite.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    CompletionTokensDetails,
    PromptTokensDetails,
    UsageInfo,
)
from fastdeploy_lite.entrypoints.openai.request_building import MergedBodyError, seed_of
from fastdeploy_lite.entrypoints.openai.service import Service
from fastdeploy_lite.entrypoints.openai.streams import (
    DONE,
    ClientGoneError,
    EventStream,
    event,
    while_connected,
)
from fastdeploy_lite.request.messages import EngineRequest
from fastdeploy_lite.request.outputs import LogprobsLists, RequestOutput
from fastdeploy_lite.request.user_request import Request
from fastdeploy_lite.utils import request_log
from fastdeploy_lite.utils.logging import get_logger
from fastdeploy_lite.utils.request_log import HIDDEN, RequestLogLevel, content, is_logged

log = get_logger("api_server")


@dataclass(slots=True)
class Collected:
    """The whole output of one sequence."""

    text: str = ""
    logprobs: list[LogprobsLists] = field(default_factory=list)
    prompt_logprobs: list[Any] | None = None

    def add(self, output: RequestOutput) -> None:
        """Append a step's output."""
        self.text += output.outputs.text
        if output.outputs.top_logprobs is not None:
            self.logprobs.append(output.outputs.top_logprobs)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs


def prepare(service: Service, request: Request, switch: bool | None) -> tuple[EngineRequest, str]:
    """Turn a request into tokens; blocking.

    Args:
        service: The service.
        request: What the client asks.
        switch: The request's thinking switch.

    Returns:
        The engine's request, and the prompt's text.

    Raises:
        RequestError: The request is at fault.
    """
    parser = service.parsers.reasoning
    if parser is not None and request.messages:
        request.thinking_switch, request.assumes_thinking = switch, parser.assumes_thinking
    prepared = service.preprocessor.process(request)
    return prepared, service.tokenizer.decode(prepared.prompt_token_ids)


def expand(service: Service, public_id: str, request: EngineRequest, n: int) -> list[EngineRequest]:
    """`n` copies that differ in their name and seed.

    Args:
        service: The service.
        public_id: Id of the answer.
        request: What to copy.
        n: How often.

    Returns:
        The copies.
    """
    copies = []
    for choice in range(n):
        sampler = request.sampling.sampler
        sampler = dataclasses.replace(sampler, seed=seed_of(sampler.seed, choice))
        sampling = msgspec.structs.replace(request.sampling, sampler=sampler)
        name = service.engine_id(public_id)
        copies.append(msgspec.structs.replace(request, request_id=name, sampling=sampling))
    return copies


def usage_of(sequences: list[Choice], prompts: int, reasoning_tokens: int = 0) -> UsageInfo:
    """Token counts; a prompt with several choices counts once.

    Args:
        sequences: All choices, prompt-major.
        prompts: Number of prompts.
        reasoning_tokens: Tokens of reasoning text, of all choices.

    Returns:
        The usage.
    """
    each = max(len(sequences) // max(prompts, 1), 1)
    firsts = sequences[::each]
    prompt = sum(len(s.request.prompt_token_ids) for s in firsts)
    completion = sum(s.num_tokens for s in sequences)
    return UsageInfo(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(s.num_cached_tokens for s in firsts)
        ),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning_tokens),
    )


async def collect(
    service: Service, public_id: str, sequences: list[Choice]
) -> dict[int, Collected]:
    """Run all sequences to their end.

    Args:
        service: The service.
        public_id: Id of the answer.
        sequences: What to generate.

    Returns:
        The outputs by choice index.
    """
    results = {sequence.index: Collected() for sequence in sequences}
    async with aclosing(run(service, public_id, sequences)) as outputs:
        async for sequence, output in outputs:
            results[sequence.index].add(output)
    return results


def log_request(kind: str, body: ChatCompletionRequest | CompletionRequest, public_id: str) -> None:
    """Note a request in api_server.log, with as much of its content as is wanted there."""
    level = RequestLogLevel.LIFECYCLE
    request_log.log_request(log, level, "Create %s request %s: %s", kind, public_id, content(body))


async def respond(http: HttpRequest, work: Any) -> Response:
    """Await a handler while its client is there; every failure becomes an answer.

    Args:
        http: The HTTP request.
        work: Coroutine that gives the response.

    Returns:
        The response.
    """
    try:
        response: Response = await while_connected(http, work)
    except ClientGoneError:
        return Response(status_code=499)  # nobody reads it
    except MergedBodyError as error:
        return errors.from_validation(error.errors)
    except Exception as error:
        return errors.from_exception(error)
    return response


def stream_response(
    events: AsyncGenerator[dict[str, Any] | bytes, None], completion: bool
) -> Response:
    """Send a stream that ends with `[DONE]`, also after a failure.

    Args:
        events: Plain data, or encoded events.
        completion: Whether errors take the form of completion streams.

    Returns:
        The response.
    """
    return EventStream(_guarded(events, completion))


async def _guarded(
    events: AsyncGenerator[dict[str, Any] | bytes, None], completion: bool
) -> AsyncGenerator[bytes, None]:
    last = b""
    try:
        async with aclosing(events) as source:
            async for value in source:
                last = value if isinstance(value, bytes) else event(value)
                yield last
    except Exception as error:
        status, body = errors.describe(error)
        if completion:
            body = {"error": {"message": body["error"]["message"], "code": str(status)}}
        log.info("Stream failed: %s", content(body["error"]["message"]))
        yield event(body)
    text = last[:512].decode(errors="replace") if is_logged(RequestLogLevel.CONTENT) else HIDDEN
    request_log.log_request(log, RequestLogLevel.LIFECYCLE, "Last stream event: %s", text)
    yield DONE
