"""Drawings of a conversion's report: a plot a layer, and one along all layers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 150, 52, 22
_BEFORE, _AFTER, _TRAFFIC = "#c9a27e", "#2f6f9f", "#6b8f71"
Bars = Sequence[tuple[str, Sequence[float]]]


def stream_plot(layers: Sequence[Mapping[str, Any]]) -> str:
    """The error of the residual stream behind every layer as SVG."""
    errors = [layer["stream_error"] for layer in layers]
    panel = _panel(0, "error of the residual stream", (("", errors),), (_AFTER,), "layer")
    return _svg(_HEIGHT + 4, panel)


def error_plot(layers: Sequence[Mapping[str, Any]]) -> str:
    """The error of every layer's weights as SVG."""
    errors = [weight_error(layer) for layer in layers]
    panel = _panel(0, "relative error of weights", (("", errors),), (_AFTER,), "layer")
    return _svg(_HEIGHT + 4, panel)


def weight_error(layer: Mapping[str, Any]) -> float:
    """Squared error over squared weights, all formats of a layer together."""
    sums = list(layer["kinds"].values())
    return float(sum(it[3] for it in sums) / max(sum(it[2] for it in sums), 1e-30))


def layer_plot(layer: Mapping[str, Any]) -> str:
    """One layer as SVG: errors of its experts before and after, and their share of the tokens."""
    calibrated = "stream_error" in layer
    panels = _expert_panels(layer, "products" if calibrated else "weights")
    if layer.get("tokens"):
        count = max(1, sum(layer["tokens"]))
        share = [tokens / count for tokens in layer["tokens"]]
        panels.append(("share of routed tokens", (("tokens", share),), (_TRAFFIC,)))
    dense = "" if panels else ", no experts"
    error = (
        f"stream error {layer['stream_error']:.4f}"
        if calibrated
        else f"error of weights {weight_error(layer):.5f}; traffic and outputs not measured"
    )
    title = f"Layer {layer['layer']}: {', '.join(layer['kinds'])}{dense}, {error}"
    heading = f'<text x="8" y="15" font-size="13">{html.escape(title)}</text>'
    body = "".join(_panel(at * _HEIGHT + 24, *panel) for at, panel in enumerate(panels))
    return _svg(len(panels) * _HEIGHT + 24, heading + body)


def _expert_panels(layer: Mapping[str, Any], what: str) -> list[tuple[str, Bars, Sequence[str]]]:
    """Errors of the experts' `what`; one row of bars where encoding is rounding to nearest."""
    panels: list[tuple[str, Bars, Sequence[str]]] = []
    for name in ("up_gate_proj", "down_proj"):
        found = sorted(row for row in layer["experts"] if row[0] == name)
        if not found:
            continue
        bars = [("rounded to nearest", [row[3] for row in found])]
        if any(row[2] != row[3] for row in found):
            bars.append(("encoded", [row[2] for row in found]))
        colours = (_BEFORE, _AFTER)[: len(bars)]
        panels.append((f"{name}: relative error of {what}", bars, colours))
    return panels


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
