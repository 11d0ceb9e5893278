"""`quantize --tune`: the layers with gradients against the oracle, what is learnt, what is kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import paddle
import pytest
from oracles.ernie_float32 import ErnieFloat32
from tiny_model import (
    KINDS,
    TOKENIZER_FILES,
    Kind,
    tiny_config,
    tiny_tensors,
    write_tensors,
    write_tiny_model,
)

from fastdeploy_lite.calibration import trainable
from fastdeploy_lite.calibration.convert import CalibrationText, quantize_with_calibration
from fastdeploy_lite.calibration.encoder import CalibrationSettings
from fastdeploy_lite.calibration.trainable import TrainableModel, norm_keys
from fastdeploy_lite.calibration.tuning import Tuned, Tuner, TuningSettings, fold, schedule
from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import verify
from fastdeploy_lite.entrypoints.cli.main import run as run_command
from fastdeploy_lite.quantization.ccq_codes import CODES
from fastdeploy_lite.quantization.convert import quantize_checkpoint
from fastdeploy_lite.utils.arrays import bfloat16_to_float32, float32_to_bfloat16
from fastdeploy_lite.utils.errors import ConfigError

IDS = np.random.default_rng(5).integers(10, 8000, 40).astype(np.int32)
QUICK = TuningSettings(epochs=3, windows=2, learning_rate=0.01, held_back=0.25)


def run(model: TrainableModel, ids: np.ndarray) -> paddle.Tensor:
    stream = model.embed(ids[None])
    for layer in model.layers:
        stream = model.run(layer, stream)
    return stream


def logits(model: TrainableModel) -> np.ndarray:
    with paddle.no_grad():
        return model.logits(run(model, IDS)[0].numpy())


def reference(folder: Path, windows: list[np.ndarray]) -> np.ndarray:
    """Residual stream behind the last layer of a model."""
    model = TrainableModel(Checkpoint.open(folder))
    with paddle.no_grad():
        return np.concatenate([run(model, window).numpy()[0] for window in windows])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bf16") / "model", kind="bf16", experts=2)


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's experts in 2 bits, rows permuted, but a quarter too large."""
    root = tmp_path_factory.mktemp("2bits")
    config = tiny_config("bf16", experts=2)
    tensors = tiny_tensors(config)
    for key, (bits, dtype) in tensors.items():
        if ".mlp.experts." in key:
            tensors[key] = float32_to_bfloat16(1.25 * bfloat16_to_float32(bits)), dtype
    write_tensors(root / "large", config, tensors)
    for name in TOKENIZER_FILES:
        shutil.copyfile(teacher / name, root / "large" / name)
    folder = root / "model"
    quantize_checkpoint(root / "large", folder, scheme="2bits", codes=CODES[:1], progress=False)
    return folder


