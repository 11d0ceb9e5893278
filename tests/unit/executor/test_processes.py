"""A model over several processes is the model in one: logits, tokens, memory, failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from draft_layer import random_layer, write_layer
from hugging_face import hugging_face_config, hugging_face_tensors
from machine import promised
from model_driver import Running, generate, make_runner, sequences
from tiny_model import (
    tiny_config,
    tiny_tensors,
    write_pdparams,
    write_tensors,
    write_tiny_model,
)
from waiting import until

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.config import (
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from fastdeploy_lite.executor import ranks as ranks_module
from fastdeploy_lite.executor.base import ExecutorDeadError, RankError
from fastdeploy_lite.executor.processes import ProcessesExecutor
from fastdeploy_lite.executor.verdict import run_step
from fastdeploy_lite.quantization.convert import quantize_checkpoint
from fastdeploy_lite.request.step import SamplerParams
from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.utils.errors import ConfigError, FastDeployError
from fastdeploy_lite.worker.model_runner import ModelRunner

RNG = np.random.default_rng(5)
PROMPTS = [[int(i) for i in RNG.integers(0, 8192, n)] for n in (1, 70, 33)]
LENGTH, COUNT = 128, 12
ROUNDING = 2e-4  # of a logit, when sums have another order
WIDE: dict[str, Any] = {"moe_intermediate_size": 512, "intermediate_size": 512}


def settings(folder: Path, size: int, **runtime: Any) -> RuntimeConfig:
    return RuntimeConfig(
        model_path=folder,
        model=ModelConfig.from_dir(folder),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=LENGTH),
        parallel=ParallelConfig(size),
        device="cpu",
        **runtime,
    )


@contextmanager
def ranks(folder: Path, size: int, **runtime: Any) -> Iterator[ProcessesExecutor]:
    executor = ProcessesExecutor(settings(folder, size, **runtime))
    try:
        executor.load()
        yield executor
    finally:
        executor.close()


@dataclass
class Shared:
    """A model in one process and over several, which each test leaves as it was."""

    folder: Path
    load: LoadConfig
    executor: ProcessesExecutor

    def alone(self, **more: Any) -> ModelRunner:
        return make_runner(self.folder, length=LENGTH, load=self.load, **more)


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Shared]:
    """Of a kind, a number of ranks, and a row order: a rank starts for seconds."""
    kind, size, order = request.param
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, kind=kind, tied=size == 2, seed=3)
    load = LoadConfig(row_order=order)
    with ranks(folder, size, load=load) as executor:
        yield Shared(folder, load, executor)


def sharing(*ways: tuple[str, int, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shared", ways, indirect=True, ids=str)


def run(executor: Any, chunk: int = 40) -> list[Running]:
    running = sequences(PROMPTS, LENGTH)
    generate(executor, running, COUNT, chunk)
    return running


def assert_alike(found: list[Running], wanted: list[Running]) -> None:
    """The same logits but for rounding; the same tokens but where two were nearly as likely."""
    for one, other in zip(found, wanted, strict=True):
        for step, (row, expected) in enumerate(zip(one.rows, other.rows, strict=True)):
            np.testing.assert_allclose(row, expected, atol=ROUNDING)
            if one.output[step] != other.output[step]:
                second, first = np.sort(expected)[-2:]
                assert first - second < 2 * ROUNDING
                break


@sharing(
    ("bf16", 2, "natural"),
    ("bf16", 4, "natural"),
    ("wint8", 2, "natural"),
    ("wint4", 2, "natural"),
    ("w4w2", 2, "natural"),
    ("w4w2", 4, "permuted"),
    ("2bits", 2, "permuted"),
    ("2bits", 4, "natural"),
)
def test_any_size_gives_the_same_answers(shared: Shared) -> None:
    """Four ranks share two KV heads, and two steps of 128 rows of 2-bit experts."""
    found = run(shared.executor)
    again = run(shared.executor, chunk=7)
    assert_alike(found, run(shared.alone()))
    for one, other in zip(found, again, strict=True):  # any batch, any chunks: the same bits
        assert one.output == other.output
        np.testing.assert_array_equal(one.rows, other.rows)


@pytest.mark.parametrize("size", [2, 4])
def test_demo(size: int) -> None:
    """Logits of the demo model reach 35; -s prints how far those of several ranks are away."""
    folder = demo_path()
    wanted = run(make_runner(folder, length=LENGTH))
    with ranks(folder, size) as executor:
        found = run(executor)
    assert_alike(found, wanted)
    pairs = [np.subtract(a.rows, b.rows) for a, b in zip(found, wanted, strict=True)]
    print(f"TP {size}: largest difference of a logit {np.abs(pairs).max():.1e}")


@pytest.mark.parametrize(("stacked", "size"), [(False, 2), (True, 2), (False, 4)])
def test_hugging_face_names_and_separate_matrices(tmp_path: Path, stacked: bool, size: int) -> None:
    config = tiny_config("bf16", tied=False)
    tensors = tiny_tensors(config, 4)
    folder = tmp_path / "hf"
    write_tensors(
        folder, hugging_face_config(config), hugging_face_tensors(config, tensors, stacked=stacked)
    )
    write_tensors(tmp_path / "paddle", config, tensors)
    wanted = run(make_runner(tmp_path / "paddle", length=LENGTH))
    with ranks(folder, size) as executor:
        assert_alike(run(executor), wanted)


def test_pickled_checkpoints_and_rank_files(tmp_path: Path) -> None:
    whole = write_tiny_model(tmp_path / "whole", kind="w4w2", file_format="pdparams", seed=3)
    cut = write_tiny_model(tmp_path / "cut", kind="w4w2", tensor_parallel_size=2, seed=3)
    files = tmp_path / "files"
    files.mkdir()
    shutil.copy(cut / "config.json", files)
    for rank in (0, 1):
        held = Checkpoint.open(cut, 2, rank)
        tensors = {key: (held.get(key).data, held.get(key).dtype) for key in held}
        write_pdparams(files / f"model_state.tp0{rank}.pdparams", tensors)
    wanted = run(make_runner(whole, length=LENGTH))
    for folder in (whole, files):
        with ranks(folder, 2) as executor:
            assert_alike(run(executor), wanted)


@pytest.mark.parametrize(("cut", "size"), [(2, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("scheme", ["2bits", "wint8"])
def test_rank_folders_run_at_their_own_and_at_other_sizes(
    tmp_path: Path, cut: int, size: int, scheme: Any
) -> None:
    """Each folder is quantised by itself, so that rows have scales of their own."""
    source = write_tiny_model(tmp_path / "bf16", kind="bf16", experts=2, **WIDE)
    folder = tmp_path / "cut"
    quantize_checkpoint(source, folder, scheme=scheme, tensor_parallel_size=cut, progress=False)
    wanted = run(make_runner(folder, length=LENGTH))
    with ranks(folder, size) as executor:
        assert_alike(run(executor), wanted)


def test_three_steps_of_rows_for_two_ranks(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, kind="2bits", moe_intermediate_size=384)
    wanted = run(make_runner(folder, length=LENGTH))
    with ranks(folder, 2) as executor:
        assert_alike(run(executor), wanted)


def test_weights_quantised_while_loading(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, kind="bf16")
    config = settings(folder, 2)
    model = config.model.with_quantization("wint8")
    wanted = run(make_runner(folder, length=LENGTH, model=model))
    executor = ProcessesExecutor(replace(config, model=model))
    try:
        executor.load()
        # A rank's rows have scales of their own: rounding differs by more than sums do.
        found = run(executor)
    finally:
        executor.close()
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(one.rows[0] - other.rows[0]).max() < 0.05 * np.abs(other.rows[0]).max()


@sharing(("w4w2", 2, "natural"))
def test_prompt_logprobs_and_guesses(shared: Shared) -> None:
    params = SamplerParams(temperature=0.0, prompt_logprobs=2, logprobs=1)
    results = []
    for one in (shared.alone(), shared.executor):
        (running,) = sequences([PROMPTS[1]], LENGTH, sampling=params)
        (result,) = one.execute([running.slice(100)])
        running.take(result)
        results.append(result)
        plain = list(running.output)
        part = running.slice(1)  # a right guess and a wrong one
        (first,) = one.execute([part])
        running.take(first)
        again = sequences([PROMPTS[1] + plain], LENGTH)[0]
        guessed = again.slice(100)
        guessed.token_ids = [*guessed.token_ids, running.output[1], 5, 6]
        guessed.draft_token_ids = [running.output[1], 5, 6]
        (checked,) = one.execute([guessed])
        assert checked.token_ids[0] == running.output[1]
        assert len(checked.token_ids) == 2
    assert results[0].token_ids == results[1].token_ids
    found, wanted = (
        [entry.logprob for entry in result.prompt_logprobs or ()] for result in results
    )
    assert len(wanted) == len(PROMPTS[1]) - 1
    assert found == pytest.approx(wanted, abs=1e-3)


def test_memory_is_shared_among_the_ranks(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, kind="w4w2", tied=False)
    alone = make_runner(folder, length=LENGTH)
    with ranks(folder, 2) as executor:
        report = executor.report()
        assert report.num_blocks == executor.runner.num_blocks
        own = executor.runner.memory_report()
        assert {"kv_cache", "workspace", "sampling"} <= set(report.memory)
        for role, size in alone.memory_report().weights.items():
            assert own.weights[role] < 0.6 * size, role
            assert report.memory[f"weights.{role}"] == pytest.approx(size, rel=0.05)


@sharing(("2bits", 2, "permuted"))
def test_a_step_that_fails_fails_for_all_and_the_next_one_is_sound(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only one rank meets is the verdict of all, and costs only the request to blame."""
    executor, wanted = shared.executor, run(shared.alone())
    good, bad = sequences(PROMPTS[:2], LENGTH)
    parts = [good.slice(100), bad.slice(100)]
    parts[1].token_ids = [*list(parts[1].token_ids)[:-1], 8192]  # outside the vocabulary
    verdict = run_step(executor, parts)
    assert verdict.results[0].token_ids == wanted[0].output[:1]
    assert "token id 8192" in (verdict.results[1].error or "")
    assert not verdict.is_broken
    run(executor)
    with monkeypatch.context() as damaged:
        damaged.setattr(executor.runner.model.layers[1], "mlp", None)  # this rank only
        with pytest.raises(TypeError):
            executor.execute([sequences(PROMPTS[1:2], LENGTH)[0].slice(100)])
    assert_alike(run(executor), wanted)


