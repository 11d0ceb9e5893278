"""What comes out: `RequestOutput` and its parts.

Names, fields and their order are upstream's; scripts read and print these objects.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from fastdeploy_lite.request.messages import DraftCounts
from fastdeploy_lite.request.step import LOWEST


class Logprob(NamedTuple):
    """Natural-log probability of one token.

    Attributes:
        logprob: Natural logarithm of the probability.
        rank: 1 for the most likely token of the vocabulary; None when unknown.
        decoded_token: The token's own text.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PromptLogprobs = list[dict[int, Logprob] | None]
"""One entry per prompt token: None for the first, then the token and its alternatives."""


def possible(ids: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    """Pairs of tokens and their log-probabilities, without tokens that could not come."""
    return [(i, value) for i, value in zip(ids, values, strict=True) if value > LOWEST]


class LogprobsLists(NamedTuple):
    """Log-probabilities of several positions; column 0 is the sampled token, then the best ones.

    Attributes:
        logprob_token_ids: `[positions][1 + k]` token ids.
        logprobs: `[positions][1 + k]` natural-log probabilities; `LOWEST` of a token that could
            not come, since a constraint forbids it or it is outside of the nucleus.
        sampled_token_ranks: `[positions]` ranks of the sampled tokens, 1 = best.
    """

    logprob_token_ids: list[list[int]]
    logprobs: list[list[float]]
    sampled_token_ranks: list[int]

    def alternatives(self, position: int, most: int) -> list[tuple[int, float]]:
        """The best tokens of a position, without those that could not come.

        Args:
            position: Row.
            most: How many at most; -1 is all.

        Returns:
            Token ids and log-probabilities, best first.
        """
        end = None if most < 0 else 1 + most
        ids, values = self.logprob_token_ids[position], self.logprobs[position]
        return possible(ids[1:end], values[1:end])

    def slice_columns(self, start: int, end: int) -> LogprobsLists:
        """Keep columns `start..end-1` of every position."""
        return LogprobsLists(
            [row[start:end] for row in self.logprob_token_ids],
            [row[start:end] for row in self.logprobs],
            self.sampled_token_ranks,
        )

    def slice_rows(self, start: int, end: int) -> LogprobsLists:
        """Keep positions `start..end-1`."""
        return LogprobsLists(
            self.logprob_token_ids[start:end],
            self.logprobs[start:end],
            self.sampled_token_ranks[start:end],
        )

    def extend(self, other: LogprobsLists) -> None:
        """Append the positions of `other`."""
        self.logprob_token_ids.extend(other.logprob_token_ids)
        self.logprobs.extend(other.logprobs)
        self.sampled_token_ranks.extend(other.sampled_token_ranks)


@dataclass(slots=True)
class SpeculateMetrics:
    """How speculative decoding did for one answer, in upstream's terms.

    The token that the model gives in any case counts as the first accepted one of each step.

    Attributes:
        accepted_tokens: Tokens of the answer.
        rejected_tokens: Guesses that were wrong, or came after a wrong one.
        accept_ratio: Share of the answer that came from guesses.
        average_accept_length: Tokens per step.
        accepted_tokens_per_head: Steps that gave at least 1, 2, ... tokens.
        accept_ratio_per_head: Of those that gave i tokens, the share that gave i + 1.
    """

    accepted_tokens: int
    rejected_tokens: int
    accept_ratio: float
    average_accept_length: float
    accepted_tokens_per_head: list[int]
    accept_ratio_per_head: list[float]

    @classmethod
    def from_counts(cls, counts: DraftCounts) -> SpeculateMetrics:
        """From what the engine counted."""
        accepted = counts.steps + counts.accepted
        heads = [counts.steps, *counts.accepted_at]
        pairs = itertools.pairwise(heads)
        return cls(
            accepted_tokens=accepted,
            rejected_tokens=counts.drafted - counts.accepted,
            accept_ratio=counts.accepted / accepted if accepted else 0.0,
            average_accept_length=accepted / counts.steps if counts.steps else 0.0,
            accepted_tokens_per_head=heads,
            accept_ratio_per_head=[after / before if before else 0.0 for before, after in pairs],
        )


@dataclass(slots=True)
class RequestMetrics:
    """When things happened; all in seconds, times since the epoch, durations marked.

    Attributes:
        arrival_time: The request reached the program.
        inference_start_time: It was first scheduled.
        first_token_time: Duration from inference start to the first token.
        time_in_queue: Duration of waiting for the first schedule.
        preprocess_cost_time: Duration of template and tokenisation.
        model_forward_time: Duration since inference start.
        model_execute_time: Duration since the engine received the request.
        request_start_time: As `arrival_time`.
        llm_engine_recv_req_timestamp: Preprocessing began.
        llm_engine_send_req_to_engine_timestamp: Preprocessing ended.
        llm_engine_recv_token_timestamp: The newest token reached the front end.
        speculate_metrics: With the last part of an answer, when speculation is on.
    """

    arrival_time: float | None = None
    inference_start_time: float | None = None
    first_token_time: float | None = None
    time_in_queue: float | None = None
    preprocess_cost_time: float | None = None
    model_forward_time: float | None = None
    model_execute_time: float | None = None
    request_start_time: float | None = None
    llm_engine_recv_req_timestamp: float | None = None
    llm_engine_send_req_to_engine_timestamp: float | None = None
    llm_engine_recv_token_timestamp: float | None = None
    speculate_metrics: SpeculateMetrics | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a mapping."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RequestMetrics:
        """The inverse of `to_dict`; unknown keys are ignored."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        if isinstance(known.get("speculate_metrics"), Mapping):
            known["speculate_metrics"] = SpeculateMetrics(**known["speculate_metrics"])
        return cls(**known)


@dataclass(slots=True)
class CompletionOutput:
    """Generated tokens and text.

    Attributes:
        index: Position of the prompt in the batch.
        send_idx: Number of the chunk, from 0.
        token_ids: Generated tokens; the last one of a finished sequence is EOS.
        text: Generated text without the closing EOS.
        decode_type: Always 0 (text).
        logprob: Of the newest token.
        top_logprobs: Sampled and best tokens per position.
        draft_top_logprobs: Always None: there is no draft model.
        logprobs: Per position the best tokens, sampled one not included unless it is among them.
        draft_token_ids: Always None.
        reasoning_content: Text of the thinking part, when a parser separated it.
        tool_calls: Parsed tool calls.
        finish_reason: "stop", "length", "abort" or "error" once finished.
    """

    index: int = 0
    send_idx: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    decode_type: int = 0
    logprob: float | None = None
    top_logprobs: LogprobsLists | None = None
    draft_top_logprobs: LogprobsLists | None = None
    logprobs: PromptLogprobs | None = None
    draft_token_ids: list[int] | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None
    finish_reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a mapping."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompletionOutput:
        """The inverse of `to_dict`; unknown keys are ignored."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def extend(self, chunk: CompletionOutput) -> None:
        """Append a later chunk."""
        self.send_idx = chunk.send_idx
        self.token_ids.extend(chunk.token_ids)
        self.text += chunk.text
        self.logprob = chunk.logprob
        if chunk.logprobs is not None:
            self.logprobs = (self.logprobs or []) + chunk.logprobs
        if chunk.top_logprobs is not None:
            if self.top_logprobs is None:
                self.top_logprobs = LogprobsLists([], [], [])
            self.top_logprobs.extend(chunk.top_logprobs)
        if chunk.reasoning_content is not None:
            self.reasoning_content = (self.reasoning_content or "") + chunk.reasoning_content
        self.tool_calls = chunk.tool_calls or self.tool_calls
        self.finish_reason = chunk.finish_reason

    def __repr__(self) -> str:
        return (
            f"CompletionOutput(index={self.index}, send_idx={self.send_idx}, text={self.text!r}, "
            f"token_ids={self.token_ids}, draft_token_ids={self.draft_token_ids}, "
            f"reasoning_content={self.reasoning_content!r}, logprobs={self.logprobs}, "
            f"top_logprobs={self.top_logprobs}, draft_top_logprobs={self.draft_top_logprobs})"
        )


class RequestOutput:
    """One request's result: whole, or a chunk of it while streaming.

    Args:
        request_id: Name of the request.
        prompt: What was passed in.
        prompt_token_ids: Its tokens.
        prompt_logprobs: Per prompt token, when asked for.
        output_type: Always 3, upstream's number for text.
        outputs: Tokens and text (a single object, not a list).
        finished: Whether nothing more will come.
        metrics: When things happened.
        num_cached_tokens: Prompt tokens that the prefix cache served.
        num_input_image_tokens, num_input_video_tokens: Always 0.
        error_code: 200, or an HTTP-like status.
        error_msg: One line; contains `Aborted` when the request was aborted.
    """

    def __init__(
        self,
        request_id: str,
        prompt: Any = None,
        prompt_token_ids: Sequence[int] | None = None,
        prompt_logprobs: PromptLogprobs | None = None,
        output_type: int = 3,
        outputs: CompletionOutput | None = None,
        finished: bool = False,
        metrics: RequestMetrics | None = None,
        num_cached_tokens: int = 0,
        num_input_image_tokens: int = 0,
        num_input_video_tokens: int = 0,
        error_code: int = 200,
        error_msg: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = [] if prompt_token_ids is None else _plain_list(prompt_token_ids)
        self.prompt_logprobs = prompt_logprobs
        self.output_type = output_type
        self.outputs = CompletionOutput() if outputs is None else outputs
        self.finished = finished
        self.metrics = metrics
        self.num_cached_tokens = num_cached_tokens
        self.num_input_image_tokens = num_input_image_tokens
        self.num_input_video_tokens = num_input_video_tokens
        self.error_code = error_code
        self.error_msg = error_msg

    def add(self, chunk: RequestOutput) -> None:
        """Merge a later chunk of the same request."""
        self.outputs.extend(chunk.outputs)
        self.finished |= chunk.finished
        self.prompt_logprobs = chunk.prompt_logprobs or self.prompt_logprobs
        self.metrics = chunk.metrics or self.metrics
        self.num_cached_tokens = max(self.num_cached_tokens, chunk.num_cached_tokens)
        self.error_code, self.error_msg = chunk.error_code, chunk.error_msg

    def to_dict(self) -> dict[str, Any]:
        """The attributes as a mapping, nested objects too."""
        return {
            **vars(self),
            "outputs": self.outputs.to_dict(),
            "metrics": None if self.metrics is None else self.metrics.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RequestOutput:
        """The inverse of `to_dict`."""
        given = dict(values)
        if isinstance(given.get("outputs"), Mapping):
            given["outputs"] = CompletionOutput.from_dict(given["outputs"])
        if isinstance(given.get("metrics"), Mapping):
            given["metrics"] = RequestMetrics.from_dict(given["metrics"])
        return cls(**given)

    def __repr__(self) -> str:
        return (
            f"RequestOutput(request_id={self.request_id}, prompt={self.prompt!r}, "
            f"prompt_token_ids={self.prompt_token_ids}, prompt_logprobs={self.prompt_logprobs}, "
            f"output_type={self.output_type}, outputs={self.outputs!r}, finished={self.finished}, "
            f"num_cached_tokens={self.num_cached_tokens}, "
            f"num_input_image_tokens={self.num_input_image_tokens}, "
            f"num_input_video_tokens={self.num_input_video_tokens}, metrics={self.metrics}, "
            f"error_code={self.error_code}, error_msg={self.error_msg})"
        )


def _plain_list(values: Any) -> list[int]:
    """A list of Python ints, from a numpy array too."""
    return values.tolist() if hasattr(values, "tolist") else list(values)
