"""What a calibrated conversion did, for programs (report.json) and for people (report.html)."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
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
_NUMBERS = re.compile(r"\[(\s[^][{}\"]*)\]")
_DIGEST = "model_and_text"
"""A setting that programs compare and nobody reads."""
_FORMATS = ("format", "million weights", "bits each", "relative squared error of weights")
_MEMORY = ("context", "card", "CPU")
_LAYERS = ("layer", "formats", "stream error", "up_gate_proj", "down_proj", "fewest tokens")
_WEIGHTS_NOTE = (
    "With calibration text weights err more than without, where inputs are small, so that products "
    "err less: compare those, below."
)
_LAYERS_NOTE = (
    "Stream error: squared distance of the residual stream behind the layer from the bf16 model's, "
    "over its square, on the calibration text. up_gate_proj and down_proj: the same of the "
    "products of the experts with their inputs, rounded to nearest and as encoded, means over "
    "experts. Fewest tokens: of the expert that the text reaches least."
)


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
    (folder / "report.json").write_text(_json(content), encoding="utf-8")
    plots = folder / "report"
    plots.mkdir(exist_ok=True)
    pages = []
    for layer in content["layers"]:
        drawing = layer_plot(layer)
        (plots / f"layer-{layer['layer']:05d}.svg").write_text(drawing, encoding="utf-8")
        pages.append(drawing)
    (folder / "report.html").write_text(page(content, pages), encoding="utf-8")


def _json(content: Mapping[str, Any]) -> str:
    """Every figure by its name, and a list of numbers on one line."""
    text = json.dumps({**content, "layers": [_named(x) for x in content["layers"]]}, indent=1)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def _named(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's figures, which the journal keeps as bare rows."""
    names = ("weights", "bits", "squared_weights", "squared_error")
    kinds = {kind: dict(zip(names, sums, strict=True)) for kind, sums in layer["kinds"].items()}
    experts = {
        name: dict(zip(("expert", "product_error", "rounded_to_nearest"), columns, strict=True))
        for name, columns in _columns(layer).items()
    }
    return {**layer, "kinds": kinds, "experts": experts}


def _columns(layer: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """By linear: numbers of experts, errors of their products as encoded and as rounded."""
    found: dict[str, list[list[float]]] = {}
    for name, *figures in layer["experts"]:
        columns = found.setdefault(name, [[], [], []])
        for column, figure in zip(columns, figures, strict=True):
            column.append(figure)
    return found


def product_errors(layers: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """By linear of the experts: relative squared errors of products, as encoded and as rounded.

    Means over all experts of `layers`, each counted once.
    """
    rows = [row for layer in layers for row in layer["experts"]]
    names = dict.fromkeys(row[0] for row in rows)
    return {
        name: (fmean(row[2] for row in rows if row[0] == name),
               fmean(row[3] for row in rows if row[0] == name))
        for name in names
    }  # fmt: skip


def stream_plot(layers: Sequence[Mapping[str, Any]]) -> str:
    """The error of the residual stream behind every layer as SVG."""
    errors = [layer["stream_error"] for layer in layers]
    panel = _panel(0, "error of the residual stream", (("", errors),), (_AFTER,), "layer")
    return _svg(_HEIGHT + 4, panel)


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
    kinds = ", ".join(layer["kinds"])
    dense = "" if panels else ", no experts"
    title = f"Layer {layer['layer']}: {kinds}{dense}, stream error {layer['stream_error']:.4f}"
    heading = f'<text x="8" y="15" font-size="13">{html.escape(title)}</text>'
    body = "".join(_panel(at * _HEIGHT + 24, *panel) for at, panel in enumerate(panels))
    return _svg(len(panels) * _HEIGHT + 24, heading + body)


def _svg(height: int, body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="11">{body}</svg>\n'
    )


def _panel(top: int, title: str, bars: Bars, colours: Sequence[str], what: str = "expert") -> str:
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
                f'height="{tall:.1f}" fill="{colour}"><title>{what} {index}: {value:.4f}'
                "</title></rect>"
            )
    parts.append(f'<text x="{_LEFT}" y="{floor + 14}">{what} 0 to {count - 1}</text>')
    return "".join(parts)


def page(content: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The whole report as one HTML file that needs nothing else."""
    formats_ = [
        (name, f"{part['weights'] / 1e6:.2f}", f"{part['bits_per_weight']:.3f}",
         f"{part['relative_error']:.5f}")
        for name, part in content["formats"].items()
    ]  # fmt: skip
    room = [(row["context"], _size(row["card"]), _size(row["cpu"])) for row in content["memory"]]
    settings = [(name, value) for name, value in _flat(content["settings"]) if name != _DIGEST]
    layers = content["layers"]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Quantisation report</title>'
        "<style>body{font:15px/1.5 sans-serif;max-width:46em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px "
        "solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}"
        "td{white-space:nowrap}td:last-child{white-space:normal}svg{max-width:100%;height:auto}"
        "</style>"
        f"<h1>Quantisation report</h1><p>{_size(content['output_bytes'])}, "
        f"{content['bits_per_weight']:.3f} bits a weight over all linears, made in "
        f"{content['seconds']:.0f} s.</p>{_tuning(content)}"
        f"<h2>Formats</h2>{_table(_FORMATS, formats_)}<p>{_WEIGHTS_NOTE}</p>"
        f"<h2>Expected memory, one sequence</h2>{_table(_MEMORY, room)}"
        f"<h2>Layers</h2><p>{_LAYERS_NOTE}</p>{stream_plot(layers)}"
        f"{_table(_LAYERS, [_layer_row(layer) for layer in layers])}{''.join(plots)}"
        f"<h2>Settings</h2>{_table((), settings)}</html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in [titles, *lines] if line)}</table>"


def _layer_row(layer: Mapping[str, Any]) -> list[Any]:
    """What `_LAYERS` names; linears that a layer has not are left empty."""
    errors = product_errors([layer])
    cells = [errors.get(name) for name in ("up_gate_proj", "down_proj")]
    return [
        layer["layer"],
        ", ".join(layer["kinds"]),
        f"{layer['stream_error']:.4f}",
        *("" if it is None else f"{it[1]:.4f} → {it[0]:.4f}" for it in cells),
        min(layer["tokens"]) if layer.get("tokens") else "",
    ]


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings inside others under the names of both."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _tuning(content: Mapping[str, Any]) -> str:
    found = content.get("tuning")
    if found is None:
        return ""
    return (
        f"<p>Scales and norms were tuned in {found['steps']:.0f} steps: on windows held back, the "
        f"next token's distribution is {found['after']:.4f} nats from the bf16 model's, "
        f"{found['before']:.4f} before.</p>"
    )
