"""The demo model on the card against the CPU: greedy tokens, logits, batching, sampling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import partings
import pytest
from model_driver import make_runner
from tiny_model import write_tiny_model

pytestmark = pytest.mark.usefixtures("deterministic")  # answers of other batches are compared
RUNNER = Path(__file__).resolve().parent / "run_model.py"
ROOT = RUNNER.parents[2]
NEW_TOKENS = 110
WIDE: Any = {"moe_intermediate_size": 512, "intermediate_size": 512}


def run(folder: Path, device: str, model: Path, request: dict) -> dict[str, np.ndarray]:
    """What run_model.py answers on "cpu" or, with "", on the card."""
    asked, answer = folder / f"{device or 'card'}.json", folder / f"{device or 'card'}.npz"
    asked.write_text(json.dumps(request), encoding="utf-8")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "FD_LITE_DEVICE": device, "PYTHONPATH": path}
    env.pop("CUSTOM_DEVICE_ROOT", None)
    command = [sys.executable, str(RUNNER), str(model), str(asked), str(answer)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(answer) as found:
        return {key: found[key] for key in found.files}


QUESTIONS = [
    "解析三首李白的诗",
    "背诵李白的静夜思",
    "春眠不觉晓的下一句是什么?",
    "床前明月光的下一句是什么?",
    "解释成语画蛇添足",
    "解释成语守株待兔",
    "背诵杜甫的春望",
    "背诵王维的相思",
    "背诵白居易的赋得古原草送别",
    "请赏析登鹳雀楼",
    "你好",
    "你叫什么名字?",
    "今天天气怎么样",
    "What is a river?",
    "What does the word 'ancient' mean?",
    "Define gold.",
    "What is a library?",
    "讲一个笑话",
    "我很难过",
    "请背诵一首唐诗",
]


def prompts(model: Path) -> list[list[int]]:
    """Questions of the kind that the demo model was trained on, in its chat form."""
    from fastdeploy_lite.input.ernie4_5_tokenizer import Ernie4_5Tokenizer

    tokenizer = Ernie4_5Tokenizer.from_pretrained(str(model))
    head = "<|begin_of_sentence|>User: "
    return [tokenizer.encode(f"{head}{q}\nAssistant: ")["input_ids"] for q in QUESTIONS]


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory, demo_dir: Path) -> tuple[dict, dict]:
    request = {"prompts": prompts(demo_dir), "max_tokens": NEW_TOKENS}
    folder = tmp_path_factory.mktemp("greedy")
    return run(folder, "cpu", demo_dir, request), run(folder, "", demo_dir, request)


@pytest.mark.timeout(600)
def test_greedy_tokens_equal_the_cpus_or_part_at_a_tie(
    greedy: tuple[dict, dict], tmp_path: Path, demo_dir: Path
) -> None:
    """Where the two part, the CPU's logits of both tokens must be closer than bf16 can tell apart.

    The card's logits differ from the CPU's by the roundings of bf16 activations. Their deviation
    over the vocabulary at that position measures it: a parting must lie within four of them.
    """
    cpu, card = greedy
    found = partings.find(prompts(demo_dir), card, cpu)
    if found:
        request = partings.request(found)
        exact = run(tmp_path, "cpu", demo_dir, request)
        partings.assert_explained(found, exact, run(tmp_path, "", demo_dir, request))


@pytest.mark.timeout(300)
def test_teacher_forced_logits(tmp_path: Path, demo_dir: Path) -> None:
    text = np.random.default_rng(2).integers(300, 8000, (3, 200)).tolist()
    request = {"sequences": [*prompts(demo_dir), *text]}
    cpu, card = run(tmp_path, "cpu", demo_dir, request), run(tmp_path, "", demo_dir, request)
    same, rows = 0, 0
    for key in map(str, range(len(request["sequences"]))):
        row = cpu[key]
        difference = np.abs(card[key] - row)
        assert np.sqrt((difference**2).mean()) < 0.1 * row.std()
        same += int((card[key].argmax(-1) == row.argmax(-1)).sum())
        rows += len(row)
    print(f"{same} of {rows} tokens are the likeliest on both devices")
    assert same > 0.95 * rows


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "engine",
    [
        {"use_cudagraph": False},
        {"max_num_batched_tokens": 64},
        {"speculative_config": {"method": "ngram", "adaptive": False}},  # most steps by graph
        {"speculative_config": {"method": "suffix", "adaptive": False}, "max_num_seqs": 4},
    ],
)
def test_graphs_chunks_and_guesses_change_no_token(
    engine: dict, greedy: tuple[dict, dict], tmp_path: Path, demo_dir: Path
) -> None:
    request = {"prompts": prompts(demo_dir), "max_tokens": NEW_TOKENS, "engine": engine}
    other = run(tmp_path, "", demo_dir, request)
    for key, tokens in greedy[1].items():
        np.testing.assert_array_equal(other[key], tokens)


@pytest.mark.timeout(300)
def test_quantised_while_loading_equals_converted_files(tmp_path: Path) -> None:
    from fastdeploy_lite.config import CacheConfig, ModelConfig
    from fastdeploy_lite.quantization.convert import quantize_checkpoint

    plain = write_tiny_model(tmp_path / "bf16", kind="bf16", seed=3)
    files = tmp_path / "wint4"
    quantize_checkpoint(plain, files, scheme="wint4", progress=False)
    ids = np.random.default_rng(1).integers(0, 8192, 150).tolist()
    cache = CacheConfig(num_blocks=16)
    model = ModelConfig.from_dir(plain).with_quantization("wint4")
    online = make_runner(plain, device=None, model=model, cache=cache)
    assert {weight.kind for weight in online.model.weights()["experts"]} == {"int4"}
    converted = make_runner(files, device=None, cache=cache)
    np.testing.assert_array_equal(online.logits(ids), converted.logits(ids))


def logits(folder: Path, device: str, model: Path, ids: list[int], **load: str) -> np.ndarray:
    """[len(ids), vocabulary] of a model on "cpu" or, with "", on the card."""
    return run(folder, device, model, {"sequences": [ids], "load": load})["0"]


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference in standard deviations of what is wanted."""
    return float(np.sqrt(((found - wanted) ** 2).mean()) / wanted.std())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["2bits", "w4w2"])
