"""The row order of 2-bit experts is told from trained weights, and never guessed from noise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import write_tiny_model

from fastdeploy_lite import formats
from fastdeploy_lite.assets import demo_path
from fastdeploy_lite.checkpoint import Checkpoint, row_order
from fastdeploy_lite.checkpoint.inventory import other_half, rank_linears, read_linear
from fastdeploy_lite.formats.ccq import CCQ, to_stored_order
from fastdeploy_lite.formats.ccq import RowOrder as Order
from fastdeploy_lite.quantization import ccq
from fastdeploy_lite.quantization.ccq_codes import CODES
from fastdeploy_lite.utils.errors import ConfigError

Correlations = tuple[float, float, int]


@pytest.fixture(scope="module")
def demo() -> dict[tuple[int, int], Correlations]:
    """Correlations of every 2-bit expert of the demo checkpoint by layer and expert."""
    checkpoint = Checkpoint.open(demo_path())
    return {
        (linear.layer, linear.expert): row_order.expert_correlations(
            *row_order.expert_arrays(checkpoint, linear)
        )
        for linear in row_order.first_halves(checkpoint)
    }


def test_every_layer_of_the_demo_alone_tells(demo: dict[tuple[int, int], Correlations]) -> None:
    layers = sorted({layer for layer, _ in demo})
    assert len(layers) == 6
    for layer in layers:
        evidence = row_order.weigh([value for key, value in demo.items() if key[0] == layer])
        assert evidence.order == "natural", (layer, evidence)
        assert evidence.natural > 0.1
        assert abs(evidence.permuted) < 0.03


def test_a_thousand_samples_of_the_size_that_is_used(
    demo: dict[tuple[int, int], Correlations],
) -> None:
    values, random = list(demo.values()), np.random.default_rng(1)
    for _ in range(1000):
        chosen = random.choice(len(values), row_order.ROUNDS[0], replace=False)
        assert row_order.weigh([values[i] for i in chosen]).order == "natural"


def test_the_number_of_an_expert_means_nothing(demo: dict[tuple[int, int], Correlations]) -> None:
    values = list(demo.values())
    random = np.random.default_rng(2)
    first = row_order.weigh(values)
    for _ in range(20):
        shuffled = row_order.weigh([values[i] for i in random.permutation(len(values))])
        assert shuffled.order == first.order
        assert shuffled.distance == pytest.approx(first.distance)


@pytest.mark.parametrize("order", ["natural", "permuted"])
def test_an_encoded_expert_shows_the_order_it_was_written_in(order: Order) -> None:
    checkpoint = Checkpoint.open(demo_path())
    linears = [one for one in rank_linears(checkpoint) if one.layer == 4 and one.expert in range(6)]
    found = []
    for linear in (one for one in linears if one.role == "up_gate_proj"):
        arrays = []
        for half in (linear, other_half(checkpoint, linear)):
            matrix = CCQ().decode(read_linear(checkpoint, half).arrays)
            encoded = ccq.encode(to_stored_order(matrix, order), codes=CODES[:1])
            arrays.append(
                {
                    "quant_weight": encoded.packed,
                    "weight_scale": encoded.local_scale,
                    "super_scales": encoded.super_scale,
                    "code_scale": encoded.code_scale,
                    "code_zp": encoded.code_zp,
                }
            )
        found.append(row_order.expert_correlations(*arrays))
    evidence = row_order.weigh(found)
    assert evidence.order == order
    assert str(evidence).count("0.") >= 2


def test_noise_is_never_taken_for_an_order() -> None:
    """Random experts of the demo's size, as many as are ever looked at, two hundred times."""
    random = np.random.default_rng(3)
    format_, decided = CCQ(), 0
    pool = [
        row_order.expert_correlations(
            format_.random(random, 128, 512), format_.random(random, 256, 128)
        )
        for _ in range(200)
    ]
    for _ in range(200):
        chosen = random.choice(len(pool), row_order.ROUNDS[-1], replace=False)
        decided += row_order.weigh([pool[i] for i in chosen]).order is not None
    assert decided == 0
    distances = [row_order.weigh([one]).distance for one in pool]
    assert 0.6 < np.std(distances) < 1.1  # at most what the claimed error assumes
    assert row_order.ERROR_PROBABILITY < 2e-6


