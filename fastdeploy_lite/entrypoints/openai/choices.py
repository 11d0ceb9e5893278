"""Running the sequences of one HTTP request and merging their outputs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from fastdeploy_lite import envs
from fastdeploy_lite.entrypoints.openai.errors import EngineUnavailableError, ServiceError
from fastdeploy_lite.entrypoints.openai.output_parser import OutputParser, ParsedDelta
from fastdeploy_lite.entrypoints.openai.service import Service
from fastdeploy_lite.entrypoints.openai.tracing import note_phases
from fastdeploy_lite.request.messages import EngineOutput, EngineRequest
from fastdeploy_lite.request.outputs import (
    CompletionOutput,
    LogprobsLists,
    PromptLogprobs,
    RequestOutput,
    SpeculateMetrics,
)
from fastdeploy_lite.utils.errors import RequestError
from fastdeploy_lite.utils.logging import get_logger
from fastdeploy_lite.utils.request_log import RequestLogLevel, log_request

_log = get_logger("fastdeploy")
STARTED_AT_ONCE = 16


@dataclass(slots=True)
class Choice:
    """Choice `index` of an answer: one sequence, what it was asked for and what came of it.

    Attributes:
        index: Prompt-major.
        request: For the engine.
        parser: Takes the text apart.
        prompt_text: The prompt as text, where the answer shows it.
        scores_only: The one token that the engine must generate is not wanted.
        num_tokens: Tokens generated so far.
        num_cached_tokens: Prompt tokens that the prefix cache served.
        started: Wall clock when inference began.
        finish_reason: Once finished.
        text: The raw text so far, in pieces.
        logprobs: Of the tokens so far.
        prompt_logprobs: Of the prompt, with the first message.
        speculation: At the end, when speculation is on.
    """

    index: int
    request: EngineRequest
    parser: OutputParser
    prompt_text: str = ""
    scores_only: bool = False
    num_tokens: int = 0
    num_cached_tokens: int = 0
    started: float = 0.0
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[LogprobsLists] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    speculation: SpeculateMetrics | None = None

    def arrival_time(self) -> float:
        """Seconds since inference began."""
        return round(max(time.time() - self.started, 0.0), 6) if self.started else 0.0

    def speculate_metrics(self) -> dict[str, Any] | None:
        """For the last chunk of a stream."""
        return None if self.speculation is None else asdict(self.speculation)

    def take(self, output: RequestOutput) -> Piece:
        """Note a step's output and take its text apart."""
        part = output.outputs
        if self.scores_only:
            part = CompletionOutput()
        if part.top_logprobs is not None:
            self.logprobs.append(part.top_logprobs)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.text.append(part.text)
        self.token_ids.extend(part.token_ids)
        self.num_tokens += len(part.token_ids)
        parsed = self.parser.feed(part.text, part.token_ids, output.finished)
        return Piece(
            self, parsed, part.text, part.token_ids, part.top_logprobs, output.prompt_logprobs,
            output.finished,
        )  # fmt: skip


@dataclass(slots=True)
class Piece:
    """What one step added to a choice.

    Attributes:
        choice: Whose.
        parsed: The text's parts, as far as they are certain.
        text: The raw text.
        token_ids: The tokens.
        logprobs: Of the tokens.
        prompt_logprobs: Of the prompt, with the first step, when asked for.
        finished: Whether it is the last one.
    """

    choice: Choice
    parsed: ParsedDelta
    text: str
    token_ids: list[int]
    logprobs: LogprobsLists | None
    prompt_logprobs: PromptLogprobs | None
    finished: bool


async def run(
    service: Service, public_id: str, sequences: list[Choice]
) -> AsyncGenerator[tuple[Choice, RequestOutput], None]:
    """Generate all sequences; closing the iterator early aborts what still runs.

    Args:
        service: The service.
        public_id: Id of the answer, for the abort route.
        sequences: What to generate.

    Yields:
        A sequence and the new part of its output.

    Raises:
        ServiceError: The engine died or refused.
        RequestError: A sequence failed for a reason that lies in the request.
    """
    ids = {sequence.request.request_id for sequence in sequences}
    service.active.setdefault(public_id, set()).update(ids)
    try:
        stream = _one(service, sequences[0]) if len(sequences) == 1 else _many(service, sequences)
        async with aclosing(stream):
            async for sequence, output in stream:
                yield sequence, output
    finally:
        remaining = service.active.get(public_id, set())
        remaining -= ids
        if not remaining:
            service.active.pop(public_id, None)


async def _one(service: Service, sequence: Choice) -> AsyncGenerator[Any, None]:
    request = sequence.request
    observer = _Observer(service, sequence)
    service.outputs.add(request, index=sequence.index)
    stream = cast("AsyncGenerator[EngineOutput, None]", service.client.generate(request))
    try:
        async with aclosing(stream):
            news = await service.within_wait(anext(stream), request.arrival_time)
            while True:
                output = service.outputs.process(news)
                observer.note(news, output)
                _raise_error(output)
                yield sequence, output
                if output.finished:
                    return
                news = await anext(stream)
    finally:
        service.outputs.discard(request.request_id)


