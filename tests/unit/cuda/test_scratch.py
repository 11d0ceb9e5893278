"""Runners of one process share no memory that kernels write."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paddle
import pytest
from fake_cuda import Card
from model_driver import generate, make_runner, sequences
from tiny_model import write_tiny_model

from fastdeploy_lite.config import CacheConfig
from fastdeploy_lite.model_executor import ops
from fastdeploy_lite.model_executor.ops import _view

CPU = paddle.CPUPlace()
SOURCES = Path(__file__).resolve().parents[3] / "custom_ops" / "cuda"


def on_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(20)
    return found[0]


def addresses(card: Card) -> tuple[int, int]:
    return card.runtime.scratch(1), card.runtime.attention_counters()


def test_each_runners_scratch_is_its_own_and_stays(card: Card) -> None:
    first, second = card.runtime.Scratch(CPU), card.runtime.Scratch(CPU)
    with first.use():
        one = addresses(card)
        with second.use():
            other = addresses(card)
        assert addresses(card) == one  # after the inner one
    assert not set(one) & set(other)
    with second.use():
        assert addresses(card) == other
        assert on_thread(lambda: addresses(card)[0]) not in (one[0], other[0])
    assert addresses(card)[0] not in (one[0], other[0])  # outside of both


def test_a_failed_step_leaves_no_scratch_behind(card: Card) -> None:
    scratch = card.runtime.Scratch(CPU)
    with pytest.raises(KeyError), scratch.use():
        raise KeyError
    assert addresses(card)[0] != scratch.memory()


def test_counters_are_zero_at_first_and_are_never_cleared_again(card: Card) -> None:
    with card.runtime.Scratch(CPU).use():
        at = card.runtime.attention_counters()
        size = card.cuda.attention_counter_bytes
        assert ctypes.string_at(at, size) == bytes(size)
        ctypes.memset(at, 7, size)
        assert card.runtime.attention_counters() == at
        card.cuda.synchronize()
        assert ctypes.string_at(at, size) == b"\7" * size


def test_a_thread_keeps_its_stream_and_its_recorder_to_itself(card: Card) -> None:
    ran: list[str] = []
    with card.runtime.use_stream(5), card.runtime.recording(lambda work: ran.append("recorded")):
        assert card.runtime.stream() == 5
        assert on_thread(card.runtime.stream) == 0
        on_thread(lambda: card.runtime.on_host(lambda: ran.append("now")))
        card.runtime.on_host(lambda: ran.append("too early"))
    assert ran == ["now", "recorded"]


def test_too_much_scratch_is_refused(card: Card) -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        card.runtime.scratch(card.runtime.SCRATCH_BYTES + 1)


def test_kernels_keep_nothing_in_global_variables() -> None:
    """Two launches that overlap would share it."""
    sources = [path for path in SOURCES.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cc")]
    assert len(sources) > 20
    variable = re.compile(r"^\s*(static )?__(device|managed)__ [^(]*[;=]", re.MULTILINE)
    assert variable.search("__device__ int finished_blocks;")
    assert [path.name for path in sources if variable.search(path.read_text("utf-8"))] == []


def test_a_runner_computes_on_its_own_scratch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every op of loading, steps and evaluation; a card would take what is current."""
    inside: list[Any] = []

    def own_scratch(_: Any) -> Callable[[], contextlib.AbstractContextManager[None]]:
        token = object()

        @contextlib.contextmanager
        def use() -> Iterator[None]:
            inside.append(token)
            yield
            inside.pop()

        return use

    used: list[Any] = []
    real = _view.Arguments.native

    def native(self: Any, op: str | None = None) -> Any:
        assert inside, f"{op or self.op} outside"
        used.append(inside[-1])
        return real(self, op)

    monkeypatch.setattr(ops, "own_scratch", own_scratch)
    monkeypatch.setattr(_view.Arguments, "native", native)
    folder = write_tiny_model(tmp_path, kind="w4w2", seed=3)
    owners = []
    for _ in range(2):
        runner = make_runner(folder, cache=CacheConfig(num_blocks=16), length=128)
        running = sequences([[5, 6, 7, 5, 6], [9, 8]], 128)
        generate(runner, running, 3)
        runner.logits([1, 2, 3])
        for row in runner.logits_chunks([1, 2, 3]):
            assert not inside, len(row)  # whoever iterates does as it likes
        owners.append(set(used))
        used.clear()
    assert all(len(owner) == 1 for owner in owners) and not owners[0] & owners[1]
