"""The prediction layer against numpy: prompts in chunks, guesses right and wrong, full blocks."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from draft_layer import random_layer, write_layer
from model_driver import Running, make_runner, sequences
from oracles.draft_float32 import DraftFloat32
from oracles.ernie_float32 import ErnieFloat32, Files
from tiny_model import tiny_tensors, write_tensors, write_tiny_model

from fastdeploy_lite.config import LoadConfig, ModelConfig
from fastdeploy_lite.request.step import SequenceSlice
from fastdeploy_lite.speculation.config import SpeculativeConfig
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError
from fastdeploy_lite.worker.model_runner import ModelRunner

SURE = 2e-3  # a lead in logits that rounding cannot turn
DRAFTS = 4


def with_layer(model: Path, folder: Path, seed: int = 5) -> Path:
    return write_layer(folder, random_layer(ModelConfig.from_dir(model), seed))


def runner_with(model: Path, layer: Path | None, **more: object) -> ModelRunner:
    speculative = SpeculativeConfig(
        "mtp", num_speculative_tokens=DRAFTS, model=None if layer is None else str(layer)
    )
    return make_runner(model, speculative=speculative, **more)  # type: ignore[arg-type]


def prompts(sizes: tuple[int, ...], seed: int = 3) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 60, size).tolist() for size in sizes]


def slice_of(one: Running, most: int, guesses: list[int]) -> SequenceSlice:
    part = one.slice(most, num_drafts=DRAFTS)
    part.logits_processors = None
    if part.sample and guesses:
        part.token_ids = [*part.token_ids, *guesses]
        part.draft_token_ids = guesses
    return part


def check(found: list[int], tokens: list[int], oracle: DraftFloat32) -> int:
    """Compare guesses up to the first that is a near tie; returns how many were compared."""
    expected, leads = oracle.guesses(tokens, len(found))
    sure = next((i for i, lead in enumerate(leads) if lead < SURE), len(leads))
    assert found[:sure] == expected[:sure]
    return sure


@pytest.mark.parametrize("chunk", [5, 10_000])
@pytest.mark.parametrize("kind", ["tiny_2bits", "tiny_bf16", "tiny_w4w2"])
def test_guesses_are_those_of_numpy(
    kind: str, chunk: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Whatever was guessed before, right or wrong, and however prompts were cut."""
    model: Path = request.getfixturevalue(kind)
    layer = with_layer(model, tmp_path / "layer")
    runner = runner_with(model, layer)
    oracle = DraftFloat32(ErnieFloat32(model), Files(layer))
    rng = random.Random(chunk)
    running = sequences(prompts((3, 40, 62)), 128)
    guesses: list[list[int]] = [[] for _ in running]
    compared = right = 0
    for _ in range(24):
        parts = [slice_of(one, chunk, guess) for one, guess in zip(running, guesses, strict=True)]
        for i, (part, result) in enumerate(zip(parts, runner.execute(parts), strict=True)):
            one = running[i]
            one.take(result)
            guesses[i] = []
            if not part.sample:
                assert not result.draft_token_ids
                continue
            one.done = len(one.prompt) + len(one.output) - 1
            right += len(result.token_ids) - 1
            room = 1 + 64 * len(one.blocks) - one.done
            assert len(result.draft_token_ids) == min(DRAFTS, room)
            known = one.prompt + one.output
            compared += check(list(result.draft_token_ids), known, oracle)
            guesses[i] = _disturbed(list(result.draft_token_ids), known, oracle, rng)
    assert compared > 60
    assert right > 3


def _disturbed(
    drafts: list[int], known: list[int], oracle: DraftFloat32, rng: random.Random
) -> list[int]:
    """What the next step checks: the layer's guesses, what is right, or what is partly wrong."""
    choice = rng.random()
    if choice < 0.3:
        return drafts
    truth: list[int] = []
    for _ in range(rng.randrange(4)):
        logits = oracle._main.logits(known + truth)[-1]
        truth.append(int(logits.argmax()))
    return truth if choice < 0.7 else [*truth, 1]


