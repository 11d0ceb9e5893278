"""Loading: forms, memory, errors that name file and key, dummy weights, tensor-parallel parts."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import paddle
import pytest
from model_driver import generate, make_runner, sequences
from oracles.ernie_float32 import ErnieFloat32
from tiny_model import KINDS, Kind, tiny_config, tiny_tensors, write_tensors, write_tiny_model

from fastdeploy_lite import envs
from fastdeploy_lite.checkpoint import Checkpoint, inventory
from fastdeploy_lite.config import (
    CacheConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from fastdeploy_lite.model_executor import ops, weights
from fastdeploy_lite.model_executor.weights import CheckpointSource
from fastdeploy_lite.models.registry import ModelRegistry
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError, FastDeployError
from fastdeploy_lite.worker.model_runner import ModelRunner

CPU = paddle.CPUPlace()
IDS = [5, 900, 17, 17, 4000, 8191]


def test_bytes_kept_are_bytes_of_the_files(tiny_2bits: Path) -> None:
    """Weights stay packed: only scales may be wider in memory than on disk."""
    report = make_runner(tiny_2bits).memory_report()
    on_disk = sum(file.stat().st_size for file in tiny_2bits.glob("*.safetensors"))
    assert sum(report.weights.values()) < 1.05 * on_disk
    # 2.0625 bits and, per column of 128 or 256 rows, three float32: up to 0.75 bits in so small K.
    assert 2.0625 < report.bits_per_expert_weight < 2.9
    assert report.weights["head"] == 0
    assert report.total > report.kv_cache > 0


def test_an_untied_head_is_a_second_table(tiny_bf16: Path) -> None:
    report = make_runner(tiny_bf16).memory_report()
    assert report.weights["head"] == report.weights["embedding"] == 8192 * 128 * 2
    assert report.bits_per_expert_weight == 16.0


def test_a_head_in_the_files_is_used_though_config_ties_it(tmp_path: Path) -> None:
    config = tiny_config("bf16", tied=False)
    tensors = tiny_tensors(config, seed=4)
    write_tensors(tmp_path, config | {"tie_word_embeddings": True}, tensors)
    found = make_runner(tmp_path).logits(IDS)
    assert np.abs(found - ErnieFloat32(tmp_path).logits(IDS)).max() < 1e-3


def test_a_config_of_another_name(tiny_2bits: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_2bits, tmp_path / "model"))
    (folder / "config.json").rename(folder / "other.json")
    config = RuntimeConfig(folder, ModelConfig.from_dir(folder, "other.json"), device="cpu")
    runner = ModelRunner(config)
    runner.load_model()
    assert runner.logits(IDS).shape == (len(IDS), 8192)


def test_progress_bar_ends_at_all_bytes(tiny_w4w2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint.open(tiny_w4w2)
    with CheckpointSource(checkpoint, CPU, show_progress=True) as source:
        ModelRegistry.get_class(checkpoint.config)(checkpoint.config, source, None, "float32")
    shown = capfd.readouterr().err
    assert "Loading Weights: 100%" in shown
    assert "B/s" in shown
    assert "Loading Layers: 100%" in shown
    assert "3/3" in shown


def test_a_layer_counts_when_it_is_built(
    tiny_w4w2: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with CheckpointSource(Checkpoint.open(tiny_w4w2), CPU, show_progress=True) as source:
        layers = iter(source.layers(3))
        assert (next(layers), next(layers)) == (0, 1)
        layers.close()  # as when building layer 1 fails
    shown = capfd.readouterr().err
    assert "1/3" in shown
    assert "2/3" not in shown
    with CheckpointSource(Checkpoint.open(tiny_w4w2), CPU) as source:
        assert list(source.layers(3)) == [0, 1, 2]
    assert capfd.readouterr().err == ""


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    config = tiny_config("2bits")
    tensors = tiny_tensors(config)
    key = "ernie.layers.2.mlp.experts.3.down_proj.code_zp"
    del tensors[key]
    write_tensors(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*{key}: found nothing, expected F32"):
        make_runner(tmp_path)


def test_a_failed_load_ends_its_line_and_never_says_100_percent(
    tiny_w4w2: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(CheckpointError, match="nothing"),
        CheckpointSource(Checkpoint.open(tiny_w4w2), CPU, show_progress=True) as source,
    ):
        source.embedding()
        source.vector("ernie.nothing")
    shown = capfd.readouterr().err
    assert shown.endswith("\n")
    assert "100%" not in shown


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ernie.layers.1.self_attn.qkv_proj.weight_scale", 0x7FC0),  # bf16 NaN
        ("ernie.layers.2.mlp.experts.1.up_gate_proj.super_scales", 0x7F80),  # infinity
        ("ernie.layers.0.input_layernorm.weight", 0x7FC0),
    ],
)
def test_scales_that_are_not_numbers_are_named(tmp_path: Path, key: str, value: int) -> None:
    config = tiny_config("2bits")
    tensors = tiny_tensors(config)
    array, dtype = tensors[key]
    array = array.copy()
    array.reshape(-1)[3] = value
    write_tensors(tmp_path, config, tensors | {key: (array, dtype)})
    with pytest.raises(CheckpointError, match=rf"{key}: found (nan|inf) at element 3"):
        make_runner(tmp_path)


def test_too_little_memory_is_said_before_loading(
    tiny_2bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "available_bytes", lambda: 1 << 20)
    with pytest.raises(FastDeployError, match=r"the weights need 0\.0 GiB .* 0\.0 GiB are avail"):
        make_runner(tiny_2bits)


def test_an_op_that_refuses_a_weight_is_blamed_on_the_file(
    tiny_2bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("weight_scale is negative")

    monkeypatch.setattr(ops, "fill_weight", refuse)
    with pytest.raises(
        CheckpointError, match=r"ernie\.embed_tokens\.weight: weight_scale is negative"
    ) as caught:
        make_runner(tiny_2bits)
    assert str(tiny_2bits) in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_dummy_weights_run_without_files(tmp_path: Path, kind: Kind) -> None:
    """Any form; activations stay finite and of normal size; one seed gives one model."""
    config = ModelConfig.from_dict(tiny_config(kind, layers=6, experts=8, tied=False))
    logits = []
    for seed in (1, 1, 2):
        runner = ModelRunner(
            RuntimeConfig(
                model_path=tmp_path / "nowhere",
                model=config,
                scheduler=SchedulerConfig(max_num_seqs=2, max_model_len=128),
                load=LoadConfig("dummy"),
                seed=seed,
                device="cpu",
            )
        )
        runner.load_model()
        logits.append(runner.logits(IDS))
    assert 0.3 < logits[0].std() < 3.0
    assert np.array_equal(logits[0], logits[1])
    assert not np.array_equal(logits[0], logits[2])


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_parallel_parts_add_up(tmp_path: Path, kind: Kind) -> None:
    """Each rank's product with its own columns and rows, summed, is the whole product."""
    folder = write_tiny_model(tmp_path, kind=kind)
    whole = {w: CheckpointSource(Checkpoint.open(folder), CPU).linear(w) for w in MODULES}
    parts = []
    for rank in (0, 1):
        checkpoint = Checkpoint.open(folder, 2, rank)
        inventory.verify(checkpoint)
        source = CheckpointSource(checkpoint, CPU)
        parts.append({module: source.linear(module) for module in MODULES})
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    up_gate, down = MODULES
    inner = product(x[:, :128], whole[up_gate])
    halves = [product(x[:, :128], part[up_gate]) for part in parts]
    gate = np.concatenate([half[:, :128] for half in halves], axis=1)
    up = np.concatenate([half[:, 128:] for half in halves], axis=1)
    assert np.allclose(np.concatenate([gate, up], axis=1), inner, atol=1e-5)
    sums = sum(product(x[:, 128 * r : 128 * (r + 1)], part[down]) for r, part in enumerate(parts))
    assert np.allclose(sums, product(x, whole[down]), atol=1e-5)


