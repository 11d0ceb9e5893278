"""The sampling kernels of a card on its queue: the CPU's ops, when their turn comes.

What a kernel reads and writes is what lies at its addresses then, so a copy that is queued too late
or an array that is written too early changes the tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from place import FakeCuda, when_synchronized

View = tuple[int, str, list[int], list[int]]


class QueuedCard(FakeCuda):
    """Stands for fastdeploy_lite._ops_cuda where no layer of a model is computed."""

    max_top_logprobs = 20

    def __init__(self) -> None:
        super().__init__()
        when_synchronized(self.synchronize)

    def allow_early_start(self, allowed: bool) -> None:
        pass

    def gather_rows(self, x: View, rows: View, out: View, stream: int) -> None:
        (source_rows, width), count = x[2], rows[2][0]
        row_bytes = width * (4 if x[1] == "float32" else 2)

        def work() -> None:
            for to, row in enumerate((ctypes.c_int32 * count).from_address(rows[0])):
                assert 0 <= row < source_rows
                ctypes.memmove(out[0] + to * row_bytes, x[0] + row * row_bytes, row_bytes)

        self.put(work)

    def mask_logits(self, logits: View, bitmask: View, owners: View, stream: int) -> None:
        self._put("mask_logits", logits, bitmask, owners)

    def process_logits(self, logits: View, *rest: Any) -> None:
        *vectors, offsets, ids, values, _ = rest

        def work() -> None:
            edits = (ctypes.c_int32 * offsets[2][0]).from_address(offsets[0])[-1]
            named = (head(ids, edits), head(values, edits))
            _native("process_logits")(logits, *vectors, offsets, *named)

        self.put(work)

    def update_occurrences(
        self, occurrences: View, slots: View, ids: View, prompt: bool, stream: int
    ) -> None:
        self._put("update_occurrences", occurrences, slots, ids, prompt)

    def sample(self, *arguments: Any) -> None:
        self._put("sample", *arguments[:-1])

    def token_logprobs(self, *arguments: Any) -> None:
        self._put("token_logprobs", *arguments[:-1])

    def _put(self, op: str, *arguments: Any) -> None:
        self.put(lambda: _native(op)(*arguments))


def head(vector: View, count: int) -> View:
    """Its first elements."""
    address, dtype, _, strides = vector
    return address, dtype, [count], strides


def _native(op: str) -> Callable[..., None]:
    from fastdeploy_lite.model_executor.ops._dispatch import native

    found: Callable[..., None] = native("cpu", op)
    return found
