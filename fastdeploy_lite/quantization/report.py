"""What a conversion did, for programs (report.json) and for people (report.html)."""

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
from fastdeploy_lite.quantization.report_plots import error_plot, layer_plot, stream_plot
from fastdeploy_lite.utils.files import writing

CONTEXTS = (4096, 32768)
"""Lengths for which memory is told, cut to what the model can do."""
_NUMBERS = re.compile(r"\[(\s[^][{}\"]*)\]")
_DIGEST = "model_and_text"
"""A setting that programs compare and nobody reads."""
NOT_MEASURED = dict.fromkeys(
    ("tokens", "product_error", "output_error", "stream_error"), "needs --calibration"
)
"""Keys of layers that a conversion without a text has not, for report.json."""
_FORMATS = ("format", "million weights", "bits each", "relative squared error of weights")
_MEMORY = ("context", "card", "CPU")
_LAYERS = ("layer", "formats", "stream error", "up_gate_proj", "down_proj", "fewest tokens")
_LAYERS_OF_WEIGHTS = ("layer", "formats", "up_gate_proj", "down_proj", "largest of the others")
_WEIGHTS_NOTE = (
    "With calibration text weights err more than without, where inputs are small, so that products "
    "err less: compare those, below."
)
_NO_TEXT_NOTE = (
    "No text was run through the model (--calibration), so that errors are those of weights. Not "
    "measured, and therefore not here: which experts the router chooses how often, errors of the "
    "experts' outputs, and how far the residual stream is off."
)
_LAYERS_NOTE = (
    "Stream error: squared distance of the residual stream behind the layer from the bf16 model's, "
    "over its square, on the calibration text. up_gate_proj and down_proj: the same of the "
    "products of the experts with their inputs, rounded to nearest and as encoded, means over "
    "experts. Fewest tokens: of the expert that the text reaches least."
)
_LAYERS_OF_WEIGHTS_NOTE = (
    "up_gate_proj and down_proj: squared error of the experts' weights over their square, means "
    "over experts; of 2 bits also, before the arrow, of rounding to nearest (four levels for 64 "
    "rows), estimated from two groups of 64 rows a matrix. int4 and int8 are rounded to nearest. "
    "The others: attention, dense MLP and shared experts."
)