def without_key(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"]["row_order"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_option_wins_then_the_key_then_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = Checkpoint.open(demo_path())
    by_weights = row_order.decide(demo)
    assert (by_weights.order, by_weights.warning) == ("natural", None)
    assert by_weights.reason.startswith("by the weights: down rows follow")
    forced = row_order.decide(demo, "permuted")
    assert (forced.order, forced.reason) == ("permuted", "as asked")
    assert forced.warning is not None
    assert "read in permuted order, but look natural" in forced.warning

    copy = Path(shutil.copytree(demo_path(), tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"]["row_order"] = (
        "permuted"
    )
    (copy / "config.json").write_text(json.dumps(config))
    lies = Checkpoint.open(copy)
    doubted = row_order.decide(lies, doubts_key=True)
    assert (doubted.order, doubted.reason) == ("permuted", "by config.json")
    assert doubted.warning is not None and "but look natural" in doubted.warning

    monkeypatch.setattr(row_order, "measure", lambda *_: pytest.fail("the key has said it"))
    written = row_order.decide(lies)
    assert (written.order, written.reason) == ("permuted", "by config.json")
    assert written.warning is row_order.decide(lies, "permuted").warning is None
    forced = row_order.decide(lies, "natural")
    assert (forced.order, forced.reason) == ("natural", "as asked")
    assert forced.warning == "2-bit rows are read in natural order, but config.json says permuted"


def test_the_study_of_detection_tells_right_from_wrong(tmp_path: Path) -> None:
    """entrypoints/study_row_detection.py on files whose key is true, and on ones where it lies."""
    script = Path(__file__).resolve().parents[3] / "entrypoints" / "study_row_detection.py"
    for order, status in (("natural", 0), ("permuted", 1)):
        copy = Path(shutil.copytree(demo_path(), tmp_path / order))
        config = json.loads((copy / "config.json").read_text())
        experts = config["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"]
        experts["row_order"] = order
        (copy / "config.json").write_text(json.dumps(config))
        command = [sys.executable, str(script), str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert "1000 samples of 16 experts: {'natural': 1000}" in done.stdout
        assert "another expert's down_proj: {'None': 1000}" in done.stdout
        assert done.stdout.count(" alone: natural; ") == 6


def test_noise_is_not_decided(tmp_path: Path) -> None:
    folder = without_key(write_tiny_model(tmp_path))
    decision = row_order.decide(Checkpoint.open(folder))
    assert decision.order is None
    assert decision.reason.startswith("the weights do not tell: down rows follow")


def test_a_model_without_2_bit_experts_has_no_order(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, kind="wint4")
    assert row_order.decide(Checkpoint.open(folder)).reason == row_order.NO_EXPERTS


def test_an_unknown_order_in_config_json_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"]["row_order"] = "up"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"row_order: found 'up', expected 'natural' or 'perm"):
        Checkpoint.open(folder)


def test_sizes_are_those_of_the_decoded_weights() -> None:
    rng = np.random.default_rng(5)
    up_gate, down = (_random_arrays(rng, k, n) for k, n in ((1536, 48), (256, 1100)))
    decode = formats.get("ccq").decode
    inner = np.square(decode(up_gate), dtype=np.float64)[256 : 256 + 1024]
    found = row_order._column_sizes(up_gate)
    np.testing.assert_allclose(found, np.sqrt(inner.mean(0)), rtol=1e-6)
    first = np.square(decode(down), dtype=np.float64)[:, :1024]
    np.testing.assert_allclose(row_order._row_sizes(down), np.sqrt(first.mean(1)), rtol=1e-6)


def _random_arrays(rng: np.random.Generator, k: int, n: int) -> dict[str, Any]:
    return {
        "quant_weight": rng.integers(0, 256, (k // 4, n), dtype=np.uint8),
        "weight_scale": rng.integers(0, 256, (k // 128, n), dtype=np.uint8),
        "super_scales": rng.uniform(0.5, 2, n).astype(np.float32),
        "code_scale": rng.uniform(90, 130, n).astype(np.float32),
        "code_zp": rng.uniform(-50, 50, n).astype(np.float32),
    }