def test_a_layer_reads_what_it_is_fed(
    tiny_2bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model says the same without it; what it missed leaves it with numbers for its guesses."""
    layer = with_layer(tiny_2bits, tmp_path / "layer")
    said, reads = [], []
    for fed in (lambda step: True, lambda step: step in (2, 5), lambda step: False):
        runner = runner_with(tiny_2bits, layer)
        drafting, read = runner._drafting, [0]
        assert drafting is not None
        follow = drafting.follow

        def count(*args: object, follow=follow, read=read) -> None:  # type: ignore[no-untyped-def]
            read[0] += 1
            follow(*args)

        monkeypatch.setattr(drafting, "follow", count)
        running = sequences(prompts((3, 40)), 128)
        for step in range(8):
            parts = [slice_of(one, 10_000, []) for one in running]
            for part in parts:
                part.feeds_draft = fed(step)
            for one, result in zip(running, runner.execute(parts), strict=True):
                one.take(result)
                assert len(result.draft_token_ids) == (DRAFTS if fed(step) else 0)
        said.append([one.output for one in running])
        reads.append(read[0])
    assert said[0] == said[1] == said[2]
    assert reads == [8, 2, 0]


def test_a_full_block_leaves_no_room(tiny_2bits: Path, tmp_path: Path) -> None:
    """The first guess needs no block; the others need one for the token that was sampled."""
    runner = runner_with(tiny_2bits, with_layer(tiny_2bits, tmp_path / "layer"))
    for size, expected in ((61, 4), (62, 3), (63, 2), (64, 1)):
        (one,) = sequences(prompts((size,)), 64)
        part = slice_of(one, 10_000, [])
        (result,) = runner.execute([part])
        assert len(result.draft_token_ids) == expected, size


def test_rows_in_the_permuted_order(tmp_path: Path) -> None:
    """Channels are rearranged while loading, the layer's with them."""
    model = write_tiny_model(tmp_path / "model", kind="2bits", seed=3)
    layer = with_layer(model, tmp_path / "layer")
    natural = runner_with(model, layer)
    permuted = runner_with(model, layer, load=LoadConfig(row_order="permuted"))
    assert permuted.memory_report().row_order != natural.memory_report().row_order
    # Another model, since the file means something else now: compared with itself without a cache.
    (prompt,) = prompts((30,))
    (whole,) = sequences([prompt], 128)
    (result,) = permuted.execute([slice_of(whole, 10_000, [])])
    (pieces,) = sequences([prompt], 128)
    for _ in range(6):
        (cut,) = permuted.execute([slice_of(pieces, 5, [])])
    assert cut.draft_token_ids == result.draft_token_ids
    (other,) = natural.execute([slice_of(sequences([prompt], 128)[0], 10_000, [])])
    assert list(other.draft_token_ids) != list(result.draft_token_ids)


@pytest.mark.parametrize("place", ["beside", "below", "turned", "named"])
def test_where_layers_lie(place: str, tiny_bf16: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_bf16, model)
    config = ModelConfig.from_dir(model)
    tensors = random_layer(config, 5)
    expected = runner_with(tiny_bf16, write_layer(tmp_path / "reference", tensors))
    if place == "turned":
        key = "ernie.mtp_linear_proj.0.weight"
        tensors[key] = (tensors[key][0].T.copy(), "BF16")
    if place == "named":  # Hugging Face's names: separate projections, [out, in]
        tensors = _hugging_face(tensors, config)
    if place == "beside":
        (model / "model.safetensors").unlink()
        raw = json.loads((model / "config.json").read_text())
        write_tensors(model, raw, tiny_tensors(raw, seed=13) | tensors)
        folder = None
    else:
        folder = write_layer(model / "mtp", tensors)
    (one,), (other,) = sequences(prompts((20,)), 64), sequences(prompts((20,)), 64)
    runner = runner_with(model, folder if place == "named" else None)
    (found,) = runner.execute([slice_of(one, 10_000, [])])
    (wanted,) = expected.execute([slice_of(other, 10_000, [])])
    assert found.draft_token_ids == wanted.draft_token_ids
    weights = runner.memory_report().weights
    assert weights["draft"] == expected.memory_report().weights["draft"] > 0


def _hugging_face(tensors: dict, config: ModelConfig) -> dict:  # type: ignore[type-arg]
    found = {}
    for key, (array, dtype) in tensors.items():
        name = key.replace("ernie.", "model.")
        if ".qkv_proj." in key:
            width, dim = config.num_attention_heads, config.head_dim
            ends = np.array([width, width + config.num_key_value_heads]) * dim
            for letter, part in zip("qkv", np.split(array, ends, axis=1), strict=True):
                turned = np.ascontiguousarray(part.T)
                found[name.replace("qkv_proj", f"{letter}_proj")] = (turned, dtype)
        elif ".up_gate_proj." in key:
            for side, part in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                turned = np.ascontiguousarray(part.T)
                found[name.replace("up_gate_proj", f"{side}_proj")] = (turned, dtype)
        else:
            turn = array.ndim == 2 and "mtp_block" in key
            found[name] = (np.ascontiguousarray(array.T) if turn else array, dtype)
    return found


def test_what_cannot_be_used_is_named(tiny_2bits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"speculative_config\.model"):
        runner_with(tiny_2bits, None)
    with pytest.raises(CheckpointError, match="nothing"):
        (tmp_path / "nothing").mkdir()
        runner_with(tiny_2bits, tmp_path / "nothing")
    with pytest.raises(ConfigError, match="missing"):
        runner_with(tiny_2bits, tmp_path / "missing")
    tensors = random_layer(ModelConfig.from_dir(tiny_2bits))
    lacking = {k: v for k, v in tensors.items() if "mtp_emb_norm" not in k}
    with pytest.raises(CheckpointError, match="mtp_emb_norm"):
        runner_with(tiny_2bits, write_layer(tmp_path / "lacking", lacking))
    key = "ernie.mtp_linear_proj.0.weight"
    short = tensors | {key: (tensors[key][0][:100].copy(), "BF16")}
    with pytest.raises(CheckpointError, match="mtp_linear_proj"):
        runner_with(tiny_2bits, write_layer(tmp_path / "short", short))


def test_a_block_of_experts_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", kind="bf16", moe_layer_start_index=0)
    layer = with_layer(model, tmp_path / "layer")
    with pytest.raises(ConfigError, match="not supported"):
        runner_with(model, layer)


def test_the_layer_changes_no_answer(tiny_w4w2: Path, tmp_path: Path) -> None:
    """The model's own tokens and log-probabilities, bit for bit."""
    layer = with_layer(tiny_w4w2, tmp_path / "layer")
    drafting, plain = runner_with(tiny_w4w2, layer), make_runner(tiny_w4w2)
    a, b = sequences(prompts((3, 40, 62)), 128), sequences(prompts((3, 40, 62)), 128)
    for _ in range(20):
        left = drafting.execute([one.slice(7, num_drafts=DRAFTS) for one in a])
        right = plain.execute([one.slice(7) for one in b])
        for one, other, found, expected in zip(a, b, left, right, strict=True):
            assert dataclasses.replace(found, draft_token_ids=()) == expected
            one.take(found)
            other.take(expected)
    for one, other in zip(a, b, strict=True):
        assert all(map(np.array_equal, one.rows, other.rows))