def totals(layers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Sums over layers by format: weights, bits, bits a weight, relative squared error.

    Without a text also that of rounding to nearest.
    """
    sums: dict[str, list[float]] = {}
    for layer in layers:
        for name, part in layer["kinds"].items():
            before = sums.get(name, [0] * len(part))
            sums[name] = [a + b for a, b in zip(before, part, strict=True)]
    return {name: _total(*part) for name, part in sorted(sums.items())}


def _total(
    weights: float, bits: float, energy: float, error: float, rounding: float | None = None
) -> dict[str, float]:
    found = {
        "weights": weights,
        "bits": bits,
        "bits_per_weight": bits / weights,
        "relative_error": error / max(energy, 1e-30),
    }
    if rounding is not None:
        found["rounded_to_nearest"] = rounding / max(energy, 1e-30)
    return found


def memory(config: ModelConfig, plain_bytes: int, ranks: int = 1) -> list[dict[str, int]]:
    """Expected bytes of weights and KV cache of one sequence, by context length.

    Args:
        config: the quantised model's.
        plain_bytes: of embedding, head, norms and routers, as in the files of one rank.
        ranks: that share the model; the figures are those of each.

    A card keeps keys and values in bfloat16, a CPU in float32; both keep weights packed. Scratch
    memory of a step is not counted.
    """
    weights = plain_bytes + sum(
        formats.get(linear.kind).nbytes(linear.in_features, linear.out_features)
        for linear in model_linears(config, ranks)
    )
    heads = max(1, config.num_key_value_heads // ranks)
    values = 2 * heads * config.head_dim * config.num_hidden_layers
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
    for old in plots.glob("layer-*.svg"):  # of a model that had more layers
        old.unlink()
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
    names = ("weights", "bits", "squared_weights", "squared_error", "squared_rounding_error")
    kinds = {kind: dict(zip(names, sums, strict=False)) for kind, sums in layer["kinds"].items()}
    errors = ("product_error" if "stream_error" in layer else "weight_error", "rounded_to_nearest")
    experts = {
        name: dict(zip(("expert", *errors), columns, strict=True))
        for name, columns in _columns(layer).items()
    }
    named = {**layer, "kinds": kinds, "experts": experts}
    if "linears" in layer:
        named["linears"] = {
            name: dict(zip(errors, values, strict=True)) for name, *values in layer["linears"]
        }
    return named


def _columns(layer: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """By linear: numbers of experts, their errors as encoded and as rounded."""
    found: dict[str, list[list[float]]] = {}
    for name, *figures in layer["experts"]:
        columns = found.setdefault(name, [[], [], []])
        for column, figure in zip(columns, figures, strict=True):
            column.append(figure)
    return found


def expert_errors(layers: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """By linear of the experts: relative squared errors as encoded and as rounded.

    Of products with a text, of weights without. Means over all experts of `layers`, each counted
    once.
    """
    rows = [row for layer in layers for row in layer["experts"]]
    names = dict.fromkeys(row[0] for row in rows)
    return {
        name: (fmean(row[2] for row in rows if row[0] == name),
               fmean(row[3] for row in rows if row[0] == name))
        for name in names
    }  # fmt: skip


def page(content: Mapping[str, Any], plots: Sequence[str]) -> str:
    """The whole report as one HTML file that needs nothing else."""
    room = [(row["context"], _size(row["card"]), _size(row["cpu"])) for row in content["memory"]]
    settings = [(name, value) for name, value in _flat(content["settings"]) if name != _DIGEST]
    ranks = content["settings"].get("tensor_parallel_size", 1)
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
        f"<h2>Formats</h2>{_formats(content)}"
        f"<h2>Expected memory, one sequence{f', each of {ranks} ranks' if ranks > 1 else ''}</h2>"
        f"{_table(_MEMORY, room)}"
        f"<h2>Layers</h2>{_layers(content['layers'])}{''.join(plots)}"
        f"<h2>Settings</h2>{_table((), settings)}</html>\n"
    )


def _formats(content: Mapping[str, Any]) -> str:
    """The table of formats, and what its errors mean."""
    rows = [
        [name, f"{part['weights'] / 1e6:.2f}", f"{part['bits_per_weight']:.3f}",
         f"{part['relative_error']:.5f}"]
        for name, part in content["formats"].items()
    ]  # fmt: skip
    if "not_measured" not in content:
        return f"{_table(_FORMATS, rows)}<p>{_WEIGHTS_NOTE}</p>"
    for row, part in zip(rows, content["formats"].values(), strict=True):
        row.append(f"{part['rounded_to_nearest']:.5f}")
    return f"{_table((*_FORMATS, 'rounded to nearest'), rows)}<p>{_NO_TEXT_NOTE}</p>"


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    """The errors of all layers: what they mean, as a plot, as a table."""
    if all("stream_error" in layer for layer in layers):
        table = _table(_LAYERS, [_layer_row(layer) for layer in layers])
        return f"<p>{_LAYERS_NOTE}</p>{stream_plot(layers)}{table}"
    table = _table(_LAYERS_OF_WEIGHTS, [_weights_row(layer) for layer in layers])
    return f"<p>{_LAYERS_OF_WEIGHTS_NOTE}</p>{error_plot(layers)}{table}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in [titles, *lines] if line)}</table>"


def _layer_row(layer: Mapping[str, Any]) -> list[Any]:
    """What `_LAYERS` names; linears that a layer has not are left empty."""
    return [
        layer["layer"],
        ", ".join(layer["kinds"]),
        f"{layer['stream_error']:.4f}",
        *_expert_cells(layer),
        min(layer["tokens"]) if layer.get("tokens") else "",
    ]


def _weights_row(layer: Mapping[str, Any]) -> list[Any]:
    """What `_LAYERS_OF_WEIGHTS` names."""
    others = max((error for _, error, _ in layer["linears"]), default=None)
    return [
        layer["layer"],
        ", ".join(layer["kinds"]),
        *_expert_cells(layer),
        "" if others is None else f"{others:.5f}",
    ]


def _expert_cells(layer: Mapping[str, Any]) -> list[str]:
    """Errors of gate and up, and of down: rounded to nearest, and as encoded where that differs."""
    cells = []
    errors = expert_errors([layer])
    for name in ("up_gate_proj", "down_proj"):
        encoded, rounded = errors.get(name, (None, None))
        shown = dict.fromkeys(f"{it:.4f}" for it in (rounded, encoded) if it is not None)
        cells.append(" → ".join(shown))
    return cells


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
