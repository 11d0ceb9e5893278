"""`POST /v1/completions`: raw text in, raw text out, without template and parsers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from fastdeploy_lite.entrypoints.openai import logprobs_format
from fastdeploy_lite.entrypoints.openai.choices import Choice, run
from fastdeploy_lite.entrypoints.openai.errors import json_response
from fastdeploy_lite.entrypoints.openai.logprobs_format import CompletionLogprobs
from fastdeploy_lite.entrypoints.openai.protocol import (
    CompletionRequest,
    CompletionResponse,
    CompletionResponseChoice,
    Prompt,
)
from fastdeploy_lite.entrypoints.openai.request_building import (
    answer_id,
    check_count,
    completion_logprobs,
    merge_extra,
    sampling_params,
    scores_only,
)
from fastdeploy_lite.entrypoints.openai.service import Service
from fastdeploy_lite.entrypoints.openai.serving_base import (
    Collected,
    collect,
    expand,
    log_request,
    prepare,
    respond,
    stream_response,
    usage_of,
)
from fastdeploy_lite.request.outputs import LogprobsLists, RequestOutput
from fastdeploy_lite.request.user_request import Request
from fastdeploy_lite.utils.errors import RequestError


@dataclass(slots=True)
class _Completion:
    """One completion request under way."""

    body: CompletionRequest
    id: str
    created: int
    top: int | None
    num_prompts: int = 1
    sequences: list[Choice] = field(default_factory=list)
    logprobs: dict[int, CompletionLogprobs] = field(default_factory=dict)

    @property
    def decodes_tokens(self) -> bool:
        """Whether tokens are shown as text beside their log-probabilities."""
        return self.body.include_logprobs_decode_token is not False


def split_prompts(prompt: Prompt, field_name: str = "prompt") -> list[str | list[int]]:
    """The prompts of one request.

    Args:
        prompt: A text, token ids, or a list of either.
        field_name: For messages.

    Returns:
        One entry per prompt.

    Raises:
        RequestError: There is none.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError(f"{field_name} can not be an empty list", param=field_name)
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


