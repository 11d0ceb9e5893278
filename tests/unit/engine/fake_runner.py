"""A model runner without a model: the next token is a hash of the whole history.

It keeps what each KV block holds and reads the history back through the block table, so that a
block that is shared wrongly, evicted too early or filled twice changes the tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastdeploy_lite.config import BLOCK_SIZE
from fastdeploy_lite.executor.base import Executor, ExecutorReport
from fastdeploy_lite.request.step import SequenceSlice, SliceResult, TokenLogprobs

VOCAB = 1000
FIRST_PLAIN_ID = 10


def next_token(history: Sequence[int], seed: int, step: int, banned: Sequence[int] = ()) -> int:
    """The token that follows a history, whatever the schedule."""
    counter = 0
    while True:
        text = f"{list(history)}|{seed}|{step}|{counter}".encode()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")
        token = FIRST_PLAIN_ID + digest % (VOCAB - FIRST_PLAIN_ID)
        if token not in banned:
            return token
        counter += 1


@dataclass
class FakeRunner(Executor):
    """See the module; `eos_every` makes about one token in so many the EOS id 2.

    Attributes:
        limit: Tokens allowed in a step; exceeding it is an error.
        failing: Request ids for which a step raises.
        steps: Slices of every step, as (request id, start, number of tokens).
    """

    num_blocks: int
    limit: int = 1 << 30
    eos_every: int = 0
    failing: set[str] = field(default_factory=set)
    steps: list[list[tuple[str, int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.blocks: list[list[int | None]] = [[None] * BLOCK_SIZE for _ in range(self.num_blocks)]
        self.slots: dict[int, str] = {}

    def load(self, show_progress: bool = False) -> int:
        return self.num_blocks

    def report(self) -> ExecutorReport:
        return ExecutorReport(self.num_blocks, 0.0, "none")

    def execute(self, slices: Sequence[SequenceSlice]) -> list[SliceResult]:
        assert slices
        assert sum(len(part.token_ids) for part in slices) <= self.limit
        assert len({part.slot for part in slices}) == len(slices)
        failing = [part.request_id for part in slices if part.request_id in self.failing]
        if failing:
            raise FloatingPointError(f"cannot compute {failing}")
        self.steps.append([(p.request_id, p.start, len(p.token_ids)) for p in slices])
        for part in slices:
            self._write(part)
        return [self._result(part) for part in slices]

    def _write(self, part: SequenceSlice) -> None:
        if part.fresh:
            self.slots[part.slot] = part.request_id
        assert self.slots[part.slot] == part.request_id, "a slot changed hands without being fresh"
        assert len(set(part.block_table)) == len(part.block_table)
        for offset, token in enumerate(part.token_ids):
            block, place = divmod(part.start + offset, BLOCK_SIZE)
            self.blocks[part.block_table[block]][place] = token

    def _history(self, part: SequenceSlice) -> list[int]:
        end = part.start + len(part.token_ids)
        places = (divmod(i, BLOCK_SIZE) for i in range(end))
        read = [self.blocks[part.block_table[block]][place] for block, place in places]
        known = [*part.prompt_token_ids, *part.output_token_ids][:end]
        assert read == known, f"{part.request_id}: the KV blocks hold another history"
        return known

    def _result(self, part: SequenceSlice) -> SliceResult:
        history = self._history(part)
        result = SliceResult()
        if part.sampling.prompt_logprobs is not None:
            positions = range(part.start + 1, part.start + len(part.token_ids) + 1)
            result.prompt_logprobs = [
                TokenLogprobs(-float(p), 1, [], [])
                for p in positions
                if p < len(part.prompt_token_ids)
            ]
        if not part.sample:
            return result
        assert len(history) == len(part.prompt_token_ids) + len(part.output_token_ids)
        assert part.step == len(part.output_token_ids)
        token = part.forced_token if part.forced_token >= 0 else self._sample(part)
        result.token_ids = [token]
        if part.sampling.logprobs is not None:
            result.logprobs = [TokenLogprobs(-0.001, 1, [token], [-0.001])]
        return result

    def _sample(self, part: SequenceSlice) -> int:
        history = [*part.prompt_token_ids, *part.output_token_ids]
        token = next_token(history, part.sampling.seed, part.step)
        wants_end = self.eos_every and token % self.eos_every == 0
        if wants_end and 2 not in part.banned_now:
            return 2
        return next_token(history, part.sampling.seed, part.step, part.banned_now)