MODULES = ("ernie.layers.0.mlp.up_gate_proj", "ernie.layers.0.mlp.down_proj")


def product(x: npt.NDArray[np.float32], weight: ops.PackedWeight) -> npt.NDArray[np.float32]:
    out = paddle.empty([len(x), weight.out_features], "float32")
    ops.linear(paddle.to_tensor(np.ascontiguousarray(x)), weight, out)
    result: npt.NDArray[np.float32] = out.numpy()
    return result


def test_a_runner_alone_does_not_pretend_to_be_a_rank(tiny_2bits: Path) -> None:
    with pytest.raises(ConfigError, match=r"size 2: this command runs a model in one process"):
        make_runner(tiny_2bits, parallel=ParallelConfig(2, 0))


def test_block_count_follows_memory_limits_and_override(
    tiny_2bits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(tiny_2bits, seqs=3, length=130)
    assert runner.kv_bytes_per_block == 3 * 2 * 2 * 64 * 64 * 4
    # Twice what all slots at full length use, and the scheduler's reserve.
    assert runner.profile_num_blocks() == 2 * 3 * 3 + envs.FD_ENC_DEC_BLOCK_NUM
    room = 5 * runner.kv_bytes_per_block
    monkeypatch.setattr(ops, "memory_info", lambda _: (int(room / 0.9) + 1, 1 << 40))
    assert runner.profile_num_blocks() == 5
    monkeypatch.setattr(ops, "memory_info", lambda _: (room // 3, 1 << 40))
    with pytest.raises(ConfigError, match="room for 64 tokens but max_model_len is 130: lower"):
        runner.profile_num_blocks()
    explicit = make_runner(tiny_2bits, length=130, cache=CacheConfig(num_blocks=7))
    assert explicit.profile_num_blocks() == explicit.num_blocks == 7


def test_unknown_architectures_are_refused() -> None:
    config = ModelConfig.from_dict(tiny_config("bf16"))
    config.raw["architectures"][:] = ["LlamaForCausalLM"]
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM.* expected a list with one of"):
        ModelRegistry.get_class(config)


def test_reallocating_the_cache_starts_clean(tiny_2bits: Path) -> None:
    runner = make_runner(tiny_2bits)
    (expected,) = generate(runner, sequences([IDS], 192), 5)
    runner.allocate_kv_cache(9)
    assert generate(runner, sequences([IDS], 192), 5) == [expected]


def test_loading_says_nothing_on_the_console(
    tiny_2bits: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        make_runner(tiny_2bits)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