def _raise_error(output: RequestOutput) -> None:
    """Turn an engine-side failure into an exception; an abort is an ordinary end."""
    if output.error_code in (0, 200) or output.outputs.finish_reason == "abort":
        return
    text = output.error_msg or "generation failed"
    if output.error_code == 429:
        raise ServiceError(text, 429, "rate_limit_error", "rate_limit_exceeded")
    if 400 <= output.error_code < 500:
        raise RequestError(text)
    if output.error_code == 503:
        raise EngineUnavailableError(text)
    raise ServiceError(text, 500, "server_error", "internal_error")


async def _many(service: Service, sequences: list[Choice]) -> AsyncGenerator[Any, None]:
    """Merge several sequences; the first failure ends all."""
    queue: asyncio.Queue[Any] = asyncio.Queue()

    async def pump(sequence: Choice) -> None:
        try:
            async with aclosing(_one(service, sequence)) as stream:
                async for item in stream:
                    queue.put_nowait(item)
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks: list[asyncio.Task[None]] = []
    try:
        for sequence in sequences:
            tasks.append(asyncio.create_task(pump(sequence)))
            if len(tasks) % STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)  # a thousand of them must not hold the event loop
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Observer:
    """Feeds one sequence's times and counts into the metrics."""

    def __init__(self, service: Service, sequence: Choice) -> None:
        self._metrics = service.metrics
        self._sequence = sequence
        self._previous = 0.0
        self._num_tokens = 0
        self._metrics.counters["requests_number"].inc()
        self._metrics.observe("request_params_max_tokens", sequence.request.sampling.max_tokens)

    def note(self, news: EngineOutput, output: RequestOutput) -> None:
        """Take one message in."""
        sequence, now = self._sequence, time.time()
        self._num_tokens += len(output.outputs.token_ids)
        sequence.num_cached_tokens = max(sequence.num_cached_tokens, output.num_cached_tokens)
        if news.timing is not None and not sequence.started:
            sequence.started = news.timing.scheduled or news.timing.received
        if output.outputs.token_ids:
            self._note_tokens(now, len(output.outputs.token_ids))
        if output.finished:
            if output.metrics is not None:
                sequence.speculation = output.metrics.speculate_metrics
            sequence.finish_reason = self._reason(output)
            self._note_end(news, now)

    def _note_tokens(self, now: float, count: int) -> None:
        metrics, arrival = self._metrics, self._sequence.request.arrival_time
        if not self._previous:
            metrics.observe("time_to_first_token_seconds", now - arrival)
            metrics.gauges["first_token_latency"].set(max(now - arrival, 0.0))
        else:
            each = max(now - self._previous, 0.0) / count  # one message brings guessed ones, too
            for _ in range(count):
                metrics.observe("time_per_output_token_seconds", each)
            metrics.gauges["infer_latency"].set(each)
        self._previous = now

    def _reason(self, output: RequestOutput) -> str:
        sequence = self._sequence
        if output.outputs.finish_reason == "abort":
            return "abort"
        counts_closing = envs.FD_LITE_COUNT_CLOSING_EOS
        if counts_closing and self._num_tokens >= sequence.request.sampling.max_tokens:
            return "length"  # even when a natural end falls on the last slot, as upstream says
        return str(output.outputs.finish_reason or "stop")

    def _note_end(self, news: EngineOutput, now: float) -> None:
        metrics, sequence = self._metrics, self._sequence
        log_request(
            _log, RequestLogLevel.LIFECYCLE,
            "Request %s finished (%s), number of generated tokens: %d",
            sequence.request.request_id, sequence.finish_reason, self._num_tokens,
        )  # fmt: skip
        if sequence.finish_reason != "abort":
            metrics.counters["request_success_total"].inc()
        elapsed = now - sequence.request.arrival_time
        metrics.observe("e2e_request_latency_seconds", elapsed)
        metrics.observe("request_prompt_tokens", len(sequence.request.prompt_token_ids))
        metrics.observe("request_generation_tokens", self._num_tokens)
        metrics.observe("request_token_ratio", self._num_tokens / max(elapsed, 1e-9))
        timing = news.timing
        if timing is None or not timing.first_token:
            return
        metrics.observe("request_queue_time_seconds", timing.scheduled - timing.received)
        metrics.observe("request_prefill_time_seconds", timing.first_token - timing.scheduled)
        metrics.observe("request_decode_time_seconds", now - timing.first_token)
        metrics.observe("request_inference_time_seconds", now - timing.scheduled)
        moments = (timing.received, timing.scheduled, timing.first_token, now)
        note_phases(sequence.request.request_id, moments, sequence.num_tokens)
