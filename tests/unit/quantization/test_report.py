"""The report of a conversion: figures, plots, a page without outside parts."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tiny_model import tiny_config

from fastdeploy_lite.config import ModelConfig
from fastdeploy_lite.quantization import report, report_plots

LAYERS = [
    {"layer": 0, "kinds": {"int8": [100, 800, 2.0, 0.02]}, "experts": [], "stream_error": 0.001},
    {
        "layer": 1,
        "kinds": {"int8": [100, 800, 2.0, 0.06], "ccq": [400, 900, 4.0, 0.4]},
        "experts": [
            ["up_gate_proj", 0, 0.05, 0.2],
            ["up_gate_proj", 1, 0.06, 0.3],
            ["down_proj", 0, 0.07, 0.2],
            ["down_proj", 1, 0.08, 0.25],
        ],
        "tokens": [30, 10],
        "stream_error": 0.02,
    },
]


def test_totals_add_up() -> None:
    found = report.totals(LAYERS)
    assert found["int8"]["weights"] == 200
    assert found["int8"]["relative_error"] == pytest.approx(0.02)
    assert found["ccq"]["bits_per_weight"] == pytest.approx(2.25)


def test_plots_are_drawings_with_a_bar_for_every_expert() -> None:
    drawing = ElementTree.fromstring(report_plots.layer_plot(LAYERS[1]))
    bars = [e for e in drawing.iter() if e.tag.endswith("rect")]
    assert len(bars) == 2 * 2 * 2 + 2
    heights = [float(bar.get("height", "nan")) for bar in bars]
    assert max(heights) == pytest.approx(heights[1])  # 0.3, the largest of its panel
    dense = ElementTree.fromstring(report_plots.layer_plot(LAYERS[0]))
    assert any("no experts" in (e.text or "") for e in dense.iter())


def test_memory_grows_with_context_by_the_size_of_keys_and_values() -> None:
    config = ModelConfig.from_dict(tiny_config("2bits", max_position_embeddings=8192))
    short, long = report.memory(config, 1000)
    values = 2 * 2 * 64 * 3 * (long["context"] - short["context"])
    assert (short["context"], long["context"]) == (4096, 8192)
    assert long["card"] - short["card"] == 2 * values
    assert long["cpu"] - short["cpu"] == 4 * values


def test_files_are_written_and_need_nothing_else(tmp_path: Path) -> None:
    content = {
        "layers": LAYERS,
        "formats": report.totals(LAYERS),
        "memory": [{"context": 4096, "card": 1 << 30, "cpu": 1 << 31}],
        "settings": {"calibration": "<text>.jsonl"},
        "output_bytes": 1 << 20,
        "bits_per_weight": 3.5,
        "seconds": 2.0,
    }
    report.write(tmp_path, content)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    written = json.loads(text)
    assert {**written, "layers": LAYERS} == content
    assert written["layers"][1]["experts"]["down_proj"] == {
        "expert": [0, 1],
        "product_error": [0.07, 0.08],
        "rounded_to_nearest": [0.2, 0.25],
    }
    assert written["layers"][0]["kinds"]["int8"]["squared_error"] == 0.02
    assert '"tokens": [30, 10]' in text  # a list of numbers is a line, not a line a number
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3  # the stream along all layers, and each layer
    assert "&lt;text&gt;.jsonl" in page
    assert "src=" not in page
    assert "href=" not in page
    assert (tmp_path / "report" / "layer-00001.svg").is_file()


def test_the_page_says_what_its_figures_mean() -> None:
    """It had one error, of weights, which is worse under calibration, and a digest."""
    content = {
        "layers": LAYERS,
        "formats": report.totals(LAYERS),
        "memory": [{"context": 4096, "card": 3 << 19, "cpu": 3 << 30}],
        "settings": {"quantization_config": {"a": {"b": 7}}, "model_and_text": "0123456789abcdef"},
        "output_bytes": 1 << 20,
        "bits_per_weight": 3.5,
        "seconds": 2.0,
    }
    page = report.page(content, [])
    assert "error of weights" in page
    assert "<td>1</td><td>int8, ccq</td><td>0.0200</td>" in page
    assert "<td>0.2500 → 0.0550</td><td>0.2250 → 0.0750</td><td>10</td>" in page
    assert "1.5 MiB" in page
    assert "3.00 GiB" in page
    assert "quantization_config.a.b</td><td>7" in page
    assert "0123456789abcdef" not in page


def test_products_are_told_beside_weights() -> None:
    assert report.expert_errors(LAYERS) == {
        "up_gate_proj": (pytest.approx(0.055), pytest.approx(0.25)),
        "down_proj": (pytest.approx(0.075), pytest.approx(0.225)),
    }
    assert report.expert_errors(LAYERS[:1]) == {}


def test_a_layer_without_experts_is_a_line() -> None:
    drawing = ElementTree.fromstring(report_plots.layer_plot(LAYERS[0]))
    assert float(drawing.get("height", "nan")) < 60
