"""Teacher-forced logits against the float32 reference.

Tolerance: the product sums in another order than numpy and writes activations of quantised
linears as 24-bit integers, so each product carries relative errors near 2^-23 and a model of a few
layers some 1e-5 of its largest logit. A wrong layout, head, rotation or expert is off by 0.1 and
more, so 1e-3 separates the two with room on both sides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_driver import make_runner
from oracles.ernie_float32 import ErnieFloat32
from tiny_model import KINDS, Kind, tiny_config, tiny_tensors, write_tensors, write_tiny_model

from fastdeploy_lite.worker.model_runner import ModelRunner

TOLERANCE = 1e-3


def random_ids(count: int, seed: int = 0, vocab_size: int = 8192) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, vocab_size, count)]


def assert_same_logits(runner: ModelRunner, folder: Path, ids: list[int]) -> None:
    found, expected = runner.logits(ids), ErnieFloat32(folder).logits(ids)
    assert found.shape == expected.shape == (len(ids), runner.config.model.vocab_size)
    assert np.abs(found - expected).max() < TOLERANCE
    best, second = np.sort(expected, axis=1)[:, :-3:-1].T
    clear = best - second > 2 * TOLERANCE  # nearer ones may swap within the tolerance
    assert clear.mean() > 0.5
    assert (found.argmax(1) == expected.argmax(1))[clear].all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_equals_the_reference(tmp_path: Path, kind: Kind, tied: bool) -> None:
    folder = write_tiny_model(tmp_path, kind=kind, tied=tied, seed=3)
    assert_same_logits(make_runner(folder), folder, random_ids(150))


VARIANTS: dict[str, dict[str, Any]] = {
    "no shared expert": {"shared_experts": 0},
    "two shared experts": {"shared_experts": 2},
    "every layer routed": {"moe_layer_start_index": 0},
    "two dense layers": {"moe_layer_start_index": 2, "layers": 4},
    "dense model": {"experts": 0, "kind": "bf16", "moe_num_experts": 0},
    "one expert": {"experts": 1},
    "all experts": {"moe_k": 4},
    "one KV head": {"num_key_value_heads": 1},
    "no shared KV head": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 128},
    "no selection bias": {"moe_use_aux_free": False},
    "large theta": {"rope_theta": 500000.0},
    "large epsilon": {"rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_architecture_variants(tmp_path: Path, name: str) -> None:
    folder = write_tiny_model(tmp_path, **{"kind": "2bits", "seed": 5, **VARIANTS[name]})
    assert_same_logits(make_runner(folder), folder, random_ids(70))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_lengths_around_block_and_chunk_boundaries(tiny_2bits: Path, count: int) -> None:
    """Blocks hold 64 tokens and a step 128 here, so all seams are crossed."""
    assert_same_logits(make_runner(tiny_2bits, tokens=128), tiny_2bits, random_ids(count, count))


def test_high_positions(tmp_path: Path) -> None:
    """Position 2,999 with a fast-turning theta: angles, cache and causal mask far from zero."""
    overrides = {"max_position_embeddings": 4096, "rope_theta": 100.0}
    folder = write_tiny_model(tmp_path, kind="bf16", layers=2, **overrides)
    assert_same_logits(make_runner(folder, length=4096), folder, random_ids(3000))


def test_equal_router_scores_go_to_the_lower_expert(tmp_path: Path) -> None:
    """A zero gate makes all scores equal: experts 0 and 1 must be taken for every token."""
    config = tiny_config("bf16", moe_use_aux_free=False)
    tensors = tiny_tensors(config, seed=1)
    for key, (array, dtype) in tensors.items():
        if key.endswith("gate.weight"):
            tensors[key] = (np.zeros_like(array), dtype)
    write_tensors(tmp_path, config, tensors)
    assert_same_logits(make_runner(tmp_path), tmp_path, random_ids(40))


def test_selection_bias_selects_but_does_not_weigh(tmp_path: Path) -> None:
    """A bias above 1 forces experts 2 and 3; their weights must still come from the softmax."""
    config = tiny_config("bf16")
    tensors = tiny_tensors(config, seed=2)
    for key in tensors:
        if key.endswith("e_score_correction_bias"):
            tensors[key] = (np.array([[0.0, 0.0, 2.0, 2.0]], np.float32), "F32")
    write_tensors(tmp_path, config, tensors)
    assert_same_logits(make_runner(tmp_path), tmp_path, random_ids(40))


def test_demo_checkpoint(demo_dir: Path) -> None:
    assert_same_logits(make_runner(demo_dir), demo_dir, random_ids(200))


def test_bf16_demo_checkpoint(demo_bf16_dir: Path) -> None:
    assert_same_logits(make_runner(demo_bf16_dir), demo_bf16_dir, random_ids(100))


def test_bf16_demo_checkpoint_agrees_with_its_training_code(demo_bf16_dir: Path) -> None:
    """The recorded log-probabilities were computed in bf16: 0.03 a token, 98 % same argmax."""
    import json

    recorded = json.loads((demo_bf16_dir / "reference_logprobs.json").read_text())["bf16"]
    runner = make_runner(demo_bf16_dir, tokens=512, length=2048)
    differences, same = [], []
    for document in recorded:
        ids = document["ids"]
        logits = runner.logits(ids).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        found = logprobs[np.arange(len(ids) - 1), ids[1:]]
        differences += list(np.abs(found - np.array(document["logprobs"])))
        same += list(logits.argmax(1) == np.array(document["argmax"]))
    assert np.mean(differences) < 0.05
    assert np.mean(same) > 0.97


@pytest.mark.parametrize("ids", [[], [8192], [-1], list(range(600))])
def test_sequences_that_cannot_be_scored(tiny_2bits: Path, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected 1 to max_model_len 512|outside"):
        make_runner(tiny_2bits).logits(ids)
