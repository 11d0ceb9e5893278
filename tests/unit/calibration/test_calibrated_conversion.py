"""`quantize --calibration`: streams against the oracle, gains, resuming, refusals."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hugging_face import hugging_face_config, hugging_face_tensors
from oracles.ernie_float32 import ErnieFloat32
from tiny_model import (
    TOKENIZER_FILES,
    Tensors,
    tiny_config,
    tiny_tensors,
    write_tensors,
    write_tiny_model,
)

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.calibration import convert, input_moments
from fastdeploy_lite.calibration.convert import (
    CalibratedReport,
    CalibrationText,
    quantize_with_calibration,
)
from fastdeploy_lite.calibration.encoder import (
    METHODS,
    CalibratedEncoder,
    CalibrationSettings,
    read_dense,
)
from fastdeploy_lite.calibration.experts import add_outputs, group_by_expert
from fastdeploy_lite.calibration.streams import LayerRunner
from fastdeploy_lite.checkpoint import Checkpoint
from fastdeploy_lite.checkpoint.inventory import verify
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.entrypoints.cli import main as cli
from fastdeploy_lite.entrypoints.cli import quantize as cli_quantize
from fastdeploy_lite.entrypoints.evaluation import load_runner
from fastdeploy_lite.formats.ccq import ROW_ORDERS, RowOrder, to_stored_order
from fastdeploy_lite.quantization import ccq_hessian, hessian
from fastdeploy_lite.quantization.card import Encoded
from fastdeploy_lite.quantization.convert import DenseType
from fastdeploy_lite.quantization.journal import LayerResult
from fastdeploy_lite.quantization.products import HOST, HostProducts
from fastdeploy_lite.utils.errors import CheckpointError, ConfigError

QUICK = CalibrationSettings("corrected", candidates=1, descents=1)
"""The method that keeps most between layers; not the default, which is one of its parts."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", kind="bf16", experts=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = np.random.default_rng(0).integers(0x4E00, 0x5E00, (40, 60))
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join("".join(map(chr, row)) for row in words), encoding="utf-8")
    return file


def run_quick(
    model: Path, text: Path, output: Path, settings: CalibrationSettings = QUICK, **options: Any
) -> CalibratedReport:
    given = CalibrationText(str(text), 600)
    return quantize_with_calibration(
        model, output, given, settings, scheme="2bits", progress=False, **options
    )


@pytest.fixture(scope="module")
def whole(
    model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CalibratedReport]:
    """The output and the report of an undisturbed `run_quick`; not to be changed."""
    output = tmp_path_factory.mktemp("whole") / "whole"
    return output, run_quick(model, text, output)