class CompletionHandler:
    """Answers completion requests.

    Args:
        service: The service.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, body: CompletionRequest, http: HttpRequest) -> Response:
        """Answer one request.

        Args:
            body: The validated body.
            http: The HTTP request.

        Returns:
            JSON, a stream, or an error.
        """
        return await respond(http, self._create(body))

    async def _create(self, body: CompletionRequest) -> Response:
        work = await self._prepare(body, time.time())
        if work.body.stream:
            return stream_response(self._stream(work), completion=True)
        results = await collect(self._service, work.id, work.sequences)
        _leave_out(work)
        answer = CompletionResponse(
            id=work.id,
            created=work.created,
            model=self._service.model_name,
            choices=[self._choice(work, s, results[s.index]) for s in work.sequences],
            usage=usage_of(work.sequences, work.num_prompts),
        )
        return json_response(answer.model_dump())

    async def _prepare(self, body: CompletionRequest, arrival: float) -> _Completion:
        service = self._service
        service.check_alive()
        service.check_model(body.model)
        body = merge_extra(body, body.suffix if isinstance(body.suffix, dict) else None, "suffix")
        work = _Completion(
            body,
            answer_id("cmpl", body.request_id, body.user),
            int(arrival),
            completion_logprobs(body, service),
        )
        prompts = self._prompts(body)
        work.num_prompts, n = len(prompts), body.n or 1
        check_count(len(prompts), n)
        log_request("completion", body, work.id)
        for i, prompt in enumerate(prompts):
            request = self._request(work, prompt, arrival)
            prepared, text = await service.prepare(prepare, request, None)
            copies = expand(service, work.id, prepared, n)
            work.sequences += [Choice(i * n + j, c, text) for j, c in enumerate(copies)]
        return work

    @staticmethod
    def _prompts(body: CompletionRequest) -> list[str | list[int]]:
        if body.prompt_token_ids is not None:
            return split_prompts(body.prompt_token_ids, "prompt_token_ids")
        return split_prompts(body.prompt)

    def _request(self, work: _Completion, prompt: str | list[int], arrival: float) -> Request:
        body = work.body
        return Request(
            request_id=work.id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=None if isinstance(prompt, str) else prompt,
            sampling_params=sampling_params(body, self._service, work.top),
            include_stop_str_in_output=bool(body.include_stop_str_in_output),
            arrival_time=arrival,
        )

    # Whole answers -------------------------------------------------------------------------------

    def _choice(
        self, work: _Completion, sequence: Choice, result: Collected
    ) -> CompletionResponseChoice:
        if scores_only(work.body):
            result.text, result.logprobs = "", []
        choice = CompletionResponseChoice(
            index=sequence.index,
            text=(sequence.prompt_text if work.body.echo else "") + result.text,
            logprobs=self._logprobs(work, sequence, result.logprobs, result.prompt_logprobs),
            finish_reason=sequence.finish_reason,
            speculate_metrics=sequence.speculation,
        )
        if work.body.prompt_logprobs is not None:
            choice.prompt_logprobs = logprobs_format.prompt_logprobs(
                result.prompt_logprobs, work.decodes_tokens
            )
        if work.body.return_token_ids:
            choice.prompt_token_ids = sequence.request.prompt_token_ids
            choice.completion_token_ids = sequence.token_ids
            choice.prompt_tokens = sequence.prompt_text
            choice.completion_tokens = result.text
        return choice

    def _logprobs(
        self,
        work: _Completion,
        sequence: Choice,
        parts: list[LogprobsLists],
        prompt: list[Any] | None = None,
    ) -> dict[str, Any] | None:
        """Of new tokens; with `prompt`, which comes once, of an echoed prompt before them."""
        if work.top is None:
            return None
        form = work.logprobs.get(sequence.index)
        if form is None:
            form = CompletionLogprobs(self._service.tokenizer, work.top, work.decodes_tokens)
            work.logprobs[sequence.index] = form
        found = []
        if prompt is not None and work.body.echo:
            found.append(form.prompt(sequence.request.prompt_token_ids, prompt))
        if parts:
            found.append(form.rows(logprobs_format.join(parts)))
        return logprobs_format.joined(found)

    # Streams -------------------------------------------------------------------------------------

    async def _stream(self, work: _Completion) -> AsyncGenerator[dict[str, Any] | bytes, None]:
        options = work.body.stream_options
        continuous = options is not None and bool(options.continuous_usage_stats)
        usage_at_end = options is not None and options.include_usage is not False
        waiting: list[dict[str, Any]] = []
        size = max(work.body.max_streaming_response_tokens or 1, 1)
        opened: set[int] = set()
        async with aclosing(run(self._service, work.id, work.sequences)) as outputs:
            async for sequence, output in outputs:
                first = sequence.index not in opened
                opened.add(sequence.index)
                if first and work.body.return_token_ids:
                    yield self._event(work, [self._opening(sequence)], sequence, continuous)
                waiting.append(self._delta(work, sequence, output, first))
                if output.finished or len(waiting) >= size:
                    yield self._event(work, waiting, sequence, continuous)
                    waiting = []
        _leave_out(work)
        if usage_at_end:
            usage = usage_of(work.sequences, work.num_prompts).model_dump()
            yield {**self._event(work, [], work.sequences[0], False), "usage": usage}

    def _event(
        self, work: _Completion, choices: list[Any], sequence: Choice, usage: bool
    ) -> dict[str, Any]:
        value: dict[str, Any] = {
            "id": work.id,
            "object": "text_completion",
            "created": work.created,
            "model": self._service.model_name,
            "choices": choices,
        }
        if usage:
            value["usage"] = usage_of([sequence], 1).model_dump()
        return value

    @staticmethod
    def _opening(sequence: Choice) -> dict[str, Any]:
        return {
            "index": sequence.index,
            "text": "",
            "prompt_token_ids": sequence.request.prompt_token_ids,
            "completion_token_ids": None,
            "prompt_tokens": sequence.prompt_text,
        }

    def _delta(
        self, work: _Completion, sequence: Choice, output: RequestOutput, first: bool
    ) -> dict[str, Any]:
        part = output.outputs
        echo = sequence.prompt_text if first and work.body.echo else ""
        parts = [part.top_logprobs] if part.top_logprobs is not None and work.top else []
        text, token_ids = part.text, list(part.token_ids)
        if scores_only(work.body):
            text, token_ids, parts = "", [], []
        choice: dict[str, Any] = {
            "index": sequence.index,
            "text": echo + text,
            "prompt_token_ids": None,
            "completion_token_ids": token_ids if work.body.return_token_ids else None,
            "tool_calls": None,
            "reasoning_content": "",
            "arrival_time": sequence.arrival_time(),
            "logprobs": self._logprobs(work, sequence, parts, output.prompt_logprobs),
            "draft_logprobs": None,
        }
        if output.prompt_logprobs is not None and work.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprobs_format.prompt_logprobs(
                output.prompt_logprobs, work.decodes_tokens
            )
        if output.finished:
            only = scores_only(work.body)
            choice["finish_reason"] = "length" if only else sequence.finish_reason
            choice["speculate_metrics"] = sequence.speculate_metrics()
        return choice


def _leave_out(work: _Completion) -> None:
    """Forget what was generated where `max_tokens` is 0: the engine gives a token at least."""
    if scores_only(work.body):
        for sequence in work.sequences:
            sequence.num_tokens, sequence.token_ids = 0, []
            sequence.finish_reason = "length"