def test_permuted_rows(tmp_path: Path, kind: str) -> None:
    model = write_tiny_model(tmp_path / "model", kind=kind, seed=3)
    ids = np.random.default_rng(1).integers(0, 8192, 150).tolist()
    orders = ("natural", "permuted")
    card = [logits(tmp_path, "", model, ids, row_order=order) for order in orders]
    cpu = [logits(tmp_path, "cpu", model, ids, row_order=order) for order in orders]
    same = [distance(*pair) for pair in zip(card, cpu, strict=True)]
    crossed = distance(card[1], cpu[0])
    print(f"the same order: {same}, the other one: {crossed}")
    assert max(same) < 0.1
    assert crossed > 3 * max(same)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2, 4])
def test_folders_of_several_ranks(tmp_path: Path, ranks: int) -> None:
    """Cut from a whole model: the same bits. Quantised rank by rank: parts, summed."""
    from fastdeploy_lite.config import CacheConfig
    from fastdeploy_lite.model_executor.ops import SegmentedWeight
    from fastdeploy_lite.quantization.convert import quantize_checkpoint

    ids = np.random.default_rng(1).integers(0, 8192, 150).tolist()
    cut = write_tiny_model(
        tmp_path / "cut", kind="w4w2", tensor_parallel_size=ranks, seed=3, **WIDE
    )
    whole = write_tiny_model(tmp_path / "whole", kind="w4w2", seed=3, **WIDE)
    np.testing.assert_array_equal(*(logits(tmp_path, "", model, ids) for model in (cut, whole)))

    plain = write_tiny_model(tmp_path / "bf16", kind="bf16", seed=3, **WIDE)
    parts = tmp_path / "parts"
    quantize_checkpoint(plain, parts, scheme="2bits", tensor_parallel_size=ranks, progress=False)
    loaded = make_runner(parts, device=None, cache=CacheConfig(num_blocks=16))
    assert isinstance(loaded.model.layers[1].mlp.down, SegmentedWeight)
    apart = distance(logits(tmp_path, "", parts, ids), logits(tmp_path, "cpu", parts, ids))
    print(f"parts, summed: {apart}")
    assert apart < 0.1


@pytest.mark.timeout(300)
def test_seeds_reproduce(tmp_path: Path, demo_dir: Path) -> None:
    sampling = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "seed": 5, "repetition_penalty": 1.1}
    request = {"prompts": prompts(demo_dir)[:6], "max_tokens": 40, "sampling": sampling}
    first = run(tmp_path, "", demo_dir, request)
    second = run(tmp_path, "", demo_dir, request)
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert len({tuple(tokens.tolist()) for tokens in first.values()}) > 1
