"""Guesses of a draft layer: after every step it reads what the model has read, and goes on alone.

The layer follows the model row by row, so that its own KV cache, which has the same blocks, is
complete. Rows of guesses that turned out wrong are read too; the next step overwrites them before
anything looks there, as it does in the model's cache.

Where several ranks share the layers, the first one, which samples, tells the others what was read
and where to guess; each then finds the same guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastdeploy_lite.config import BLOCK_SIZE
from fastdeploy_lite.distributed.communicator import Communicator
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.layers.forward_batch import ForwardBatch, KVCache
from fastdeploy_lite.model_executor.ops import Weight
from fastdeploy_lite.model_executor.static_buffers import PackedBuffer
from fastdeploy_lite.model_executor.workspace import Workspace
from fastdeploy_lite.request.step import SequenceSlice, SliceResult

Integers = npt.NDArray[np.int32]


class DraftModel(Protocol):
    """A layer that guesses one token further than the model."""

    def __call__(self, batch: ForwardBatch, hidden: Any) -> Any:
        """Hidden states [T, H] from the tokens after, and the hidden states of, T tokens."""

    def logits(self, hidden: Any, workspace: Workspace) -> Any:
        """Logits [R, V] of rows of the above."""

    def weights(self) -> list[Weight]:
        """All matrices that are not the model's."""


@dataclass
class _Guess:
    """One sequence's guess while it grows.

    Attributes:
        index: of the slice.
        position: of the token that was guessed or sampled last.
        most: tokens that are wanted and have room.
        tokens: so far.
    """

    index: int
    position: int
    most: int
    tokens: list[int]