@sharing(("w4w2", 2, "natural"))
def test_every_rank_rounds_activations_as_asked(shared: Shared) -> None:
    """Where rounding is coarse, sums in another order may round to the next integer."""
    alone = shared.alone(activation_bits=16).logits(PROMPTS[1])
    found = []
    with ranks(shared.folder, 2, load=shared.load, activation_bits=16) as rounding:
        for executor in (shared.executor, rounding):
            running = sequences([PROMPTS[1]], LENGTH)
            generate(executor, running, 1)
            found.append(running[0].rows[0])
    fine, coarse = found
    assert shared.executor.config.activation_bits == 24
    assert (fine != coarse).any()
    np.testing.assert_allclose(coarse, alone[-1], atol=10 * ROUNDING)


@sharing(("w4w2", 2, "natural"), ("w4w2", 4, "permuted"))
def test_candidates_of_each_rank_give_the_tokens_of_all_logits(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed batches, chunks of prompts and single tokens; a processor asks for all logits."""
    ways = [
        SamplerParams(temperature=0.0),
        SamplerParams(temperature=0.8, top_k=20, top_p=0.9, seed=3),
        SamplerParams(temperature=1.5, top_k=50, seed=4, presence_penalty=0.5, banned_ids=(5,)),
    ]

    def answers(executor: Any, by_candidates: bool) -> list[list[int]]:
        running = sequences(PROMPTS, LENGTH)
        for one, way in zip(running, ways, strict=True):
            one.sampling = way
        if by_candidates:
            for one in running:
                real = one.slice
                one.slice = lambda most, real=real: replace(  # type: ignore[method-assign]
                    real(most), logits_processors=None
                )
        generate(executor, running, COUNT, 40)
        return [one.output for one in running]

    rows = shared.executor.runner._candidates
    assert rows is not None
    counted: list[int] = []
    real = rows.gather
    monkeypatch.setattr(
        rows, "gather", lambda own, parts, count: counted.append(count) or real(own, parts, count)
    )
    wanted = answers(shared.executor, False)
    assert not counted
    assert answers(shared.executor, True) == wanted
    assert len(counted) >= COUNT
    assert len({token for one in wanted for token in one}) > 10


@sharing(("2bits", 2, "permuted"))
def test_a_failure_of_another_rank_is_told_with_its_reason(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = shared.executor
    (one,) = sequences(PROMPTS[1:2], LENGTH)
    part = one.slice(100)
    message = executor._writer.step([part])
    message.slices[0].new_blocks[0] = 10**6
    with monkeypatch.context() as wrong:
        wrong.setattr(executor._writer, "step", lambda _: message)
        with pytest.raises(RankError, match=r"^rank 1: ValueError: .*block table"):
            executor.execute([part])
    run(executor)


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
@pytest.mark.parametrize("busy", [True, False])
def test_a_rank_that_is_lost_ends_all_within_ten_seconds(
    tmp_path: Path, sent: signal.Signals, busy: bool
) -> None:
    folder = write_tiny_model(tmp_path, kind="2bits")
    with ranks(folder, 4) as executor:
        pids = executor.pids
        assert len(pids) == 3
        reason = "stopped" if sent == signal.SIGSTOP else f"was ended by signal {sent.name}"
        named = rf"^rank 2 \(process {pids[1]}\):? .*{reason}"

        def work_or_look() -> None:
            run(executor) if busy else executor.check()

        with promised(10), pytest.raises(ExecutorDeadError, match=named):
            os.kill(pids[1], sent)
            until(work_or_look)
    assert gone(pids)


def test_a_rank_that_sleeps_while_others_wait_is_lost(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, kind="2bits")
    with ranks(folder, 2) as executor:
        time.sleep(5)  # between steps all may sleep
        run(executor)
        watch = executor._ranks
        assert watch is not None
        watch.send = lambda _: None  # type: ignore[method-assign]
        slept = r"^rank 1 \(process \d+\): has slept"
        with promised(10), pytest.raises(ExecutorDeadError, match=slept):
            run(executor)


HANGING_RANK = """\
import ctypes, itertools, sys
sys.path[:] = {path!r}
from fastdeploy_lite.distributed.communicator import SharedMemoryCommunicator
from fastdeploy_lite.executor.rank_process import main
real, calls = SharedMemoryCommunicator.all_reduce, itertools.count()
def hang(self, x):
    if next(calls) > 20:
        ctypes.PyDLL(None).pause()
    real(self, x)
SharedMemoryCommunicator.all_reduce = hang
sys.exit(main({descriptor}))
"""


def test_a_rank_that_hangs_with_the_interpreters_lock_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module, "_RUN_RANK", HANGING_RANK)
    folder = write_tiny_model(tmp_path, kind="2bits")
    with ranks(folder, 2) as executor:
        with pytest.raises(ExecutorDeadError, match=r"^rank 1 \(process \d+\): has slept for 4 s"):
            run(executor)
        pids = executor.pids
    assert gone(pids)


def test_a_rank_that_cannot_load_says_why(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, kind="2bits", tensor_parallel_size=2)
    damaged = folder / "rank1" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    executor = ProcessesExecutor(settings(folder, 2))
    with pytest.raises(FastDeployError, match=r"rank1/model\.safetensors"):
        executor.load()
    assert gone(executor.pids)


def test_sizes_that_do_not_divide_are_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    with pytest.raises(ConfigError, match=r"size 3: .*; this model allows 1, 2, 4$"):
        ProcessesExecutor(settings(folder, 3))
    assert json.loads((folder / "config.json").read_text())["num_attention_heads"] == 4


@pytest.mark.parametrize(("kind", "size", "order"), [
    ("bf16", 2, "natural"), ("w4w2", 4, "natural"), ("2bits", 2, "permuted"),
])  # fmt: skip
def test_guesses_of_a_prediction_layer(tmp_path: Path, kind: Any, size: int, order: Any) -> None:
    """The same guesses, chunk by chunk, right ones and wrong ones, and a failed step between."""
    folder = write_tiny_model(tmp_path / "model", kind=kind, seed=3)
    layer = write_layer(tmp_path / "layer", random_layer(ModelConfig.from_dir(folder), 5))
    speculative = SpeculativeConfig("mtp", num_speculative_tokens=4, model=str(layer))
    load = LoadConfig(row_order=order)
    alone = make_runner(folder, length=LENGTH, speculative=speculative, load=load)
    wanted = guessed(alone)
    with ranks(folder, size, speculative=speculative, load=load) as executor:
        assert guessed(executor) == wanted
        part = sequences(PROMPTS[1:2], LENGTH)[0].slice(100)
        part.token_ids = [*list(part.token_ids)[:-1], 8192]  # outside the vocabulary
        with pytest.raises(ValueError, match="token id 8192"):
            executor.execute([part])
        assert guessed(executor) == wanted
        report = executor.report().memory
    held = alone.memory_report().weights["draft"]
    assert held < report["weights.draft"] < size * held  # the block is shared, projections are not


def guessed(executor: Any, steps: int = 10) -> list[tuple[list[int], list[int]]]:
    """Tokens and guesses of every step; every other guess is checked with a wrong token, and of
    every fourth step the layer reads nothing."""
    found, running = [], sequences(PROMPTS, LENGTH)
    drafts: list[list[int]] = [[] for _ in running]
    for step in range(steps):
        parts = []
        for one, guess in zip(running, drafts, strict=True):
            feeds_draft = step % 4 != 3
            part = one.slice(40, num_drafts=4 * feeds_draft, feeds_draft=feeds_draft)
            part.logits_processors = None
            if part.sample and guess:
                part.token_ids = [*part.token_ids, *guess]
                part.draft_token_ids = guess
            parts.append(part)
        for i, (part, result) in enumerate(zip(parts, executor.execute(parts), strict=True)):
            running[i].take(result)
            if part.sample:
                running[i].done = len(running[i].prompt) + len(running[i].output) - 1
            found.append((list(result.token_ids), list(result.draft_token_ids)))
            drafts[i] = list(result.draft_token_ids)
            if step % 2 and drafts[i]:
                drafts[i][-1] = 1
    assert sum(len(guess) for _, guess in found) > 40
    return found


def test_ranks_end_with_their_parent(tmp_path: Path) -> None:
    """Whatever happens to it; also a rank that is stopped at that moment."""
    folder = write_tiny_model(tmp_path, kind="2bits")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # no pytest in here
        try:
            executor = ProcessesExecutor(settings(folder, 4))
            executor.load()
            os.kill(executor.pids[0], signal.SIGSTOP)
            os.write(write, json.dumps(executor.pids).encode())
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    pids = json.loads(os.read(read, 1000))
    os.waitpid(child, 0)
    until(lambda: gone(pids))
