"""Steps in segments: order, empty segments, failures; a list stands for the card's queue."""

from __future__ import annotations

import pytest

from fastdeploy_lite.model_executor.recorder import Part, Recorder


class Queue:
    """Work is done at once, or kept while it is recorded."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.kept: list[str] | None = None
        self.fails = False

    def put(self, name: str) -> None:
        (self.done if self.kept is None else self.kept).append(name)

    def begin(self) -> None:
        assert self.kept is None
        self.kept = []

    def end(self, discard: bool) -> Part | None:
        assert self.kept is not None
        kept, self.kept = self.kept, None
        if self.fails:
            raise RuntimeError("the recording is broken")
        return None if discard or not kept else lambda: self.done.extend(kept)


def test_a_replay_runs_segments_and_the_hosts_work_in_order() -> None:
    queue = Queue()
    recorder = Recorder(queue.begin, queue.end)

    def step() -> str:
        queue.put("norm")
        recorder.cut(lambda: queue.done.append("mark"))
        recorder.cut(lambda: queue.done.append("experts"))
        queue.put("add")
        queue.put("head")
        return "logits"

    assert recorder.record(step) == "logits"
    assert queue.done == []
    for _ in range(2):
        queue.done.clear()
        for part in recorder.parts:
            part()
        assert queue.done == ["norm", "mark", "experts", "add", "head"]
    assert len(recorder.parts) == 4  # nothing was queued between the mark and the experts


def test_a_failing_step_ends_the_recording() -> None:
    queue = Queue()
    recorder = Recorder(queue.begin, queue.end)

    def step() -> None:
        queue.put("norm")
        recorder.cut(lambda: None)
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        recorder.record(step)
    queue.put("next")
    assert queue.done == ["next"]


def test_a_recording_that_cannot_end_is_ended_once() -> None:
    queue = Queue()
    recorder = Recorder(queue.begin, queue.end)
    queue.fails = True
    with pytest.raises(RuntimeError, match="broken"):
        recorder.record(lambda: recorder.cut(lambda: None))
    assert queue.kept is None
