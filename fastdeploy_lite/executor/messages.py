"""What the first rank tells the others, and what they answer: msgpack over a pair of sockets."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fastdeploy_lite.config import RuntimeConfig
from fastdeploy_lite.request.step import SamplerParams, SequenceSlice


class Start(msgspec.Struct):
    """What a rank is to run, sent first.

    Attributes:
        config: of this rank.
        memory_fd, widest: see `SharedMemory`.
        threads: of ops.
        on_cards: whether each rank has a card.
    """

    config: RuntimeConfig
    memory_fd: int
    widest: int
    threads: int
    on_cards: bool


class RankSlice(msgspec.Struct, array_like=True):
    """A `SequenceSlice` without what only sampling needs.

    Attributes:
        slot, fresh, token_ids, start, sample: see SequenceSlice.
        new_blocks: blocks that were appended since the sequence's last step; all if fresh.
        num_drafts: how many of `token_ids` are guesses.
        scored_prompt: length of a prompt whose log-probabilities are wanted, 0 for none.
        candidates: see SequenceSlice; 0 where it does not sample.
        temperature: where there are candidates.
        feeds_draft: see SequenceSlice.
    """

    slot: int
    fresh: bool
    token_ids: list[int]
    start: int
    sample: bool
    new_blocks: list[int]
    num_drafts: int = 0
    scored_prompt: int = 0
    candidates: int = 0
    temperature: float = 1.0
    feeds_draft: bool = True


class Step(msgspec.Struct, tag=True):
    """Compute this, together with all ranks."""

    slices: list[RankSlice]


class CountBlocks(msgspec.Struct, tag=True):
    """Say how many KV blocks there is room for, now that all ranks have loaded."""


class Allocate(msgspec.Struct, tag=True):
    """Allocate the KV cache."""

    num_blocks: int


class Loaded(msgspec.Struct, tag=True):
    """The model is loaded."""

    seconds: float


class Blocks(msgspec.Struct, tag=True):
    """There is room for so many KV blocks."""

    count: int


class Held(msgspec.Struct, tag=True):
    """The KV cache is allocated; bytes by role."""

    memory: dict[str, int]


class StepFailed(msgspec.Struct, tag=True):
    """A step was not sound; `reason` is "" where another rank is the cause."""

    reason: str


class RankFatal(msgspec.Struct, tag=True):
    """Last words of a rank. `is_users`: the fault is the user's, and the text says what to do."""

    reason: str
    is_users: bool


ToRank = Step | CountBlocks | Allocate
FromRank = Loaded | Blocks | Held | StepFailed | RankFatal


def encode_start(start: Start) -> bytes:
    """Return the message."""
    return msgspec.msgpack.encode(start, enc_hook=str)  # paths


def decode_start(raw: bytes) -> Start:
    """Return what was encoded; ValidationError if it is anything else."""
    return msgspec.msgpack.decode(raw, type=Start, dec_hook=lambda kind, text: kind(text))


class SliceWriter:
    """Turns the slices of steps into messages; remembers which blocks every slot has sent."""

    def __init__(self) -> None:
        self._sent: dict[int, int] = {}

    def step(self, slices: Sequence[SequenceSlice]) -> Step:
        """Return the message for the slices of one step."""
        return Step([self._slice(part) for part in slices])

    def _slice(self, part: SequenceSlice) -> RankSlice:
        known = 0 if part.fresh else self._sent.get(part.slot, 0)
        table = part.block_table
        self._sent[part.slot] = len(table)
        candidates = part.candidates if part.sample else 0
        return RankSlice(
            part.slot,
            part.fresh,
            list(part.token_ids),
            part.start,
            part.sample,
            list(table[known:]),
            len(part.draft_token_ids),
            0 if part.sampling.prompt_logprobs is None else len(part.prompt_token_ids),
            candidates,
            part.sampling.temperature if candidates else 1.0,
            part.feeds_draft,
        )


class SliceReader:
    """The other end of `SliceWriter`."""

    def __init__(self) -> None:
        self._tables: dict[int, list[int]] = {}

    def slices(self, step: Step) -> list[SequenceSlice]:
        """Return the slices of a step, as a rank that does not sample needs them."""
        return [self._slice(part) for part in step.slices]

    def _slice(self, part: RankSlice) -> SequenceSlice:
        if part.fresh:
            self._tables[part.slot] = []
        table = self._tables[part.slot]
        table += part.new_blocks
        drafts = part.token_ids[len(part.token_ids) - part.num_drafts :]
        return SequenceSlice(
            request_id=f"in slot {part.slot}",
            slot=part.slot,
            fresh=part.fresh,
            token_ids=part.token_ids,
            start=part.start,
            block_table=table,
            sample=part.sample,
            prompt_token_ids=[0] * part.scored_prompt,
            output_token_ids=(),
            sampling=SamplerParams(
                part.temperature, prompt_logprobs=0 if part.scored_prompt else None
            ),
            draft_token_ids=drafts,
            feeds_draft=part.feeds_draft,
            known_candidates=part.candidates,
        )
