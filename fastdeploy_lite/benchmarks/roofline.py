"""A roofline: how fast each measurement ran over how much work it has for a byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy_lite.benchmarks.ceilings import Ceilings
from fastdeploy_lite.benchmarks.experts import Row
from fastdeploy_lite.utils.errors import ConfigError


def figure_class() -> Any:
    """matplotlib's `Figure`.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'fastdeploy-lite[plots]'") from None
    return Figure


def draw(path: str, title: str, rows: Sequence[Row], ceilings: Ceilings) -> None:
    """Draw measurements under the two ceilings of their run.

    Args:
        path: of the picture; its ending decides the form (.png, .svg, .pdf).
        title: above it.
        rows: at least one.
        ceilings: of the run.

    Raises:
        ConfigError: matplotlib is missing, or the picture cannot be written there.
    """
    figure = figure_class()(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    work = [row.flops / row.nbytes for row in rows]
    ridge = ceilings.flops_per_second / ceilings.bytes_per_second
    span = np.geomspace(min(*work, ridge) / 2, max(*work, ridge) * 2, 200)
    roof = np.minimum(span * ceilings.bytes_per_second, ceilings.flops_per_second)
    memory, product = ceilings.bytes_per_second / 1e9, ceilings.flops_per_second / 1e12
    label = (
        f"{ceilings.memory_kind} {memory:.0f} GB/s, {ceilings.matmul_kind} {product:.3g} TFLOP/s"
    )
    axes.loglog(span, roof / 1e12, color="0.3", label=label)
    for name in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == name]
        xs = [row.flops / row.nbytes for row in own]
        ys = [row.flops / row.us / 1e6 for row in own]
        axes.loglog(xs, ys, marker="o", label=name)
        for row, x, y in zip(own, xs, ys, strict=True):
            axes.annotate(str(row.tokens), (x, y), xytext=(3, -9), textcoords="offset points")
    axes.set(title=title, xlabel="floating-point operations a byte", ylabel="TFLOP/s")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(loc="lower right")
    try:
        figure.savefig(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from None
