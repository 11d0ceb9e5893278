"""Slices that travel are what they were, and bring only what is new."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest

from fastdeploy_lite.executor.remote_slices import SliceKeeper, SliceSender, UnsendableError
from fastdeploy_lite.request.step import SamplerParams, SequenceSlice


def part(slot: int, fresh: bool, prompt: list[int], output: list[int], **extra: Any) -> Any:
    return SequenceSlice(
        request_id=f"r{slot}", slot=slot, fresh=fresh, token_ids=[1], start=0,
        block_table=list(range(len(prompt) + len(output))), sample=True, prompt_token_ids=prompt,
        output_token_ids=output, sampling=SamplerParams(seed=slot, top_k=3), **extra,
    )  # fmt: skip


class Counter:
    """A logits processor that remembers."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _: Any, row: Any) -> None:
        self.calls += 1


def test_every_step_arrives_whole() -> None:
    sender, keeper = SliceSender(pickle.dumps), SliceKeeper(True, pickle.loads)
    prompt = list(range(1000))
    sizes = []
    for step in range(4):
        sent = [
            part(0, step == 0, prompt, list(range(step)), step=step, draft_token_ids=[7]),
            part(1, step in (0, 2), [3, 4], [9] * step, banned_now=(2,)),  # preempted between
        ]
        parcel = sender.pack(sent)
        sizes.append(len(pickle.dumps(parcel)))
        found = keeper.unpack(parcel)
        assert [one.candidates for one in found] == [one.candidates for one in sent] == [0, 4]
        assert [replace(one, known_candidates=None) for one in found] == sent
    assert max(sizes[1:]) < sizes[0] / 4  # the prompt is sent once


def test_a_processor_lives_where_it_is_called() -> None:
    sender = SliceSender(pickle.dumps)
    keeper, other = SliceKeeper(True, pickle.loads), SliceKeeper(False, pickle.loads)
    own = Counter()
    for step in range(3):
        parcel = sender.pack([part(0, step == 0, [1], [5] * step, logits_processors=[own])])
        (found,) = keeper.unpack(parcel)
        found.logits_processors[0]([], None)
        assert found.logits_processors[0].calls == step + 1
        (elsewhere,) = other.unpack(parcel)
        assert elsewhere.logits_processors is None
        assert elsewhere.candidates == found.candidates == 0  # all ranks gather alike
    assert own.calls == 0


def test_what_cannot_be_pickled_names_its_request_and_sends_nothing() -> None:
    sender, keeper = SliceSender(pickle.dumps), SliceKeeper(True, pickle.loads)
    keeper.unpack(sender.pack([part(0, True, [1], [])]))
    good = part(0, False, [1], [8])
    bad = part(1, True, [1], [], logits_processors=[lambda *_: None])
    with pytest.raises(UnsendableError, match=r"^request r1: its logits processor cannot be sent"):
        sender.pack([good, bad])
    (found,) = keeper.unpack(sender.pack([good]))
    assert replace(found, known_candidates=None) == good
