"""Tokens of several ranks, of which each names its best ones, are those of all logits."""

from __future__ import annotations

from typing import Any

import hypothesis
import numpy as np
import paddle
import pytest
from hypothesis import strategies as st

from fastdeploy_lite.executor.messages import SliceReader, SliceWriter
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.candidates import CandidateRows
from fastdeploy_lite.model_executor.sampling_batch import SampledRow, SamplingBatch
from fastdeploy_lite.model_executor.workspace import Workspace
from fastdeploy_lite.request.step import SamplerParams, SequenceSlice

VOCAB, SLOTS, STEPS = 4096, 5, 3
Row = np.ndarray[Any, Any]


class Rank:
    """A communicator of ranks that are asked in turn, the first one last."""

    def __init__(self, rank: int, size: int, said: dict[int, Row]) -> None:
        self.rank, self.size, self._said = rank, size, said

    def all_gather(self, x: Any, widths: list[int], out: Any) -> None:
        self._said[self.rank] = ops.host_array(x).copy()
        assert x.shape[1] == widths[self.rank]
        if self.rank == 0:
            parts = [self._said.pop(rank) for rank in range(self.size)]
            ops.host_array(out)[...] = np.concatenate(parts, axis=1)


class Ranks:
    """The sampling of a model over `size` ranks, or of one."""

    def __init__(self, size: int) -> None:
        said: dict[int, Row] = {}
        ranks: list[Any] = [Rank(rank, size, said) for rank in range(size)]
        self.rows = [CandidateRows(rank, VOCAB) for rank in ranks] if size > 1 else []
        self.batch = SamplingBatch(SLOTS, VOCAB, Workspace(paddle.CPUPlace()), "raw_logprobs")
        self.writer, self.readers = SliceWriter(), [SliceReader() for _ in range(size)]
        self.counts: list[int] = []

    def sample(self, logits: Row, slices: list[SequenceSlice]) -> list[SampledRow]:
        for part in slices:
            if part.fresh:
                self.batch.table.admit(part)
        return self.batch.sample(self._known(logits, slices), slices)

    def _known(self, logits: Row, slices: list[SequenceSlice]) -> Any:
        if not self.rows:
            return paddle.to_tensor(logits)
        step, found, size = self.writer.step(slices), None, len(self.rows)
        for rank in reversed(range(size)):
            parts = self.readers[rank].slices(step) if rank else slices
            count = self.rows[rank].count(parts)
            if count == 0:
                return paddle.to_tensor(logits)
            own = paddle.to_tensor(np.split(logits, size, axis=1)[rank].copy())
            found = self.rows[rank].gather(own, parts, count)
            assert (found is None) == (rank > 0)
        self.counts.append(count)
        return found


def make_slice(slot: int, params: SamplerParams, **fields: Any) -> SequenceSlice:
    values: dict[str, Any] = {"token_ids": [1], "prompt_token_ids": [1, 7], "output_token_ids": []}
    return SequenceSlice(
        request_id=str(slot), slot=slot, fresh=True, start=0, block_table=[slot], sample=True,
        sampling=params, **{**values, **fields},
    )  # fmt: skip


def make_logits(kind: str, seed: int, rows: int) -> Row:
    """Numbers as of a model; many equal ones; and ones that a division makes equal."""
    random = np.random.default_rng(seed)
    logits = random.standard_normal((rows, VOCAB)).astype(np.float32) * 4
    if kind == "ties":
        logits = np.round(logits)
    if kind == "neighbours":
        steps = random.integers(0, 6, (rows, VOCAB)).astype(np.int32)
        logits = (np.full((rows, VOCAB), 7.9, np.float32).view(np.int32) + steps).view(np.float32)
    return np.ascontiguousarray(logits)


