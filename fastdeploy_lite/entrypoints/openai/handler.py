"""Answers generation requests of every form: prepare, generate, collect or stream."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel

from fastdeploy_lite.entrypoints.openai import errors
from fastdeploy_lite.entrypoints.openai.answer import Answer
from fastdeploy_lite.entrypoints.openai.bodies import is_large
from fastdeploy_lite.entrypoints.openai.choices import Choice, Piece, run
from fastdeploy_lite.entrypoints.openai.output_parser import OutputParser
from fastdeploy_lite.entrypoints.openai.request_building import (
    MergedBodyError,
    check_count,
    seed_of,
)
from fastdeploy_lite.entrypoints.openai.service import Service
from fastdeploy_lite.entrypoints.openai.streams import (
    ClientGoneError,
    EventStream,
    event,
    while_connected,
)
from fastdeploy_lite.request.messages import EngineRequest
from fastdeploy_lite.request.user_request import Request
from fastdeploy_lite.utils import request_log
from fastdeploy_lite.utils.errors import RequestError
from fastdeploy_lite.utils.logging import get_logger
from fastdeploy_lite.utils.request_log import HIDDEN, RequestLogLevel, content, is_logged

Given_contra = TypeVar("Given_contra", bound=BaseModel, contravariant=True)
Pieces = AsyncGenerator[Piece, None]
Events = AsyncGenerator["dict[str, Any] | bytes", None]

log = get_logger("api_server")


class AnswerFormat(Protocol[Given_contra]):
    """What is particular to one route.

    Attributes:
        name: For the log.
        closing: The last event of a stream, also after a failure.
    """

    name: str
    closing: bytes

    def open(self, body: Given_contra, service: Service, arrival: float) -> Answer[Any]:
        """Read a body: names, limits, and one request per prompt.

        Raises:
            RequestError: It cannot be used.
        """
        ...

    def parser(self, answer: Answer[Any], request: EngineRequest, service: Service) -> OutputParser:
        """What takes the text of a choice apart."""
        ...

    def whole(self, answer: Answer[Any], service: Service) -> dict[str, Any]:
        """The body of an answer whose choices have ended."""
        ...

    def events(self, answer: Answer[Any], pieces: Pieces, service: Service) -> Events:
        """The events of a streamed answer: plain data, or encoded."""
        ...

    def failure(self, status: int, body: dict[str, Any]) -> dict[str, Any] | bytes:
        """The event that tells of a failure."""
        ...

    def field_of(self, body: Given_contra, name: str | None) -> str | None:
        """The client's name for a field that an error blames."""
        ...


class Handler(Generic[Given_contra]):
    """Answers the requests of one route.

    Args:
        service: The service.
        form: Of the route.
    """

    def __init__(self, service: Service, form: AnswerFormat[Given_contra]) -> None:
        self._service = service
        self._form = form

    async def create(self, body: Given_contra, http: HttpRequest) -> Response:
        """Answer one request; every failure becomes an answer.

        Args:
            body: The validated body.
            http: The HTTP request; the work ends when its client leaves.

        Returns:
            JSON, a stream, or an error.
        """
        try:
            return await while_connected(http, self._create(body, is_large(http)))
        except ClientGoneError:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            return self._refusal(body, error)

    def _refusal(self, body: Given_contra, error: Exception) -> Response:
        """The answer to a failure, in the words of this route's fields."""
        form = self._form
        if isinstance(error, MergedBodyError):
            return errors.from_validation(error.errors, lambda name: form.field_of(body, name))
        if isinstance(error, RequestError):
            error = errors.renamed(error, form.field_of(body, error.param))
        return errors.from_exception(error)

    async def _create(self, body: Given_contra, large: bool) -> Response:
        answer = await self._prepare(body, large)
        if answer.body.stream:
            return EventStream(self._encoded(answer))
        async with aclosing(self._pieces(answer)) as pieces:
            async for _ in pieces:
                pass
        return errors.json_response(self._form.whole(answer, self._service))

    async def _prepare(self, body: Given_contra, large: bool) -> Answer[Any]:
        service, form, arrival = self._service, self._form, time.time()
        service.check_accepting()
        if large:  # side channels and converted items are walked and checked again
            answer = await service.in_thread(form.open, body, service, arrival)
        else:
            answer = form.open(body, service, arrival)
        n = answer.body.n or 1
        check_count(len(answer.prompts), n)
        level = RequestLogLevel.LIFECYCLE
        text = "Create %s request %s: %s"
        request_log.log_request(log, level, text, form.name, answer.id, content(body))
        for prompt in answer.prompts:
            work = service.prepare(prepare, prompt, answer.shows_prompt)
            prepared, shown = await service.within_wait(work, arrival)
            for copy in expand(service, answer.id, prepared, n):
                parser = form.parser(answer, copy, service)
                choice = Choice(len(answer.choices), copy, parser, shown)
                choice.scores_only = answer.scores_only
                answer.choices.append(choice)
        return answer

    async def _pieces(self, answer: Answer[Any]) -> Pieces:
        async with aclosing(run(self._service, answer.id, answer.choices)) as outputs:
            async for choice, output in outputs:
                yield choice.take(output)

    async def _encoded(self, answer: Answer[Any]) -> AsyncGenerator[bytes, None]:
        """The events of a stream as bytes, a failure among them."""
        last = b""
        pieces = self._pieces(answer)
        try:
            async with aclosing(self._form.events(answer, pieces, self._service)) as values:
                async for value in values:
                    if not last:
                        log.info("First stream event of %s", answer.id)
                    last = value if isinstance(value, bytes) else event(value)
                    yield last
        except Exception as error:
            status, body = errors.describe(error)
            log.info("Stream failed: %s", content(body["error"]["message"]))
            failure = self._form.failure(status, body)
            yield failure if isinstance(failure, bytes) else event(failure)
        finally:
            await pieces.aclose()
        text = last[:512].decode(errors="replace") if is_logged(RequestLogLevel.CONTENT) else HIDDEN
        request_log.log_request(log, RequestLogLevel.LIFECYCLE, "Last stream event: %s", text)
        yield self._form.closing


def prepare(service: Service, request: Request, shows_prompt: bool) -> tuple[EngineRequest, str]:
    """Turn a request into tokens; blocking.

    Args:
        service: The service.
        request: What the client asks.
        shows_prompt: Whether the answer holds the prompt's text.

    Returns:
        The engine's request, and the prompt's text where it is shown.

    Raises:
        RequestError: The request is at fault.
    """
    prepared = service.preprocessor.process(request)
    if not shows_prompt:
        return prepared, ""
    text = request.prompt
    return prepared, service.tokenizer.decode(prepared.prompt_token_ids) if text is None else text


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
