"""One engine step as plain data: what the scheduler asks of the model runner and what it gets back.

No Paddle here, so that the scheduler and its tests need neither a model nor a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LogitsRow = npt.NDArray[np.float32]
LogitsProcessor = Callable[[Sequence[int], LogitsRow], "LogitsRow | None"]
"""`processor(output_token_ids, row)` edits the logits row [V] in place or returns another one."""

LOWEST = float(np.finfo(np.float32).min)
"""Log-probability of a token that cannot come: JSON has no infinity (upstream clips alike)."""

MOST_CANDIDATES = 256
GREEDY_TOP_P = 1e-5
TINY_TEMPERATURE = 1e-3  # below it logits are shifted by their largest before they are divided


@dataclass(slots=True)
class SamplerParams:
    """Sampling numbers of one request, every default already resolved.

    Attributes:
        temperature: 0 means greedy.
        top_p: nucleus mass in [0, 1]; at most 1e-5 means greedy.
        top_k: candidates kept; 0 or -1 keeps all.
        min_p: tokens below `min_p` times the best probability are dropped.
        repetition_penalty: applies to prompt and output tokens; 1 is off.
        frequency_penalty, presence_penalty: apply to output tokens; 0 is off.
        seed: key of the request's random stream; the step index is its counter.
        logit_bias: token id -> additive bias.
        banned_ids: tokens that can never be sampled (bad words).
        logprobs: alternatives to report per sampled token; None reports nothing, -1 the vocabulary.
        prompt_logprobs: the same for the prompt's tokens.
        temp_scaled_logprobs: raw log-probabilities are taken after dividing by the temperature.
        top_p_normalized_logprobs: they are renormalised over the nucleus.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    logit_bias: dict[int, float] | None = None
    banned_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    temp_scaled_logprobs: bool = False
    top_p_normalized_logprobs: bool = False

    @property
    def uses_penalties(self) -> bool:
        """Whether token occurrences have to be counted for this request."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
        )


@dataclass(slots=True)
class SequenceSlice:
    """The tokens of one sequence that one step computes.

    Attributes:
        request_id: names the sequence in errors.
        slot: row of the runner's tables, 0 <= slot < max_num_seqs, unique in a step.
        fresh: the slot is newly assigned or re-admitted; the runner rebuilds its rows.
        token_ids: tokens to compute now, at least one.
        start: tokens of the sequence that are in the KV cache already.
        block_table: KV blocks of the sequence; only appended to until the slot is fresh again.
        sample: whether the last token's logits give a new token.
        prompt_token_ids, output_token_ids: the whole history, by reference.
        sampling: numbers of the request, fixed while the slot is not fresh.
        step: index of the token to be sampled, counter of the random stream.
        banned_now: tokens banned in this step only (end of sequence below `min_tokens`).
        forced_token: id that is returned whatever the logits say; -1 samples.
        bitmask: int32 [ceil(V / 32)], bit set = token allowed; None allows all.
        logits_processors: called in order on this sequence's row before the penalties.
        draft_token_ids: guesses, which `token_ids` ends with. Each is checked: the position before
            it is sampled as if the guess were not known, and it counts if that gives the same.
        draft_bitmasks: what `bitmask` becomes after each guess; None allows all everywhere.
        num_banned_now: sampled positions that `banned_now` holds for.
        num_drafts: tokens that the draft model is to guess after the new ones, at most.
        feeds_draft: whether the draft model reads the step; the same for all slices of one.
        known_candidates: `candidates`, where not all is known that it depends on.
    """

    request_id: str
    slot: int
    fresh: bool
    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    sample: bool
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    sampling: SamplerParams
    step: int = 0
    banned_now: tuple[int, ...] = ()
    forced_token: int = -1
    bitmask: npt.NDArray[np.int32] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    draft_token_ids: Sequence[int] = ()
    draft_bitmasks: Sequence[npt.NDArray[np.int32] | None] | None = None
    num_banned_now: int = 1
    num_drafts: int = 0
    feeds_draft: bool = True
    known_candidates: int | None = None

    @property
    def candidates(self) -> int:
        """Best tokens of a row, by logit over temperature, that decide what is sampled; 0: any may.

        Of so many at least `top_k` (or one, where the best is taken) keep their logits, since all
        that is done before only lowers those of certain tokens.
        """
        if self.known_candidates is not None:
            return self.known_candidates
        params = self.sampling
        is_plain = params.logprobs is None and self.bitmask is None and not self.logits_processors
        lowers = params.repetition_penalty >= 1.0 and params.frequency_penalty >= 0.0
        lowers = lowers and params.presence_penalty >= 0.0
        bias = params.logit_bias or {}
        tiny = 0.0 < params.temperature < TINY_TEMPERATURE
        if self.draft_token_ids or not is_plain or not lowers or tiny:
            return 0
        if any(value > 0.0 for value in bias.values()):
            return 0
        is_greedy = params.temperature == 0.0 or params.top_p <= GREEDY_TOP_P
        kept = 1 if is_greedy else max(0, params.top_k)
        lowered = len(bias) + len(params.banned_ids) + len(self.banned_now)
        if params.uses_penalties:
            lowered += len(self.prompt_token_ids) + len(self.output_token_ids)
        return kept + lowered if 0 < kept <= MOST_CANDIDATES - lowered else 0

    @property
    def num_rows(self) -> int:
        """Positions whose logits are sampled."""
        return len(self.draft_token_ids) + 1 if self.sample else 0


@dataclass(slots=True)
class GuessedPosition:
    """A position of a slice, behind guesses that are taken for right; a step has many.

    Attributes:
        slot, sampling, step, output_token_ids, banned_now, forced_token, bitmask,
            logits_processors: as of a `SequenceSlice` that ended there; sampling reads no more.
    """

    slot: int
    sampling: SamplerParams
    step: int
    output_token_ids: Sequence[int]
    banned_now: tuple[int, ...]
    forced_token: int
    bitmask: npt.NDArray[np.int32] | None
    logits_processors: Sequence[LogitsProcessor] | None


SampledPart = SequenceSlice | GuessedPosition
"""What one row of logits is sampled for."""


@dataclass(slots=True)
class TokenLogprobs:
    """Natural-log probabilities of one token and of the best alternatives.

    Attributes:
        logprob: of the token itself.
        rank: 1 when no token is more likely.
        top_ids, top_logprobs: the most likely tokens, best first.
    """

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


NOT_NUMBERS = "the model's logits are not numbers"  # or every token is forbidden


@dataclass(slots=True)
class SliceResult:
    """What one slice gave.

    Attributes:
        token_ids: the sampled tokens in order: none when the slice did not sample, else one and
            those sampled after guesses that were right.
        logprobs: of each sampled token when the request asked for them.
        prompt_logprobs: entry i is about prompt token `start + i + 1`; the prompt's first token has
            no prediction and the last position predicts an output token, so all chunks together
            hold len(prompt) - 1 entries.
        error: one line when this sequence alone failed (its logits were not numbers, or a logits
            processor raised); the others of the step are sound.
        draft_token_ids: what the draft model thinks comes after `token_ids`.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    draft_token_ids: Sequence[int] = ()
