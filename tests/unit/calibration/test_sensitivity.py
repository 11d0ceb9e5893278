"""Layers measured one by one, and int4 where it gains most."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_model import TOKENIZER_FILES, tiny_config, tiny_tensors, write_tensors

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.calibration import sensitivity
from fastdeploy_lite.calibration.sensitivity import LayerNats, measure_layers
from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.entrypoints.cli import main as cli
from fastdeploy_lite.entrypoints.evaluation import diverge, load_runner
from fastdeploy_lite.quantization.ccq_codes import CODES
from fastdeploy_lite.quantization.convert import quantize_matrix
from fastdeploy_lite.utils.arrays import bfloat16_to_float32, float32_to_bfloat16

LAYERS = 4


def write_model(folder: Path, sizes: dict[int, float], rounded: int | None = None) -> Path:
    """A tiny bf16 model whose routed experts of some layers are scaled; those of `rounded` are
    what the 2-bit code makes of them."""
    config = tiny_config("bf16", experts=2, layers=LAYERS)
    tensors = tiny_tensors(config)
    for key, (bits, dtype) in tensors.items():
        if ".experts." not in key:
            continue
        layer = int(key.split(".")[2])
        weight = bfloat16_to_float32(bits)
        if "down_proj" in key:
            weight = weight * np.float32(sizes.get(layer, 1.0))
        if layer == rounded:
            weight = quantize_matrix("ccq", weight, codes=CODES[:1])[1]
        tensors[key] = (float32_to_bfloat16(weight), dtype)
    write_tensors(folder, config, tensors)
    for name in TOKENIZER_FILES:
        shutil.copyfile(demo_path() / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 1 does nothing, layer 2 little, layer 3 most."""
    sizes = {1: 0.0, 2: 0.25, 3: 2.0}
    return write_model(tmp_path_factory.mktemp("sensitivity") / "model", sizes)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = np.random.default_rng(0).integers(0x4E00, 0x5E00, (40, 60))
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join("".join(map(chr, row)) for row in words), encoding="utf-8")
    return file


def windows(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(10, 8000, length).astype(np.int32) for length in lengths]


def test_figures_are_the_divergence_of_a_model_with_that_layer_rounded(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain", {})
    text = windows(40, 25)
    found = measure_layers(Checkpoint.open(plain), text, progress=False)
    assert [row.layer for row in found] == [1, 2, 3]
    reference = load_runner(plain, 64, "cpu")
    for row in found:
        rounded = write_model(tmp_path / f"rounded-{row.layer}", {}, row.layer)
        runner = load_runner(rounded, 64, "cpu")
        # An id more than is scored: `diverge` looks at what is said of tokens 1 and later.
        parts = [diverge(runner, reference, [*ids.tolist(), 5]).kl for ids in text]
        assert row.ccq == pytest.approx(float(np.concatenate(parts).mean()), rel=0.05)


def test_a_layer_that_does_nothing_costs_nothing_and_int4_costs_less(model: Path) -> None:
    first, second, third = measure_layers(Checkpoint.open(model), windows(50), progress=False)
    assert first == LayerNats(1, pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert 0 < second.gain < third.gain
    for row in (second, third):
        assert row.gain == row.ccq - row.int4
        assert row.int4 < 0.5 * row.ccq


def test_only_so_many_tokens_are_run(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    all_, few = windows(30, 30), windows(30, 30)[:1]
    limited = measure_layers(checkpoint, all_, tokens=30, progress=False)
    assert limited == measure_layers(checkpoint, few, progress=False)


def test_int4_goes_where_it_gains_most(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A budget for one int4 layer: the last of three, which no range from the first can say."""
    command = [
        *["quantize", "--model", str(model), "--output", str(tmp_path / "out")],
        *["--calibration", str(text), "--calibration-tokens", "400", "--bits", "3.4"],
        *["--int4-layers", "measured", "--calibration-method", "data-free"],
    ]
    assert cli.run(command) == 0
    assert "nats that int4 saves, by layer: 3: " in capsys.readouterr().out
    checkpoint = Checkpoint.open(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    w4 = config["quantization_config"]["moe_quant_config"]["moe_w4_quant_config"]
    assert w4["layers"] == [3]
    assert w4["quant_end_layer"] == 0  # layers 0.. before the first 2-bit one: dense
    assert [checkpoint.config.expert_kind(layer) for layer in (1, 2, 3)] == ["ccq", "ccq", "int4"]
    logits = load_runner(tmp_path / "out", 64, "cpu").logits(list(range(20, 50)))
    assert np.isfinite(logits).all()
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [row["layer"] for row in report["sensitivity"]] == [1, 2, 3]


def test_a_run_that_goes_on_does_not_measure_again(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdeploy_lite.calibration import convert

    command = [
        *["quantize", "--quiet", "--model", str(model), "--output", str(tmp_path / "out")],
        *["--calibration", str(text), "--calibration-tokens", "400", "--bits", "3.4"],
        *["--int4-layers", "measured", "--calibration-method", "data-free"],
    ]

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "CheckpointWriter", stop)
        assert cli.run(command) == 130
    monkeypatch.setattr(convert, "measure_layers", stop)
    assert cli.run(command) == 0
    assert not (tmp_path / "out.unfinished").exists()


def test_the_text_is_run_in_windows_of_its_own(model: Path) -> None:
    """Two windows are two sequences: their mean is that of each alone."""
    one, two = windows(20, 30)
    checkpoint = Checkpoint.open(model)
    whole = measure_layers(checkpoint, [one, two], progress=False)
    parts = [measure_layers(checkpoint, [part], progress=False) for part in (one, two)]
    for row, first, second in zip(whole, *parts, strict=True):
        assert row.ccq == pytest.approx(0.4 * first.ccq + 0.6 * second.ccq, rel=1e-3, abs=1e-7)
    assert sensitivity.TOKENS > 50
