"""Decode steps on a CPU that repeat native calls: the same bits, never through old addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_links import MemoryLink
from model_driver import generate, make_runner, sequences
from tiny_model import write_tiny_model

from fastdeploy_lite import _ops_cpu
from fastdeploy_lite.config import ExpertOffloadConfig, LoadConfig
from fastdeploy_lite.model_executor import expert_placement
from fastdeploy_lite.model_executor.ops import SegmentedWeight
from fastdeploy_lite.model_executor.recorded_steps import MOST_SEQUENCES, RecordedSteps
from fastdeploy_lite.models.ernie4_5.model import Ernie4_5_MoeForCausalLM
from fastdeploy_lite.models.registry import ModelRegistry
from fastdeploy_lite.quantization.convert import quantize_checkpoint
from fastdeploy_lite.worker.model_runner import ModelRunner

PROMPTS = [[int(i) for i in np.random.default_rng(3).integers(0, 8192, n)] for n in (70, 3, 41)]
TOKENS = 9


def run(runner: ModelRunner, prompts: list[list[int]], chunk: int = 10_000) -> Any:
    """Tokens, and all logits that were sampled."""
    running = sequences(prompts, 192)
    tokens = generate(runner, running, TOKENS, chunk)
    return tokens, [np.stack(one.rows).tobytes() for one in running]


def forbid_python(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the model's layers may not be asked."""

    def fail(*_: Any) -> None:
        raise AssertionError("a step was not repeated from its recording")

    monkeypatch.setattr(runner, "_all_hidden", fail)


@pytest.mark.parametrize("kind", ["tiny_2bits", "tiny_w4w2", "tiny_bf16"])
@pytest.mark.parametrize("bits", [24, 16])
def test_repeated_steps_have_the_bits_of_computed_ones(
    kind: str, bits: Any, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    plain = make_runner(folder, use_cudagraph=False, activation_bits=bits)
    runner = make_runner(folder, activation_bits=bits)
    assert plain._graphs is None
    assert isinstance(runner._graphs, RecordedSteps)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:], PROMPTS):
        assert run(runner, prompts, 50) == run(plain, prompts, 50)


@pytest.mark.parametrize("scheme", ["2bits", "w4w2", "wint8"])
def test_weights_in_parts_and_an_int8_head(scheme: Any, tmp_path: Path) -> None:
    """Folders that ranks have quantised apart: linears gather their rows from several products."""
    wide: Any = {"moe_intermediate_size": 512, "intermediate_size": 512, "layers": 3}
    whole, parts = write_tiny_model(tmp_path / "bf16", kind="bf16", **wide), tmp_path / "parts"
    quantize_checkpoint(whole, parts, scheme=scheme, tensor_parallel_size=2, progress=False)
    more: Any = {"load": LoadConfig(lm_head_quantization="wint8")}
    runner = make_runner(parts, **more)
    assert any(isinstance(w, SegmentedWeight) for w in runner._all_weights())
    assert isinstance(runner._graphs, RecordedSteps)
    plain = make_runner(parts, use_cudagraph=False, **more)
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS):
        assert run(runner, prompts) == run(plain, prompts)


def test_experts_beside_a_card_are_not_recorded(
    tiny_2bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python hands their inputs over, between the ops of a layer."""
    monkeypatch.setattr(expert_placement, "open_link", lambda place: MemoryLink())
    runner = make_runner(tiny_2bits, expert_offload=ExpertOffloadConfig())
    assert runner._graphs is None
    assert run(runner, PROMPTS) == run(make_runner(tiny_2bits), PROMPTS)


def test_a_second_step_asks_no_layer(tiny_2bits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(tiny_2bits)
    expected = run(runner, PROMPTS)
    forbid_python(runner, monkeypatch)
    assert run(runner, PROMPTS) == expected


def test_a_buffer_that_moves_ends_all_recordings(tiny_2bits: Path) -> None:
    runner = make_runner(tiny_2bits)
    expected = run(runner, PROMPTS[:1])
    assert isinstance(runner._graphs, RecordedSteps)
    assert list(runner._graphs._steps) == [1]
    generation = runner.workspace.generation
    run(runner, [PROMPTS[0] * 2, PROMPTS[0]])  # a larger prompt than before
    assert runner.workspace.generation > generation
    assert list(runner._graphs._steps) == [2]
    assert run(runner, PROMPTS[:1]) == expected


def test_a_new_cache_ends_all_recordings(tiny_2bits: Path) -> None:
    runner = make_runner(tiny_2bits)
    expected = run(runner, PROMPTS)
    runner.allocate_kv_cache(runner.num_blocks + 1)
    assert run(runner, PROMPTS) == expected


def test_large_steps_are_not_kept(tiny_2bits: Path) -> None:
    steps = RecordedSteps(make_runner(tiny_2bits).workspace)
    assert [steps.bucket(n) for n in (1, MOST_SEQUENCES, MOST_SEQUENCES + 1)] == [
        1,
        MOST_SEQUENCES,
        None,
    ]


def test_a_derived_model_says_anew_that_it_is_replayable(
    tiny_2bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Derived(Ernie4_5_MoeForCausalLM):
        pass

    monkeypatch.setattr(ModelRegistry, "_classes", dict(ModelRegistry._classes))
    ModelRegistry.register_model_class(Derived, "Ernie4_5_MoeForCausalLM")
    runner = make_runner(tiny_2bits)
    assert type(runner.model) is Derived
    assert runner._graphs is None


def test_a_step_that_fails_is_not_kept(tiny_2bits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(tiny_2bits)
    expected = run(runner, PROMPTS[:1])
    runner.allocate_kv_cache(runner.num_blocks)
    with monkeypatch.context() as broken:
        broken.setattr(runner.model, "norm", None)
        with pytest.raises(AttributeError):
            run(runner, PROMPTS[:1])
    assert isinstance(runner._graphs, RecordedSteps)
    assert not runner._graphs._steps
    assert run(runner, PROMPTS[:1]) == expected


def test_a_thread_has_one_recording() -> None:
    first, second = _ops_cpu.Recording(), _ops_cpu.Recording()
    with first, pytest.raises(RuntimeError, match="this thread is recording already"):
        second.__enter__()
    with second:
        pass
    assert len(second) == 0
