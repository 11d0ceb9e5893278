"""Permuted 2-bit experts compute what natural ones do, and the order is told or asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from model_driver import make_runner
from tiny_model import Tensors, tiny_config, tiny_tensors, write_tensors, write_tiny_model

from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.checkpoint import row_order
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.config import LoadConfig, ModelConfig
from fastdeploy_lite.formats import get
from fastdeploy_lite.formats.ccq import to_true_order
from fastdeploy_lite.model_executor import order_probe
from fastdeploy_lite.model_executor.weights import UndecidedRowOrderError
from fastdeploy_lite.utils.arrays import bfloat16_to_float32

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 8192, 60)]


def dense_copy(folder: Path, config: dict, tensors: Tensors, order: str) -> Path:
    """The same model with its 2-bit experts decoded, rows in their true order, in float32."""
    dense = {k: v for k, v in config.items() if "quant" not in k}
    result = dict(tensors)
    for linear in model_linears(ModelConfig.from_dict(config)):
        format_ = get(linear.kind)
        arrays = {}
        for spec in format_.tensors(linear.in_features, linear.out_features):
            data, dtype = result.pop(f"{linear.module}.{spec.suffix}")
            arrays[spec.suffix] = bfloat16_to_float32(data) if dtype == "BF16" else data
        weight = format_.decode(arrays)
        if linear.kind == "ccq":
            weight = to_true_order(weight, order)
        result[f"{linear.module}.weight"] = (weight, "F32")
    write_tensors(folder, dense, result)
    return folder


@pytest.mark.parametrize("order", ["natural", "permuted"])
@pytest.mark.parametrize("kind", ["2bits", "w4w2"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_decoded_model(
    tmp_path: Path, kind: str, tied: bool, order: str
) -> None:
    config = tiny_config(kind, tied=tied)
    scheme = config["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"]
    scheme["row_order"] = order
    tensors = tiny_tensors(config, seed=4)
    write_tensors(tmp_path / "packed", config, tensors)
    found = make_runner(tmp_path / "packed").logits(IDS)
    wanted = make_runner(dense_copy(tmp_path / "dense", config, tensors, order)).logits(IDS)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_the_orders_differ(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    natural, permuted = (
        make_runner(folder, load=LoadConfig(row_order=order)).logits(IDS)
        for order in ("natural", "permuted")
    )
    assert np.abs(natural - permuted).max() > 0.1


def test_the_start_says_which_order_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastdeploy_lite"):
        runner = make_runner(demo_path())
    lines = [r for r in caplog.records if "2-bit rows" in r.getMessage()]
    assert [r.levelname for r in lines] == ["INFO"]
    assert "natural order, by the weights: down rows follow" in lines[0].getMessage()
    assert runner.memory_report().row_order.startswith("natural order, by the weights")


def test_a_wrong_order_that_is_forced_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastdeploy_lite"):
        wrong = make_runner(demo_path(), load=LoadConfig(row_order="permuted"))
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any("read in permuted order, but look natural" in line for line in warnings)
    assert "WARNING: 2-bit rows are read in permuted" in wrong.memory_report().row_order
    tokens = order_probe.encode(demo_path(), 8192)
    right = make_runner(demo_path())
    loss = [-order_probe.log_probabilities(r.logits(tokens), tokens).mean() for r in (right, wrong)]
    assert loss[1] - loss[0] > 1.5


def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_order, "DECISIVE", 1e9)


def test_a_text_decides_where_the_weights_do_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    undecided(monkeypatch)
    with caplog.at_level(logging.INFO, "fastdeploy_lite"):
        runner = make_runner(demo_path())
    line = next(r.getMessage() for r in caplog.records if "by reading" in r.getMessage())
    assert line.startswith("2-bit rows: natural order, by reading: a text of ")
    monkeypatch.undo()
    np.testing.assert_array_equal(runner.logits(IDS), make_runner(demo_path()).logits(IDS))


def test_noise_stops_with_the_option(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"]["row_order"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UndecidedRowOrderError, match=r"cannot be told.*--wint2-row-order"
    ) as caught:
        make_runner(folder)
    assert "a text of" in str(caught.value)
    assert "\n" not in str(caught.value)
    make_runner(folder, load=LoadConfig(row_order="natural"))


@pytest.mark.parametrize(
    ("natural", "permuted", "expected"),
    [(-2.0, -5.0, "natural"), (-5.0, -2.0, "permuted"), (-9.0, -9.2, None), (-2.0, -2.0, None)],
)
def test_a_text_is_only_believed_when_it_is_read(
    natural: float, permuted: float, expected: str | None
) -> None:
    noise = np.random.default_rng(0).standard_normal((2, 300)) * 0.5
    scores = {"natural": natural + noise[0], "permuted": permuted + noise[1]}
    assert order_probe.judge(scores, 8192)[0] == expected
