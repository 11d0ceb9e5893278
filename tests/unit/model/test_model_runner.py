"""The step of the runner: prompt scores, padding for graphs, reuse of memory, the demo answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_driver import GREEDY, PaddedSteps, generate, make_runner, sequences
from oracles.ernie_float32 import ErnieFloat32

from fastdeploy_lite.config import LogprobsMode
from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer
from fastdeploy_lite.model_executor.logprobs import log_softmax
from fastdeploy_lite.request.step import SamplerParams, SliceResult, TokenLogprobs
from fastdeploy_lite.worker.model_runner import ModelRunner

PROMPT = [int(i) for i in np.random.default_rng(9).integers(0, 8192, 150)]


def run_chunks(runner: ModelRunner, params: SamplerParams, chunk: int) -> list[SliceResult]:
    (one,) = sequences([PROMPT], 192, sampling=params)
    results = []
    while not one.output:
        (result,) = runner.execute([one.slice(chunk)])
        one.take(result)
        results.append(result)
    return results


def scored(results: list[SliceResult]) -> list[TokenLogprobs]:
    return [entry for result in results for entry in result.prompt_logprobs or []]


@pytest.mark.parametrize("chunk", [150, 149, 64, 7])
def test_prompt_logprobs_over_chunks(tiny_2bits: Path, chunk: int) -> None:
    """Every prompt token but the first has one entry, wherever the chunks end."""
    params = SamplerParams(temperature=0.0, prompt_logprobs=3, logprobs=1)
    results = run_chunks(make_runner(tiny_2bits), params, chunk)
    entries = scored(results)
    logits = ErnieFloat32(tiny_2bits).logits(PROMPT)
    assert len(entries) == len(PROMPT) - 1
    for token, entry, row in zip(PROMPT[1:], entries, logits, strict=False):
        values = log_softmax(row)
        assert entry.logprob == pytest.approx(values[token], abs=1e-4)
        assert abs(entry.rank - 1 - int((values > values[token]).sum())) <= 1
        assert entry.top_logprobs == pytest.approx(np.sort(values)[:-4:-1], abs=1e-4)
    assert [len(result.token_ids) for result in results[:-1]] == [0] * (len(results) - 1)
    assert results[-1].logprobs is not None


@pytest.mark.parametrize(("wanted", "count"), [(0, 0), (-1, 8192)])
def test_prompt_logprobs_none_or_all(tiny_2bits: Path, wanted: int, count: int) -> None:
    params = SamplerParams(temperature=0.0, prompt_logprobs=wanted)
    entries = scored(run_chunks(make_runner(tiny_2bits), params, 150))
    assert {len(entry.top_ids) for entry in entries} == {count}


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits"])
def test_prompt_logits(tiny_2bits: Path, mode: LogprobsMode) -> None:
    runner = make_runner(tiny_2bits, logprobs_mode=mode)
    entries = scored(run_chunks(runner, SamplerParams(temperature=0.0, prompt_logprobs=1), 70))
    logits = runner.logits(PROMPT)
    assert [entry.logprob for entry in entries] == [
        float(row[token]) for row, token in zip(logits, PROMPT[1:], strict=False)
    ]
    assert [entry.top_ids for entry in entries] == [[int(row.argmax())] for row in logits[:-1]]


def test_padding_rows_of_graphs_change_nothing(tiny_w4w2: Path) -> None:
    prompts = [PROMPT[:n] for n in (3, 64, 65)]
    expected = generate(make_runner(tiny_w4w2), sequences(prompts, 192), 6)
    runner, graphs = make_runner(tiny_w4w2), PaddedSteps()
    runner._graphs = graphs
    running = sequences(prompts, 192)
    assert generate(runner, running, 6) == expected
    assert graphs.sizes == [4] * 5


def test_steps_reuse_memory(tiny_2bits: Path) -> None:
    """After the largest step nothing moves, so captured addresses stay good."""
    runner = make_runner(tiny_2bits)
    generate(runner, sequences([PROMPT, PROMPT[:40]], 192), 3)
    before = (runner.workspace.generation, runner.workspace.nbytes)
    generate(runner, sequences([PROMPT[:140], PROMPT[:9]], 192), 5, chunk=50)
    assert (runner.workspace.generation, runner.workspace.nbytes) == before


def test_teacher_forcing_leaves_running_sequences_alone(tiny_2bits: Path) -> None:
    runner = make_runner(tiny_2bits)
    (expected,) = generate(runner, sequences([PROMPT], 192), 8)
    (one,) = sequences([PROMPT], 192)
    generate(runner, [one], 4)
    runner.logits(PROMPT[::-1])
    generate(runner, [one], 8)
    assert one.output == expected


def test_a_refused_step_leaves_the_runner_usable(tiny_2bits: Path) -> None:
    runner = make_runner(tiny_2bits)
    (expected,) = generate(runner, sequences([PROMPT], 192), 3)
    (bad,) = sequences([[8192]], 64)
    with pytest.raises(ValueError, match="token id 8192 is outside the vocabulary of 8192"):
        runner.execute([bad.slice(1)])
    assert generate(runner, sequences([PROMPT], 192), 3) == [expected]


def test_the_demo_recites_li_bai(demo_dir: Path) -> None:
    """Question and first poem of the demo: 解析三首李白的诗."""
    tokenizer = Ernie4_5Tokenizer.from_pretrained(str(demo_dir))
    question = f"{tokenizer.cls_token}User: 解析三首李白的诗\nAssistant: "
    runner = make_runner(demo_dir, length=1024)
    running = sequences([tokenizer.encode_text(question)], 1024, sampling=GREEDY)
    (tokens,) = generate(runner, running, 180)
    answer = tokenizer.decode(tokens)
    assert "《静夜思》" in answer
    assert "低头思故乡" in answer
    assert "李白" in answer
    assert answer.count("《") >= 2


@pytest.mark.parametrize(("tokens", "length", "seqs"), [(256, 64, 8), (100, 512, 8), (300, 70, 3)])
def test_the_largest_step_is_known_before_it_comes(
    tiny_2bits: Path, tokens: int, length: int, seqs: int
) -> None:
    """On a card the KV cache takes what this profile leaves: no later step may need more."""
    runner = make_runner(tiny_2bits, tokens=tokens, length=length, seqs=seqs)
    runner._run_largest_step()
    before = (runner.workspace.generation, runner.workspace.nbytes)
    lengths = [min(length, tokens - at) for at in range(0, tokens, length)][:seqs]
    running = sequences([PROMPT[:1] * n for n in lengths], length)
    runner.execute([one.slice(length) for one in running])
    decodes = sequences([PROMPT[:1]] * seqs, length)
    runner.execute([one.slice(1) for one in decodes])
    runner.logits(PROMPT[: min(length, 150)])
    run = sequences([PROMPT[:30]], 64, sampling=SamplerParams(prompt_logprobs=2, logprobs=2))
    runner.execute([run[0].slice(30)])
    assert (runner.workspace.generation, runner.workspace.nbytes) == before
