"""Logits of several ranks, of which only the best tokens of each rank travel.

Enough for greedy rows and for those with `top_k`, see `SequenceSlice.candidates`. Between CPU
processes and hosts: on cards a kernel that finds them takes as long as NVLink does for all logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle

from fastdeploy_lite.distributed.communicator import Communicator
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.workspace import Workspace
from fastdeploy_lite.request.step import SequenceSlice

SMALLEST_SAVING = 8
"""All logits are gathered unless the candidates are this many times fewer."""


class CandidateRows:
    """Rows of logits in which the candidates stand; all other tokens are at -inf.

    The sampler takes them like any rows, which gives the same tokens: what bans, penalties and
    temperature leave of -inf is -inf.
    """

    def __init__(self, communicator: Communicator, vocab_size: int) -> None:
        """Args: communicator: to the other ranks, which have equal shares of the vocabulary."""
        self._communicator = communicator
        self._vocab_size = vocab_size
        self._workspace = Workspace(paddle.CPUPlace())
        self._rows: Any = None
        self._filled: Any = ()

    def count(self, slices: Sequence[SequenceSlice]) -> int:
        """Candidates that each rank has to name for these slices, which sample; 0: all logits."""
        counts = [part.candidates for part in slices]
        share = self._vocab_size // self._communicator.size
        most = max(counts, default=0)
        return most if all(counts) and most * SMALLEST_SAVING <= share else 0

    def gather(self, own: Any, slices: Sequence[SequenceSlice], count: int) -> Any:
        """Return the rows [R, V] on the first rank; None on the others.

        Args:
            own: float32 [R, V / ranks], this rank's logits.
            slices: of the rows.
            count: from `count`.

        Raises:
            PeerFailedError, PeerLostError: the others' will not come.
        """
        rows, ranks = len(slices), self._communicator.size
        get = self._workspace.get
        temperature = get("temperature", [rows], "float32")
        ops.host_array(temperature)[:] = [part.sampling.temperature for part in slices]
        ids, values = get("ids", [rows, count], "int32"), get("values", [rows, count], "float32")
        ops.best_logits(own, temperature, ids, values)
        packed = get("packed", [rows, 2 * count], "float32")
        found = get("found", [rows, 2 * count * ranks], "float32")
        array = ops.host_array(packed)
        array[:, :count] = ops.host_array(ids)  # exact: ids are below 2^20
        array[:, count:] = ops.host_array(values)
        self._communicator.all_gather(packed, [2 * count] * ranks, found)
        if self._communicator.rank:
            return None
        parts = ops.host_array(found).reshape(rows, ranks, 2, count)
        first = np.arange(ranks)[:, None] * (self._vocab_size // ranks)
        return self._fill(parts[:, :, 0].astype(np.int64) + first, parts[:, :, 1])

    def _fill(self, ids: Any, values: Any) -> Any:
        """Put [R, ranks, k] candidates in their places."""
        rows = len(ids)
        if self._rows is None or self._rows.shape[0] < rows:
            self._rows = paddle.empty([rows, self._vocab_size], "float32", device=paddle.CPUPlace())
            ops.host_array(self._rows)[...] = -np.inf
            self._filled = ()
        table = ops.host_array(self._rows)
        if len(self._filled):
            table[np.arange(len(self._filled))[:, None, None], self._filled] = -np.inf
        table[np.arange(rows)[:, None, None], ids] = values
        found, self._filled = self._rows[:rows], ids
        if not np.isfinite(values).all():  # the sampler may write all over a row of no numbers
            self._rows = None
        return found
