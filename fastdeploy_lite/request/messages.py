"""What crosses the boundary between the front end and the engine core.

msgspec structs, msgpack on the wire: typed on both sides, and nothing in them can run code.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fastdeploy_lite.guided.spec import GuidedSpec
from fastdeploy_lite.request.step import SamplerParams, TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


class EngineSampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to generate, every default resolved and every word already tokens.

    Attributes:
        sampler: Numbers for the sampler.
        max_tokens: Tokens to generate; at least 1.
        min_tokens: Tokens before which the sequence cannot end.
        eos_token_ids: Ids that end a sequence; the first stands for all of them in the output.
        stop: Texts that end generation.
        stop_token_seqs: Token sequences that do; single stop tokens are sequences of one.
        guided: Constraint on the output.
        thinking: Whether the answer starts inside the model's thinking.
        think_start_id, think_end_id: Tokens that open and close thinking; -1 when there are none.
        think_truncate_ids: What is forced when the budget is spent.
        reasoning_max_tokens: The budget of thinking tokens; None is unlimited.
        response_max_tokens: Tokens after thinking; None is unlimited.
        ignore_eos: Whether only lengths and stops end the answer; EOS cannot come before.
        logits_processors_args: msgpack of the arguments for configured logits processors.
    """

    sampler: SamplerParams
    max_tokens: int
    eos_token_ids: tuple[int, ...]
    min_tokens: int = 1
    stop: tuple[str, ...] = ()
    stop_token_seqs: tuple[tuple[int, ...], ...] = ()
    guided: GuidedSpec | None = None
    thinking: bool = False
    think_start_id: int = -1
    think_end_id: int = -1
    think_truncate_ids: tuple[int, ...] = ()
    reasoning_max_tokens: int | None = None
    response_max_tokens: int | None = None
    ignore_eos: bool = False
    logits_processors_args: bytes = b""


class EngineRequest(msgspec.Struct, frozen=True, omit_defaults=True, tag="request"):
    """One sequence to generate.

    Attributes:
        request_id: Unique among the requests alive.
        prompt_token_ids: At least one token.
        sampling: How.
        arrival_time: Seconds since the epoch, when the request reached the program.
        preprocess_end_time: When it had become tokens.
        include_stop_str_in_output: For the output processor: the closing EOS shows in the text.
        thinking: For the output parser: whether the prompt, or else the request, says that the
            answer starts inside the thinking; None when neither does.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: EngineSampling
    arrival_time: float = 0.0
    preprocess_end_time: float = 0.0
    include_stop_str_in_output: bool = False
    thinking: bool | None = None


class Timing(msgspec.Struct, frozen=True, array_like=True):
    """When a request passed through the core; seconds since the epoch.

    Attributes:
        received: Added to the core.
        scheduled: First scheduled.
        first_token: First token sampled; 0 before.
    """

    received: float
    scheduled: float = 0.0
    first_token: float = 0.0


class DraftCounts(msgspec.Struct, array_like=True):
    """How the guesses of speculative decoding did.

    Attributes:
        drafted: Guessed tokens that were checked.
        accepted: Those of them that were right.
        steps: Steps that decoded for these requests.
        checks: Those of them in which guesses were checked.
        accepted_at: Right guesses by their place in the guess.
        checked_at: Checked ones, too.
    """

    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    checks: int = 0
    accepted_at: list[int] = []
    checked_at: list[int] = []


class EngineOutput(msgspec.Struct, omit_defaults=True):
    """News of one request after one step: new tokens, or its end.

    Attributes:
        request_id: Whose.
        new_token_ids: The new tokens: none, one, or more where guesses were right.
        new_logprobs: Their log-probabilities when asked for, one entry per new token.
        prompt_logprobs: With the first token, when asked for: entries for prompt tokens 1, 2, ...
        finished: Whether this is the last message about the request.
        finish_reason: Why, once finished.
        stop_reason: The stop text or token that ended it, when one did: with the token that
            completed it and from then on.
        num_cached_tokens: Prompt tokens that the prefix cache served (with the first message).
        error_code: 200, or an HTTP-like status.
        error_msg: One line.
        timing: With the first token and with the last message.
        draft_counts: With the last message, when speculation is on.
    """

    request_id: str
    new_token_ids: list[int] = []
    new_logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finished: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    error_code: int = 200
    error_msg: str | None = None
    timing: Timing | None = None
    draft_counts: DraftCounts | None = None


class EngineStats(msgspec.Struct, omit_defaults=True):
    """The core's counters; totals since start unless said otherwise.

    Attributes:
        time: Seconds since the epoch when these were taken.
        num_running, num_waiting: Requests now; a preempted one waits.
        num_preempted: Requests that were preempted and wait, now.
        preemptions: Preemptions.
        num_blocks: KV blocks.
        num_free_blocks: Blocks that a request can get now, unused or evictable.
        num_cached_blocks: Those of them that hold a reusable prefix.
        requests: Requests received.
        prompt_tokens: Prompt tokens of requests that produced a token.
        generation_tokens: Tokens generated.
        prefix_queries, prefix_hits: Admissions that looked for a cached prefix / found one.
        prefix_query_tokens, prefix_hit_tokens: Tokens looked for / found.
        steps: Engine steps.
        last_batch_size: Sequences in the newest step.
        step_seconds, model_seconds: Time in steps and in the model runner within them.
        failed_steps: Steps that the model runner failed.
        paused: Whether scheduling is stopped.
        drafts: Guesses of all requests; None when speculation is off.
    """

    time: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    num_preempted: int = 0
    preemptions: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    steps: int = 0
    last_batch_size: int = 0
    step_seconds: float = 0.0
    model_seconds: float = 0.0
    failed_steps: int = 0
    paused: bool = False
    drafts: DraftCounts | None = None


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End these requests now; unknown ids are ignored.  `request_ids` None means all."""

    request_ids: list[str] | None


PAUSED = "The engine is paused: POST /v1/resume first"  # the message of an error 503


class Control(msgspec.Struct, frozen=True, tag="control"):
    """pause: abort all and refuse requests; resume: take them again; reset: abort all and forget
    cached prefixes; shutdown: end the process; check: verify that no KV block and no request is
    lost."""

    action: Literal["pause", "resume", "reset", "shutdown", "check"]


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded.

    Attributes:
        num_blocks: KV blocks.
        load_seconds: Time that loading the weights took.
        device: Where it runs.
        memory: Bytes by purpose, as the model runner reports them.
        bits_per_expert_weight: How densely routed experts are stored; 0 when there are none.
        row_order: In which order the rows of 2-bit experts are read and why, for the start-up
            line; empty when there are none.
    """

    num_blocks: int
    load_seconds: float
    device: str
    memory: dict[str, int] = {}
    bits_per_expert_weight: float = 0.0
    row_order: str = ""


class Outputs(msgspec.Struct, frozen=True, omit_defaults=True, tag="outputs"):
    """What one step brought; `stats` come along at least once a second, busy or idle."""

    outputs: list[EngineOutput] = []
    stats: EngineStats | None = None


class Checked(msgspec.Struct, frozen=True, tag="checked"):
    """Answer to `check`; `error` is None when nothing is lost."""

    error: str | None = None


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine cannot go on; its process ends after this.  `error` is one line."""

    error: str


ToCore = EngineRequest | Abort | Control
FromCore = Ready | Outputs | Checked | Fatal