@pytest.fixture(scope="module")
def unfinished(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `run_quick` has left when it ends just before the output; to be copied."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path_factory.mktemp("cut") / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "CheckpointWriter", stop)
        with pytest.raises(KeyboardInterrupt):
            run_quick(model, text, output, keep_every=0)
    return output.with_name("cut.unfinished")


def weights(folder: Path) -> dict[str, bytes]:
    found = {}
    for key, tensor in ((k, Checkpoint.open(folder).get(k)) for k in Checkpoint.open(folder)):
        found[key] = tensor.data.tobytes()
    return found


def write_model(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    write_tensors(folder, config, tensors)
    for name in TOKENIZER_FILES:
        shutil.copyfile(demo_path() / name, folder / name)
    return folder


def test_streams_are_those_of_the_model(model: Path) -> None:
    """Layer by layer, experts apart: the residual stream that the oracle computes."""
    checkpoint = Checkpoint.open(model)
    ids = np.random.default_rng(1).integers(10, 8000, 50).astype(np.int32)
    runner = LayerRunner(checkpoint, [30, 20])
    stream = runner.embed(ids)
    linears = {linear.module: linear for linear in model_linears(checkpoint.config)}
    for layer in range(checkpoint.config.num_hidden_layers):
        entered = runner.enter_mlp(layer, stream, {})
        stream = entered.residual + entered.dense
        if entered.experts.shape[1]:
            prefix = f"ernie.layers.{layer}.mlp.experts"
            add_outputs(
                stream,
                entered.x,
                group_by_expert(entered.experts, entered.weights, 2),
                lambda name, e, p=prefix: read_dense(checkpoint, linears[f"{p}.{e}.{name}"]),
            )
    oracle = ErnieFloat32(model)
    for rows in (slice(0, 30), slice(30, 50)):
        expected = oracle.hidden(ids[rows].tolist())
        part = stream[rows]
        scale = np.sqrt(np.mean(np.square(part), axis=1, keepdims=True) + 1e-5)
        norm = oracle.files.floats("ernie.norm.weight")
        np.testing.assert_allclose(part / scale * norm, expected, atol=2e-3)


def test_each_method_knows_more_and_loses_less(model: Path, text: Path, tmp_path: Path) -> None:
    errors = []
    for method in METHODS:
        report = quantize_with_calibration(
            model,
            tmp_path / method,
            CalibrationText(str(text), 1500, 256),
            CalibrationSettings(method=method, candidates=1, descents=1),
            scheme="2bits",
            progress=False,
        )
        verify(Checkpoint.open(tmp_path / method))
        errors.append(report.layers[-1]["stream_error"])
    assert errors[0] > errors[1] > errors[2] > errors[3]
    written = json.loads((tmp_path / "hessian" / "report.json").read_text(encoding="utf-8"))
    assert sum(written["layers"][1]["tokens"]) == 2 * 1500
    assert written["settings"]["method"] == "hessian"


class CardOfTheCpu(HostProducts):
    """Works as a card does, on several experts side by side, and counts what it searched."""

    workers = 3

    def __init__(self) -> None:
        self.searched = 0

    def encode_hessian(
        self,
        weight: np.ndarray,
        moments: np.ndarray,
        *,
        candidates: int,
        descents: int,
        row_order: RowOrder,
    ) -> Encoded:
        time.sleep(0.01 * (self.searched % 2))  # the last may overtake the first
        self.searched += 1
        stored = to_stored_order(to_stored_order(moments, row_order).T, row_order)
        found = ccq_hessian.encode(
            to_stored_order(weight, row_order),
            np.ascontiguousarray(stored),
            candidates=candidates,
            descents=descents,
        )
        return Encoded(found, 0.0, 0.0)


def test_a_card_does_the_work_of_the_cpu(
    model: Path, text: Path, tmp_path: Path, whole: tuple[Path, CalibratedReport]
) -> None:
    """The same files and figures, and a run of one is not continued on the other."""
    card = CardOfTheCpu()
    of_card = run_quick(model, text, tmp_path / "card", card=card)
    reports = [
        [{**layer, "seconds": 0} for layer in report.layers] for report in (whole[1], of_card)
    ]
    assert card.searched == 2 * 2 * len([layer for layer in reports[1] if layer["experts"]])
    assert reports[0] == reports[1]
    assert weights(whole[0]) == weights(tmp_path / "card")
    settings = [
        json.loads((folder / "report.json").read_text(encoding="utf-8"))["settings"]
        for folder in (whole[0], tmp_path / "card")
    ]
    assert settings[1] == {**settings[0], "device": "nvidia"}


def test_both_row_orders_are_as_good_and_run(model: Path, text: Path, tmp_path: Path) -> None:
    """Another order puts other rows into a byte: other bytes, the same quality."""
    errors = {}
    for order in ROW_ORDERS:
        settings = CalibrationSettings(candidates=1, descents=1, row_order=order)
        report = quantize_with_calibration(
            model, tmp_path / order, CalibrationText(str(text), 1200, 256), settings,
            scheme="2bits", progress=False,
        )  # fmt: skip
        errors[order] = report.layers[-1]["stream_error"]
        # The oracle reads natural rows; the engine reads both, told by config.json.
        runner = load_runner(tmp_path / order, 64, "cpu")
        logits = runner.logits(list(range(20, 50)))
        if order == "natural":
            expected = ErnieFloat32(tmp_path / order).logits(list(range(20, 50)))
            np.testing.assert_allclose(logits, expected, atol=2e-3)
    assert errors["permuted"] == pytest.approx(errors["natural"], rel=0.1)


def test_hugging_face_input_gives_the_same_bytes(
    text: Path, tmp_path: Path, whole: tuple[Path, CalibratedReport]
) -> None:
    config = tiny_config("bf16", experts=2)
    tensors = hugging_face_tensors(config, tiny_tensors(config))
    write_model(tmp_path / "hf", hugging_face_config(config), tensors)
    run_quick(tmp_path / "hf", text, tmp_path / "output")
    assert weights(whole[0]) == weights(tmp_path / "output")


@pytest.mark.parametrize("scheme", ["w4w2", "wint8"])
def test_integer_schemes_are_calibrated_too(
    model: Path, text: Path, tmp_path: Path, scheme: str
) -> None:
    def stream_error(method: str) -> float:
        report = quantize_with_calibration(
            model,
            tmp_path / f"{scheme}-{method}",
            CalibrationText(str(text), 800, 256),
            CalibrationSettings(method=method, candidates=1, descents=0),
            scheme=scheme,  # type: ignore[arg-type]
            progress=False,
        )
        verify(Checkpoint.open(tmp_path / f"{scheme}-{method}"))
        error: float = report.layers[-1]["stream_error"]
        return error

    assert stream_error("hessian") < stream_error("data-free")


@pytest.mark.parametrize("dense", get_args(DenseType))
def test_linears_that_all_tokens_pass_know_their_inputs(
    model: Path, text: Path, tmp_path: Path, dense: DenseType
) -> None:
    """The first layer has no experts: all that it loses is lost by attention and dense MLP."""
    errors = []
    for method in ("data-free", "diagonal", "hessian"):
        report = quantize_with_calibration(
            model,
            tmp_path / method,
            CalibrationText(str(text), 1500, 256),
            CalibrationSettings(method=method, candidates=1, descents=0),
            scheme="wint4",
            dense=dense,
            progress=False,
        )
        verify(Checkpoint.open(tmp_path / method))
        errors.append(report.layers[0]["stream_error"])
    assert errors[2] < 0.9 * errors[1]
    assert errors[2] < 0.75 * errors[0]


def test_what_enters_the_linears_is_seen(model: Path) -> None:
    """Rows of every window: norms' outputs, and what the last matrices make of theirs."""
    checkpoint = Checkpoint.open(model)
    linears = {
        (linear.layer, linear.role): linear
        for linear in model_linears(checkpoint.config)
        if linear.expert is None
    }
    runner = LayerRunner(checkpoint, [30, 20])
    stream = runner.embed(np.random.default_rng(1).integers(10, 8000, 50).astype(np.int32))
    for layer in range(2):  # a dense one, one of experts
        seen: dict[str, list[np.ndarray]] = {}
        entered = runner.enter_mlp(
            layer, stream, {}, lambda role, x, seen=seen: seen.setdefault(role, []).append(x)
        )
        rows = {role: np.concatenate(parts) for role, parts in seen.items()}
        assert [len(part) for part in seen["qkv_proj"]] == [30, 20]
        norm = checkpoint.get(f"ernie.layers.{layer}.input_layernorm.weight").float32()
        scale = np.sqrt(np.square(stream).mean(axis=1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(rows["qkv_proj"], stream / scale * norm, atol=1e-4)
        np.testing.assert_array_equal(rows["up_gate_proj"], entered.x)
        for role, expected in (
            ("o_proj", entered.residual - stream),
            ("down_proj", entered.dense),
        ):
            weight = read_dense(checkpoint, linears[layer, role])
            np.testing.assert_allclose(rows[role] @ weight, expected, atol=1e-4)
        stream = entered.residual + entered.dense


def test_moments_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_moments, "ROWS_AT_ONCE", 50)
    monkeypatch.setattr(input_moments, "MOST_INPUTS", 16)
    moments = input_moments.InputMoments(HOST)
    rows = np.random.default_rng(2).standard_normal((130, 16)).astype(np.float32)
    for part in np.split(rows, 10):
        moments.see("o_proj", part)
    moments.see("down_proj", np.ones((4, 17), np.float32))
    expected = hessian.blend(hessian.second_moment(rows), 130)
    np.testing.assert_allclose(moments.take("o_proj"), expected, atol=1e-5)
    assert moments.take("down_proj") is None  # too wide


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    model: Path, text: Path, tmp_path: Path
) -> None:
    """SIGKILL once the first layers are done; the second run keeps them."""
    command = [
        *[sys.executable, "-m", "fastdeploy_lite.entrypoints.cli.main", "quantize", "--quiet"],
        *["--model", str(model), "--calibration", str(text), "--calibration-tokens", "900"],
        *["--scheme", "2bits", "--keep-every", "0"],
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert subprocess.run([*command, "--output", str(whole)], check=False).returncode == 0
    journal = tmp_path / "cut.unfinished"
    process = subprocess.Popen([*command, "--output", str(cut)])
    until = time.monotonic() + 300
    while not (journal / "layer-00001.json").exists():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (cut / "config.json").exists()
    assert subprocess.run([*command, "--output", str(cut)], check=False).returncode == 0
    assert weights(whole) == weights(cut)
    assert json.loads((cut / "report.json").read_text(encoding="utf-8"))["resumed_layers"] >= 2
    assert not journal.exists()


@pytest.mark.parametrize(("damaged_layer", "resumed"), [(2, 2), (1, 0)])
def test_a_damaged_layer_is_made_again(
    model: Path, text: Path, tmp_path: Path, damaged_layer: int, resumed: int,
    whole: tuple[Path, CalibratedReport], unfinished: Path,
) -> None:  # fmt: skip
    """From the last streams that are kept: those behind layer 1, unless that one is damaged."""
    shutil.copytree(unfinished, tmp_path / "cut.unfinished")
    damaged = tmp_path / "cut.unfinished" / f"layer-{damaged_layer:05d}.tensors.npz"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    report = run_quick(model, text, tmp_path / "cut")
    assert report.resumed_layers == resumed
    assert weights(whole[0]) == weights(tmp_path / "cut")


@pytest.mark.parametrize(("keep_every", "kept"), [(0.0, [1]), (3600.0, [])])
def test_streams_are_written_where_enough_work_would_be_lost(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    keep_every: float, kept: list[int],
) -> None:  # fmt: skip
    """Never behind the last of the three layers, which nothing follows; the latest alone stays."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    given = CalibrationText(str(text), 4000, 256)
    with monkeypatch.context() as patch:
        patch.setattr(convert, "CheckpointWriter", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_with_calibration(
                model, tmp_path / "out", given, QUICK, scheme="2bits", progress=False,
                keep_every=keep_every,
            )  # fmt: skip
    journal = tmp_path / "out.unfinished"
    states = sorted(journal.glob("*.state.npz"))
    assert [int(file.name.split("-")[1].split(".")[0]) for file in states] == kept
    streams = 2 * 4000 * Checkpoint.open(model).config.hidden_size * 4
    assert all(file.stat().st_size > streams for file in states)
    report = quantize_with_calibration(
        model, tmp_path / "out", given, QUICK, scheme="2bits", progress=False
    )
    assert report.resumed_layers == 3  # all that is missing is the output


def test_a_run_that_kept_no_streams_begins_anew_and_ends_with_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    whole: tuple[Path, CalibratedReport],
) -> None:  # fmt: skip
    encode = CalibratedEncoder.encode_layer

    def killed(self: CalibratedEncoder, layer: int, linears: Any) -> LayerResult:
        if layer == 2:
            raise KeyboardInterrupt
        return encode(self, layer, linears)

    with monkeypatch.context() as patch:
        patch.setattr(CalibratedEncoder, "encode_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            run_quick(model, text, tmp_path / "cut")
    report = run_quick(model, text, tmp_path / "cut")
    assert report.resumed_layers == 0
    assert weights(whole[0]) == weights(tmp_path / "cut")


def test_other_settings_than_the_unfinished_run_are_refused(
    model: Path, text: Path, tmp_path: Path, unfinished: Path
) -> None:
    shutil.copytree(unfinished, tmp_path / "cut.unfinished")
    other = dataclasses.replace(QUICK, descents=2)
    with pytest.raises(ConfigError, match="begun with descents 1, now 2: go on with the same"):
        run_quick(model, text, tmp_path / "cut", other)


def test_too_little_text_is_warned_of(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "few.txt").write_text("床前明月光", encoding="utf-8")
    given = CalibrationText(str(tmp_path / "few.txt"))
    quantize_with_calibration(model, tmp_path / "out", given, QUICK, scheme="2bits", progress=False)
    [record] = [r for r in caplog.records if "calibration" in r.getMessage()]
    assert re.search(r"\d tokens are fewer than the \d+ inputs of a linear", record.getMessage())


def test_bad_arguments_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="not empty"):
        quantize_with_calibration(model, tmp_path / "full", CalibrationText(str(text)), QUICK)
    with pytest.raises(ConfigError, match="found 1, expected at least 2"):
        quantize_with_calibration(model, tmp_path / "new", CalibrationText(str(text), 1), QUICK)
    with pytest.raises(ConfigError, match="no such file"):
        quantize_with_calibration(model, tmp_path / "new", CalibrationText("nowhere.txt"), QUICK)
    (tmp_path / "short.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
    short = CalibrationText(str(tmp_path / "short.jsonl"))
    with pytest.raises(ConfigError, match="found fewer than two tokens"):
        quantize_with_calibration(model, tmp_path / "new", short, QUICK)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("self_attn.o_proj.weight", 0x7FC0, r"self_attn\.o_proj\.weight: found nan at element"),
        ("mlp.experts.1.down_proj.weight", 0x7F80, r"experts\.1\.down_proj\.weight: found inf"),
        ("input_layernorm.weight", 0x7FC0, r"input_layernorm\.weight: found nan at element 5"),
        ("post_attention_layernorm.weight", 0x7F00, "layer 1: moments of the activations"),
        ("mlp.gate.weight", 0x7FC00000, r"mlp\.gate\.weight: found nan at element 5"),
    ],
)
def test_a_model_that_is_not_finite_is_one_line(
    text: Path, tmp_path: Path, key: str, value: int, message: str
) -> None:
    """With the tensor's name, or, where products overflow, with the layer's number."""
    config = tiny_config("bf16", experts=2)
    tensors = tiny_tensors(config)
    array, dtype = tensors[f"ernie.layers.1.{key}"]
    array = array.copy()
    array.view(np.uint16 if dtype == "BF16" else np.uint32).flat[5] = value
    changed = {**tensors, f"ernie.layers.1.{key}": (array, dtype)}
    model = write_model(tmp_path / "model", config, changed)
    with pytest.raises(CheckpointError, match=message) as caught:
        quantize_with_calibration(
            model, tmp_path / "q", CalibrationText(str(text), 300), QUICK, scheme="2bits",
            progress=False,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("scheme", ["2bits", "wint4"])
@pytest.mark.parametrize("tokens", [2, 300])
def test_an_expert_without_tokens_is_encoded(
    text: Path, tmp_path: Path, scheme: str, tokens: int
) -> None:
    """The router's bias keeps them all away from the last expert; embedding and head are tied."""
    config = tiny_config("bf16", experts=4, tied=True)
    tensors = tiny_tensors(config)
    for key, (array, dtype) in tensors.items():
        if key.endswith("e_score_correction_bias"):
            tensors[key] = np.where(np.arange(4) < 3, array, np.float32(-99)), dtype
    model = write_model(tmp_path / "model", config, tensors)
    report = quantize_with_calibration(
        model, tmp_path / "q", CalibrationText(str(text), tokens), QUICK, scheme=scheme,
        progress=False,
    )  # fmt: skip
    assert [layer["tokens"][3] for layer in report.layers[1:]] == [0, 0]
    verify(Checkpoint.open(tmp_path / "q"))
    assert np.isfinite(load_runner(tmp_path / "q", 64, "cpu").logits(list(range(20, 50)))).all()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--code", "120,0"], "--code fixes what --calibration chooses"),
        (["--tensor-parallel-size", "2"], "leave out --tensor-parallel-size"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    model: Path,
    text: Path,
    tmp_path: Path,
    option: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = ["--model", str(model), "--output", str(tmp_path / "o"), "--calibration", str(text)]
    assert cli.run(["quantize", *call, *option]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_the_default_is_what_measured_best(model: Path, text: Path, tmp_path: Path) -> None:
    """`hessian`, of the command and of the settings alike."""
    assert CalibrationSettings().method == "hessian"
    parser = argparse.ArgumentParser()
    cli_quantize.add_arguments(parser)
    options = ["--calibration", str(text), "--calibration-tokens", "300", "--scheme", "2bits"]
    where = ["--model", str(model), "--output", str(tmp_path / "q"), "--device", "cpu", "--quiet"]
    assert cli_quantize.run(parser.parse_args([*where, *options])) == 0
    written = json.loads((tmp_path / "q" / "report.json").read_text(encoding="utf-8"))
    assert written["settings"]["method"] == "hessian"
