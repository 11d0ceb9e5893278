"""From the scheduler's slices to the arrays that the forward pass reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdeploy_lite.config import BLOCK_SIZE
from fastdeploy_lite.model_executor.static_buffers import PackedBuffer
from fastdeploy_lite.request.step import SequenceSlice


@dataclass(frozen=True)
class BatchShape:
    """Sizes of one prepared step.

    Attributes:
        num_tokens: T, tokens of all slices.
        num_seqs: B, slices.
        decode_only: every slice has one token, so a graph of B tokens can replay the step.
    """

    num_tokens: int
    num_seqs: int
    decode_only: bool


class InputBatch:
    """Static input arrays and the block table of every slot.

    Block tables live here by slot; a step copies the rows it needs, and a slice that is not fresh
    only hands over the blocks that were appended since its last step. Most decode steps continue
    the one before: their arrays are filled while the device still computes that one, all but the
    tokens and new blocks.
    """

    def __init__(
        self,
        max_tokens: int,
        max_seqs: int,
        max_model_len: int,
        vocab_size: int,
        place: Any,
        max_logit_rows: int | None = None,
        max_spread: int = 0,
    ) -> None:
        """Args: the limits of one step and of one sequence; place: where the tensors live;
        max_logit_rows: positions that are sampled, one a sequence by default; max_spread: most
        tokens of a step that `spread` takes apart."""
        self.max_tokens = max_tokens
        self.max_seqs = max_seqs
        self.vocab_size = vocab_size
        self.num_blocks = 0
        width = -(-max_model_len // BLOCK_SIZE)
        rows = max(max_seqs, max_spread)
        self._tables = np.zeros((max_seqs, width), np.int32)
        self._filled = np.zeros(max_seqs, np.int64)
        self._decoding: list[int] = []  # slots of the step in the arrays if it only decodes
        self._expected: list[tuple[int, int, int]] = []  # slot, start, blocks of the next step
        self._padded: tuple[int, int] | None = None
        self.buffer = PackedBuffer(
            {
                "cu_seqlens_q": ([rows + 1], "int32"),
                "context_lens": ([rows], "int32"),
                "logit_rows": ([max(max_logit_rows or max_seqs, rows)], "int32"),
                "token_ids": ([max_tokens], "int32"),
                "positions": ([max_tokens], "int32"),
                "slot_mapping": ([max_tokens], "int32"),
                "block_tables": ([rows, width], "int32"),
            },
            place,
        )

    def prepare(self, slices: Sequence[SequenceSlice]) -> BatchShape:
        """Fill the host arrays for `slices`, in their order.

        Raises:
            ValueError: the step exceeds a limit or names a token or block that does not exist.
        """
        if self._continues(slices):
            return BatchShape(len(slices), len(slices), True)
        self._decoding, self._expected, self._padded = [], [], None
        lengths = np.array([len(part.token_ids) for part in slices], np.int64)
        starts = np.array([part.start for part in slices], np.int64)
        slots = np.array([part.slot for part in slices], np.int64)
        total = int(lengths.sum())
        self._check_limits(len(slices), total, lengths)
        self._update_tables(slices)
        self._fill_sequences(lengths, starts, slots)
        self._fill_tokens(slices, lengths, total)
        self._fill_positions(lengths, starts, slots, total)
        if total == len(slices):
            self._decoding = slots.tolist()
        return BatchShape(total, len(slices), total == len(slices))

    def prepare_next(self) -> None:
        """After a decode step was uploaded: fill in what one more token of each sequence needs."""
        count = len(self._decoding)
        if not count:
            return
        host, slots = self.buffer.host, np.array(self._decoding)
        positions = host["positions"][:count]
        positions += 1
        host["context_lens"][:count] += 1
        filled = self._filled[slots]
        known = np.minimum(positions // BLOCK_SIZE, filled - 1)
        blocks = self._tables[slots, known]
        host["slot_mapping"][:count] = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        self._expected = list(zip(self._decoding, positions.tolist(), filled.tolist(), strict=True))

    def _continues(self, slices: Sequence[SequenceSlice]) -> bool:
        """Whether this is the step that `prepare_next` expected; if so, fill in what it lacks.

        Anything else, faults included, is left to the long way.
        """
        expected, self._expected = self._expected, []
        if not slices or len(slices) != len(expected):
            return False
        tokens = [0] * len(slices)
        grown = []
        for row, (part, (slot, start, blocks)) in enumerate(zip(slices, expected, strict=True)):
            if part.slot != slot or part.start != start or part.fresh or len(part.token_ids) != 1:
                return False
            tokens[row] = part.token_ids[0]
            if not 0 <= tokens[row] < self.vocab_size:
                return False
            if len(part.block_table) != blocks:
                grown.append(row)
            elif start >= blocks * BLOCK_SIZE:
                return False
        if not all(self._grow(row, slices[row]) for row in grown):
            return False
        self.buffer.host["token_ids"][: len(tokens)] = tokens
        return True

    def _grow(self, row: int, part: SequenceSlice) -> bool:
        """Take a sequence's new blocks; False if its token has no block even so."""
        self._update_tables([part])
        block, offset = divmod(part.start, BLOCK_SIZE)
        if block >= self._filled[part.slot]:
            return False
        table, host = self._tables[part.slot], self.buffer.host
        host["block_tables"][row] = table
        host["slot_mapping"][row] = table[block] * BLOCK_SIZE + offset
        return True

    def spread(self, shape: BatchShape) -> None:
        """Make a prepared step of T tokens one of T sequences with one token each.

        Every token sees what it saw before: its sequence up to itself. Such a step fits a graph,
        whose number of tokens a sequence is fixed. At most `max_spread` tokens.
        """
        host, total = self.buffer.host, shape.num_tokens
        lengths = np.diff(host["cu_seqlens_q"][: shape.num_seqs + 1])
        owners = np.repeat(np.arange(shape.num_seqs), lengths)
        host["block_tables"][:total] = host["block_tables"][owners]
        host["context_lens"][:total] = host["positions"][:total] + 1
        host["cu_seqlens_q"][: total + 1] = np.arange(total + 1)

    def pad_decode(self, num_seqs: int, bucket: int) -> None:
        """Extend a step of single tokens to `bucket` sequences for a graph of that size.

        A padding sequence is token 0 at position 0 with a context of one token in block 0; it
        writes nothing (slot -1), and its results are never read.
        """
        if self._padded == (num_seqs, bucket):
            return
        self._padded = (num_seqs, bucket)
        host = self.buffer.host
        extra = slice(num_seqs, bucket)
        host["cu_seqlens_q"][num_seqs + 1 : bucket + 1] = np.arange(num_seqs + 1, bucket + 1)
        host["context_lens"][extra] = 1
        host["token_ids"][extra] = 0
        host["positions"][extra] = 0
        host["slot_mapping"][extra] = -1
        host["block_tables"][extra] = 0
        host["logit_rows"][extra] = np.arange(num_seqs, bucket)

    def upload(self, num_seqs: int) -> None:
        """Copy what a step of so many sequences, padding included, reads.

        The block tables of all slots are most of the bytes: 512 KB for 64 of 131,072 tokens.
        """
        self.buffer.upload("block_tables", num_seqs)

    def _check_limits(self, count: int, total: int, lengths: np.ndarray[Any, Any]) -> None:
        if not 0 < count <= self.max_seqs:
            raise ValueError(f"a step has {count} sequences, the limit is {self.max_seqs}")
        if not 0 < total <= self.max_tokens or lengths.min() < 1:
            raise ValueError(f"a step has {total} tokens, the limit is {self.max_tokens}")

    def _update_tables(self, slices: Sequence[SequenceSlice]) -> None:
        for part in slices:
            slot = part.slot
            known = 0 if part.fresh else int(self._filled[slot])
            count = len(part.block_table)
            if count == known:
                continue
            new = part.block_table[known:count]
            if count > self._tables.shape[1] or min(new) < 0 or max(new) >= self.num_blocks:
                raise ValueError(
                    f"request {part.request_id}: block table of {count} blocks, at most "
                    f"{self._tables.shape[1]} ids below {self.num_blocks} are possible"
                )
            self._tables[slot, known:count] = new
            self._filled[slot] = count

    def _fill_sequences(
        self,
        lengths: np.ndarray[Any, Any],
        starts: np.ndarray[Any, Any],
        slots: np.ndarray[Any, Any],
    ) -> None:
        host, count = self.buffer.host, len(lengths)
        ends = starts + lengths
        short = ends > self._filled[slots] * BLOCK_SIZE
        if short.any():
            slot = int(slots[short.argmax()])
            raise ValueError(f"slot {slot}: its block table is too short for the step's tokens")
        host["cu_seqlens_q"][0] = 0
        np.cumsum(lengths, out=host["cu_seqlens_q"][1 : count + 1])
        host["context_lens"][:count] = ends
        np.take(self._tables, slots, axis=0, out=host["block_tables"][:count])

    def _fill_tokens(
        self, slices: Sequence[SequenceSlice], lengths: np.ndarray[Any, Any], total: int
    ) -> None:
        tokens = self.buffer.host["token_ids"]
        if total == len(slices):
            tokens[:total] = [part.token_ids[0] for part in slices]
        else:
            begin = 0
            for part, length in zip(slices, lengths, strict=True):
                tokens[begin : begin + length] = part.token_ids
                begin += int(length)
        used = tokens[:total]
        if used.min() < 0 or used.max() >= self.vocab_size:
            bad = int(used[(used < 0) | (used >= self.vocab_size)][0])
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")

    def _fill_positions(
        self,
        lengths: np.ndarray[Any, Any],
        starts: np.ndarray[Any, Any],
        slots: np.ndarray[Any, Any],
        total: int,
    ) -> None:
        host = self.buffer.host
        if total == len(lengths):
            positions, owners = starts, slots
        else:
            first = np.cumsum(lengths) - lengths
            positions = np.repeat(starts - first, lengths) + np.arange(total)
            owners = np.repeat(slots, lengths)
        host["positions"][:total] = positions
        blocks = self._tables[owners, positions // BLOCK_SIZE]
        host["slot_mapping"][:total] = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
