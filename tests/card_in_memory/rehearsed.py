"""What the start of an engine with speculation captures, and that serving captures nothing more.

python rehearsed.py
"""

from __future__ import annotations

import sys
from typing import Any

import place  # noqa: F401 - first of all: it makes the place
from queued_card import QueuedCard


class CountingCard(QueuedCard):
    """Counts captures."""

    captures = 0

    def end_capture(self, stream: int, discard: bool) -> int:
        self.captures += not discard
        return super().end_capture(stream, discard)


CUDA = sys.modules["fastdeploy_lite._ops_cuda"] = CountingCard()

from engine import create  # noqa: E402

from fastdeploy_lite.request.messages import EngineRequest, EngineSampling  # noqa: E402
from fastdeploy_lite.request.step import SamplerParams  # noqa: E402
from fastdeploy_lite.speculation.config import SpeculativeConfig  # noqa: E402

BATCHES = (1, 2, 4, 8)


def serve(core: Any, batch: int) -> list[list[int]]:
    """Answers of 60 tokens to prompts of one block."""
    sampling = EngineSampling(SamplerParams(temperature=0.0), 60, (2, 7), ignore_eos=True)
    answers: dict[str, list[int]] = {f"{batch}-{i}": [] for i in range(batch)}
    for number, name in enumerate(answers):
        core.add(EngineRequest(name, [*range(10, 40), 50 + number] * 2, sampling))
    while core.has_work:
        for output in core.step():
            answers[output.request_id] += output.new_token_ids
    core.check_integrity()
    return list(answers.values())


def main() -> None:
    """Compare with plain decoding."""
    plain = [serve(create(64), batch) for batch in BATCHES]
    CUDA.captures = 0
    core = create(64, speculative=SpeculativeConfig("suffix", adaptive=False))
    seconds, captured = core.step_seconds, CUDA.captures
    assert seconds is not None
    print("plain", *seconds.plain)
    print("checking", *seconds.checking)
    print("captured", captured)
    assert min(*seconds.plain.values(), *seconds.checking.values()) > 0
    assert [serve(core, batch) for batch in BATCHES] == plain
    assert core.stats().drafts.drafted > 100
    print("later", CUDA.captures - captured)


main()