PARAMS = st.builds(
    SamplerParams,
    temperature=st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.7]),
    top_p=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([1, 2, 5, 40]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.0, 2.5]),
    seed=st.integers(0, 2**62),
    logit_bias=st.sampled_from([None, {3: -5.0, 4095: -100.0}]),
    banned_ids=st.sampled_from([(), (9, 2048)]),
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    size=st.sampled_from([2, 4]),
    kind=st.sampled_from(["model", "ties", "neighbours"]),
    seed=st.integers(0, 1000),
    params=st.lists(PARAMS, min_size=1, max_size=SLOTS),
    bans_best=st.booleans(),
    forced=st.sampled_from([-1, -1, 17]),
)
def test_the_tokens_are_those_of_all_logits(
    size: int, kind: str, seed: int, params: list[SamplerParams], bans_best: bool, forced: int
) -> None:
    whole, split = Ranks(1), Ranks(size)
    outputs: list[list[int]] = [[] for _ in params]
    for step in range(STEPS):
        logits = make_logits(kind, seed + step, len(params))
        banned = (int(logits[0].argmax()),) if bans_best else ()
        slices = [
            make_slice(
                slot, one, output_token_ids=list(outputs[slot]), step=step, banned_now=banned,
                forced_token=forced if slot == 0 else -1,
            )
            for slot, one in enumerate(params)
        ]  # fmt: skip
        wanted = [row.token_id for row in whole.sample(logits.copy(), slices)]
        assert [row.token_id for row in split.sample(logits.copy(), slices)] == wanted
        for output, token in zip(outputs, wanted, strict=True):
            output.append(token)
    assert len(split.counts) == STEPS  # of candidates, each time
    assert max(split.counts) <= 40 + 2 + 2 + 1 + 2 + STEPS


def test_batches_grow_shrink_and_are_not_numbers() -> None:
    """What one step leaves in the rows is not there in the next."""
    greedy, whole, split = SamplerParams(temperature=0.0), Ranks(1), Ranks(2)
    for seed, rows in enumerate((2, 5, 1, 4, 5)):
        logits = make_logits("model", seed, rows)
        if seed in (1, 3):
            logits[0, 3000 if seed == 1 else 5] = np.nan
        if seed == 2:
            logits[0] = -np.inf
        slices = [make_slice(slot, greedy) for slot in range(rows)]
        found, wanted = split.sample(logits.copy(), slices), whole.sample(logits, slices)
        assert [row.error for row in found] == [row.error for row in wanted]
        sound = [i for i, row in enumerate(wanted) if row.error is None]
        assert [found[i].token_id for i in sound] == [wanted[i].token_id for i in sound]
    assert len(split.counts) == 5


@pytest.mark.parametrize(
    ("params", "fields"),
    [
        ({}, {}),
        ({"top_k": 500}, {}),
        ({"top_k": 5, "logprobs": 0}, {}),
        ({"top_k": 5, "temperature": 1e-4}, {}),
        ({"temperature": 0.0, "logit_bias": {5: 0.5}}, {}),
        ({"temperature": 0.0, "repetition_penalty": 0.9}, {}),
        ({"temperature": 0.0, "presence_penalty": -0.5}, {}),
        ({"temperature": 0.0, "presence_penalty": 0.5}, {"prompt_token_ids": [1] * 300}),
        ({"temperature": 0.0}, {"bitmask": np.full(VOCAB // 32, -1, np.int32)}),
        ({"temperature": 0.0}, {"logits_processors": [lambda ids, row: None]}),
        ({"temperature": 0.0}, {"draft_token_ids": [1]}),
    ],
    ids=str,
)
def test_what_needs_all_logits(params: dict[str, Any], fields: dict[str, Any]) -> None:
    """One such row of a step, and all of them are gathered."""
    other = make_slice(0, SamplerParams(temperature=0.0))
    part = make_slice(1, SamplerParams(**params), **fields)
    rows = CandidateRows(Rank(0, 2, {}), VOCAB)  # type: ignore[arg-type]
    assert other.candidates == rows.count([other]) == 1
    assert part.candidates == 0
    assert rows.count([other, part]) == 0


def test_few_logits_are_gathered_whole() -> None:
    part = make_slice(0, SamplerParams(top_k=40))
    assert CandidateRows(Rank(0, 2, {}), 640).count([part]) == 40  # type: ignore[arg-type]
    assert CandidateRows(Rank(0, 2, {}), 638).count([part]) == 0  # type: ignore[arg-type]
