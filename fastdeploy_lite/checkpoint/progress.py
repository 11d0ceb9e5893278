"""The progress bars of loading: bytes, because tensors differ a thousandfold, and layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from fastdeploy_lite.utils.logging import ConsoleStream

if TYPE_CHECKING:
    Bar = tqdm[Any]


def loading_bar(
    total_bytes: int, enabled: bool = True, description: str = "Loading Weights"
) -> Bar:
    """Return a tqdm bar over `total_bytes`; call `update(nbytes)` and close it (or use `with`).

    Rates and sizes are shown in binary units. Where stderr is a file it refreshes every 10 s.
    """
    return tqdm(
        total=total_bytes,
        desc=description,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not enabled,
        file=ConsoleStream(),
        mininterval=_refresh_seconds(),
    )


def count_layers(count: int, enabled: bool = True) -> Iterator[int]:
    """Yield the numbers of `count` layers; a tqdm bar counts each when the next is asked for."""
    yield from tqdm(
        range(count),
        desc="Loading Layers",
        unit="layer",
        disable=not enabled,
        file=ConsoleStream(),
        mininterval=_refresh_seconds(),
    )


def _refresh_seconds() -> float:
    return 0.1 if sys.stderr.isatty() else 10.0
