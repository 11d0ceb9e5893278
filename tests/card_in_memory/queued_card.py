"""The sampling kernels of a card on its queue: the CPU's ops, when their turn comes.

What a kernel reads and writes is what lies at its addresses then, so a copy that is queued too late
or an array that is written too early changes the tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from place import FakeCuda, when_synchronized

View = tuple[int, str, list[int], list[int]]


def view(address: int, dtype: str, *shape: int) -> View:
    strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    return address, dtype, list(shape), strides


class QueuedCard(FakeCuda):
    """Stands for fastdeploy_lite._ops_cuda where no layer of a model is computed."""

    max_top_logprobs = 20

    def __init__(self, slots: int) -> None:
        """Args: slots: rows of the table of occurrences."""
        super().__init__()
        self.slots = slots
        when_synchronized(self.synchronize)

    def allow_early_start(self, allowed: bool) -> None:
        pass

    def gather_rows(
        self, x: int, rows: int, out: int, count: int, row_bytes: int, source_rows: int, stream: int
    ) -> None:
        def work() -> None:
            for to, row in enumerate((ctypes.c_int32 * count).from_address(rows)):
                assert 0 <= row < source_rows
                ctypes.memmove(out + to * row_bytes, x + row * row_bytes, row_bytes)

        self.put(work)

    def mask_logits(
        self, logits: int, bits: int, owners: int, rows: int, vocab: int, words: int, stream: int
    ) -> None:
        masks = view(bits, "int32", rows, words), view(owners, "int32", rows)
        self._put("mask_logits", view(logits, "float32", rows, vocab), *masks)

    def process_logits(self, logits: int, *rest: int) -> None:
        slots, occurrences, *factors, offsets, ids, values, rows, vocab, _ = rest

        def work() -> None:
            edits = (ctypes.c_int32 * (rows + 1)).from_address(offsets)[rows]
            seen = view(occurrences, "int32", self.slots, vocab) if occurrences else None
            _native("process_logits")(
                view(logits, "float32", rows, vocab),
                view(slots, "int32", rows),
                seen,
                *(view(factor, "float32", rows) for factor in factors),
                view(offsets, "int32", rows + 1),
                view(ids, "int32", edits),
                view(values, "float32", edits),
            )

        self.put(work)

    def update_occurrences(
        self,
        occurrences: int,
        slots: int,
        ids: int,
        count: int,
        prompt: bool,
        slot_count: int,
        vocab: int,
        stream: int,
    ) -> None:
        table = view(occurrences, "int32", slot_count, vocab)
        pairs = view(slots, "int32", count), view(ids, "int32", count)
        self._put("update_occurrences", table, *pairs, prompt)

    def sample(self, logits: int, *rest: int) -> None:
        *inputs, out, rows, vocab, _ = rest
        dtypes = ("float32", "int32", "float32", "float32", "int64", "int64", "int32")
        named = [view(each, dtype, rows) for each, dtype in zip(inputs, dtypes, strict=True)]
        self._put("sample", view(logits, "float32", rows, vocab), *named, view(out, "int32", rows))

    def token_logprobs(self, logits: int, tokens: int, k: int, *rest: int) -> None:
        logprob, rank, ids, logprobs, rows, vocab, _ = rest
        self._put(
            "token_logprobs",
            view(logits, "float32", rows, vocab),
            view(tokens, "int32", rows),
            k,
            view(logprob, "float32", rows),
            view(rank, "int32", rows),
            view(ids, "int32", rows, k),
            view(logprobs, "float32", rows, k),
        )

    def _put(self, op: str, *arguments: Any) -> None:
        self.put(lambda: _native(op)(*arguments))


def _native(op: str) -> Callable[..., None]:
    from fastdeploy_lite.model_executor.ops._dispatch import native

    found: Callable[..., None] = native("cpu", op)
    return found