class Drafting:
    """The draft layer of one runner with its buffers.

    Args:
        model: the layer.
        max_tokens, max_seqs, max_model_len: limits of a step.
        place: Paddle place.
        workspace: of the model.
        communicator: to the other ranks, None where there are none.
    """

    def __init__(
        self,
        model: DraftModel,
        max_tokens: int,
        max_seqs: int,
        max_model_len: int,
        place: Any,
        workspace: Workspace,
        communicator: Communicator | None = None,
    ) -> None:
        self.model = model
        self._communicator = communicator
        self._workspace = workspace
        width = -(-max_model_len // BLOCK_SIZE)
        rows = {
            name: ([max_seqs], "int32")
            for name in ("token_ids", "positions", "slot_mapping", "context_lens")
        }
        self._inputs = PackedBuffer(
            {
                "following": ([max_tokens], "int32"),
                **rows,
                "rows": ([max_seqs], "int32"),
                "cu_seqlens_q": ([max_seqs + 1], "int32"),
                "block_tables": ([max_seqs, width], "int32"),
            },
            place,
        )
        self._inputs.host["cu_seqlens_q"][:] = np.arange(max_seqs + 1)
        self._greedy = PackedBuffer(
            {
                "out": ([max_seqs], "int32"),
                **{name: ([max_seqs], dtype) for name, dtype in ops.SAMPLE_ROWS.items()},
            },
            place,
        )
        self._greedy.host["top_p"][:] = 1.0
        self._greedy.host["forced"][:] = -1
        self._greedy.upload()

    def follow(
        self,
        batch: ForwardBatch,
        hidden: Any,
        slices: Sequence[SequenceSlice],
        results: Sequence[SliceResult],
    ) -> None:
        """Read a step that the model has computed, and guess where guesses are wanted.

        Args:
            batch: the step's, its first rows those of `slices` in order.
            hidden: [T, H], what the model returned for it.
            slices: of the step.
            results: theirs; `draft_token_ids` is filled in.
        """
        if self._communicator is None:
            following, plan = _plan(slices, results)
        else:
            following, plan = _plan_of_the_first(self._communicator, slices, results)
        self._inputs.host["following"][: len(following)] = following
        guesses = [_Guess(int(i), int(at), int(most), []) for i, at, most, _ in plan]
        last_rows = plan[:, 3]
        self._inputs.host["rows"][: len(last_rows)] = last_rows
        self._inputs.upload()
        tokens = ops.fix(self._inputs.device["following"][: batch.num_tokens])
        read = self.model(replace(batch, token_ids=tokens), hidden)
        if guesses:
            rows = self._gathered("draft_rows", read, len(guesses))
            self._guess(rows, guesses, slices, batch.kv_caches)
        for guess in guesses:
            results[guess.index].draft_token_ids = guess.tokens

    def _guess(
        self,
        hidden: Any,
        guesses: list[_Guess],
        slices: Sequence[SequenceSlice],
        caches: Sequence[KVCache],
    ) -> None:
        while True:
            chosen = self._best(hidden)
            for guess, token in zip(guesses, chosen, strict=True):
                guess.tokens.append(int(token))
            going = [i for i, guess in enumerate(guesses) if len(guess.tokens) < guess.most]
            if not going:
                return
            self._inputs.host["rows"][: len(going)] = going
            guesses = [guesses[i] for i in going]
            self._fill(guesses, slices)
            self._inputs.upload()
            rows = self._gathered("draft_kept", hidden, len(going))
            count = len(guesses)
            batch = ForwardBatch.of_buffers(
                self._inputs.device, count, count, caches, self._workspace
            )
            hidden = self.model(batch, rows)
            for guess in guesses:
                guess.position += 1

    def _fill(self, guesses: Sequence[_Guess], slices: Sequence[SequenceSlice]) -> None:
        """Each guess's next row: its last but one position, with the token that follows there."""
        host = self._inputs.host
        for row, guess in enumerate(guesses):
            table = slices[guess.index].block_table
            block, offset = divmod(guess.position, BLOCK_SIZE)
            host["token_ids"][row] = guess.tokens[-1]
            host["positions"][row] = guess.position
            host["slot_mapping"][row] = table[block] * BLOCK_SIZE + offset
            host["context_lens"][row] = guess.position + 1
            host["block_tables"][row, : len(table)] = table

    def _gathered(self, name: str, hidden: Any, count: int) -> Any:
        """Rows of `hidden` that the buffer "rows" names, in memory that the layer leaves alone."""
        shape = [count, hidden.shape[1]]
        out = self._workspace.get(name, shape, hidden.dtype)
        ops.gather_rows(hidden, ops.fix(self._inputs.device["rows"][:count]), out)
        return out

    def _best(self, hidden: Any) -> npt.NDArray[np.int32]:
        logits = self.model.logits(hidden, self._workspace)
        names = (*ops.SAMPLE_ROWS, "out")
        columns = [ops.fix(self._greedy.device[name][: logits.shape[0]]) for name in names]
        ops.sample(logits, *columns)
        self._greedy.download("out")
        found: npt.NDArray[np.int32] = self._greedy.host["out"][: logits.shape[0]]
        return found


def _plan(
    slices: Sequence[SequenceSlice], results: Sequence[SliceResult]
) -> tuple[Integers, Integers]:
    """What the layer reads, [T]; and where it guesses, [G, 4]: slice, position, most, row."""
    following: list[Integers] = []
    guesses: list[tuple[int, int, int, int]] = []
    begin = 0
    for index, (part, result) in enumerate(zip(slices, results, strict=True)):
        count = len(part.token_ids)
        following.append(_following(part, result))
        known = count - len(part.draft_token_ids) + len(result.token_ids) - 1
        position = part.start + known
        most = min(part.num_drafts, 1 + len(part.block_table) * BLOCK_SIZE - position)
        if result.token_ids and most > 0:
            guesses.append((index, position, most, begin + known - 1))
        begin += count
    return np.concatenate(following), np.array(guesses, np.int32).reshape(-1, 4)


def _plan_of_the_first(
    communicator: Communicator, slices: Sequence[SequenceSlice], results: Sequence[SliceResult]
) -> tuple[Integers, Integers]:
    """`_plan` of the rank that samples, on every rank: all know the sizes of a step."""
    tokens = sum(len(part.token_ids) for part in slices)
    sent = np.zeros(tokens + 1 + 4 * len(slices), np.int32)
    if communicator.rank == 0:
        sent[:tokens], plan = _plan(slices, results)
        sent[tokens] = len(plan)
        sent[tokens + 1 : tokens + 1 + plan.size] = plan.reshape(-1)
    found = np.frombuffer(communicator.first_bytes(sent.tobytes()), np.int32)
    guesses = found[tokens + 1 : tokens + 1 + 4 * found[tokens]]
    return found[:tokens], guesses.reshape(-1, 4)


def _following(part: SequenceSlice, result: SliceResult) -> npt.NDArray[np.int32]:
    """The token after each of a slice's tokens; 0 where there is none that counts."""
    out = np.zeros(len(part.token_ids), np.int32)
    out[:-1] = part.token_ids[1:]
    known = len(part.token_ids) - len(part.draft_token_ids)
    if result.token_ids:
        out[known - 1 :] = 0
        out[known - 1 : known - 1 + len(result.token_ids)] = result.token_ids
    elif not part.sample:
        out[-1] = _token_at(part, part.start + len(part.token_ids))
    return out


def _token_at(part: SequenceSlice, position: int) -> int:
    prompt = len(part.prompt_token_ids)
    if position < prompt:
        return part.prompt_token_ids[position]
    return part.output_token_ids[position - prompt]
