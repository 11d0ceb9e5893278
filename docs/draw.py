"""Draws docs/images/*.svg: what the pages explain, and the plots of their tables.

python docs/draw.py [FOLDER]

Plots take their numbers from the tables of these pages, which the commands beside them print, and
the memory of a model from its sizes: nothing is typed in here twice.
"""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent), str(DOCS.parent / "entrypoints")]

import bench_card  # noqa: E402
from svg import BLUE, GREEN, INK, ORANGE, PALE, RED, SOFT, VIOLET, Axes, Picture  # noqa: E402

from fastdeploy_lite import formats  # noqa: E402
from fastdeploy_lite.checkpoint.linears import model_linears  # noqa: E402
from fastdeploy_lite.config import ModelConfig  # noqa: E402

CARDS = {"A100 or H100, 80 GB": 80, "H200, 141 GB": 141}


def table(page: str, first_cell: str) -> list[list[str]]:
    """The rows of the table whose heading begins with a cell; emphasis taken off."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(rf"(?m)^\| {re.escape(first_cell)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text)
    assert found is not None, f"{page} has no table {first_cell!r}"
    rows = [line.strip("|").split("|") for line in found[1].splitlines()]
    return [[cell.strip().replace("*", "").replace("`", "") for cell in row] for row in rows]


def number(cell: str) -> float:
    return float(cell.split(maxsplit=1)[0].replace(",", ""))


# -- how it works ---------------------------------------------------------------------------------


def two_processes() -> Picture:
    p = Picture(760, 330, "A request's way through the HTTP process and the engine process")
    p.box(120, 40, 270, 270, PALE[BLUE], BLUE)
    p.text(255, 62, "HTTP process: no model, no device", 13, BLUE, middle=True, bold=True)
    p.box(480, 40, 270, 270, PALE[GREEN], GREEN)
    p.text(615, 62, "engine process: one loop", 13, GREEN, middle=True, bold=True)
    down = ("checks, limits, keys", "template, tokens, constraint")
    for i, text in enumerate(down):
        p.box(140, 80 + 44 * i, 230, 32, "#ffffff", BLUE, text)
    up = ("text, stop texts", "thinking, tool calls, JSON, events")
    for i, text in enumerate(up):
        p.box(140, 262 - 44 * i, 230, 32, "#ffffff", BLUE, text)
    core = ("scheduler: who runs, KV blocks", "model: one step for all that run",
            "sampler: penalties, masks, seeds", "stop rules")  # fmt: skip
    for i, text in enumerate(core):
        p.box(500, 80 + 56 * i, 230, 32, "#ffffff", GREEN, text)
        if i:
            p.line(615, 56 + 56 * i, 615, 78 + 56 * i, arrow=True)
    p.text(10, 90, "request", 13, bold=True)
    p.line(62, 96, 138, 96, arrow=True)
    p.line(255, 112, 255, 122, arrow=True)
    p.line(370, 140, 498, 96, arrow=True)
    p.text(434, 100, "ids", 12, SOFT, middle=True)
    p.line(498, 264, 372, 278, arrow=True)
    p.text(434, 292, "new ids", 12, SOFT, middle=True)
    p.line(255, 262, 255, 252, arrow=True)
    p.line(138, 234, 62, 234, arrow=True)
    p.text(10, 228, "answer", 13, bold=True)
    p.text(434, 200, "private local", 12, SOFT, middle=True)
    p.text(434, 216, "sockets", 12, SOFT, middle=True)
    return p


def two_bit_code() -> Picture:
    p = Picture(760, 330, "One byte becomes four weights: overlapping six-bit fields of a number")
    p.text(20, 36, "one byte of the file, for four rows of a column", 13)
    p.box(330, 16, 90, 30, PALE[VIOLET], VIOLET, "w: 0 … 255")
    p.line(375, 46, 375, 76, arrow=True)
    p.text(390, 66, "floor(w · code_scale + code_zp + ½)", 12, SOFT)
    left, cell = 150, 30
    for bit in range(15):
        p.box(left + cell * bit, 80, cell, 30, PALE[ORANGE], ORANGE, str(14 - bit), 11)
    p.text(20, 100, "d, its low 15 bits", 13)
    for j, colour in enumerate((BLUE, GREEN, RED, VIOLET)):
        y = 124 + 26 * j
        p.box(left + cell * 3 * j, y, cell * 6, 20, PALE[colour], colour, f"v{j} + 32", 11)
    p.text(20, 170, "four fields of six bits;", 13)
    p.text(20, 188, "neighbours share three", 13)
    p.line(375, 232, 375, 256, arrow=True)
    p.box(150, 260, 450, 34, "#ffffff", INK, "W = v · local scale · super scale", 14)
    text = "v: -32 … 31;  local: 4 bits for 64 rows;  super: one a column"
    p.text(375, 316, text, 12, SOFT, middle=True)
    return p


# Steps of four requests: w waits, p computes a part of its prompt, d makes a token, - has ended.
_BATCH = {
    "A": "ppdddddd----",
    "B": "wpddddddddd-",
    "C": "--wppddddddd",
    "D": "----wwwwpddd",
}


def batch_in_time() -> Picture:
    p = Picture(760, 292, "Requests join and leave a batch at every step")
    colours = {"p": ORANGE, "d": BLUE, "w": SOFT}
    for row, (name, steps) in enumerate(_BATCH.items()):
        y = 44 + 44 * row
        p.text(20, y + 21, f"request {name}", 13)
        for step, what in enumerate(steps):
            x = 110 + 52 * step
            if what == "w":
                p.line(x + 4, y + 16, x + 44, y + 16, SOFT, dashed=True)
            elif what != "-":
                p.box(x, y, 48, 32, PALE[colours[what]], colours[what], "prompt" if what == "p" else
                      "token", 11)  # fmt: skip
    p.line(110, 226, 740, 226, arrow=True)
    p.text(740, 244, "steps of the model", 12, SOFT, end=True)
    notes = (
        "long prompts go in parts beside tokens of others;",
        "D waits for KV blocks until A has ended;",
        "an answer is the same alone or in company, bit for bit",
    )
    for line, text in enumerate(notes):
        p.text(110, 244 + 18 * line, text, 12, SOFT)
    p.text(20, 28, "A batch in time", 13, bold=True)
    return p


# -- plots ----------------------------------------------------------------------------------------


def bits_and_perplexity() -> Picture:
    """`quantize.md`, "What it gains"."""
    rows = table("quantize.md", "experts")
    p = Picture(760, 430, "Bits a weight against perplexity of the demo model")
    p.text(20, 24, "Perplexity of the bf16 demo model, its experts quantised", 14, bold=True)
    axes = Axes(
        p, [2.0, 2.2, 2.4, 2.6, 2.8], [30, 50, 70, 90, 110], "bits a weight of a routed expert",
        "perplexity",
    )  # fmt: skip
    for name, bits, perplexity, *_ in rows:
        y = axes.y(number(perplexity))
        if name == "bf16":
            p.line(axes.LEFT, y, axes.LEFT + axes.WIDTH, y, SOFT, dashed=True)
            p.text(axes.LEFT + axes.WIDTH, y - 6, f"bf16: {perplexity}", 12, SOFT, end=True)
            continue
        ours, x = name.startswith("2 bits"), axes.x(number(bits))
        colour = BLUE if ours else ORANGE
        p.dot(x, y, colour)
        if ours:
            p.text(x - 9, y + 4, name, 12, colour, end=True, bold=True)
        else:
            p.text(x + 9, y + 4, name, 12)
    return p


def schemes() -> dict[str, dict[str, Any]]:
    """config.json of the 300B shape in each form."""
    whole = {**bench_card.COMMON, **bench_card.SHAPES["300b"]}
    bare = {k: v for k, v in whole.items() if k != "is_quantized"}
    online = {
        name: {**bare, "is_quantized": True, "quantization_config": {"quantization": name}}
        for name in ("wint8", "wint4")
    }
    whole["quantization_config"] = bench_card.QUANTIZATION
    return {"bf16": bare, **online, "2Bits": whole}


def weight_gigabytes(config: dict[str, Any]) -> float:
    """Memory of all weights: linears in their formats, embedding and head in bf16."""
    model = ModelConfig.from_dict(config)
    total = 2 * 2 * model.vocab_size * model.hidden_size
    for linear in model_linears(model):
        total += formats.get(linear.kind).nbytes(linear.in_features, linear.out_features)
    return total / 1e9


def memory_of_300b() -> Picture:
    p = Picture(760, 300, "Memory of the weights of ERNIE-4.5-300B-A47B in four forms")
    p.text(20, 28, "Weights of ERNIE-4.5-300B-A47B, GB", 14, bold=True)
    left, scale = 90.0, 600 / 620
    for row, (name, config) in enumerate(schemes().items()):
        y, size = 60 + 46 * row, weight_gigabytes(config)
        colour = BLUE if name == "2Bits" else ORANGE
        p.box(left, y, size * scale, 30, PALE[colour], colour)
        p.text(left - 10, y + 20, name, 13, end=True)
        p.text(left + size * scale + 8, y + 20, f"{size:.1f}", 13, bold=name == "2Bits")
    for i, (name, size) in enumerate(CARDS.items()):
        x = left + size * scale
        p.line(x, 46, x, 250, GREEN, dashed=True)
        p.text(x, 266 + 18 * i, name, 12, GREEN, middle=True)
    return p


def tokens_and_concurrency() -> Picture:
    """`performance.md`, "On a CPU: the server"."""
    rows = [(number(row[0]), number(row[1])) for row in table("performance.md", "concurrency")]
    p = Picture(760, 430, "Tokens a second of the server against requests at the same time")
    p.text(20, 24, "The demo model's server on two CPU cores, clients included", 14, bold=True)
    axes = Axes(p, [1, 2, 4, 8, 16, 32, 64], [0, 400, 800, 1200], "requests at the same time",
                "generated tokens/s", log_x=True)  # fmt: skip
    points = [(axes.x(count), axes.y(rate)) for count, rate in rows]
    for start, stop in pairwise(points):
        p.line(*start, *stop, BLUE)
    for (x, y), (_, rate) in zip(points, rows, strict=True):
        p.dot(x, y, BLUE)
        p.text(x, y - 12, f"{rate:,.0f}", 13, BLUE, middle=True, bold=True)
    return p


PICTURES = {
    "two-processes": two_processes,
    "two-bit-code": two_bit_code,
    "batch-in-time": batch_in_time,
    "bits-and-perplexity": bits_and_perplexity,
    "memory-of-300b": memory_of_300b,
    "tokens-and-concurrency": tokens_and_concurrency,
}


def main(folder: Path) -> None:
    for name, draw in PICTURES.items():
        draw().save(folder / f"{name}.svg")
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "images")
