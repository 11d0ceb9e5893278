"""What a calibrated conversion did, for programs (report.json) and for people (report.html)."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdeploy_lite import formats
from fastdeploy_lite.checkpoint.linears import model_linears
from fastdeploy_lite.models.family import ModelConfig
from fastdeploy_lite.utils.files import writing

CONTEXTS = (4096, 32768)
"""Lengths for which memory is told, cut to what the model can do."""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 150, 52, 22
_BEFORE, _AFTER, _TRAFFIC = "#c9a27e", "#2f6f9f", "#6b8f71"
Bars = Sequence[tuple[str, Sequence[float]]]


def totals(layers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Sums over layers by format: weights, bits, bits a weight, relative squared error."""
    sums: dict[str, list[float]] = {}
    for layer in layers:
        for name, part in layer["kinds"].items():
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * 4), part, strict=True)]
    return {
        name: {
            "weights": weights,
            "bits": bits,
            "bits_per_weight": bits / weights,
            "relative_error": error / max(energy, 1e-30),
        }
        for name, (weights, bits, energy, error) in sorted(sums.items())
    }


def memory(config: ModelConfig, plain_bytes: int) -> list[dict[str, int]]:
    """Expected bytes of weights and KV cache of one sequence, by context length.

    Args:
        config: the quantised model's.
        plain_bytes: of embedding, head, norms and routers, as in the files.

    A card keeps keys and values in bfloat16, a CPU in float32; both keep weights packed. Scratch
    memory of a step is not counted.
    """
    weights = plain_bytes + sum(
        formats.get(linear.kind).nbytes(linear.in_features, linear.out_features)
        for linear in model_linears(config)
    )
    values = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    lengths = sorted({min(length, config.max_position_embeddings) for length in CONTEXTS})
    return [
        {
            "context": length,
            "card": weights + 2 * values * length,
            "cpu": weights + 4 * values * length,
        }
        for length in lengths
    ]


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write report.json, report.html and one plot a layer under report/ into `folder`."""
    with writing(folder / "report"):
        _write(folder, content)


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plots = folder / "report"
    plots.mkdir(exist_ok=True)
    pages = []
    for layer in content["layers"]:
        drawing = layer_plot(layer)
        (plots / f"layer-{layer['layer']:05d}.svg").write_text(drawing, encoding="utf-8")
        pages.append(drawing)
    (folder / "report.html").write_text(page(content, pages), encoding="utf-8")


def layer_plot(layer: Mapping[str, Any]) -> str:
    """One layer as SVG: errors of its experts before and after, and their share of the tokens."""
    panels: list[tuple[str, Bars, Sequence[str]]] = []
    for name in ("up_gate_proj", "down_proj"):
        found = sorted(row for row in layer["experts"] if row[0] == name)
        if found:
            bars = (("rounded to nearest", [row[3] for row in found]),
                    ("encoded", [row[2] for row in found]))  # fmt: skip
            panels.append((f"{name}: relative error of products", bars, (_BEFORE, _AFTER)))
    if layer.get("tokens"):
        count = max(1, sum(layer["tokens"]))
        share = [tokens / count for tokens in layer["tokens"]]
        panels.append(("share of routed tokens", (("tokens", share),), (_TRAFFIC,)))
    height = max(1, len(panels)) * _HEIGHT + 24
    title = f"Layer {layer['layer']}: stream error {layer['stream_error']:.4f}"
    body = (
        "".join(_panel(at * _HEIGHT + 24, *panel) for at, panel in enumerate(panels))
        or f'<text x="{_LEFT}" y="60">dense layer, {", ".join(layer["kinds"])}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="11"><text x="8" y="15" font-size="13">'
        f"{html.escape(title)}</text>{body}</svg>\n"
    )


def _panel(top: int, title: str, bars: Bars, colours: Sequence[str]) -> str:
    """Bars of one quantity for every expert, series side by side, the scale from zero."""
    largest = max((value for _, values in bars for value in values), default=0.0) or 1.0
    count = len(bars[0][1])
    step = (_WIDTH - _LEFT - 8) / max(1, count)
    room = _HEIGHT - _BOTTOM - 30
    floor = top + _HEIGHT - _BOTTOM
    parts = [f'<text x="{_LEFT}" y="{top + 14}">{html.escape(title)}</text>']
    parts.append(f'<text x="4" y="{floor - room + 4}">{largest:.3f}</text>')
    parts.append(f'<text x="4" y="{floor}">0</text>')
    width = max(0.5, step * 0.8 / len(bars))
    for series, ((name, values), colour) in enumerate(zip(bars, colours, strict=True)):
        place = _LEFT + 230 + 140 * series
        parts.append(f'<text x="{place}" y="{top + 14}" fill="{colour}">{html.escape(name)}</text>')
        for index, value in enumerate(values):
            tall = room * value / largest
            left = _LEFT + index * step + series * width
            parts.append(
                f'<rect x="{left:.1f}" y="{floor - tall:.1f}" width="{width:.1f}" '
                f'height="{tall:.1f}" fill="{colour}"><title>expert {index}: {value:.4f}'
                "</title></rect>"
            )
    parts.append(f'<text x="{_LEFT}" y="{floor + 14}">expert 0 to {count - 1}</text>')
    return "".join(parts)


def page(content: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The whole report as one HTML file that needs nothing else."""
    formats_ = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{part['weights'] / 1e6:.2f}</td>"
        f"<td>{part['bits_per_weight']:.3f}</td><td>{part['relative_error']:.5f}</td></tr>"
        for name, part in content["formats"].items()
    )
    room = "".join(
        f"<tr><td>{row['context']}</td><td>{row['card'] / 2**30:.3f}</td>"
        f"<td>{row['cpu'] / 2**30:.3f}</td></tr>"
        for row in content["memory"]
    )
    settings = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in content["settings"].items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Quantisation report</title>'
        "<style>body{font:15px/1.5 sans-serif;max-width:46em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px "
        "solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}"
        "svg{max-width:100%;height:auto}</style>"
        f"<h1>Quantisation report</h1><p>{content['output_bytes'] / 2**20:.1f} MiB, "
        f"{content['bits_per_weight']:.3f} bits a weight over all linears, made in "
        f"{content['seconds']:.0f} s.</p>{_tuning(content)}"
        "<h2>Formats</h2><table><tr><th>format</th><th>million weights</th><th>bits each</th>"
        f"<th>relative squared error</th></tr>{formats_}</table>"
        "<h2>Expected memory, one sequence</h2><table><tr><th>context</th><th>card, GiB</th>"
        f"<th>CPU, GiB</th></tr>{room}</table>"
        f"<h2>Layers</h2>{''.join(plots)}"
        f"<h2>Settings</h2><table>{settings}</table></html>\n"
    )


def _tuning(content: Mapping[str, Any]) -> str:
    found = content.get("tuning")
    if found is None:
        return ""
    return (
        f"<p>Scales and norms were tuned in {found['steps']:.0f} steps: on windows held back, the "
        f"next token's distribution is {found['after']:.4f} nats from the bf16 model's, "
        f"{found['before']:.4f} before.</p>"
    )