def windows(count: int = 8, length: int = 24) -> list[np.ndarray]:
    random = np.random.default_rng(6)
    return list(random.integers(10, 8000, (count, length)).astype(np.int32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_the_models(kind: Kind, tied: bool, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", kind=kind, experts=4, tied=tied)
    model = TrainableModel(Checkpoint.open(folder))
    found = logits(model)
    oracle = ErnieFloat32(folder)
    expected = oracle.logits(IDS.tolist())
    assert oracle.margin.min() > 1e-6
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_permuted_files_are_the_same_model(student: Path) -> None:
    """The converter writes permuted rows by default; the engine reads them by config.json."""
    from fastdeploy_lite.entrypoints.evaluation import load_runner

    model = TrainableModel(Checkpoint.open(student))
    found = logits(model)
    expected = load_runner(student, 64, "cpu").logits(IDS.tolist())
    np.testing.assert_allclose(found, expected, atol=2e-2)


def test_layers_read_anew_each_time_give_the_same(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with paddle.no_grad():
        held = run(TrainableModel(Checkpoint.open(student)), IDS).numpy()
        monkeypatch.setattr(trainable, "HELD_BYTES", 0)
        model = TrainableModel(Checkpoint.open(student))
        read = run(model, IDS).numpy()
    assert model._held is None
    assert np.array_equal(held, read)


def test_gradients_layer_by_layer_are_the_slopes_of_the_loss(student: Path, teacher: Path) -> None:
    """Against central differences, for a gain of every kind in the first and the last layer."""
    text = windows(3)
    tuner = Tuner(Checkpoint.open(student), text, reference(teacher, text), QUICK)
    gains = tuner.model.gains
    for gain in gains.values():
        gain.stop_gradient = False
    tuner._step([0, 1])
    prefix = "ernie.layers"
    names = [
        "ernie.norm.weight",
        f"{prefix}.0.input_layernorm.weight",
        f"{prefix}.0.self_attn.qkv_proj",
        f"{prefix}.0.mlp.down_proj",
        f"{prefix}.2.self_attn.o_proj",
        f"{prefix}.2.mlp.experts.1.up_gate_proj",
        f"{prefix}.2.mlp.experts.0.down_proj",
        f"{prefix}.2.mlp.shared_experts.down_proj",
    ]
    slopes = {name: gains[name].grad.numpy().copy() for name in names}
    for name in names:
        direction = np.sign(slopes[name]).astype(np.float32)
        losses = []
        for step in (1e-2, -1e-2):
            gains[name].set_value(step * direction)
            losses.append(tuner._step([0, 1]))
        gains[name].set_value(0 * direction)
        slope = (losses[0] - losses[1]) / 2e-2
        assert slope == pytest.approx(float(np.abs(slopes[name]).sum()), rel=0.05), name


def test_tuning_brings_the_model_nearer_and_the_files_hold_it(
    student: Path, teacher: Path, tmp_path: Path
) -> None:
    text = windows(12)
    found = Tuner(Checkpoint.open(student), text, reference(teacher, text), QUICK).run(0, False)
    assert found.steps == 3 * 5
    assert found.after < 0.97 * found.before
    again = Tuner(Checkpoint.open(student), text, reference(teacher, text), QUICK).run(0, False)
    assert all(np.array_equal(found.gains[key], again.gains[key]) for key in found.gains)
    checkpoint = Checkpoint.open(student)
    folded = fold(checkpoint, found.gains)
    assert set(folded) == {
        *(key for keys in norm_keys(checkpoint).values() for key in keys),
        *(key for key in checkpoint if key.endswith(".super_scales")),
        *(key for key in checkpoint if key.endswith(".weight_scale") and "expert" not in key),
        *(key for key in checkpoint if key.endswith(".weight_scale") and "shared" in key),
    }
    for key, (array, dtype) in folded.items():
        source = checkpoint.get(key)
        assert (source.dtype, source.data.shape) == (dtype, array.shape)


def test_nothing_is_changed_where_nothing_is_gained(student: Path, teacher: Path) -> None:
    text = windows(4)
    wild = replace(QUICK, learning_rate=0.9, epochs=1)
    found = Tuner(Checkpoint.open(student), text, reference(teacher, text), wild).run(0, False)
    assert found.after >= found.before
    assert found.gains == {}


def test_one_window_is_too_little(student: Path) -> None:
    with pytest.raises(ConfigError, match="--tune: found 1 window of text, expected at least two"):
        Tuner(Checkpoint.open(student), windows(1), np.zeros((24, 128), np.float32), QUICK)


def test_schedule_rises_and_ends_at_zero() -> None:
    rates = [schedule(step, 50) for step in range(50)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4] == 1.0
    assert all(a > b for a, b in pairwise(rates[5:]))
    assert rates[-1] < 0.01
    assert schedule(0, 1) == 1.0


def test_quantize_writes_what_was_learnt(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With given gains: scales and norms alone differ from the run without, by just these."""
    run_really = Tuner.run

    def learn(tuner: Tuner, seed: int, progress: bool) -> Tuned:
        assert run_really(tuner, seed, progress).steps == QUICK.epochs * 4
        gains = {k: np.full(g.shape, 0.125, np.float32) for k, g in tuner.model.gains.items()}
        return Tuned(0.5, 0.25, 9, gains)

    monkeypatch.setattr(Tuner, "run", learn)
    words = np.random.default_rng(0).integers(0x4E00, 0x5E00, (12, 60))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("".join(map(chr, row)) for row in words), encoding="utf-8")
    given, settings = CalibrationText(str(text), 384, 64), CalibrationSettings(method="data-free")
    for name, tuning in (("plain", None), ("tuned", QUICK)):
        quantize_with_calibration(
            teacher, tmp_path / name, given, settings, scheme="w4w2", tuning=tuning, progress=False
        )
        verify(Checkpoint.open(tmp_path / name))
        assert not (tmp_path / f"{name}.unfinished").exists()
    plain, tuned = (Checkpoint.open(tmp_path / name) for name in ("plain", "tuned"))
    assert sorted(plain) == sorted(tuned)
    for key in plain:
        before, after = plain.get(key), tuned.get(key)
        local = key.endswith(".weight_scale") and before.dtype == "U8"
        if key.endswith((".super_scales", ".weight_scale", "norm.weight")) and not local:
            np.testing.assert_allclose(after.float32(), 1.125 * before.float32(), rtol=0.004)
        else:
            assert before.data.tobytes() == after.data.tobytes()
    report = json.loads((tmp_path / "tuned" / "report.json").read_text(encoding="utf-8"))
    assert report["tuning"] == {"before": 0.5, "after": 0.25, "steps": 9}
    assert report["settings"]["tuning"]["epochs"] == QUICK.epochs
    page = (tmp_path / "tuned" / "report.html").read_text(encoding="utf-8")
    assert "tuned in 9 steps" in page
    assert "0.2500 nats" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune"], "--tune needs --calibration"),
        (
            ["--calibration", "sample", "--tune", "--calibration-tokens", "99"],
            "--tune: found 1 window of text, expected at least two",
        ),
    ],
)
def test_options_that_cannot_be(
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    command = ["quantize", "--model", str(teacher), "--output", str(tmp_path / "q"), *options]
    assert run_command(command) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "q.unfinished").exists()  # refused before hours of work


def test_no_rounds_are_refused(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", "--model", str(teacher), "--output", str(tmp_path / "q")]
    with pytest.raises(SystemExit) as ended:
        run_command([*command, "--calibration", "sample", "--tune", "0"])
    assert ended.value.code == 2
    assert "--tune: expected an integer of at least 1, got '0'" in capsys.readouterr().err
