"""Which tokens of which sequences the next step computes.

Continuous batching: every step, each decoding sequence computes one token, and what is left of the
token budget goes to prefill chunks, first come first served. A sequence gets the blocks of all its
known tokens when it is admitted, so that only decoding can run out of blocks; then the sequence
admitted last gives up its blocks, returns to the front of the queue and is recomputed later.

A prefix that a step is just computing is computed once: who could use it next waits for that step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum

from fastdeploy_lite.config import SchedulerConfig
from fastdeploy_lite.engine.kv_cache import BlockManager, Digest, DigestChain, token_range
from fastdeploy_lite.request.messages import EngineRequest


class Status(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One sequence on its way through the engine.

    Attributes:
        request: What was asked; its prompt tokens are shared, not copied.
        output_token_ids: Tokens generated so far.
        block_table: KV blocks, in order.
        num_computed: Tokens whose keys and values are in the blocks.
        slot: Row in the model runner's tables; -1 while waiting.
        fresh: Whether the slot is new to this sequence.
        num_cached_tokens: Prompt tokens that came from the prefix cache at first admission.
        preempted: Whether it waits because it was preempted.
        can_use_prefix: False when every prompt position must be computed (prompt_logprobs).
    """

    __slots__ = (
        "_chain", "_num_published", "block_table", "can_use_prefix", "fresh", "num_cached_tokens",
        "num_computed", "output_token_ids", "preempted", "prompt_token_ids", "request", "slot",
        "status",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, block_size: int) -> None:
        self.request = request
        self.prompt_token_ids = request.prompt_token_ids
        self.output_token_ids: list[int] = []
        self.block_table: list[int] = []
        self.num_computed = 0
        self.slot = -1
        self.fresh = True
        self.num_cached_tokens = 0
        self.preempted = False
        self.can_use_prefix = request.sampling.sampler.prompt_logprobs is None
        self.status = Status.WAITING
        self._chain = DigestChain(block_size)
        self._num_published = 0

    @property
    def request_id(self) -> str:
        """Name of the request."""
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_to_compute(self) -> int:
        """Known tokens that are not in the blocks yet."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) - self.num_computed

    def next_tokens(self, count: int) -> list[int]:
        """The next `count` tokens to compute."""
        start = self.num_computed
        output = self.output_token_ids
        return list(token_range(self.prompt_token_ids, output, start, start + count))

    def findable_prefix(self, blocks: BlockManager) -> list[int]:
        """Cached blocks this sequence can start from; at least one token is left to compute."""
        if not (blocks.enable_prefix_caching and self.can_use_prefix):
            return []
        count = (self.num_tokens - 1) // blocks.block_size
        digests = self._chain.up_to(count, self.prompt_token_ids, self.output_token_ids)
        return blocks.find_prefix(digests[:count])

    def is_next_computed(
        self, blocks: BlockManager, prefix: list[int], coming: set[Digest]
    ) -> bool:
        """Whether the block after `prefix` is among those that others are computing."""
        if not (blocks.enable_prefix_caching and self.can_use_prefix):
            return False
        count = (self.num_tokens - 1) // blocks.block_size
        if len(prefix) >= count:
            return False
        digests = self._chain.up_to(count, self.prompt_token_ids, self.output_token_ids)
        return digests[len(prefix)] in coming

    def completed_by(self, count: int, block_size: int) -> list[Digest]:
        """Digests of the prompt's blocks that `count` more computed tokens fill."""
        first = self.num_computed // block_size
        last = min(self.num_computed + count, len(self.prompt_token_ids)) // block_size
        return self._chain.up_to(last, self.prompt_token_ids, self.output_token_ids)[first:last]

    def publish(self, blocks: BlockManager, most_tokens: int) -> None:
        """Make the full blocks among the first `most_tokens` computed tokens findable."""
        count = min(self.num_computed, most_tokens) // blocks.block_size
        if count <= self._num_published:
            return
        digests = self._chain.up_to(count, self.prompt_token_ids, self.output_token_ids)
        for i in range(self._num_published, count):
            blocks.publish(self.block_table[i], digests[i])
        self._num_published = count

    def start(self, table: list[int], num_cached: int, slot: int) -> None:
        """Begin (again) with a block table whose first `num_cached` tokens are computed."""
        if not self.preempted:
            self.num_cached_tokens = num_cached
        self.block_table = table
        self.num_computed = num_cached
        self._num_published = 0
        self.slot, self.fresh, self.preempted = slot, True, False
        self.status = Status.RUNNING

    def most_new_blocks(self, block_size: int) -> int:
        """Blocks it may still ask for until its length limit."""
        longest = len(self.prompt_token_ids) + self.request.sampling.max_tokens
        return max(-(-longest // block_size) - len(self.block_table), 0)


class Scheduler:
    """Queue, running sequences and KV blocks.

    Args:
        config: Limits.
        blocks: The KV blocks.
        reserve: Blocks kept free per running sequence when another one is admitted.
        cache_outputs: Whether blocks with generated tokens can be found again.
        on_preempt: Called with each sequence that is preempted.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        *,
        reserve: int = 2,
        cache_outputs: bool = True,
        on_preempt: Callable[[Sequence], None] | None = None,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of admission
        self.num_preemptions = 0
        self.prefix_queries = self.prefix_hits = 0
        self.prefix_query_tokens = self.prefix_hit_tokens = 0
        self._reserve = reserve
        self._cache_outputs = cache_outputs
        self._on_preempt = on_preempt
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))

    @property
    def has_sequences(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def num_preempted(self) -> int:
        """Sequences that wait because they were preempted; they are at the front of the queue."""
        count = 0
        for sequence in self.waiting:
            if not sequence.preempted:
                break
            count += 1
        return count

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free what it holds.  Idempotent."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._vacate(sequence)
        elif sequence.status is Status.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED

    def schedule(self) -> list[tuple[Sequence, int]]:
        """Choose the next step.

        Returns:
            Sequences and how many tokens of each to compute: at most `max_num_batched_tokens`
            together, decodes first, then prefills in the order of admission.
        """
        plan: list[tuple[Sequence, int]] = []
        preemptions = self.num_preemptions
        for sequence in self.running.copy():
            if (
                sequence.status is Status.RUNNING  # not preempted a moment ago
                and sequence.num_to_compute == 1
                and self._has_room(sequence)
            ):
                plan.append((sequence, 1))
        budget = self.config.max_num_batched_tokens - len(plan)
        for sequence in self.running:
            if budget and sequence.num_to_compute > 1:
                count = min(sequence.num_to_compute, budget)
                plan.append((sequence, count))
                budget -= count
        if self.waiting and self.num_preemptions == preemptions:
            self._admit(plan, budget)
        return plan

    def computed(self, sequence: Sequence, count: int) -> None:
        """Record that `count` more tokens of a sequence are in its blocks."""
        sequence.num_computed += count
        sequence.fresh = False
        most = sequence.num_computed if self._cache_outputs else len(sequence.prompt_token_ids)
        sequence.publish(self.blocks, most)

    def room_for_guesses(self, sequence: Sequence, most: int) -> int:
        """How many guessed tokens, at most `most`, a decoding sequence has KV blocks for.

        Blocks are not taken from anybody: every running sequence could still get its next one.
        """
        size = self.blocks.block_size
        room = len(sequence.block_table) * size - sequence.num_tokens
        while room < most and self.blocks.num_free > len(self.running):
            self.blocks.append(sequence.block_table)
            room += size
        return min(room, most)

    def _has_room(self, sequence: Sequence) -> bool:
        """Make sure that the next token has a block; False when `sequence` itself had to go."""
        if sequence.num_tokens <= len(sequence.block_table) * self.blocks.block_size:
            return True
        while not self.blocks.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        self.blocks.append(sequence.block_table)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._vacate(sequence)
        sequence.status, sequence.preempted = Status.WAITING, True
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
        if self._on_preempt is not None:
            self._on_preempt(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.num_computed = -1, 0

    def _admit(self, plan: list[tuple[Sequence, int]], budget: int) -> None:
        coming: set[Digest] = set()
        known = 0
        while self.waiting and budget and self._free_slots:
            sequence = self.waiting[0]
            prefix = sequence.findable_prefix(self.blocks)
            for other, count in plan[known:]:
                if count > 1:
                    coming.update(other.completed_by(count, self.blocks.block_size))
            known = len(plan)
            if sequence.is_next_computed(self.blocks, prefix, coming):
                return
            num_cached = len(prefix) * self.blocks.block_size
            count = sequence.num_tokens - num_cached
            if count > budget and not self.config.enable_chunked_prefill:
                return
            table = self._table_for(sequence, prefix)
            if table is None:
                return
            self._count_prefix(sequence, num_cached)
            self.waiting.popleft()
            sequence.start(table, num_cached, self._free_slots.pop())
            self.running.append(sequence)
            count = min(count, budget)
            plan.append((sequence, count))
            budget -= count

    def _table_for(self, sequence: Sequence, prefix: list[int]) -> list[int] | None:
        size = self.blocks.block_size
        new = -(-sequence.num_tokens // size) - len(prefix)
        reserve = sum(min(self._reserve, s.most_new_blocks(size)) for s in self.running)
        return self.blocks.allocate(prefix, new, reserve)

    def _count_prefix(self, sequence: Sequence, num_cached: int) -> None:
        if not self.blocks.enable_prefix_caching or sequence.preempted:
            return
        self.prefix_queries += 1
        self.prefix_hits += num_cached > 0
        self.prefix_query_tokens += sequence.num_tokens
        self.prefix_hit_tokens += num_cached

    def check_integrity(self) -> None:
        """Verify blocks, slots and states.

        Raises:
            RuntimeError: Something is lost or counted twice.
        """
        self.blocks.check_integrity(s.block_table for s in self.running)
        slots = sorted([*self._free_slots, *(s.slot for s in self.running)])
        if slots != list(range(self.config.max_num_seqs)):
            raise RuntimeError(f"Scheduler: slots are lost or shared: {slots}")
        if any(s.status is not Status.RUNNING for s in self.running) or any(
            s.status is not Status.WAITING or s.block_table for s in self.waiting
        ):
            raise RuntimeError("Scheduler: a sequence is where its status denies")
