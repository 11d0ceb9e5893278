"""From the core's tokens to the user's text and results, one request at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastdeploy_lite import envs
from fastdeploy_lite.engine.generation import end_of
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.request.messages import EngineOutput, EngineRequest
from fastdeploy_lite.request.outputs import (
    CompletionOutput,
    Logprob,
    LogprobsLists,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
    SpeculateMetrics,
    possible,
)
from fastdeploy_lite.request.step import TokenLogprobs


class OutputProcessor:
    """Detokenises the answers of all requests alive.

    Args:
        tokenizer: The model's.
    """

    def __init__(self, tokenizer: Ernie4_5Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._streams: dict[str, _Stream] = {}

    def add(self, request: EngineRequest, prompt: Any = None, index: int = 0) -> None:
        """Expect outputs of a request.

        Args:
            request: As sent to the engine.
            prompt: What the user passed, for the results.
            index: Position in the user's batch.
        """
        self._streams[request.request_id] = _Stream(self._tokenizer, request, prompt, index)

    def process(self, output: EngineOutput) -> RequestOutput:
        """Turn news of a request into a result that holds only what is new.

        Args:
            output: From the core.

        Returns:
            The chunk; `RequestOutput.add` merges chunks. Its `outputs.finish_reason` is set with
            the last one, after which the request is forgotten.

        Raises:
            KeyError: The request was not added, or has ended.
        """
        stream = self._streams[output.request_id]
        if output.finished:
            del self._streams[output.request_id]
        return stream.process(output)

    def discard(self, request_id: str) -> None:
        """Forget a request whose outputs nobody wants any more."""
        self._streams.pop(request_id, None)


class _Stream:
    """Text and results of one request."""

    __slots__ = (
        "_chunks", "_cut", "_index", "_prompt", "_request", "_text", "_tokenizer",
    )  # fmt: skip

    def __init__(
        self, tokenizer: Ernie4_5Tokenizer, request: EngineRequest, prompt: Any, index: int
    ) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._prompt = prompt
        self._index = index
        self._text = tokenizer.detokenizer()
        self._chunks = 0
        strips = envs.FD_LITE_STRIP_STOP_TEXT and not request.include_stop_str_in_output
        stops = request.sampling.stop
        self._cut = _StopCut(stops, strips) if stops else None

    def process(self, output: EngineOutput) -> RequestOutput:
        """See `OutputProcessor.process`."""
        completion = CompletionOutput(
            self._index, self._chunks, output.new_token_ids, self._new_text(output)
        )
        completion.finish_reason = output.finish_reason
        self._chunks += 1
        if output.new_logprobs:
            self._add_logprobs(completion, output)
        first = self._chunks == 1
        return RequestOutput(
            request_id=output.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._request.prompt_token_ids if first or output.finished else None,
            prompt_logprobs=self._prompt_logprobs(output.prompt_logprobs),
            outputs=completion,
            finished=output.finished,
            metrics=self._metrics(output) if output.timing is not None else None,
            num_cached_tokens=output.num_cached_tokens,
            error_code=output.error_code,
            error_msg=output.error_msg,
        )

    # Text ----------------------------------------------------------------------------------------

    def _new_text(self, output: EngineOutput) -> str:
        ids = output.new_token_ids
        closing = output.finished and bool(ids) and ids[-1] in self._request.sampling.eos_token_ids
        visible = ids[:-1] if closing else ids
        text = "".join(map(self._text.feed, visible)) if visible else ""
        if output.finished:
            text += self._text.flush()
        if self._cut is not None:
            text = self._cut.feed(text, output.stop_reason, output.finished)
        if closing and self._request.include_stop_str_in_output:
            text += self._tokenizer.convert_ids_to_tokens(ids[-1])
        return text

    # Log-probabilities ---------------------------------------------------------------------------

    def _add_logprobs(self, completion: CompletionOutput, output: EngineOutput) -> None:
        entries = output.new_logprobs or []
        completion.logprob = entries[-1].logprob
        completion.logprobs = [self._alternatives(entry) for entry in entries]
        pairs = list(zip(output.new_token_ids, entries, strict=True))
        completion.top_logprobs = LogprobsLists(
            [[token, *entry.top_ids] for token, entry in pairs],
            [[entry.logprob, *entry.top_logprobs] for _, entry in pairs],
            [entry.rank for _, entry in pairs],
        )

    def _alternatives(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        ranked = enumerate(possible(entry.top_ids, entry.top_logprobs), start=1)
        return {i: Logprob(value, rank, self._decode(i)) for rank, (i, value) in ranked}

    def _prompt_logprobs(self, entries: Sequence[TokenLogprobs] | None) -> PromptLogprobs | None:
        if entries is None:
            return None
        result: PromptLogprobs = [None]  # nothing predicts the first token
        for token, entry in zip(self._request.prompt_token_ids[1:], entries, strict=True):
            own = {token: Logprob(entry.logprob, entry.rank, self._decode(token))}
            result.append({**own, **self._alternatives(entry)})
        return result

    def _decode(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])

    # Times ---------------------------------------------------------------------------------------

    def _metrics(self, output: EngineOutput) -> RequestMetrics:
        timing, request, counts = output.timing, self._request, output.draft_counts
        assert timing is not None
        now = time.time()
        started = timing.scheduled or now
        return RequestMetrics(
            arrival_time=request.arrival_time,
            inference_start_time=started,
            first_token_time=timing.first_token - started if timing.first_token else None,
            time_in_queue=started - timing.received,
            preprocess_cost_time=request.preprocess_end_time - request.arrival_time,
            model_forward_time=now - started,
            model_execute_time=now - timing.received,
            request_start_time=request.arrival_time,
            llm_engine_recv_req_timestamp=request.arrival_time,
            llm_engine_send_req_to_engine_timestamp=request.preprocess_end_time,
            llm_engine_recv_token_timestamp=now,
            speculate_metrics=None if counts is None else SpeculateMetrics.from_counts(counts),
        )


class _StopCut:
    """Ends an answer's text with its stop text, or before it; its last token may go on.

    Args:
        stops: The stop texts.
        strips: Whether the one that ends the answer is left out.
    """

    __slots__ = ("_before", "_ended", "_stops", "_strips")

    def __init__(self, stops: Sequence[str], strips: bool) -> None:
        self._stops = stops
        self._strips = strips
        self._before = ""  # may begin a stop text; held back where that will be left out
        self._ended = False

    def feed(self, text: str, reason: str | int | None, finished: bool) -> str:
        """Take in new text.

        Args:
            text: What is new.
            reason: The stop text that it completes, if it does.
            finished: Whether nothing follows.

        Returns:
            What may be shown.
        """
        if self._ended:
            return ""
        before, whole = len(self._before), self._before + text
        shown = 0 if self._strips else before
        end = end_of(reason, whole, before) if isinstance(reason, str) else 0
        if isinstance(reason, str) and end:
            self._ended = True
            return whole[shown : end - len(reason) if self._strips else end]
        if finished:
            return whole[shown:]
        held = max(_overlap(whole, stop) for stop in self._stops)
        self._before = whole[len(whole) - held :]
        return whole[shown : len(whole) - held if self._strips else len(whole)]


def _overlap(text: str, stop: str) -> int:
    """Length of the beginning of `stop` that `text` ends with."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
