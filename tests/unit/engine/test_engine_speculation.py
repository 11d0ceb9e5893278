"""What the engine core tells the policy of speculation about its steps."""

from __future__ import annotations

import pytest
from helpers import make_core, make_request, run

from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.speculation.speculator import Speculator


def test_steps_that_read_prompts_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    class Watched(Speculator):
        def note_step(
            self, count: int, checked: int, emitted: int, seconds: float, decodes: bool = True
        ) -> None:
            told.append((count, emitted, decodes))
            assert seconds > 0
            super().note_step(count, checked, emitted, seconds, decodes)

    core = make_core(max_num_batched_tokens=64, speculative=SpeculativeConfig("ngram"))
    core._speculator = Watched(SpeculativeConfig("ngram"))
    core.add(make_request("a", [5] * 4, max_tokens=5))
    core.step()
    core.add(make_request("b", [6] * 70, max_tokens=2))
    while core.has_work:
        core.step()
    assert told == [
        (1, 1, False),  # a's prompt
        (1, 1, False),  # a, and a part of b's prompt
        (2, 2, False),  # a, and the rest of it
        (2, 2, True),
        (1, 1, True),
    ]


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_no_request_leaves_anything_behind(method: str) -> None:
    core = make_core(speculative=SpeculativeConfig(method, adaptive=False))
    for i in range(20):
        run(core, make_request(f"{i}", [5, 6, 7] * 5, max_tokens=1 + i, seed=i))
    core.add(make_request("aborted", [5, 6, 7] * 5))
    for _ in range(4):
        core.step()
    core.abort()
    core.step()
    speculator = core._speculator
    assert speculator is not None
    assert speculator.looks > 100
    assert not speculator._memories
    assert not speculator._open
    assert not speculator._drafters._readers
